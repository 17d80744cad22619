"""Metrics of distributions of motions, by the embeddings z of a trained and frozen evaluator.

Numbers of different evaluators cannot be compared. That holds for the published ones too: the paper of
InterGen has MM-Dist near 5.1, users of the released evaluator get 3.8 (real data: FID .295, R@1 .425). A
row of the real test data stands beside every table.

Embeddings have no unit, and neither have these metrics. Covariances want float64: run under
`jax.enable_x64`, or expect FID to be good to about 1e-4 of its largest term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmethods.methods.human_interaction.rotations import length
from jaxmethods.stats import shapes
from jaxmethods.trees import Key, PyTree


def fid(real: Float[Array, "n d"], made: Float[Array, "m d"]) -> Float[Array, ""]:
  """|mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^{1/2}), covariances with n - 1.

  The trace of the root is the sum of the roots of the eigenvalues of S_r^{1/2} S_g S_r^{1/2}, negative
  ones clipped. Biased with fewer samples than dimensions. InterGen embeds 6 z: 36 times as much.

  Args:
    real: embeddings of real motions, at least 2.
    made: of generated ones, at least 2.

  Raises:
    ValueError: with fewer than two samples.
  """
  shapes.check(real=(real, "n d"), made=(made, "m d"))
  if min(len(real), len(made)) < 2:
    raise ValueError(f"fid: needs 2 samples of each, got {len(real)} real and {len(made)} made")
  between = jnp.square(real.mean(0) - made.mean(0)).sum()
  s_real, s_made = _covariance(real), _covariance(made)
  values, vectors = jnp.linalg.eigh(s_real)
  root = (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T
  cross = jnp.linalg.eigvalsh(root @ s_made @ root)
  return between + jnp.trace(s_real + s_made) - 2 * jnp.sqrt(jnp.maximum(cross, 0)).sum()


def _covariance(x: Array) -> Array:
  centred = x - x.mean(0)
  return jnp.matmul(centred.T, centred, precision="highest") / (len(x) - 1)


def distance_matrix(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
  """|a_i - b_j|."""
  return length(a[:, None] - b[None])


class Retrieval(NamedTuple):
  """R-precision@1 .. k, (k,), and the mean distance of a text to its own motion, ()."""

  precision: Array
  distance: Array


def retrieval(
  text: Float[Array, "n d"], motion: Float[Array, "n d"], pool: int | None = None, top: int = 3
) -> Retrieval:
  """R-precision and MM-Dist in pools (code).

  In its pool text i is a hit at k if its motion is among the k nearest; equal distances rank by place.

  Args:
    text: embeddings of texts (or of labels).
    motion: embeddings of their motions, in the same order: shuffle before.
    pool: size of a pool (32 HumanML3D, 96 InterHuman); None: n. What fills no pool is left out.
    top: k.

  Raises:
    ValueError: if `pool` exceeds n.
  """
  shapes.check(text=(text, "n d"), motion=(motion, "n d"))
  pool = len(text) if pool is None else pool
  if not 1 <= pool <= len(text):
    raise ValueError(f"pool: must be in [1, {len(text)}], got {pool}")
  pools = lambda x: x[: len(x) // pool * pool].reshape(-1, pool, x.shape[1])

  def one(pair: tuple[Array, Array]) -> Retrieval:
    apart = distance_matrix(*pair)
    own = jnp.diagonal(apart)[:, None]
    earlier = jnp.arange(pool) < jnp.arange(pool)[:, None]
    rank = ((apart < own) | ((apart == own) & earlier)).sum(1)
    return Retrieval((rank[:, None] < jnp.arange(1, top + 1)).mean(0), own.mean())

  return jax.tree.map(lambda x: x.mean(0), jax.lax.map(one, (pools(text), pools(motion))))


def drawn_pairs(
  key: Key, size: int, count: int
) -> tuple[Int[Array, " count"], Int[Array, " count"]]:
  """Two independent choices of `count` of `size` places, each without repetition.

  Raises:
    ValueError: if `count` exceeds `size`.
  """
  if not 1 <= count <= size:
    raise ValueError(f"count: must be in [1, {size}], got {count}")
  one = lambda key: jax.random.permutation(key, size)[:count]
  first, second = jax.random.split(key)
  return one(first), one(second)


def diversity(
  z: Float[Array, "n d"], first: Int[Array, " p"], second: Int[Array, " p"]
) -> Float[Array, ""]:
  """Mean |z_i - z_j| over pairs, published with 300. InterGen takes 6 z and halves the result.

  Args:
    z: embeddings.
    first: places i, see `drawn_pairs`.
    second: places j.
  """
  shapes.check(z=(z, "n d"), first=(first, "p"), second=(second, "p"))
  return length(z[first] - z[second]).mean()


def multimodality(
  z: Float[Array, "C R d"], first: Int[Array, " p"], second: Int[Array, " p"]
) -> Float[Array, ""]:
  """Mean distance of pairs of samples of one condition, the same pairs for all conditions.

  Args:
    z: embeddings of R samples (published: 30) of C conditions (100).
    first: places among the R, see `drawn_pairs` (10).
    second: likewise.
  """
  shapes.check(z=(z, "C R d"), first=(first, "p"), second=(second, "p"))
  return length(z[:, first] - z[:, second]).mean()


def apd(samples: Float[Array, "K T D"]) -> Float[Array, ""]:
  """Average pairwise distance of K samples of one condition, mean over frames; unit of the samples.

  Raises:
    ValueError: with one sample.
  """
  shapes.check(samples=(samples, "K T D"))
  count = len(samples)
  if count < 2:
    raise ValueError("apd: needs 2 samples")
  apart = length(samples[:, None] - samples[None])
  return apart.sum((0, 1)).mean() / (count * (count - 1))


def action_accuracy(
  logits: Float[Array, "n K"], labels: Int[Array, " n"], counted: Array | None = None
) -> Float[Array, ""]:
  """Share of clips that an evaluator gives the label they were made for, in [0, 1]."""
  shapes.check(logits=(logits, "n K"), labels=(labels, "n"))
  hit = (logits.argmax(1) == labels).astype(logits.dtype)
  weight = jnp.ones_like(hit) if counted is None else counted.astype(hit.dtype)
  return (weight * hit).sum() / jnp.maximum(weight.sum(), 1)


def nearest_distance(made: Float[Array, "n d"], train: Float[Array, "m d"]) -> Float[Array, " n"]:
  """Distance of every generated motion to the nearest of training: 0 means a copy."""
  return jax.lax.map(lambda x: length(x - train).min(), made)


class Interval(NamedTuple):
  """Mean over replications, and half the width of its 95 % interval: 1.96 std / sqrt(times)."""

  mean: PyTree
  half_width: PyTree


def interval(values: PyTree) -> Interval:
  """Sums up replications along the leading axis; the deviation divides by their number (code)."""
  times = len(jax.tree.leaves(values)[0])
  half = lambda x: 1.96 * jnp.std(x, axis=0) / jnp.sqrt(times)
  return Interval(jax.tree.map(lambda x: x.mean(0), values), jax.tree.map(half, values))


def replicated(metric: Callable[[Key], PyTree], key: Key, times: int = 20) -> Interval:
  """Repeats a metric that draws, one replication after the other.

  Args:
    metric: from a key to a tree of arrays.
    key: of all draws.
    times: of replications, published with 20.
  """
  if times < 1:
    raise ValueError(f"times: must be at least 1, got {times}")
  return interval(jax.lax.map(metric, jax.random.split(key, times)))
