"""Pictures that several methods draw: horizontal bars and tables of counts, in the house's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#5c4d7d", "#8d6b48")
GREY = "#c9c9c9"
_HEIGHT = 0.76  # of a group of bars; the rows are 1 apart


def open_frame(*axes: Axes) -> None:
  """Removes the upper and the right side of the frame."""
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)


def bars(
  series: Mapping[str, Mapping[str, float]],
  label: str,
  *,
  marks: Mapping[str, Sequence[float]] | None = None,
  limit: float = 1.0,
) -> Figure:
  """Draws a group of horizontal bars for each name, one bar a series, with its value beside it.

  Args:
    series: legend -> {name: value}; every series has the same names.
    label: what the values are, for the x axis.
    marks: legend -> a value for each name, drawn as a tick on the bars.
    limit: the largest value there can be.
  """
  names = list(next(iter(series.values())))
  count, marks = len(series), marks or {}
  width = _HEIGHT / count
  figure, axis = plt.subplots(
    figsize=(7, 1.4 + (0.2 + 0.18 * count) * len(names)), layout="constrained"
  )
  rows = np.arange(len(names))
  for i, (legend, values) in enumerate(series.items()):
    place = rows + (i - (count - 1) / 2) * width
    lengths = [float(values[name]) for name in names]
    axis.barh(place, lengths, height=0.9 * width, color=COLOURS[i], label=legend)
    beside = np.max([lengths, *marks.values()], axis=0) if count == 1 else lengths
    for row, value, end in zip(place, lengths, beside, strict=True):
      axis.text(end + 0.015 * limit, row, f"{value:.3g}", va="center", fontsize=8)
  for i, (legend, places) in enumerate(marks.items()):
    axis.scatter(
      places,
      rows,
      marker="|",
      s=220,
      linewidths=2.5,
      color=COLOURS[count + i],
      label=legend,
      zorder=3,
    )
  axis.set_yticks(rows, names)
  axis.set(xlim=(0, 1.1 * limit), xlabel=label)
  axis.invert_yaxis()
  open_frame(axis)
  if count + len(marks) > 1:
    figure.legend(loc="outside upper center", ncols=count + len(marks), frameon=False, fontsize=9)
  return figure


def heat_table(
  values: np.ndarray,
  rows: Sequence[str],
  columns: Sequence[str],
  title: str,
  *,
  label: str = "",
  number: str = "d",
) -> Figure:
  """Draws a table of numbers, the larger the darker.

  Args:
    values: (rows, columns), not negative.
    rows: names of the rows.
    columns: names of the columns.
    title: what the numbers are.
    label: what the columns are, for the x axis.
    number: format of a number.
  """
  figure, axis = plt.subplots(
    figsize=(2.5 + max(0.5 * len(columns), 3), 1.2 + 0.3 * len(rows)), layout="constrained"
  )
  shade = np.sqrt(values)  # a few large numbers must not hide the small ones
  axis.imshow(shade, aspect="auto", cmap="Blues", vmin=0)
  for (row, column), value in np.ndenumerate(values):
    color = "white" if shade[row, column] > 0.65 * shade.max() else "black"
    axis.text(column, row, f"{value:{number}}", ha="center", va="center", fontsize=8, color=color)
  axis.set_yticks(range(len(rows)), rows, fontsize=8)
  axis.set_xticks(range(len(columns)), columns, fontsize=8)
  axis.set_xlabel(label)
  axis.set_title(title, fontsize=10)
  axis.spines[:].set_visible(False)
  return figure
