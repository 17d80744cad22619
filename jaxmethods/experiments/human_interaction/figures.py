"""Pictures: skeletons of real clips and of drawn ones, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmethods.runtime.pictures import COLOURS, GREY

_FRAMES = 7
_MARGIN = 0.15  # m
_FLOOR = 0.6


class Strip(NamedTuple):
  """A clip.

  Attributes:
    title: of the strip.
    joints: (T, E, J, 3), m, y up; seen from the side on which z runs to the right.
    points: object or scene beside it (T, V, 3) or (V, 3); None.
  """

  title: str
  joints: np.ndarray
  points: np.ndarray | None = None


def strips(pairs: Sequence[tuple[Strip, Strip]], parents: Sequence[int], heading: str) -> Figure:
  """Draws pairs of strips, a real clip above a drawn one.

  Args:
    pairs: clips of one label each.
    parents: of each joint, -1 at the root.
    heading: above all.
  """
  every = [strip for pair in pairs for strip in pair]
  figure, axes = plt.subplots(
    len(every), _FRAMES, figsize=(1.5 * _FRAMES, 1.25 * len(every) + 0.4), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for row, strip in zip(axes, every, strict=True):
    _strip(row, strip, parents)
  figure.suptitle(heading, fontsize=10)
  return figure


def _strip(axes: Sequence[Axes], strip: Strip, parents: Sequence[int]) -> None:
  shown = np.linspace(0, len(strip.joints) - 1, len(axes)).round().astype(int)
  level = strip.joints[shown][..., 2]
  low, high = level.min() - _MARGIN, level.max() + _MARGIN
  tall = max(strip.joints[shown][..., 1].max() + _MARGIN, 1.0)
  for axis, frame in zip(axes, shown, strict=True):
    axis.axhline(0, color=GREY, linewidth=_FLOOR)
    if strip.points is not None:
      points = strip.points if strip.points.ndim == 2 else strip.points[frame]
      axis.plot(points[:, 2], points[:, 1], ".", color=GREY, markersize=2)
    for person, body in enumerate(strip.joints[frame]):
      for joint, parent in enumerate(parents):
        if parent >= 0:
          ends = body[[joint, parent]]
          axis.plot(ends[:, 2], ends[:, 1], color=COLOURS[person], linewidth=1.2)
    axis.set(xlim=(low, high), ylim=(-_MARGIN, tall), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)
  axes[0].set_ylabel(strip.title, fontsize=7)


def trade(points: dict[str, tuple[float, float]], names: tuple[str, str]) -> Figure:
  """Draws rows by two metrics.

  Args:
    points: of every row.
    names: of the axes.
  """
  figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
  for i, (name, place) in enumerate(points.items()):
    axis.plot(*place, "o", color=COLOURS[i % len(COLOURS)])
    axis.annotate(name, place, xytext=(4, 3), textcoords="offset points", fontsize=8)
  axis.set(xlabel=names[0], ylabel=names[1])
  return figure
