"""Pseudo-graphs: random ones, optimised against the teacher, and hardened.

`Generator` holds the static parts; weights and graphs are arguments of every function.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from jaxmethods.data import gfkd
from jaxmethods.experiments.acgkd.config import GenerationSettings
from jaxmethods.experiments.acgkd.teachers import Material, Targets
from jaxmethods.methods import acgkd
from jaxmethods.models.graph_classifier import Classifier, GraphEncoder, batch_norm_gap
from jaxmethods.trees import Key

# Up to so many node slots a dense adjacency is the faster form.
DENSE_NODES = 160
MUTAG_NODES = (10, 29)  # GFKD code
MUTAG = (gfkd.NAME, "embedded:MUTAG", "tu:MUTAG")
GENERATED = ("acgkd", "gfkd", "deepinversion")
MADE_UP = (*GENERATED, "random")
ADAM = optax.scale_by_adam()


class Sizes(NamedTuple):
  """Static sizes of the pseudo-graphs.

  Attributes:
    graphs: number of pseudo-graphs P.
    low, high: range of their nodes; `high` is the number of node slots N.
    features: number of node features F.
    classes: number of classes C.
    one_hot: whether features are one-hot.
  """

  graphs: int
  low: int
  high: int
  features: int
  classes: int
  one_hot: bool


class Generator(NamedTuple):
  """Static parts of the generation.

  Attributes:
    settings: of the generation.
    sizes: of the pseudo-graphs.
    encoder: network of the teacher.
  """

  settings: GenerationSettings
  sizes: Sizes
  encoder: GraphEncoder

  @property
  def edge_form(self) -> bool:
    """Whether only candidate edges are kept in place of a dense adjacency."""
    form = self.settings.form
    return form == "edges" or (form == "auto" and self.sizes.high > DENSE_NODES)

  @property
  def rounded(self) -> bool:
    """Whether the teacher sees rounded graphs during the generation."""
    return self.settings.algorithm == "acgkd" and self.settings.relaxation == "straight_through"


class Best(NamedTuple):
  """The iterate of the lowest objective: structure and features of the same one.

  Attributes:
    loss: () its objective.
    log_odds: (P, M).
    features: (P, N, F) logits or features.
    terms: name -> () part of the objective.
  """

  loss: Float[Array, ""]
  log_odds: Float[Array, "P M"]
  features: Float[Array, "P N F"]
  terms: dict[str, Array]


class Pseudo(NamedTuple):
  """The pseudo-graphs.

  Attributes:
    num_nodes, labels: (P,) int32.
    pairs: candidates.
    log_odds: (P, M), of the candidates.
    features: phi (P, N, F).
    moments: of Adam, for each of the two.
    best: iterate that is kept.
    targets: answers of the teacher on the final graphs.
    gap: () distance of the final graphs from the batch-norm statistics of the teacher.
  """

  num_nodes: Int[Array, " P"]
  labels: Int[Array, " P"]
  pairs: acgkd.Pairs
  log_odds: Float[Array, "P M"]
  features: Float[Array, "P N F"]
  moments: tuple[optax.OptState, optax.OptState]
  best: Best
  targets: Targets
  gap: Float[Array, ""]


def choose_sizes(settings: GenerationSettings, material: Material) -> Sizes:
  """Chooses the sizes of the pseudo-graphs from the settings and the facts taken as known."""
  data = material.data
  low, high = settings.min_nodes, settings.max_nodes
  if not low and data.source.name in MUTAG:
    low, high = MUTAG_NODES
  elif not low:
    n_node = np.asarray(data.graphs.n_node)[material.train]
    low, high = (max(2, int(np.quantile(n_node, q))) for q in (0.1, 0.9))
  if settings.xi_mode == "nodes":
    low, high = (max(2, round(settings.xi * n)) for n in (low, high))
  x = data.graphs.nodes
  one_hot = bool(((x == 0) | (x == 1)).all() and (x.sum(1) == 1).all())
  graphs = settings.pseudo_graphs or len(material.train)
  return Sizes(graphs, low, high, x.shape[1], data.num_classes, one_hot)


# --- start, generation, final graphs --------------------------------------------------------------


def start(generator: Generator, key: Key, teacher: Classifier) -> Pseudo:
  """Draws random graphs: sizes and classes uniform, edge probabilities uniform, features normal."""
  settings, sizes = generator.settings, generator.sizes
  keys = jax.random.split(key, 5)
  num_nodes = jax.random.randint(keys[0], (sizes.graphs,), sizes.low, sizes.high + 1)
  labels = jax.random.randint(keys[1], (sizes.graphs,), 0, sizes.classes)
  pairs = acgkd.draw_candidates(
    keys[2],
    num_nodes,
    sizes.high,
    xi=settings.xi if settings.xi_mode == "pairs" else 1.0,
    directed=settings.directed,
    edge_form=generator.edge_form,
  )
  probability = jax.random.uniform(keys[3], pairs.source.shape, minval=1e-6, maxval=1 - 1e-6)
  log_odds = jax.scipy.special.logit(probability)
  features = jax.random.normal(keys[4], (sizes.graphs, sizes.high, sizes.features))
  terms = {name: jnp.zeros(()) for name in acgkd.Terms._fields}
  best = Best(jnp.float32(jnp.inf), log_odds, features, terms)
  moments = ADAM.init(log_odds), ADAM.init(features)
  width = teacher.head.kernel.shape[0]
  targets = Targets(jnp.zeros((sizes.graphs, sizes.classes)), jnp.zeros((sizes.graphs, width)))
  pseudo = Pseudo(
    num_nodes, labels, pairs, log_odds, features, moments, best, targets, jnp.zeros(())
  )
  return _answered(generator, teacher, pseudo)


def generate(
  generator: Generator, teacher: Classifier, pseudo: Pseudo, first: Int[Array, ""], key: Key
) -> Pseudo:
  """Runs `gen_chunk` iterations from number `first` on."""

  def body(j: Array, pseudo: Pseudo) -> Pseudo:
    return _iterate(generator, teacher, pseudo, first + j, jax.random.fold_in(key, first + j))

  last = jax.lax.fori_loop(0, generator.settings.gen_chunk, body, pseudo)
  return _answered(generator, teacher, last)


def final(
  generator: Generator, pseudo: Pseudo
) -> tuple[Float[Array, "P M"], Float[Array, "P N F"]]:
  """Returns the graphs that are kept: edges of 0 and 1, and node features."""
  features = _soft(generator, pseudo.best.features)
  if generator.sizes.one_hot and generator.settings.hard_features:
    features = acgkd.one_hot_features(pseudo.best.features)
  return acgkd.harden(pseudo.best.log_odds), features


def assemble(
  generator: Generator,
  pseudo: Pseudo,
  weights: Float[Array, "P M"],
  features: Float[Array, "P N F"],
) -> jraph.GraphsTuple:
  """Builds a batch of pseudo-graphs with the given edges and features."""
  return acgkd.assemble(
    pseudo.pairs, weights, features, pseudo.num_nodes, directed=generator.settings.directed
  )


# --- one iteration --------------------------------------------------------------------------------


def _iterate(
  generator: Generator, teacher: Classifier, pseudo: Pseudo, i: Int[Array, ""], key: Key
) -> Pseudo:
  """Runs one iteration; the better of this iterate and the best so far is kept."""
  settings = generator.settings
  theta, phi = pseudo.log_odds, pseudo.features
  theta_moments, phi_moments = pseudo.moments
  uniform = jax.random.uniform(key, theta.shape)
  decay = 0.1 ** (i // settings.lr_decay_every).astype(jnp.float32)
  if settings.algorithm == "acgkd":
    relaxed = functools.partial(
      _relaxed_objective, generator, teacher, pseudo, uniform, _heat(settings, i)
    )
    (value, terms), (d_theta, d_phi) = jax.value_and_grad(relaxed, (0, 1), has_aux=True)(theta, phi)
  else:
    fixed = functools.partial(_objective, generator, teacher, pseudo, acgkd.harden(theta))
    (value, terms), d_phi = jax.value_and_grad(fixed, has_aux=True)(phi)
  new_phi, phi_moments = _moved(phi, d_phi, phi_moments, settings.feature_lr * decay)
  if settings.algorithm == "gfkd":
    losses = functools.partial(
      _losses_of_edges, generator, teacher, pseudo, _soft(generator, new_phi)
    )
    d_theta = acgkd.antithetic_gradient(theta, uniform, losses, settings.bn_weight)
  new_theta = theta
  if settings.algorithm != "deepinversion":
    new_theta, theta_moments = _moved(theta, d_theta, theta_moments, settings.structure_lr * decay)
  better = value < pseudo.best.loss
  best = jax.tree.map(
    lambda new, old: jnp.where(better, new, old), Best(value, theta, phi, terms), pseudo.best
  )
  return pseudo._replace(
    log_odds=new_theta, features=new_phi, moments=(theta_moments, phi_moments), best=best
  )


def _moved(
  x: Array, gradient: Array, moments: optax.OptState, rate: Array
) -> tuple[Array, optax.OptState]:
  """Takes one step of Adam."""
  updates, moments = ADAM.update(gradient, moments)
  return x - rate * updates, moments


def _heat(settings: GenerationSettings, i: Int[Array, ""]) -> Float[Array, ""]:
  """Computes the temperature of iteration i, between its two ends geometrically."""
  share = i / max(1, settings.gen_iters - 1)
  first, last = settings.concrete_temperature, settings.concrete_end
  return first * (last / first) ** share


def _relaxed_objective(
  generator: Generator,
  teacher: Classifier,
  pseudo: Pseudo,
  uniform: Float[Array, "P M"],
  heat: Float[Array, ""],
  theta: Float[Array, "P M"],
  phi: Float[Array, "P N F"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Computes the objective of ACGKD with relaxed edges, and its terms."""
  settings = generator.settings
  s = acgkd.concrete(theta, uniform, heat, settings.noise)
  if generator.rounded:
    s = acgkd.straight_through(s, jnp.round(s))
  total, terms = _objective(generator, teacher, pseudo, s, phi)
  if settings.xi_mode == "penalty":
    total += settings.xi * s.mean(where=pseudo.pairs.mask)
  return total, terms


def _objective(
  generator: Generator,
  teacher: Classifier,
  pseudo: Pseudo,
  weights: Float[Array, "P M"],
  phi: Float[Array, "P N F"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Computes the generation objective for given edges, and its terms."""
  logits, _, gap = _ask(generator, teacher, pseudo, weights, _seen(generator, phi))
  entropy = jnp.zeros(())
  if generator.sizes.one_hot:
    mask = jnp.arange(generator.sizes.high) < pseudo.num_nodes[:, None]
    entropy = acgkd.feature_entropy(phi, mask)
  terms = acgkd.Terms(acgkd.cross_entropy(logits, pseudo.labels), gap, entropy)
  total = terms.total(generator.settings.bn_weight, generator.settings.entropy_weight)
  return total, terms._replace(cross_entropy=terms.cross_entropy.mean())._asdict()


def _losses_of_edges(
  generator: Generator,
  teacher: Classifier,
  pseudo: Pseudo,
  features: Float[Array, "P N F"],
  edges: Float[Array, "P M"],
) -> tuple[Float[Array, " P"], Float[Array, ""]]:
  """Computes cross-entropy and batch-norm gap as the estimator of GFKD takes them."""
  logits, _, gap = _ask(generator, teacher, pseudo, edges, features)
  return acgkd.cross_entropy(logits, pseudo.labels), gap


# --- the teacher's answers ------------------------------------------------------------------------


def _soft(generator: Generator, phi: Float[Array, "P N F"]) -> Float[Array, "P N F"]:
  """Returns relaxed features."""
  return jax.nn.softmax(phi) if generator.sizes.one_hot else phi


def _seen(generator: Generator, phi: Float[Array, "P N F"]) -> Float[Array, "P N F"]:
  """Returns features as the teacher sees them during the generation."""
  if generator.rounded and generator.sizes.one_hot:
    return acgkd.straight_through(_soft(generator, phi), acgkd.one_hot_features(phi))
  return _soft(generator, phi)


def _ask(
  generator: Generator,
  teacher: Classifier,
  pseudo: Pseudo,
  weights: Float[Array, "P M"],
  features: Float[Array, "P N F"],
) -> tuple[Float[Array, "P C"], Float[Array, "P d"], Float[Array, ""]]:
  """Returns logits, pooled features and batch-norm gap of the teacher."""
  batch = assemble(generator, pseudo, weights, features)
  pooled, gap = batch_norm_gap(generator.encoder, teacher.variables, batch)
  return teacher.head(pooled), pooled, gap


def _answered(generator: Generator, teacher: Classifier, pseudo: Pseudo) -> Pseudo:
  """Fills in the answers of the teacher on the final graphs."""
  logits, pooled, gap = _ask(generator, teacher, pseudo, *final(generator, pseudo))
  return pseudo._replace(targets=Targets(logits, pooled), gap=gap)
