"""How AdaLoRA spends its budget: penalty, scores, and the pruning of triplets (arXiv 2303.10512).

A triplet is a row of Q ("a"), a row of P^T ("b") and one entry of "lam". With the factors that
`low_rank.adalora` makes:

    loss += 0.5 * orthogonality(tree)
    scores = update_scores(scores, tree, gradients)               # every step
    tree = prune(tree, scores, budget(step, ...))                 # after the optimiser's update
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmethods.adapters.adapter import Tree, layers_of
from jaxmethods.trees import flatten, unflatten


class Scores(NamedTuple):
  """Running statistics of |w dL/dw|, trees like the adapter.

  Attributes:
    importance: smoothed value.
    uncertainty: smoothed distance of the value from its smoothed self.
  """

  importance: Tree
  uncertainty: Tree


def orthogonality(tree: Tree) -> jax.Array:
  """Sum over layers of ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2, to be weighted by gamma."""

  def distance(rows: jax.Array) -> jax.Array:
    gram = jnp.einsum("...ri,...si->...rs", rows, rows)
    return jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)) ** 2)

  return sum(
    (distance(f["a"]) + distance(f["b"]) for f in layers_of(tree).values()), start=jnp.zeros(())
  )


def zero_scores(tree: Tree) -> Scores:
  """The statistics before the first step."""
  zeros = jax.tree.map(jnp.zeros_like, tree)
  return Scores(zeros, jax.tree.map(jnp.copy, zeros))


def update_scores(
  scores: Scores, tree: Tree, gradients: Tree, beta1: float = 0.85, beta2: float = 0.85
) -> Scores:
  """Exponential means of the sensitivity |w dL/dw| and of its uncertainty."""
  sensitivity = jax.tree.map(lambda w, g: jnp.abs(w * g), tree, gradients)
  importance = jax.tree.map(
    lambda old, new: beta1 * old + (1 - beta1) * new, scores.importance, sensitivity
  )
  uncertainty = jax.tree.map(
    lambda old, new, mean: beta2 * old + (1 - beta2) * jnp.abs(new - mean),
    scores.uncertainty,
    sensitivity,
    importance,
  )
  return Scores(importance, uncertainty)


def triplet_scores(scores: Scores) -> dict[str, jax.Array]:
  """Score of every triplet, (..., rank) by layer: that of lam plus the means over its two vectors."""
  product = layers_of(jax.tree.map(jnp.multiply, scores.importance, scores.uncertainty))
  return {
    path: f["lam"] + f["a"].mean(axis=-1) + f["b"].mean(axis=-1) for path, f in product.items()
  }


def budget(step: jax.Array, initial: int, final: int, warmup: int, until: int) -> jax.Array:
  """Triplets left: `initial`, from step `warmup` on falling as a cubic to `final` at step `until`."""
  rest = 1.0 - jnp.clip((step - warmup) / (until - warmup), 0.0, 1.0)
  return jnp.round(final + (initial - final) * rest**3).astype(jnp.int32)


def prune(tree: Tree, scores: Scores, left: jax.Array) -> Tree:
  """Sets lam to zero for all but the `left` triplets with the highest scores in the whole model.

  Ties go to the earlier triplet. A pruned triplet can come back: its vectors stay.
  """
  ranked = triplet_scores(scores)
  flat = flatten(tree)
  values = jnp.concatenate([value.ravel() for value in ranked.values()])
  place = jnp.argsort(jnp.argsort(-values, stable=True))
  start = 0
  for path, value in ranked.items():
    keep = (place[start : start + value.size] < left).reshape(value.shape)
    flat[f"{path}/lam"] = jnp.where(keep, flat[f"{path}/lam"], 0)
    start += value.size
  return unflatten(flat)
