"""The lifecycle table and its pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.experiments.llm_safety.config import COLUMNS, TASKS, Place, columns
from jaxmethods.runtime import pictures

_BAD, _GOOD, _USE = "#c1553b", pictures.COLOURS[0], "0.55"
_HEADER = (
  "stage", "attack", "success", "after defence", "utility", "after defence", "epsilon", "seconds",
)  # fmt: skip


def line(made: Sequence[Place], state: jax.Array, task: str) -> dict[str, jax.Array]:
  """Returns attack, defended, utility, epsilon and seconds of a task; NaN where there is no such row."""
  rows = {place.row: i for i, place in enumerate(made) if place.task == task}
  of = lambda row, column: jnp.asarray(state[rows[row], column] if row in rows else jnp.nan)
  spec = TASKS[task]
  after = spec.defended or spec.undefended
  return {
    "attack": of(spec.undefended, 0),
    "defended": of(spec.defended, 0),
    "utility": of(after, 1),
    "epsilon": of(after, 2),
    "seconds": jnp.nansum(state[jnp.array(list(rows.values())), 3]),
  }


def table(made: Sequence[Place], state: np.ndarray) -> tuple[list[str], list[list[str]]]:
  """Returns header and lines of the lifecycle table; of one task, all its rows."""
  tasks = list(dict.fromkeys(place.task for place in made))
  if len(tasks) == 1:
    header = ["row", *columns(tasks[0])]
    lines = [[place.row, *map(_text, state[i, : len(header) - 1])] for i, place in enumerate(made)]
    return header, lines
  lines = []
  for task in tasks:
    spec, found = TASKS[task], line(made, jnp.asarray(state), task)
    before = [state[i, 1] for i, p in enumerate(made) if p == Place(task, spec.undefended)]
    name = f"{spec.undefended} -> {spec.defended}" if spec.defended else spec.undefended
    shown = (found["attack"], found["defended"], *before, found["utility"], found["epsilon"])
    lines.append(
      [spec.stage, name, *map(_text, map(float, shown)), f"{float(found['seconds']):.1f}"]
    )
  return list(_HEADER), lines


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Writes a table."""
  rows = [header, ["---"] * len(header), *lines]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def all_rows(made: Sequence[Place], state: np.ndarray) -> str:
  """Writes the rows of every task under its name, and what the columns say."""
  parts = []
  for task in dict.fromkeys(place.task for place in made):
    chosen = [i for i, place in enumerate(made) if place.task == task]
    spec = TASKS[task]
    shown = table([made[i] for i in chosen], state[chosen])
    parts.append(
      f"## {spec.stage} (`--task {task}`)\n\n`attack`: {spec.attack}; `utility`: {spec.utility}.\n\n"
      f"{markdown(*shown)}"
    )
  return "\n".join(parts)


def as_json(made: Sequence[Place], state: np.ndarray) -> str:
  """Writes all columns of all rows; what does not apply, or is infinite, is null."""
  number = lambda x: round(float(x), 6) if math.isfinite(x) else None
  named = {
    f"{place.task}.{place.row}": {
      name: number(x) for name, x in zip(columns(place.task), state[i], strict=False)
    }
    for i, place in enumerate(made)
  }
  return json.dumps(named, indent=1) + "\n"


def lifecycle(made: Sequence[Place], state: np.ndarray) -> Figure:
  """Draws every stage: the attack before and after the defence, and the utility that is left."""
  tasks = [t for t in TASKS if any(place.task == t for place in made)]
  figure, axis = plt.subplots(figsize=(8, 0.8 + 0.55 * len(tasks)), layout="constrained")
  for i, task in enumerate(reversed(tasks)):
    found = {k: float(v) for k, v in line(made, jnp.asarray(state), task).items()}
    ends = [found["attack"], found["defended"]]
    if all(map(math.isfinite, ends)):
      axis.annotate("", (ends[1], i), (ends[0], i), arrowprops={"arrowstyle": "->", "color": "0.7"})
    axis.plot(found["utility"], i - 0.22, "|", color=_USE, ms=11, mew=2, label="utility afterwards")
    axis.plot(ends[0], i, "o", color=_BAD, label="attack undefended")
    axis.plot(ends[1], i, "o", color=_GOOD, label="attack after the defence")
  axis.set_yticks(range(len(tasks)), [TASKS[t].stage for t in reversed(tasks)], fontsize=9)
  axis.set(xlim=(-0.03, 1.03), xlabel="share", ylim=(-0.6, len(tasks) - 0.4))
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(
    handles[:3], labels[:3], frameon=False, fontsize=9, ncols=3, loc="outside upper center"
  )
  pictures.open_frame(axis)
  return figure


def task_picture(made: Sequence[Place], state: np.ndarray, task: str) -> Figure:
  """Draws attack and utility of every row of a task."""
  rows = [(place.row, state[i]) for i, place in enumerate(made) if place.task == task]
  series = {
    name: {row: float(np.nan_to_num(x[COLUMNS.index(name)])) for row, x in rows}
    for name in ("attack", "utility")
  }
  return pictures.bars(series, f"share; attack: {TASKS[task].attack}")


def trade(points: Mapping[str, tuple[float | None, float | None]]) -> Figure:
  """Draws rows as points: success of the attack against utility."""
  figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
  for i, (name, (attack, utility)) in enumerate(points.items()):
    if attack is None or utility is None:
      continue
    axis.plot(attack, utility, "o", color=pictures.COLOURS[i % len(pictures.COLOURS)])
    offset = (5, 5 + 9 * (i % 3))
    axis.annotate(name, (attack, utility), xytext=offset, textcoords="offset points", fontsize=8)
  axis.set(xlabel="success of the attack", ylabel="utility", xlim=(-0.03, 1.1), ylim=(-0.03, 1.15))
  pictures.open_frame(axis)
  return figure


def _text(value: float) -> str:
  if math.isnan(value):
    return "-"
  if math.isinf(value):
    return "∞"
  return f"{value:.3g}"
