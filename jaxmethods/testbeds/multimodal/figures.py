"""Pictures of gain and loss by tuning a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmethods.runtime import pictures

Scalar = jax.Array | float

_COLUMNS = 2
_LINE = 0.05  # height of a line of text, of a panel's


def before_and_after(after: Mapping[str, Scalar], before: Mapping[str, Any]) -> Figure:
  """Draws the accuracy of the pretrained and of the tuned model on every task.

  Args:
    after: columns of the tuned model, `Target` among them.
    before: {"source": {family: accuracy}, "target": {name: accuracy}} of the pretrained one.
  """
  (target,) = before["target"].values()
  old = {**before["source"], "target": target}
  new = {name: after[name] for name in before["source"]} | {"target": after["Target"]}
  numbers = lambda scores: {name: float(x) for name, x in scores.items()}
  return pictures.bars(
    {"pretrained": numbers(old), "tuned": numbers(new)}, "accuracy, %", limit=100.0
  )


def tradeoff(points: Mapping[str, tuple[float, float]], paradigms: Mapping[Any, str]) -> Figure:
  """Draws gain on the target against forgetting, a panel for each paradigm, other rows in grey.

  Args:
    points: row -> (gain on the target, change on the pretrained tasks), points of accuracy.
    paradigms: row -> paradigm; rows called "reference" are named in every panel.
  """
  shown = list(dict.fromkeys(paradigms[name] for name in points))
  panels = [paradigm for paradigm in shown if paradigm != "reference"] or shown
  lines = -(-len(panels) // _COLUMNS)
  figure, axes = plt.subplots(
    lines, _COLUMNS, figsize=(11, 4 * lines), sharex=True, sharey=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for axis, panel in zip(axes.flat, panels, strict=False):
    colors = {"reference": "#777777", panel: pictures.COLOURS[0]}
    for name, (gain, change) in points.items():
      color = colors.get(paradigms[name], "#dddddd")
      mark = "s" if paradigms[name] == "reference" else "o"
      axis.plot(change, gain, mark, color=color, markersize=5.5, zorder=2 + (color != "#dddddd"))
    axis.set(title=panel, ylim=(-5, 105))
    pictures.open_frame(axis)
    axis.grid(alpha=0.25)
    _name_beside(
      axis,
      {n: (at, colors[paradigms[n]]) for n, at in points.items() if paradigms[n] in colors},
    )
  for axis in axes.flat[len(panels) :]:
    axis.set_axis_off()
  figure.supxlabel("F: change on the pretrained tasks, points", fontsize=10)
  figure.supylabel("E: gain on the target, points", fontsize=10)
  return figure


def _name_beside(axis: Axes, points: Mapping[str, tuple[tuple[float, float], str]]) -> None:
  """Writes the names of points {name: ((y, x), color)} in a column on the right, with lines to them."""
  low, high = axis.get_ylim()
  names = sorted(points, key=lambda name: points[name][0][0])
  wanted = [(points[name][0][0] - low) / (high - low) for name in names]
  places = list(wanted)
  for i in range(1, len(places)):  # upwards, none closer than a line of text to the one below
    places[i] = max(places[i], places[i - 1] + _LINE)
  top = 1.0
  for i in reversed(range(len(places))):  # and back down from the top
    places[i] = min(places[i], top)
    top = places[i] - _LINE
  for name, place in zip(names, places, strict=True):
    (gain, change), color = points[name]
    axis.annotate(
      name.replace("_", " "), (change, gain), (1.03, place), textcoords="axes fraction",
      fontsize=8, color=color, va="center", annotation_clip=False,
      arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": color, "lw": 0.4, "alpha": 0.6},
    )  # fmt: skip
