"""The table of all scores, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.experiments.cot_kinetics.config import Trial
from jaxmethods.experiments.cot_kinetics.evidence import Evidence, test_scores
from jaxmethods.runtime import compiler
from jaxmethods.stats import ranking

_COLUMNS = (
  "AUROC", "AUPR", "FPR@95", "AUPR, incorrect positive", "FPR@95, incorrect positive",
  "AUROC at equal length",
)  # fmt: skip
_SAME_LENGTH_DRAWS = 200  # at most: pairs are counted one by one


def make_intervals(trial: Trial) -> Callable[[Evidence], tuple[jax.Array, jax.Array]]:
  """Returns evidence (G, N, ...) -> (metrics, their bootstrap draws), both (6, G, S) and (.., draws)."""

  @compiler.jit
  def compute(evidence: Evidence) -> tuple[jax.Array, jax.Array]:
    matrix, facts = test_scores(evidence, trial)
    one = lambda part: _of_group(*part, draws=trial.bootstrap)
    parts = jnp.moveaxis(matrix, 1, 0), facts.correct, facts.reasoning
    plain, drawn = jax.lax.map(one, parts)
    return jnp.moveaxis(plain, 2, 0), jnp.moveaxis(drawn, 2, 0)

  return compute


def _of_group(
  scores: jax.Array, correct: jax.Array, lengths: jax.Array, *, draws: int
) -> tuple[jax.Array, jax.Array]:
  """Metrics (S, 6) of the scores (S, n) of one temperature, and draws of them (S, 6, draws)."""
  key = jax.random.key(0)
  return jax.lax.map(lambda score: _both(score, correct, lengths, key, draws), scores)


def _both(
  score: jax.Array, correct: jax.Array, lengths: jax.Array, key: jax.Array, draws: int
) -> tuple[jax.Array, jax.Array]:
  """Both conventions, correct answers and incorrect ones as positives; then pairs of equal length."""
  signs = ((score, correct), (-score, ~correct))
  plain = [ranking.ranking(*pair) for pair in signs]
  drawn = [ranking.bootstrap(key, *pair, draws=draws) for pair in signs]
  pick = lambda pair, last: jnp.stack([*pair[0], pair[1].aupr, pair[1].fpr95, last])
  same = ranking.stratified_auroc(score, correct, lengths)
  return pick(plain, same), pick(drawn, _same_length(score, correct, lengths, key, draws))


def _same_length(
  score: jax.Array, correct: jax.Array, lengths: jax.Array, key: jax.Array, draws: int
) -> jax.Array:
  """AUROC at equal length of resampled answers; fewer draws than wanted are repeated, (draws,)."""
  size = len(score)

  def one(key: jax.Array) -> jax.Array:
    weight = jnp.zeros(size).at[jax.random.randint(key, (size,), 0, size)].add(1)
    return ranking.stratified_auroc(score, correct, lengths, weight)

  few = jax.lax.map(one, jax.random.split(key, min(draws, _SAME_LENGTH_DRAWS)))
  return jnp.resize(few, (draws,))


def finished(evidence: Evidence) -> Evidence:
  """Without what is padding of the last batch, as numpy arrays: (G, N, ...)."""
  evidence = jax.device_get(evidence)
  real = np.asarray(evidence.facts.real).all(0)
  return jax.tree.map(lambda x: np.asarray(x)[:, real], evidence)


def table(evidence: Evidence, trial: Trial, groups: Sequence[str]) -> tuple[str, np.ndarray]:
  """The table of all scores as markdown, and (value, low, high) of the AUROCs, (3, G, S).

  Args:
    evidence: (G, N, ...), see `finished`.
    trial: which scores.
    groups: a title for each G.
  """
  value, drawn = jax.device_get(make_intervals(trial)(evidence))
  undefined = np.isnan(value)
  # A resample without a right answer, or a wrong one, says nothing and does not count.
  low, high = np.nanpercentile(np.where(undefined[..., None], 0, drawn), (2.5, 97.5), axis=-1)
  low, high = (np.where(undefined, np.nan, bound) for bound in (low, high))
  lines = ["CoT-Kinetics is our reconstruction. Intervals: 95 %, bootstrap over problems.", ""]
  for g, title in enumerate(groups):
    correct = evidence.facts.correct[g, trial.calibration :]
    answered = evidence.facts.answered[g, trial.calibration :]
    lines += [
      f"## {title}: {correct.mean():.1%} of {len(correct)} answers right, "
      f"{1 - answered.mean():.1%} without an answer",
      "",
    ]
    if len(set(correct.tolist())) < 2:
      kind = "right" if correct.all() else "wrong"
      lines += [f"All answers are {kind}: there is nothing to tell apart, AUROC is undefined.", ""]
      continue
    lines += [f"| score | {' | '.join(_COLUMNS)} |", "| --- |" + " --- |" * len(_COLUMNS)]
    for s in np.argsort(-value[0, g]):
      cells = [
        f"{100 * value[m, g, s]:.1f} [{100 * low[m, g, s]:.1f}, {100 * high[m, g, s]:.1f}]"
        for m in range(len(_COLUMNS))
      ]
      name = f"**{trial.names[s]}**" if trial.names[s] == trial.score else trial.names[s]
      lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
  return "\n".join(lines), np.stack([value[0], low[0], high[0]])
