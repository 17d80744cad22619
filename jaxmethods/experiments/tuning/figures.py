"""Pictures of a tuned language model: what it writes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

_WIDTHS = (46, 30, 30)


class Shown(NamedTuple):
  """A prompt with what is written, what is right, and whether these agree."""

  prompt: str
  written: str
  right: str
  correct: bool


def generations(shown: Sequence[Shown]) -> Figure:
  """Draws prompts, generations and right answers as a table."""
  cells = [
    [_wrapped(text, width) for text, width in zip(row[:3], _WIDTHS, strict=True)] for row in shown
  ]
  heights = [max(cell.count("\n") for cell in row) + 2 for row in cells]
  figure, axes = plt.subplots(figsize=(9.5, 0.21 * (sum(heights) + 2)))
  axes.axis("off")
  table = axes.table(
    cellText=cells, colLabels=["prompt", "written", "right"], colWidths=[0.44, 0.28, 0.28],
    cellLoc="left", bbox=Bbox.unit(),
  )  # fmt: skip
  table.auto_set_font_size(False)
  table.set_fontsize(8.5)
  total = sum(heights) + 2
  for (row, column), cell in table.get_celld().items():
    cell.set_height((heights[row - 1] if row else 2) / total)
    cell.set_edgecolor("#dddddd")
    if row and column == 1:
      cell.get_text().set_color("#1b7f3b" if shown[row - 1].correct else "#b3261e")
  return figure


def _wrapped(text: str, width: int) -> str:
  text = text.strip().replace("$", r"\$") or "(nothing)"
  return textwrap.fill(textwrap.shorten(text, 6 * width, placeholder=" ..."), width)
