"""BYE: poisoned examples found by the collapse of a model's attention, and removed.

X. Rong et al., "Backdoor Cleaning without External Guidance in MLLM Fine-tuning", NeurIPS 2025, arXiv
2505.16916. Symbols: N examples, L layers, H heads, T image tokens. A poisoned image makes the first
answer token look at little but the trigger, so in some layers the entropy of its attention over
image tokens falls into two groups. Those layers are kept, their entropies averaged, and the lower
of two groups is removed.

(paper), (code) and (inferred) say where a choice comes from.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.stats import mixtures, shapes
from jaxmethods.stats.mixtures import Mixture
from jaxmethods.trees import Key

FIXED_THRESHOLD = 0.708  # of ln T: 4.5 nats for the published 576 tokens (scaling inferred)

NULLS = ("normal", "uniform", "levels")  # shapes of clean entropies, see `null_separation`

Index = Literal["paper", "code"]


# --- attention ----------------------------------------------------------------------------------


def image_entropy(
  rows: Float[Array, "*batch H S"], start: int, count: int, *, eps: float = 1e-8
) -> Float[Array, "*batch"]:
  """Entropy of the head-averaged attention over image tokens, in nats (eq. 4 and 5).

  Renormalised over these tokens (code): how much attention the image gets as a whole does not enter.

  Args:
    rows: (..., H, S), attention probabilities of one query.
    start: first image token among the S keys.
    count: T.
    eps: inside the logarithm (code); 0 for the exact entropy.

  Returns:
    (...), in 0..ln T; NaN where no attention goes to the image at all.

  Raises:
    ValueError: fewer axes than two, or image tokens outside the keys.
  """
  return entropy(head_mean(rows, start, count), eps=eps)


def head_mean(rows: Float[Array, "*batch H S"], start: int, count: int) -> Float[Array, "*batch T"]:
  """Averages attention over heads and cuts out the image tokens (eq. 4).

  Args:
    rows: (..., H, S), attention probabilities of one query.
    start: first image token among the S keys.
    count: T.

  Returns:
    (..., T), in float32 at least.

  Raises:
    ValueError: fewer axes than two, or image tokens outside the keys.
  """
  shapes.check(rows=(rows, "... H S"))
  if not 0 <= start <= start + count <= rows.shape[-1]:
    raise ValueError(
      f"image tokens {start} to {start + count} are outside of {rows.shape[-1]} keys"
    )
  # A half-precision model's rows are summed in float32.
  rows = rows[..., start : start + count]
  return rows.astype(jnp.promote_types(rows.dtype, jnp.float32)).mean(-2)


def entropy(
  attention: Float[Array, "*batch T"], *, eps: float = 1e-8, renormalise: bool = True
) -> Float[Array, "*batch"]:
  """Takes -sum p log(p + eps) over the last axis, in nats (eq. 5).

  Args:
    attention: (..., T), probabilities.
    eps: inside the logarithm (code); 0 for the exact entropy.
    renormalise: whether to divide by the sum first (code); False is the literal reading (paper).

  Raises:
    ValueError: a scalar.
  """
  shapes.check(attention=(attention, "... T"))
  if renormalise:
    attention = attention / attention.sum(-1, keepdims=True)
  if eps:
    return -(attention * jnp.log(attention + eps)).sum(-1)
  return jax.scipy.special.entr(attention).sum(-1)


def fill_missing(
  entropies: Float[Array, "N L"],
) -> tuple[Float[Array, "N L"], Int[Array, ""]]:
  """Replaces NaN by the mean of the layer (code).

  Args:
    entropies: (N, L).

  Returns:
    (filled (N, L), number of values that were missing). A layer without any value becomes 0, so
    that it is never kept.

  Raises:
    ValueError: another number of axes.
  """
  shapes.check(entropies=(entropies, "N L"))
  missing = jnp.isnan(entropies)
  layer = jnp.where(missing.all(0), 0, jnp.nanmean(jnp.where(missing.all(0), 0, entropies), 0))
  return jnp.where(missing, layer, entropies), missing.sum()


# --- layers -------------------------------------------------------------------------------------


class Profile(NamedTuple):
  """The fit of every layer, and which layers are used.

  Attributes:
    mixture: two groups of every layer, fields (L, 2).
    separation: (L,), bimodal separation index.
    kept: (L,) bool, the layers that are used.
    divergence: (L,), KL(lower || upper), for pictures only (code).
    reversed: (L,) bool: kept, but the rarer group is the upper one. Poison is rare, so the low group of
      such a layer is suspect; the method takes it all the same, a run should say so (ours).
  """

  mixture: Mixture
  separation: Float[Array, " L"]
  kept: Bool[Array, " L"]
  divergence: Float[Array, " L"]
  reversed: Bool[Array, " L"]


def profile(
  entropies: Float[Array, "N L"],
  *,
  tau: float = 2.0,
  index: Index = "code",
  min_weight: float = 0.0,
  null: float | Float[Array, ""] = 0.0,
) -> Profile:
  """Fits two groups to every layer and keeps the layers where they are apart (eq. 6 and 7).

  Args:
    entropies: (N, L), finite.
    tau: least separation; the published sweep of 0 to 3 has its best at 2, most likely in the unit
      of the code.
    index: see `separation_index`.
    min_weight: least share of either group; 0 as published. A converged fit of a layer with one
      group can lock on to a handful of outliers, which 0.005 excludes (ours).
    null: separation that entropies without poison reach, see `null_separation`; a layer is kept only
      above it. 0: no such check, as published.

  Returns:
    See `Profile`.

  Raises:
    ValueError: another number of axes, or another index.
  """
  shapes.check(entropies=(entropies, "N L"))
  # One layer after the other: each ends when it has converged, and stays in the cache meanwhile.
  mixture = jax.lax.map(mixtures.fit, entropies.T)
  separation = separation_index(mixture, index)
  kept = separation >= tau if index == "paper" else separation > tau
  kept &= (mixture.weight.min(-1) >= min_weight) & (separation > null)
  rarer_above = mixture.weight[..., 1] < mixture.weight[..., 0]
  return Profile(mixture, separation, kept, divergence(mixture), kept & rarer_above)


def null_separation(
  key: Key, count: int, draws: int, index: Index = "code"
) -> Float[Array, "nulls draws"]:
  """Draws separations of entropies without any poison (ours).

  A separation does not depend on unit and origin, so three shapes of clean entropies stand for all:
  one normal group, uniform values, and six equal groups like those of a count from 1 to 6.

  Args:
    key: random key.
    count: examples of a draw: as many as the data have, for fewer separate better by chance.
    draws: of each shape.
    index: see `separation_index`.

  Returns:
    (3, draws), rows in the order of `NULLS`.

  Raises:
    ValueError: fewer than four examples, or another index.
  """
  if count < 4:
    raise ValueError(f"{count} examples are too few for two groups; at least 4 are needed")
  normal_key, uniform_key, level_key, noise_key = jax.random.split(key, 4)
  shape = (draws, count)
  levels = jax.random.randint(level_key, shape, 0, 6) + 0.5 * jax.random.normal(noise_key, shape)
  drawn = (jax.random.normal(normal_key, shape), jax.random.uniform(uniform_key, shape), levels)
  mixture = jax.lax.map(mixtures.fit, jnp.concatenate(drawn))
  return separation_index(mixture, index).reshape(len(NULLS), draws)


def separation_index(mixture: Mixture, index: Index = "code") -> Float[Array, "*batch"]:
  """Measures how far two groups are apart: mixtures with fields (..., 2) to (...).

  "code": |m1 - m2| / (s1 + s2), of the released code; "paper": |m1 - m2| / sqrt(s1^2 + s2^2), eq. 6,
  its root inferred, which is larger, by sqrt(2) where s1 = s2.

  Raises:
    ValueError: another index, or another number of groups.
  """
  shapes.check(mean=(mixture.mean, "... 2"), std=(mixture.std, "... 2"))
  gap = jnp.abs(mixture.mean[..., 1] - mixture.mean[..., 0])
  if index == "paper":
    return gap / jnp.sqrt((mixture.std**2).sum(-1))
  if index == "code":
    return gap / mixture.std.sum(-1)
  raise ValueError(f"index: must be 'paper' or 'code', got {index!r}")


def divergence(mixture: Mixture) -> Float[Array, "*batch"]:
  """Takes KL(lower || upper) of the two Gaussians, in nats: mixtures with fields (..., 2) to (...).

  Raises:
    ValueError: another number of groups.
  """
  shapes.check(mean=(mixture.mean, "... 2"), std=(mixture.std, "... 2"))
  (low, high), (s_low, s_high) = (jnp.moveaxis(x, -1, 0) for x in (mixture.mean, mixture.std))
  return jnp.log(s_high / s_low) + (s_low**2 + (low - high) ** 2) / (2 * s_high**2) - 0.5


# --- examples -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
  """The examples that are removed.

  Attributes:
    removed: (N,) bool.
    score: (N,), mean entropy over the layers that are used; 0 if there are none.
    low: (N,), posterior of the lower group.
    found: () bool: some layer is used. If not, nothing is removed.
    guarded: () int, examples that only the guard saved.
  """

  removed: Bool[Array, " N"]
  score: Float[Array, " N"]
  low: Float[Array, " N"]
  found: Bool[Array, ""]
  guarded: Int[Array, ""]


def mean_entropy(entropies: Float[Array, "N L"], layers: Bool[Array, " L"]) -> Float[Array, " N"]:
  """Averages entropies over the layers that are used, without weights (eq. 8).

  Args:
    entropies: (N, L).
    layers: (L,) bool.

  Returns:
    (N,); 0 without any layer.

  Raises:
    ValueError: other shapes.
  """
  shapes.check(entropies=(entropies, "N L"), layers=(layers, "L"))
  return (entropies * layers).sum(1) / jnp.maximum(layers.sum(), 1)


def clean(
  entropies: Float[Array, "N L"],
  layers: Bool[Array, " L"],
  *,
  split: Literal["gmm", "kmeans"] = "gmm",
  guard: bool = True,
) -> Verdict:
  """Removes the lower of two groups of scores.

  Args:
    entropies: (N, L), finite.
    layers: (L,) bool, `Profile.kept`; all of them is the ablation without the separation index.
    split: "gmm": the more probable group of a mixture; "kmeans" (ablation): the best split in two.
    guard: whether a score above the mean of the upper group is always kept: under a wide lower
      group it may belong there by its posterior (ours).

  Raises:
    ValueError: other shapes, another split, or fewer than four examples.
  """
  shapes.check(entropies=(entropies, "N L"), layers=(layers, "L"))
  if len(entropies) < 4:
    raise ValueError(f"{len(entropies)} examples are too few for two groups; at least 4 are needed")
  score = mean_entropy(entropies, layers)
  if split == "kmeans":
    low = 1.0 - mixtures.two_means(score)
    removed, guarded = low > 0, jnp.int32(0)
  elif split == "gmm":
    mixture = mixtures.fit(score)
    low = 1 - mixtures.upper_posterior(score, mixture)
    removed, above = low > 0.5, score > mixture.mean[1]
    guarded = (removed & above).sum() * guard
    removed &= ~(above & guard)
  else:
    raise ValueError(f"split: must be 'gmm' or 'kmeans', got {split!r}")
  # Without two distinct scores there are no two groups.
  found = layers.any()
  apart = found & (score.max() > score.min())
  return Verdict(removed & apart, score, low, found, jnp.where(apart, guarded, 0))


def below_threshold(
  entropies: Float[Array, "N L"],
  layers: Bool[Array, " L"],
  count: int,
  *,
  threshold: float | None = None,
) -> Bool[Array, " N"]:
  """Removes examples with a mean entropy under a fixed threshold (the ablation without mixtures).

  Args:
    entropies: (N, L).
    layers: (L,) bool.
    count: T.
    threshold: in nats; default 0.708 ln T.

  Returns:
    (N,) bool; nothing if no layer is used.

  Raises:
    ValueError: other shapes.
  """
  limit = FIXED_THRESHOLD * jnp.log(count) if threshold is None else threshold
  return (mean_entropy(entropies, layers) < limit) & layers.any()
