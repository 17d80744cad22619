"""Pictures: a query and its nearest photographs, and the views that the network is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmethods.runtime.pictures import COLOURS, GREY

_RIGHT, _WRONG = COLOURS[3], COLOURS[1]


class Answer(NamedTuple):
  """A query and its nearest photographs, best first.

  Attributes:
    query: (h, w, 3) uint8.
    kept: (h, w) in 0..1, share of the patches over a pixel that the second view keeps; None: no such
      view.
    title: name of the query.
    images: (k, h, w, 3).
    names: below the photographs.
    right: (k,) 1 right, 0 wrong, -1 not known.
  """

  query: np.ndarray
  kept: np.ndarray | None
  title: str
  images: np.ndarray
  names: Sequence[str]
  right: np.ndarray


def matches(answers: Sequence[Answer], title: str) -> Figure:
  """Draws a row for each query: it, its kept patches, and the nearest photographs in frames."""
  with_kept = answers[0].kept is not None
  first = 2 if with_kept else 1
  columns = first + len(answers[0].images)
  figure, axes = plt.subplots(
    len(answers), columns, figsize=(1.15 * columns, 1.35 * len(answers) + 0.5), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for row, answer in zip(axes, answers, strict=True):
    row[0].imshow(answer.query)
    row[0].set_title(answer.title, fontsize=7)
    if answer.kept is not None:
      row[1].imshow(highlighted(answer.query, answer.kept))
      row[1].set_title("kept", fontsize=7)
    for axis, image, name, right in zip(
      row[first:], answer.images, answer.names, answer.right, strict=True
    ):
      axis.imshow(image)
      axis.set_title(name, fontsize=7)
      _frame(axis, GREY if right < 0 else _RIGHT if right else _WRONG)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
  for axis in axes[:, :first].flat:
    axis.spines[:].set_visible(False)
  figure.suptitle(title, fontsize=10)
  return figure


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
