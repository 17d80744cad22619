"""Pictures: a query and its nearest photographs, and the views that the network is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxmethods.runtime.pictures import COLOURS, GREY

_BRIGHT = 0.98
UNKNOWN, WRONG, RIGHT, OWN = -1, 0, 1, 2  # OWN: right, of the query's own sighting or camera
FRAMES = {UNKNOWN: GREY, WRONG: COLOURS[1], RIGHT: COLOURS[3], OWN: COLOURS[2]}
MEANINGS = {
  RIGHT: "the same individual",
  OWN: "the same individual in the query's own sighting",
  WRONG: "another one",
  UNKNOWN: "not known",
}


class Answer(NamedTuple):
  """A query and its nearest photographs, best first.

  Attributes:
    query: (h, w, 3) uint8.
    kept: (h, w) in 0..1, share of the patches over a pixel that the second view keeps; None: no such
      view.
    high: (h, w, 3) in 0..1, its high frequencies; None: no such view.
    title: name of the query.
    images: (k, h, w, 3).
    names: below the photographs.
    right: (k,) of RIGHT, OWN, WRONG, UNKNOWN.
  """

  query: np.ndarray
  kept: np.ndarray | None
  high: np.ndarray | None
  title: str
  images: np.ndarray
  names: Sequence[str]
  right: np.ndarray


def matches(answers: Sequence[Answer], title: str) -> Figure:
  """Draws a row for each query: it, its kept patches, and the nearest photographs in frames."""
  first = 1 if answers[0].kept is None else 3
  columns = first + len(answers[0].images)
  figure, axes = plt.subplots(
    len(answers), columns, figsize=(1.15 * columns, 1.36 * len(answers) + 0.7), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for row, answer in zip(axes, answers, strict=True):
    for axis, (name, image) in zip(row, _own(answer), strict=False):
      axis.imshow(image)
      axis.set_title(name, fontsize=7)
      axis.spines[:].set_visible(False)
    for axis, image, name, right in zip(
      row[first:], answer.images, answer.names, answer.right, strict=True
    ):
      axis.imshow(image)
      axis.set_title(name, fontsize=7)
      _frame(axis, FRAMES[int(right)])
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
  seen = {int(right) for answer in answers for right in answer.right}
  patches = [
    Patch(color=FRAMES[kind], label=text) for kind, text in MEANINGS.items() if kind in seen
  ]
  figure.suptitle(title, fontsize=10)
  figure.legend(
    handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False
  )
  return figure


def _own(answer: Answer) -> list[tuple[str, np.ndarray]]:
  """The query, its kept patches and their high frequencies."""
  shown = [(shortened(answer.title), answer.query)]
  if answer.kept is not None:
    shown.append(("kept patches", highlighted(answer.query, answer.kept)))
  if answer.kept is not None and answer.high is not None:
    # Few pixels are bright: those above the quantile are white.
    bright = np.clip(answer.high / max(np.quantile(answer.high, _BRIGHT), 1e-6), 0, 1)
    shown.append(("their high frequencies", highlighted(255 * bright, answer.kept)))
  return shown


def shortened(name: str, most: int = 16) -> str:
  """Cuts a name in its middle."""
  half = (most - 1) // 2
  return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def highlighted(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Darkens and greys what is not kept; (h, w, 3) in 0..1."""
  pixels = image / 255
  faded = 0.35 * pixels.mean(-1, keepdims=True) + 0 * pixels
  return kept[..., None] * pixels + (1 - kept[..., None]) * faded


def kept_pixels(
  chosen: np.ndarray, grid: tuple[int, int], patch: int, stride: int, size: tuple[int, int]
) -> np.ndarray:
  """Spreads chosen patches over pixels.

  Args:
    chosen: (rows * columns,) bool.
    grid: rows and columns of patches.
    patch: side.
    stride: between two.
    size: height and width.

  Returns:
    (height, width), share of the patches over a pixel that are chosen; 0 where there is none.
  """
  hits, total = np.zeros(size), np.zeros(size)
  for place, hit in np.ndenumerate(chosen.reshape(grid)):
    rows, columns = (slice(i * stride, i * stride + patch) for i in place)
    hits[rows, columns] += hit
    total[rows, columns] += 1
  return hits / np.maximum(total, 1)


def views(photographs: np.ndarray, original: np.ndarray, high: np.ndarray) -> Figure:
  """Draws photographs, an augmented view of each, and its high frequencies.

  Args:
    photographs: (n, h, w, 3) uint8.
    original: in [-1, 1].
    high: in [0, 1].
  """
  count = len(photographs)
  figure, axes = plt.subplots(
    3, count, figsize=(1.6 * count, 5), squeeze=False, layout="constrained"
  )
  shown = (photographs, np.clip((original + 1) / 2, 0, 1), high)
  for row, name, images in zip(
    axes, ("photograph", "view", "high frequencies"), shown, strict=True
  ):
    for axis, image in zip(row, images, strict=True):
      axis.imshow(image)
      axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
  return figure


def _frame(axis: Axes, colour: str) -> None:
  for spine in axis.spines.values():
    spine.set(color=colour, linewidth=3)
