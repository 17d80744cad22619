"""How well a score tells two classes apart: AUROC, AUPR, FPR at a given TPR; with weights, tie-exact.

Weights make a bootstrap a `vmap`: a resampled set is the same set with other counts. With one class only
every number is NaN: there is nothing to tell apart.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.stats import shapes
from jaxmethods.trees import Key


class Curve(NamedTuple):
  """Points of a ROC curve, from the highest threshold down, (n + 1,) each; equal scores share one.

  Attributes:
    true, false: weight of the positives, and of the negatives, at or above the threshold.
  """

  true: Float[Array, " points"]
  false: Float[Array, " points"]


class Ranking(NamedTuple):
  """Metrics of a score; (...) each.

  Attributes:
    auroc: a tie counts one half.
    aupr: trapezoids under precision over recall.
    fpr95: false-positive rate at a true-positive rate of 0.95.
  """

  auroc: Float[Array, " ..."]
  aupr: Float[Array, " ..."]
  fpr95: Float[Array, " ..."]


def roc_curve(
  score: Float[Array, " n"],
  positive: Bool[Array, " n"],
  weight: Float[Array, " n"] | None = None,
) -> Curve:
  """Counts at every threshold.

  Args:
    score: (n,), higher means positive.
    positive: (n,) bool.
    weight: (n,), nonnegative; default 1.

  >>> curve = jm.stats.roc_curve(jnp.array([0.1, 0.8, 0.9]), jnp.array([False, True, True]))
  >>> curve.true.tolist(), curve.false.tolist()
  ([0.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0])
  """
  shapes.check(score=(score, "n"), positive=(positive, "n"))
  weight = jnp.ones(score.shape, _dtype(score)) if weight is None else weight.astype(_dtype(score))
  order = jnp.argsort(-score)
  ranked = -score[order]
  end = jnp.searchsorted(ranked, ranked, side="right") - 1  # last of the equal ones
  counts = (
    jnp.cumsum(jnp.where(chosen, weight, 0)[order])[end] for chosen in (positive, ~positive)
  )
  return Curve(*(jnp.concatenate([jnp.zeros(1, c.dtype), c]) for c in counts))


def auroc(curve: Curve) -> Float[Array, ""]:
  """Area under true over false positive rate.

  >>> curve = jm.stats.roc_curve(jnp.array([0.1, 0.8, 0.9]), jnp.array([False, True, False]))
  >>> float(jm.stats.auroc(curve))
  0.5
  """
  shapes.check(true=(curve.true, "m"), false=(curve.false, "m"))
  return jnp.trapezoid(*_rates(curve))


def aupr(curve: Curve) -> Float[Array, ""]:
  """Area under precision over recall, from (recall 0, precision 1), by trapezoids (CoE code).

  >>> curve = jm.stats.roc_curve(jnp.array([0.1, 0.8, 0.9]), jnp.array([False, True, True]))
  >>> float(jm.stats.aupr(curve))
  1.0
  """
  shapes.check(true=(curve.true, "m"), false=(curve.false, "m"))
  found = curve.true + curve.false
  precision = jnp.where(found > 0, curve.true / jnp.where(found > 0, found, 1), 1)
  both = (curve.true[-1] > 0) & (curve.false[-1] > 0)
  return jnp.where(both, jnp.trapezoid(precision, _rates(curve)[0]), jnp.nan)


def fpr_at(
  curve: Curve, tpr: float = 0.95, method: Literal["interpolate", "step"] = "interpolate"
) -> Float[Array, ""]:
  """False-positive rate where the true-positive rate is `tpr`.

  Args:
    curve: of the score.
    tpr: in (0, 1].
    method: linear between the points of the curve (CoE code), or the first point that reaches `tpr`.

  >>> curve = jm.stats.roc_curve(jnp.array([0.1, 0.8, 0.9]), jnp.array([False, True, True]))
  >>> float(jm.stats.fpr_at(curve, 0.95))
  0.0
  """
  shapes.check(true=(curve.true, "m"), false=(curve.false, "m"))
  true, false = _rates(curve)
  if method == "step":
    return false[jnp.argmax(true >= tpr)]
  # Where the curve runs level at `tpr`, its far end counts, as numpy's interpolation has it.
  return jnp.where(jnp.isnan(true[-1]), jnp.nan, jnp.interp(tpr, true, false))


def ranking(
  score: Float[Array, " n"],
  positive: Bool[Array, " n"],
  weight: Float[Array, " n"] | None = None,
) -> Ranking:
  """All three metrics; arguments as in `roc_curve`.

  With the correct answers as positives (CoE code) the score is a confidence; for the other convention
  (incorrect ones as positives) give `-score` and `~positive`.
  """
  curve = roc_curve(score, positive, weight)
  return Ranking(auroc(curve), aupr(curve), fpr_at(curve))


def stratified_auroc(
  score: Float[Array, " n"],
  positive: Bool[Array, " n"],
  stratum: Int[Array, " n"],
  weight: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
  """Area under the ROC curve among pairs of one stratum only: nothing that tells strata apart helps.

  Args:
    score: (n,), higher means positive; equal scores count half.
    positive: (n,) bool.
    stratum: (n,) of every example.
    weight: (n,) how often each counts; default once.

  Returns:
    The share of pairs, one positive and one not, of the same stratum, that the score has in order; NaN
    where there is no such pair.
  """
  shapes.check(score=(score, "n"), positive=(positive, "n"), stratum=(stratum, "n"))
  dtype = _dtype(score)
  weight = jnp.ones(score.shape, dtype) if weight is None else weight.astype(dtype)
  pairs = positive[:, None] & ~positive[None, :] & (stratum[:, None] == stratum[None, :])
  both = jnp.where(pairs, weight[:, None] * weight[None, :], 0)
  order = 0.5 * (1 + jnp.sign(score[:, None] - score[None, :]))
  total = both.sum()
  return jnp.where(total > 0, (both * order).sum() / jnp.where(total > 0, total, 1), jnp.nan)


def bootstrap(
  key: Key, score: Float[Array, " n"], positive: Bool[Array, " n"], *, draws: int = 1000
) -> Ranking:
  """The metrics of resampled sets, (draws,) each.

  Args:
    key: of the draws.
    score: (n,), higher means positive.
    positive: (n,) bool.
    draws: how many.

  >>> score, positive = jnp.array([0.1, 0.4, 0.8, 0.9]), jnp.array([False, True, False, True])
  >>> jm.stats.bootstrap(key, score, positive, draws=20).auroc.shape
  (20,)
  """
  shapes.check(score=(score, "n"), positive=(positive, "n"))
  size = score.shape[0]

  def one(key: jax.Array) -> Ranking:
    chosen = jax.random.randint(key, (size,), 0, size)
    return ranking(score, positive, jnp.zeros(size).at[chosen].add(1))

  return jax.lax.map(one, jax.random.split(key, draws), batch_size=100)


def _rates(curve: Curve) -> tuple[jax.Array, jax.Array]:
  """True and false positive rates; NaN without positives, or negatives."""
  return curve.true / curve.true[-1], curve.false / curve.false[-1]


def _dtype(score: jax.Array) -> jnp.dtype:
  return jnp.promote_types(score.dtype, jnp.float32)
