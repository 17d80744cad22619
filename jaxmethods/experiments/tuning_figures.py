"""Pictures of what tuning a model gained and lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

_COLUMNS = 2


def before_and_after(after: Any, test: Any) -> Figure:
  """Accuracy on every task of the pretrained and of the tuned model."""
  before = {**test["before"]["source"], **test["before"]["target"]}
  names = [*test["before"]["source"], "target"]
  old, new = [float(x) for x in before.values()], [float(after[n]) for n in names[:-1]]
  new.append(float(after["Target"]))
  figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
  places = np.arange(len(names))
  axes.bar(places - 0.2, old, 0.38, color="#c9c9c9", label="pretrained")
  axes.bar(places + 0.2, new, 0.38, color="#1f6f8b", label="tuned")
  axes.set_xticks(places, names)
  axes.set(ylabel="accuracy, %", ylim=(0, 100))
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.15))
  return figure


def tradeoff(points: Mapping[str, tuple[float, float]], paradigms: Mapping[Any, str]) -> Figure:
  """Gain on the target against forgetting, one panel for each paradigm, the others' rows in grey.

  Args:
    points: row -> (gain on the target, change of what it could before), points of accuracy.
    paradigms: row -> paradigm; rows called "reference" are named in every panel.
  """
  shown = list(dict.fromkeys(paradigms[name] for name in points))
  panels = [paradigm for paradigm in shown if paradigm != "reference"] or shown
  lines = -(-len(panels) // _COLUMNS)
  figure, axes = plt.subplots(
    lines, _COLUMNS, figsize=(10.5, 4 * lines), sharex=True, sharey=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for axis, panel in zip(axes.flat, panels, strict=False):
    for name, (gain, change) in points.items():
      own, reference = paradigms[name] == panel, paradigms[name] == "reference"
      color = "#1f6f8b" if own else "#777777" if reference else "#d9d9d9"
      axis.plot(change, gain, "s" if reference else "o", color=color, markersize=6, zorder=2 + own)
      if own or reference:
        axis.annotate(
          name.replace("_", " "), (change, gain), (5, 3), textcoords="offset points", fontsize=7.5,
          color=color,
        )  # fmt: skip
    axis.set_title(panel, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.margins(x=0.12)
  for axis in axes.flat[len(panels) :]:
    axis.set_axis_off()
  figure.supxlabel("F: change on what it could before, points", fontsize=9)
  figure.supylabel("E: gain on the target, points", fontsize=9)
  return figure
