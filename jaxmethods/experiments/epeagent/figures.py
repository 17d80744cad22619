"""Pictures and the table of a run."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.runtime import pictures

_SCORES = {
  "utility": "utility",
  "privacy_choice": "privacy, choice",
  "privacy_open": "privacy, open",
}


def leak_bars(metrics: Mapping[str, float], channels: tuple[str, ...]) -> Figure:
  """Draws the share of barred values that were told, by channel, by text and by knowledge."""
  series = {
    legend: {channel: metrics[f"{name}_{channel}"] for channel in channels}
    for legend, name in (("found in the text", "field_leak"), ("by knowledge", "taint_leak"))
  }
  largest = max(value for values in series.values() for value in values.values())
  return pictures.bars(series, "share of barred values told", limit=max(largest, 0.05))


def scores_bars(metrics: Mapping[str, float]) -> Figure:
  """Draws utility and privacy, in percent."""
  values = {label: metrics[name] for name, label in _SCORES.items() if np.isfinite(metrics[name])}
  return pictures.bars({"": values}, "percent", limit=100)


def trade(rows: Mapping[str, tuple[float, float, float]]) -> Figure:
  """Draws rows as points: leak between agents against utility; the size is privacy.

  Args:
    rows: name -> (leak, utility, privacy).
  """
  figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
  for i, (name, (leak, utility, privacy)) in enumerate(rows.items()):
    colour = pictures.COLOURS[i % len(pictures.COLOURS)]
    axis.scatter(leak, utility, s=30 + 2 * np.nan_to_num(privacy), color=colour, alpha=0.8)
    offset = (6, 6 + 9 * (i % 3))
    axis.annotate(name, (leak, utility), xytext=offset, textcoords="offset points", fontsize=8)
  axis.set(xlabel="share of barred values told, all channels", ylabel="utility in percent")
  axis.set_ylim(-4, 112)
  axis.set_xlim(left=-0.02)
  pictures.open_frame(axis)
  return figure


def table(metrics: Mapping[str, float]) -> str:
  """Writes metrics as a table."""
  lines = ["| metric | value |", "|---|---|"]
  return (
    "\n".join([*lines, *(f"| {name} | {value:.4g} |" for name, value in metrics.items())]) + "\n"
  )
