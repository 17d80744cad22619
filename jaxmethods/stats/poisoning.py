"""Poisoned training examples: known ways to find them, and how well they were found."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmethods.stats import shapes
from jaxmethods.trees import Key


class Detection(NamedTuple):
  """Poisoned = positive; 0 where nothing was removed or nothing is poisoned."""

  precision: Float[Array, ""]
  recall: Float[Array, ""]
  f1: Float[Array, ""]


def detection(removed: Bool[Array, " N"], poisoned: Bool[Array, " N"]) -> Detection:
  """How well the removed examples (N,) bool agree with the poisoned ones (N,) bool.

  >>> found = jm.stats.detection(jnp.array([True, True]), jnp.array([True, False]))
  >>> float(found.precision), float(found.recall)
  (0.5, 1.0)
  """
  shapes.check(removed=(removed, "N"), poisoned=(poisoned, "N"))
  hits = (removed & poisoned).sum()
  precision = hits / jnp.maximum(removed.sum(), 1)
  recall = hits / jnp.maximum(poisoned.sum(), 1)
  f1 = 2 * hits / jnp.maximum(removed.sum() + poisoned.sum(), 1)
  return Detection(precision, recall, f1)


def highest(
  scores: Float[Array, " N"], share: float, real: Bool[Array, " N"] | None = None
) -> Bool[Array, " N"]:
  """The `share` of examples with the highest scores.

  Args:
    scores: (N,).
    share: in 0..1, of the real ones; their number is rounded.
    real: (N,) bool, those that may be chosen; default all.

  Returns:
    (N,) bool; ties go to the first.
  """
  shapes.check(scores=(scores, "N"))
  real = jnp.ones(scores.shape, bool) if real is None else real
  rank = jnp.argsort(jnp.argsort(-jnp.where(real, scores, -jnp.inf)))
  return real & (rank < jnp.round(share * real.sum()))


def random_drop(key: Key, count: int, share: float) -> Bool[Array, " count"]:
  """A uniform share of `count` examples, (count,) bool."""
  return highest(jax.random.uniform(key, (count,)), share)


def spectral_scores(
  features: Float[Array, "N D"], real: Bool[Array, " N"] | None = None
) -> Float[Array, " N"]:
  """Squared projection on the first principal axis (Tran, Li, Madry 2018, spectral signatures).

  Args:
    features: (N, D), of examples with the same answer, or of all.
    real: (N,) bool, the examples that count; default all.

  Returns:
    (N,); 0 for the others.

  >>> jm.stats.spectral_scores(jnp.array([[0.0, 0], [0, 0], [0, 3]])).round(3).tolist()
  [1.0, 1.0, 4.0]
  """
  shapes.check(features=(features, "N D"))
  centred = _centred(features, real)
  _, axes = jnp.linalg.eigh(centred.T @ centred)
  return (centred @ axes[:, -1]) ** 2


def smaller_cluster(
  features: Float[Array, "N D"],
  real: Bool[Array, " N"] | None = None,
  *,
  components: int = 10,
  most: float = 0.35,
  iterations: int = 50,
) -> Bool[Array, " N"]:
  """The smaller of two clusters, if it is small (Chen et al. 2018, activation clustering).

  Projected on the first principal axes (ICA there), then k-means from the two sides of the first axis.

  Args:
    features: (N, D), of examples with the same answer, or of all.
    real: (N,) bool, the examples that count; default all.
    components: principal axes.
    most: a cluster with a larger share of the examples is taken for natural.
    iterations: of k-means.

  Returns:
    (N,) bool.
  """
  shapes.check(features=(features, "N D"))
  real = jnp.ones(len(features), bool) if real is None else real
  centred = _centred(features, real)
  _, axes = jnp.linalg.eigh(centred.T @ centred)
  x = centred @ axes[:, ::-1][:, :components]

  def centre(members: jax.Array) -> jax.Array:
    return (x * members[:, None]).sum(0) / jnp.maximum(members.sum(), 1)

  def assign(second: jax.Array, _) -> tuple[jax.Array, None]:
    centres = jnp.stack([centre(real & ~second), centre(real & second)])
    distance = ((x[:, None] - centres) ** 2).sum(-1)
    return distance[:, 1] < distance[:, 0], None

  second, _ = jax.lax.scan(assign, x[:, 0] > 0, None, iterations)
  second &= real
  smaller = jnp.where(second.sum() <= real.sum() / 2, second, real & ~second)
  return smaller & (smaller.sum() < most * real.sum())


def _centred(features: jax.Array, real: jax.Array | None) -> jax.Array:
  """Features minus their mean; zeros where there is none."""
  real = jnp.ones(len(features), bool) if real is None else real
  weight = real.astype(features.dtype)[:, None]
  return (features - (features * weight).sum(0) / jnp.maximum(weight.sum(), 1)) * weight
