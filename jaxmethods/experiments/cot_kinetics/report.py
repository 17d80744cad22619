"""The table of all scores, with bootstrap intervals, and the pictures of answers and their energies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmethods.experiments.cot_kinetics import evidence as answer_trust
from jaxmethods.experiments.cot_kinetics.evidence import Evidence
from jaxmethods.methods import cot_kinetics as method
from jaxmethods.runtime import compiler
from jaxmethods.stats import ranking

if TYPE_CHECKING:
  from jaxmethods.experiments.cot_kinetics.config import Config

RIGHT, WRONG = "#1f6f8b", "#c1553b"
_COLUMNS = ("AUROC", "AUPR", "FPR@95", "AUPR, incorrect positive", "FPR@95, incorrect positive")


def make_intervals(names: tuple[str, ...], config: Config):
  """Returns evidence (G, N, ...) -> (metrics, their bootstrap draws), both (5, G, S) and (.., draws)."""

  def both(score, correct, weight_key):
    """Both conventions: correct answers are the positives, then incorrect ones."""
    signs = ((score, correct), (-score, ~correct))
    plain = [ranking.ranking(*pair) for pair in signs]
    drawn = [ranking.bootstrap(weight_key, *pair, draws=config.bootstrap) for pair in signs]
    pick = lambda pair: jnp.stack([*pair[0], pair[1].aupr, pair[1].fpr95])
    return pick(plain), pick(drawn)

  @compiler.jit
  def compute(evidence: Evidence):
    matrix, facts = answer_trust.test_scores(evidence, names, config)
    key = jax.random.key(0)

    def one_group(pair):
      scores, correct = pair
      return jax.lax.map(lambda score: both(score, correct, key), scores)

    plain, drawn = jax.lax.map(one_group, (jnp.moveaxis(matrix, 1, 0), facts.correct))
    return jnp.moveaxis(plain, 2, 0), jnp.moveaxis(drawn, 2, 0)

  return compute


def finished(evidence: Evidence) -> Evidence:
  """Without what is padding of the last batch, as numpy arrays: (G, N, ...)."""
  evidence = jax.device_get(evidence)
  real = np.asarray(evidence.facts.real).all(0)
  return jax.tree.map(lambda x: np.asarray(x)[:, real], evidence)


def table(
  evidence: Evidence, names: tuple[str, ...], config: Config, groups: list[str]
) -> tuple[str, Any]:
  """The table of all scores as markdown, and (value, low, high) of the AUROCs, (3, G, S).

  Args:
    evidence: (G, N, ...), see `finished`.
    names: scores.
    config: of the run.
    groups: a title for each G.
  """
  value, drawn = jax.device_get(make_intervals(names, config)(evidence))
  undefined = np.isnan(value)
  # A resample without a right answer, or a wrong one, says nothing and does not count.
  low, high = np.nanpercentile(np.where(undefined[..., None], 0, drawn), (2.5, 97.5), axis=-1)
  low, high = (np.where(undefined, np.nan, bound) for bound in (low, high))
  lines = ["CoT-Kinetics is our reconstruction. Intervals: 95 %, bootstrap over problems.", ""]
  for g, title in enumerate(groups):
    correct = evidence.facts.correct[g, config.calibration :]
    answered = evidence.facts.answered[g, config.calibration :]
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
      name = f"**{names[s]}**" if names[s] == config.score else names[s]
      lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
  return "\n".join(lines), np.stack([value[0], low[0], high[0]])


def energy_picture(evidence: Evidence, config: Config, groups: list[str]) -> Figure:
  """Momentum, turning angle and energy of every layer: right answers beside wrong ones."""
  segment = answer_trust.SEGMENTS.index(config.segment)
  figure, axes = plt.subplots(
    len(groups), 3, figsize=(11, 3 * len(groups)), squeeze=False, layout="constrained"
  )
  for g, title in enumerate(groups):
    path = jax.tree.map(lambda x, g=g: x[g][:, segment], evidence.paths[config.states])
    panels: dict[str, Any] = {
      "momentum": path.momentum[:, 1:],
      "turning angle, rad": path.turning,
      f"energy ({config.form}, gamma {config.gamma:g})": method.layer_energy(
        jax.tree.map(jnp.asarray, path), config.gamma, config.form
      ),
    }
    correct = np.asarray(evidence.facts.correct[g])
    for axis, (name, values) in zip(axes[g], panels.items(), strict=True):
      _layers(axis, np.asarray(values), correct)
      axis.set_title(f"{title}: {name}", fontsize=9)
      axis.set_xlabel("layer")
  axes[0, 0].legend(frameon=False, fontsize=9)
  return figure


def _layers(axis: Axes, values: np.ndarray, correct: np.ndarray) -> None:
  """Median and quartiles over answers, (N, L - 1)."""
  layer = np.arange(1, values.shape[1] + 1)
  for chosen, name, color in ((correct, "right", RIGHT), (~correct, "wrong", WRONG)):
    if not chosen.any():
      continue
    low, middle, high = np.percentile(values[chosen], (25, 50, 75), axis=0)
    axis.fill_between(layer, low, high, color=color, alpha=0.15, linewidth=0)
    axis.plot(layer, middle, color=color, label=f"{name} ({chosen.sum()}), median and quartiles")
  axis.spines[["top", "right"]].set_visible(False)


def auroc_picture(
  auroc: np.ndarray, names: tuple[str, ...], config: Config, groups: list[str]
) -> Figure:
  """AUROC of every score with its bootstrap interval, (3, G, S)."""
  figure, axes = plt.subplots(
    1, len(groups), figsize=(1.5 + 4.5 * len(groups), 1 + 0.28 * len(names)), sharey=True,
    squeeze=False, layout="constrained",
  )  # fmt: skip
  order = np.argsort(np.nan_to_num(auroc[0].mean(0)))
  for g, (axis, title) in enumerate(zip(axes.flat, groups, strict=True)):
    for row, s in enumerate(order):
      color = WRONG if names[s] == config.score else RIGHT
      axis.plot(auroc[1:, g, s], [row, row], color=color, lw=2)
      axis.plot(auroc[0, g, s], row, "o", color=color)
    axis.axvline(0.5, color="0.7", lw=1, zorder=0)
    axis.set(title=title, xlabel="AUROC, 95 % bootstrap interval")
    axis.spines[["top", "right"]].set_visible(False)
  axes[0, 0].set_yticks(range(len(order)), [names[s] for s in order])
  return figure
