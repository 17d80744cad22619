"""Chooses settings of the rows of a comparison on validation, with equal effort. Imports no jax.

Every row tries every point of one grid at the budget of the comparison. `eval.compare` runs them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from jaxmethods.errors import InputError
from jaxmethods.runtime import command
from jaxmethods.runtime.command import Given
from jaxmethods.runtime.experiment import RunConfig, Selection, Values

Point: TypeAlias = Mapping[str, object]  # config key -> value
ENOUGH, SEEDS = 400, 3  # validation items that one seed is enough for; seeds where there are fewer
_RUN = {field.name for field in dataclasses.fields(RunConfig)}


def parse(text: str) -> dict[str, list[str]]:
  """Reads a grid: "learning_rate=1e-4,1e-3;tau=1,10".

  Args:
    text: keys with their values; every combination is a point.

  Raises:
    InputError: a key without two different values, or one that is no setting of a row.
  """
  grid: dict[str, list[str]] = {}
  for part in text.split(";"):
    key, equals, words = part.partition("=")
    key, values = key.strip(), [word.strip() for word in words.split(",")]
    if not (key and equals and all(values)):
      raise InputError(f"--tune: {part.strip()!r} is not KEY=VALUE,VALUE,..")
    if key in grid:
      raise InputError(f"--tune: {key} stands there twice")
    if key in _RUN:
      raise InputError(f"--tune: {key} belongs to the run; choose a setting of the rows")
    if len(values) < 2 or len(set(values)) < len(values):
      raise InputError(f"--tune: {key} needs two different values or more, got {words.strip()!r}")
    grid[key] = values
  return grid


def points(given: Given, grid: Mapping[str, Sequence[str]]) -> list[dict[str, object]]:
  """Makes the points of a grid, with values of the types of the config.

  Raises:
    InputError: an unknown key, or a value that is none of its own.
  """
  typed: list[list[tuple[str, object]]] = []
  for key, words in grid.items():
    values = []
    for word in words:
      asked = given.asked._replace(overrides=[*given.asked.overrides, (key, word)])
      value: object = command.load(asked, given.file, short=given.args.short)
      for name in key.split("."):
        value = getattr(value, name)
      values.append((key, value))
    if len({repr(value) for _, value in values}) < len(values):
      raise InputError(f"--tune: {key} has one value twice, got {','.join(words)}")
    typed.append(values)
  return [dict(point) for point in itertools.product(*typed)]


def changed(config: RunConfig, point: Point) -> RunConfig:
  """Puts the values of a point into a config."""
  for key, value in point.items():
    config = _replaced(config, key.split("."), value)
  return config


def _replaced(config, path: Sequence[str], value: object):
  name, *rest = path
  inner = _replaced(getattr(config, name), rest, value) if rest else value
  return dataclasses.replace(config, **{name: inner})


def selection(given: Given, name: str, config: RunConfig) -> Selection | None:
  """Returns how a setting of a row is chosen; None for rows that have nothing to choose.

  Raises:
    InputError: the method has no validation split.
  """
  found = given.method.selection(config)
  if found is None and given.method.selection(given.config) is None:
    raise InputError(
      f"--tune: {given.args.method} has no validation split here to choose settings of {name} on"
    )
  return found


def num_seeds(validation_items: int) -> int:
  """Returns how many seeds a point is judged by."""
  return 1 if validation_items >= ENOUGH else SEEDS


def label(point: Point) -> str:
  """Returns a point in words."""
  text = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
  return " ".join(f"{key}={text(value)}" for key, value in point.items())


def file_of(folder: Path, row: str, index: int) -> Path:
  """Returns where the result of a point is kept."""
  return folder / "tune" / row / f"{index}.json"


def best(trials: Sequence[Values], metric: str, floors: Mapping[str, float]) -> int:
  """Chooses a trial; the earlier of equals.

  Args:
    trials: {"metrics": metric -> {"mean": number or None}} each, of the points in their order.
    metric: the highest wins among those that meet the floors; where none does, the one that misses
      them by least.
    floors: metric -> least value.

  Returns:
    Its index.
  """

  def rank(trial: Values) -> tuple[float, float]:
    mean = lambda name: _mean(trial, name)
    short = sum(max(0.0, least - mean(name)) for name, least in floors.items())
    return -short, mean(metric)

  return max(range(len(trials)), key=lambda i: (*rank(trials[i]), -i))


def _mean(trial: Values, name: str) -> float:
  value = trial["metrics"].get(name, {}).get("mean")
  return -math.inf if value is None or math.isnan(value) else value


def summary(chosen: Selection, grid: Sequence[Point], trials: Sequence[Values]) -> Values:
  """Describes the search of a row, for the JSON of a comparison."""
  index = best(trials, chosen.metric, chosen.floors)
  met = all(_mean(trials[index], name) >= least for name, least in chosen.floors.items())
  return {
    "metric": chosen.metric,
    "floors": dict(chosen.floors),
    "floors_met": met,
    "chosen": dict(grid[index]),
    "trials": [{"point": dict(point), **trial} for point, trial in zip(grid, trials, strict=True)],
  }


def table(searches: Mapping[str, Values]) -> tuple[list[str], list[list[str]]]:
  """Returns header and lines of all searches: a line a row, a column a point."""
  first = next(iter(searches.values()))
  labels = [label(trial["point"]) for trial in first["trials"]]
  lines = []
  for name, search in searches.items():
    rule = search["metric"]
    for floor, least in search["floors"].items():
      rule += f", {floor} >= {least:g}" + ("" if search["floors_met"] else " (missed)")
    cells = []
    for trial in search["trials"]:
      value = trial["metrics"].get(search["metric"], {}).get("mean")
      text = "-" if value is None else f"{value:.4g}"
      cells.append(f"[{text}]" if trial["point"] == search["chosen"] else text)
    lines.append([name, rule, str(search["trials"][0]["seeds"]), *cells])
  return ["validation, [chosen]", "criterion", "seeds", *labels], lines
