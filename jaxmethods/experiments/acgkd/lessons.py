"""Lessons of an epoch: mini-batches of graphs with the answers of the teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmethods.experiments.acgkd import config, generator
from jaxmethods.experiments.acgkd.generator import Generator, Pseudo
from jaxmethods.experiments.acgkd.teachers import Targets
from jaxmethods.methods import acgkd
from jaxmethods.trees import Key


class Lesson(NamedTuple):
  """One mini-batch of distillation; `mask` (B,) marks the graphs that count."""

  batch: jraph.GraphsTuple
  targets: Targets
  mask: Bool[Array, " B"]


class Course(NamedTuple):
  """The lessons of one epoch.

  Attributes:
    lesson: i -> mini-batch i.
    num_lessons: number of mini-batches.
    seen: () number of graphs.
  """

  lesson: Callable[[Array], Lesson]
  num_lessons: Array | int
  seen: Int[Array, ""]


class Curriculum(NamedTuple):
  """Static parts of the curriculum.

  Attributes:
    by: measure of complexity.
    start: share of the graphs in the first epoch.
    grow_epochs: epochs until all are seen.
    batch_size: B.
  """

  by: config.Curriculum
  start: float
  grow_epochs: float
  batch_size: int


# --- pseudo-graphs --------------------------------------------------------------------------------


class Deck(NamedTuple):
  """Final pseudo-graphs in the order of an epoch.

  Attributes:
    pseudo: the pseudo-graphs.
    edges: (P, M), 0 or 1.
    features: (P, N, F).
    drawn: (P or more,) int, those of the epoch first, in random order.
    available: () number of graphs of the epoch.
  """

  pseudo: Pseudo
  edges: Float[Array, "P M"]
  features: Float[Array, "P N F"]
  drawn: Int[Array, " D"]
  available: Int[Array, ""]


def of_pseudo_graphs(
  made: Generator, curriculum: Curriculum, pseudo: Pseudo, epoch: Int[Array, ""], key: Key
) -> Course:
  """Shuffles the pseudo-graphs that the curriculum allows in an epoch.

  Args:
    made: static parts of the generation.
    curriculum: static parts of the curriculum.
    pseudo: the pseudo-graphs.
    epoch: () int, from 0.
    key: of the shuffle.
  """
  graphs, batch_size = made.sizes.graphs, curriculum.batch_size
  edges, features = generator.final(made, pseudo)
  place = jnp.arange(graphs)
  order, available = place, jnp.int32(graphs)
  if curriculum.by != "off":
    complexity = acgkd.edge_complexity(edges, pseudo.pairs.mask)
    if curriculum.by == "teacher_loss":
      complexity = acgkd.cross_entropy(pseudo.targets.logits, pseudo.labels)
    order = acgkd.easy_to_hard(complexity)
    available = acgkd.curriculum_size(epoch, graphs, curriculum.start, curriculum.grow_epochs)
  shuffle = jnp.where(place < available, jax.random.uniform(key, place.shape), 2.0)
  drawn = jnp.pad(order[jnp.argsort(shuffle)], (0, -graphs % batch_size))
  deck = Deck(pseudo, edges, features, drawn, available)
  lesson = functools.partial(_pseudo_lesson, made, batch_size, deck)
  return Course(lesson, -(-available // batch_size), available)


def _pseudo_lesson(made: Generator, batch_size: int, deck: Deck, i: Int[Array, ""]) -> Lesson:
  """Takes mini-batch i off the deck."""
  at = i * batch_size + jnp.arange(batch_size)
  ids, mask = deck.drawn[at], at < deck.available
  chosen = deck.pseudo._replace(
    num_nodes=jnp.where(mask, deck.pseudo.num_nodes[ids], 0),
    pairs=jax.tree.map(lambda x: x[ids], deck.pseudo.pairs),
  )
  targets = jax.tree.map(lambda x: x[ids], deck.pseudo.targets)
  batch = generator.assemble(made, chosen, deck.edges[ids], deck.features[ids])
  return Lesson(batch, targets, mask)


# --- given graphs ---------------------------------------------------------------------------------


def of_given_graphs(batches: jraph.GraphsTuple, targets: Targets, key: Key) -> Course:
  """Shuffles batches of graphs that are given.

  Args:
    batches: stacked batches.
    targets: answers of the teacher, stacked alike.
    key: of the shuffle.
  """
  count = batches.n_node.shape[0]
  order = jax.random.permutation(key, count)
  lesson = functools.partial(_given_lesson, batches, targets, order)
  return Course(lesson, count, batches.globals["mask"].sum())


def _given_lesson(
  batches: jraph.GraphsTuple, targets: Targets, order: Int[Array, " S"], i: Int[Array, ""]
) -> Lesson:
  """Takes the batch that comes i-th."""
  batch, answers = jax.tree.map(lambda x: x[order[i]], (batches, targets))
  return Lesson(batch, answers, batch.globals["mask"])
