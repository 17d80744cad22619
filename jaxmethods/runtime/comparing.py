"""Trains the rows of a comparison, and before them what is tried on validation.

Whatever is finished lies in the workdir and is read from there. Imports no jax before a row is built.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxmethods.runtime import search, session, workdir as workdir_lib

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from jaxmethods.runtime.command import Given
  from jaxmethods.runtime.experiment import RunConfig, Selection, Values
  from jaxmethods.runtime.seeds import Trained
  from jaxmethods.runtime.session import Session


def _trained(name: str, row: Session, num: int, along: int = 0) -> Values:
  """Trains `num` seeds of a row, from its last checkpoint if there is one.

  Args:
    name: of the row.
    row: built.
    num: of seeds.
    along: parts of the run that metrics are kept of; see `seeds.train`.
  """
  import jax

  from jaxmethods.runtime import seeds

  args = row.given.args
  # On two CPU cores, 5 seeds: a convnet step takes 88 ms in the loop, 366 under vmap, 690 under scan;
  # a dense one 440, 584, 401.
  seed_map = args.seed_map or ("loop" if jax.default_backend() == "cpu" else "vmap")
  if row.given.config.counted:
    trained = _one_by_one(name, row, seed_map, num, along)
  else:
    trained = seeds.train(
      row.experiment, row.given.config, row.workdir, seeds=num, seed_map=seed_map, title=name,
      mesh=row.mesh, along=along,
    )  # fmt: skip
  metrics = {metric: seeds.summarize(numbers) for metric, numbers in trained.values.items()}
  path: Values = {}
  if trained.along:
    path = {
      "along": {
        "steps": seeds.points_along(row.experiment.num_steps, along),
        "metrics": trained.along,
      }
    }
  return {
    "name": name,
    "metrics": metrics,
    "seconds": round(trained.seconds, 3),
    "step_seconds": trained.step_seconds,
    "step_bytes": trained.step_bytes,
    **path,
  }


def _one_by_one(name: str, row: Session, seed_map: str, num: int, along: int) -> Trained:
  """Trains the seeds of a row one by one, each with data or splits of its own."""
  from jaxmethods.runtime import seeds

  parts = []
  for i in range(num):
    folder, config = row.workdir / f"seed-{i}", row.given.config
    if i:
      counted = {field: getattr(config, field) + i for field in ("seed", *config.counted)}
      config = dataclasses.replace(config, **counted)
      experiment = session.build(row.given._replace(config=config), folder, row.mesh).experiment
    else:
      experiment = row.experiment
    title = f"{name}, seed {i + 1}"
    parts.append(
      seeds.train(
        experiment, config, folder, seeds=1, seed_map=seed_map, title=title, mesh=row.mesh,
        along=along,
      )
    )  # fmt: skip
  return seeds.joined(parts)


class Bench(NamedTuple):
  """Where a comparison is run: command line, folder, devices, and what the folder must agree with."""

  given: Given
  workdir: Path
  mesh: Mesh | None
  header: Values

  def built(self, config: RunConfig, folder: Path) -> Session:
    """Builds a run, and notes its data."""
    row = session.build(self.given._replace(config=config), folder, self.mesh)
    workdir_lib.check_data(self.workdir, row.experiment.about)
    if row.writer:
      workdir_lib.create(self.workdir, self.given.config, **self.header)
      workdir_lib.keep_data(self.workdir, row.experiment.about)
    return row


def trained_row(bench: Bench, name: str, config: RunConfig, first: bool) -> tuple[str, Values]:
  """Trains a row, or reads it where it is finished; returns (about, its results)."""
  finished, args = bench.workdir / "rows" / f"{name}.json", bench.given.args
  if finished.exists():
    kept = json.loads(finished.read_text(encoding="utf-8"))
    return kept["about"], kept["row"]
  row = bench.built(config, bench.workdir / "rows" / name)
  if row.writer and first:
    print(row.experiment.about, flush=True)
  about, result = row.experiment.about, _trained(name, row, args.seeds, args.along or 0)
  if row.writer:
    workdir_lib.write_json(finished, {"about": about, "row": result})
    shutil.rmtree(row.workdir)
  return about, result


class Plan(NamedTuple):
  """A search: its points, and row -> how it chooses; rows with nothing to choose are left out."""

  points: list[dict[str, object]]
  rules: dict[str, Selection]


def planned(given: Given, rows: Mapping[str, RunConfig], grid: Mapping[str, Sequence[str]]) -> Plan:
  """Plans a search; whatever cannot be tried is refused here, before the devices start."""
  points = search.points(given, grid)
  found = {name: search.selection(given, name, config) for name, config in rows.items()}
  rules = {name: rule for name, rule in found.items() if rule}
  for rule in rules.values():
    for point in points:
      search.changed(rule.config, point)
  return Plan(points, rules)


def searched(
  bench: Bench, rows: Mapping[str, RunConfig], plan: Plan
) -> tuple[dict[str, RunConfig], dict[str, Values]]:
  """Tries every point on validation in every row; returns (rows as chosen, searches)."""
  chosen, found = dict(rows), {}
  for name, rule in plan.rules.items():
    trials = [_trial(bench, name, rule.config, plan.points, i) for i in range(len(plan.points))]
    found[name] = search.summary(rule, plan.points, trials)
    chosen[name] = search.changed(rows[name], found[name]["chosen"])
  return chosen, found


def _trial(
  bench: Bench, name: str, config: RunConfig, points: Sequence[search.Point], index: int
) -> Values:
  """Trains a row at one point and evaluates it on validation, or reads what it came to."""
  file = search.file_of(bench.workdir, name, index)
  if file.exists():
    kept: Values = json.loads(file.read_text(encoding="utf-8"))
    return kept
  folder = file.with_suffix("")
  row = bench.built(search.changed(config, points[index]), folder)
  num = search.num_seeds(row.experiment.validation_items)
  result = _trained(f"{name}, {search.label(points[index])}", row, num)
  trial = {"seeds": num, "seconds": result["seconds"], "metrics": result["metrics"]}
  if row.writer:
    workdir_lib.write_json(file, trial)
    shutil.rmtree(folder)
  return trial
