"""Pictures of a run: what was forgotten, what came before its task, what the generator paints."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.runtime.experiment import Values
from jaxmethods.runtime.pictures import heat_table, open_frame

_SHOWN = {"transfer": "o", "average": "s", "last": "D"}
_COLOURS = {"transfer": "#1f6f8b", "average": "#edae49", "last": "#8d3b72"}


def pictures(
  accuracy: jax.Array, names: Sequence[str], painted: tuple[list[str], np.ndarray]
) -> dict[str, Figure]:
  """The accuracy matrix, its course, and pictures of the generator with their prompts."""
  matrix = 100 * np.asarray(jax.device_get(accuracy))
  title = "accuracy (%) on the task of a column after the task of a row"
  found = {
    "accuracy": heat_table(np.nan_to_num(matrix), names, names, title, number=".0f"),
    "course": course(matrix, names),
  }
  if len(painted[0]) > 1:
    found["synthetic_pairs"] = gallery(*painted)
  return found


def course(matrix: np.ndarray, names: Sequence[str]) -> Figure:
  """Accuracy of every task along the sequence; the dot is where it was learnt."""
  figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
  for j, name in enumerate(names):
    (line,) = axes.plot(matrix[:, j], lw=1.2, label=name)
    axes.plot(j, matrix[j, j], "o", color=line.get_color())
  axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
  axes.set(ylabel="accuracy (%)", xlabel="task learnt last", ylim=(0, 102))
  figure.legend(frameon=False, fontsize=8, loc="outside right upper")
  open_frame(axes)
  return figure


def gallery(prompts: Sequence[str], images: np.ndarray) -> Figure:
  """Synthetic images under their prompts."""
  columns = 6
  rows = -(-len(prompts) // columns)
  figure, grid = plt.subplots(
    rows, columns, figsize=(11, 2.1 * rows), layout="constrained", squeeze=False
  )
  for axis in grid.flat:
    axis.axis("off")
  for axis, prompt, image in zip(grid.flat, prompts, images, strict=False):
    axis.imshow(image)
    axis.set_title(prompt.removeprefix("a picture of ").rstrip("."), fontsize=8)
  return figure


def comparison(rows: list[Values]) -> dict[str, Figure]:
  """Transfer, average and last of every row with their intervals."""
  named = [row for row in rows if "transfer" in row["metrics"]]
  if not named:
    return {}
  figure, axes = plt.subplots(figsize=(8, 1.5 + 0.34 * len(named)), layout="constrained")
  for name, marker in _SHOWN.items():
    values = [row["metrics"][name] for row in named]
    x = [value["mean"] if value["mean"] is not None else np.nan for value in values]
    spread = [value["ci95"] or 0 for value in values]
    axes.errorbar(
      x, range(len(named)), xerr=spread, fmt=marker, ms=4, label=name, color=_COLOURS[name]
    )
  axes.set_yticks(range(len(named)), [row["name"] for row in named])
  axes.invert_yaxis()
  axes.set_xlabel("%")
  axes.grid(axis="x", alpha=0.3)
  figure.legend(frameon=False, loc="outside upper center", ncols=3)
  open_frame(axes)
  return {"three_numbers": figure}


def table(accuracy: jax.Array, names: Sequence[str]) -> str:
  """The accuracy matrix as a table of text, in percent."""
  matrix = 100 * np.asarray(jax.device_get(accuracy))
  lines = [",".join(["after", *names])]
  for name, row in zip(names, matrix, strict=True):
    lines.append(",".join([name, *(f"{value:.2f}" for value in row)]))
  return "\n".join(lines) + "\n"
