"""Questions that a comparison answers: arms at every level of a factor, and claims about them.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jaxmethods.runtime.experiment import RunConfig, Values

if TYPE_CHECKING:
  from matplotlib.figure import Figure

Cell: TypeAlias = tuple[str, str]  # arm, level


class Claim(NamedTuple):
  """A weighted sum of cells, of which something is said, seed by seed.

  Attributes:
    text: the claim.
    metric: of the cells.
    terms: cell -> weight.
    holds_if: "positive", or "different" from 0.
  """

  text: str
  metric: str
  terms: Mapping[Cell, float]
  holds_if: str = "positive"


class Study(NamedTuple):
  """One question.

  Attributes:
    question: in words.
    factor: name of what the levels are.
    cells: the config of every arm at every level.
    claims: what is to be found out.
    metrics: a table and a panel of the picture each.
  """

  question: str
  factor: str
  cells: Mapping[Cell, RunConfig]
  claims: Sequence[Claim]
  metrics: Sequence[str]


class Verdict(NamedTuple):
  """What came of a claim; `mean` and half width `ci95` are None where there is no number."""

  claim: str
  verdict: str  # held, did not hold, unclear
  mean: float | None
  ci95: float | None


def row_name(study: Study, cell: Cell) -> str:
  """Returns the name of a cell's row: "LPT at beta 0.1"."""
  return f"{cell[0]} at {study.factor} {cell[1]}"


def rows(study: Study) -> dict[str, RunConfig]:
  """Returns the rows of a study, for eval.compare."""
  return {row_name(study, cell): config for cell, config in study.cells.items()}


def judge(study: Study, results: Sequence[Values]) -> list[Verdict]:
  """Judges every claim about rows that were run, by the 95 % interval of its sum over seeds."""
  found = _by_cell(study, results)
  return [_judged(claim, found) for claim in study.claims if claim.terms.keys() <= found.keys()]


def table(
  study: Study, results: Sequence[Values], metric: str
) -> tuple[list[str], list[list[str]]]:
  """Returns header and lines of one metric: arms down, levels across."""
  found = _by_cell(study, results)
  arms, levels = (list(dict.fromkeys(cell[i] for cell in study.cells)) for i in (0, 1))
  lines = [
    [arm, *(_text(found.get((arm, level), {}).get("metrics", {}).get(metric)) for level in levels)]
    for arm in arms
  ]
  return [f"{metric} by {study.factor}", *levels], lines


def verdict_table(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
  """Returns header and lines of the verdicts."""
  number = lambda value: "-" if value is None else f"{value:+.3g}"
  lines = [
    [v.claim, v.verdict, number(v.mean), "-" if v.ci95 is None else f"± {v.ci95:.2g}"]
    for v in verdicts
  ]
  return ["claim", "verdict", "difference", "95 % interval"], lines


def picture(study: Study, results: Sequence[Values]) -> Figure:
  """Draws every metric over the levels, a line for each arm, with 95 % intervals."""
  import matplotlib.pyplot as plt

  from jaxmethods.runtime import pictures

  found = _by_cell(study, results)
  arms, levels = (list(dict.fromkeys(cell[i] for cell in study.cells)) for i in (0, 1))
  count = len(study.metrics)
  figure, axes = plt.subplots(
    1, count, figsize=(4.2 * count, 3.4), squeeze=False, layout="constrained"
  )
  for axis, metric in zip(axes.flat, study.metrics, strict=True):
    for k, arm in enumerate(arms):
      points = [
        (levels.index(level) + 0.06 * (k - (len(arms) - 1) / 2), *value)
        for level in levels
        if (value := _interval(found.get((arm, level)), metric))
      ]
      if points:
        x, y, spread = zip(*points, strict=True)
        style = {"color": pictures.COLOURS[k % len(pictures.COLOURS)], "label": arm}
        axis.errorbar(x, y, spread, marker="o", markersize=4, capsize=2, linewidth=1.3, **style)
    axis.set_xticks(range(len(levels)), levels, fontsize=8)
    axis.set(xlabel=study.factor, title=metric.replace("_", " "))
    axis.set_xlim(-0.4, len(levels) - 0.6)
    pictures.open_frame(axis)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  figure.suptitle(study.question, fontsize=10)
  return figure


def _by_cell(study: Study, results: Sequence[Values]) -> dict[Cell, Values]:
  """Rows by cell; a comparison of some rows (`--rows`) lacks the others."""
  named = {row["name"]: row for row in results}
  names = {cell: row_name(study, cell) for cell in study.cells}
  return {cell: named[name] for cell, name in names.items() if name in named}


def _judged(claim: Claim, found: Mapping[Cell, Values]) -> Verdict:
  import numpy as np
  from scipy import special

  missing = Verdict(claim.text, "unclear", None, None)
  each = [found[cell]["metrics"][claim.metric]["values"] for cell in claim.terms]
  if any(value is None for values in each for value in values):
    return missing
  sums = np.array(list(claim.terms.values())) @ np.array(each)
  mean, n = float(sums.mean()), len(sums)
  if n < 2:
    return missing._replace(mean=mean)
  half = float(special.stdtrit(n - 1, 0.975) * sums.std(ddof=1) / np.sqrt(n))
  if claim.holds_if == "different":
    verdict = "held" if abs(mean) > half else "unclear"
  else:
    verdict = "held" if mean > half else "did not hold" if mean < -half else "unclear"
  if not half and not mean:
    verdict = "did not hold"  # no difference at all
  return Verdict(claim.text, verdict, mean, half)


def _interval(row: Values | None, metric: str) -> tuple[float, float] | None:
  value = (row or {}).get("metrics", {}).get(metric)
  if value is None or value["mean"] is None:
    return None
  return value["mean"], value["ci95"] or 0.0


def _text(value: Values | None) -> str:
  if value is None or value["mean"] is None:
    return "-"
  spread = "" if value["ci95"] is None else f" ± {value['ci95']:.2g}"
  return f"{value['mean']:.3f}{spread}"
