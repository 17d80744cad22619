"""Compares a method with its baselines, many seeds each: `python -m eval.compare --method NAME`.

Every row is trained alike. Finished rows, and the one under way, are kept in the workdir: the same
command continues a comparison that was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxmethods import experiments
from jaxmethods.errors import InputError, hint
from jaxmethods.runtime import command, launch, search, studies

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from jaxmethods.runtime.command import Given
  from jaxmethods.runtime.experiment import RunConfig, Selection, Values
  from jaxmethods.runtime.seeds import Trained
  from jaxmethods.runtime.session import Session
  from jaxmethods.runtime.studies import Study


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  given = command.read(_parser(), argv, experiments)
  if given is None:
    return 0
  args = given.args
  study = _study(given)
  every_row = studies.rows(study) if study else given.method.rows(given.config)
  if args.list_rows:
    print("\n".join(every_row))
    return 0

  from jaxmethods.runtime import session, workdir as workdir_lib

  rows = _chosen(every_row, args.rows)
  _check(given)
  workdir = command.workdir(given, f"study-{args.study}-" if study else "compare-")
  asked = {name: getattr(args, name) for name in ("tune", "along") if getattr(args, name)}
  header = {"method": args.method, "seeds": args.seeds, **asked}
  workdir_lib.check(workdir, given.config, **header)
  plan = _planned(given, rows, search.parse(args.tune)) if args.tune else None
  bench = _Bench(given, workdir, launch.start(args), header)
  rows, searches = _searched(bench, rows, plan) if plan else (rows, {})
  results, about = [], ""
  for name, config in rows.items():
    about, result = _row(bench, name, config, first=not about)
    results.append(result)
  if session.is_writer():
    _show(given, workdir, about, results, study, searches)
  return 0


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
  from jaxmethods.runtime import seeds, session

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


class _Bench(NamedTuple):
  """Where a comparison is run: command line, folder, devices, and what the folder must agree with."""

  given: Given
  workdir: Path
  mesh: Mesh | None
  header: Values

  def built(self, config: RunConfig, folder: Path) -> Session:
    """Builds a run, and notes its data."""
    from jaxmethods.runtime import session, workdir as workdir_lib

    row = session.build(self.given._replace(config=config), folder, self.mesh)
    workdir_lib.check_data(self.workdir, row.experiment.about)
    if row.writer:
      workdir_lib.create(self.workdir, self.given.config, **self.header)
      workdir_lib.keep_data(self.workdir, row.experiment.about)
    return row


def _row(bench: _Bench, name: str, config: RunConfig, first: bool) -> tuple[str, Values]:
  """Trains a row, or reads it where it is finished; returns (about, its results)."""
  from jaxmethods.runtime import workdir as workdir_lib

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


class _Plan(NamedTuple):
  """A search: its points, and row -> how it chooses; rows with nothing to choose are left out."""

  points: list[dict[str, object]]
  rules: dict[str, Selection]


def _planned(
  given: Given, rows: Mapping[str, RunConfig], grid: Mapping[str, Sequence[str]]
) -> _Plan:
  """Plans a search; whatever cannot be tried is refused here, before the devices start."""
  points = search.points(given, grid)
  found = {name: search.selection(given, name, config) for name, config in rows.items()}
  rules = {name: rule for name, rule in found.items() if rule}
  for rule in rules.values():
    for point in points:
      search.changed(rule.config, point)
  return _Plan(points, rules)


def _searched(
  bench: _Bench, rows: Mapping[str, RunConfig], plan: _Plan
) -> tuple[dict[str, RunConfig], dict[str, Values]]:
  """Tries every point on validation in every row; returns (rows as chosen, searches)."""
  chosen, found = dict(rows), {}
  for name, rule in plan.rules.items():
    trials = [_trial(bench, name, rule.config, plan.points, i) for i in range(len(plan.points))]
    found[name] = search.summary(rule, plan.points, trials)
    chosen[name] = search.changed(rows[name], found[name]["chosen"])
  return chosen, found


def _trial(
  bench: _Bench, name: str, config: RunConfig, points: Sequence[search.Point], index: int
) -> Values:
  """Trains a row at one point and evaluates it on validation, or reads what it came to."""
  from jaxmethods.runtime import workdir as workdir_lib

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


def _show(
  given: Given,
  workdir: Path,
  about: str,
  results: list[Values],
  study: Study | None,
  searches: Mapping[str, Values],
) -> None:
  """Writes compare.json and the page, and prints the table; those of a study, by its factor."""
  from jaxmethods.runtime import matched, report, session, workdir as workdir_lib

  args = given.args
  verdicts = studies.judge(study, results) if study else []
  contents: Values = {"rows": results}
  if study:
    contents |= {"question": study.question, "verdicts": [v._asdict() for v in verdicts]}
  if searches:
    contents["tune"] = dict(searches)
  rule = given.method.selection(given.config)
  read = matched.reading(results, rule.trade, args.method) if rule and rule.trade else None
  if read:
    contents["matched"] = read
  for target in filter(None, (workdir / "compare.json", args.json)):
    workdir_lib.write_json(target, contents)
  varied = given.config.seeds_vary
  title = f"{args.method}: {args.seeds} seeds ({varied} differ), mean ± 95 % interval"
  header, lines = _table(results)
  report.print_table(title, header, lines)
  intervals = report.intervals(results, _headline(results)[:2], highlight=args.method)
  if searches:
    report.print_table(
      "settings chosen on validation, the same effort a row", *search.table(searches)
    )
  if read:
    report.print_table(*matched.table(read))
  figures = {"comparison": intervals} | given.method.comparison(results)
  if study:
    tables = [studies.table(study, results, metric) for metric in study.metrics]
    for table in (*tables, studies.verdict_table(verdicts)):
      report.print_table(study.question, *table)
    figures = {"study": studies.picture(study, results), **figures}
  page = report.write_comparison(
    workdir,
    title=title,
    about=about,
    facts=session.facts(given, sum(row["seconds"] for row in results)),
    header=header,
    rows=lines,
    figures=figures,
  )
  print(f"see {page}")


def _parser() -> argparse.ArgumentParser:
  parser = command.parser("eval.compare", "Trains a method and its baselines alike, many seeds.")
  add = parser.add_argument_group("comparison").add_argument
  add("--rows", metavar="A,B", help="which of the method's rows (default: all)")
  add("--list_rows", action="store_true", help="list the rows of the method and stop")
  add("--study", metavar="NAME", help="a question of the method instead of its rows, such as H1")
  add(
    "--tune",
    metavar="KEY=V,V,..",
    help="first choose settings of each row on validation: the same values and budget for all, "
    "e.g. learning_rate=1e-4,1e-3;tau=1,10 (every combination)",
  )
  add(
    "--along",
    metavar="N",
    type=int,
    help="also measure at N ends of parts of the run, for what is lost at equal gain",
  )
  add("--seeds", metavar="N", type=int, default=5, help="seeds for each row (default: 5)")
  add("--json", metavar="FILE", type=command.local, help="also write the results there")
  add(
    "--seed_map",
    choices=("vmap", "scan", "loop"),
    help="all seeds at once in one program, one after the other in it, or the program of one seed "
    "called for each (default: loop on CPU, else vmap)",
  )
  return parser


def _study(given: Given) -> Study | None:
  """Returns the study that `--study` names."""
  name = given.args.study
  if name is None:
    return None
  if name not in (known := given.method.studies(given.config)):
    advice = hint(name, known, "studies") if known else f"{given.args.method} has none"
    raise InputError(f"--study: unknown study {name!r}; {advice}")
  return studies.Study(*known[name])


def _chosen(rows: Mapping[str, RunConfig], names: str | None) -> dict[str, RunConfig]:
  """Returns the rows that `--rows` names, in its order."""
  chosen = list(rows) if names is None else [name.strip() for name in names.split(",")]
  for name in chosen:
    if name not in rows:
      raise InputError(f"--rows: unknown row {name!r}; {hint(name, rows, 'rows')}")
  return {name: rows[name] for name in chosen}


def _check(given: Given) -> None:
  args = given.args
  if args.seeds < 1:
    raise InputError(f"--seeds: must be at least 1, got {args.seeds}")
  if args.along is not None and args.along < 2:
    raise InputError(f"--along: must be at least 2, got {args.along}")
  rule = given.method.selection(given.config)
  if args.along and not (rule and rule.trade):
    raise InputError(
      f"--along: {args.method} has no metric here that is lost while another is gained"
    )
  if args.json and not args.json.resolve().parent.is_dir():
    raise InputError(f"--json {args.json}: there is no directory {args.json.resolve().parent}")


def _headline(results: Sequence[Values]) -> list[str]:
  """Returns the metrics worth a column; parts of one (`accuracy/MUTAG`) are in the JSON only."""
  names = list(results[0]["metrics"])
  return [name for name in names if "/" not in name] or names


def _table(results: Sequence[Values]) -> tuple[list[str], list[list[str]]]:
  """Returns header and lines: the first metric with its seeds, then the others, then the cost."""
  names = _headline(results)
  header = ["", names[0], "each seed", *names[1:], "ms/step", "MB", "seconds"]
  lines = []
  for row in results:
    first, *others = (row["metrics"].get(name) for name in names)
    each = " ".join("nan" if value is None else f"{value:.4g}" for value in first["values"])
    cost = [_scaled(row, "step_seconds", 1e3), _scaled(row, "step_bytes", 1e-6)]
    seconds = f"{row['seconds']:.1f}"
    lines.append([row["name"], _interval(first), each, *map(_interval, others), *cost, seconds])
  return header, lines


def _scaled(row: Values, name: str, factor: float) -> str:
  value = row.get(name)
  return "-" if value is None else f"{value * factor:.3g}"


def _interval(result: Values | None) -> str:
  if result is None:  # a row without this metric
    return "-"
  if result["mean"] is None:
    return "not finite"
  spread = "" if result["ci95"] is None else f" ± {result['ci95']:.2g}"
  return f"{result['mean']:.4g}{spread}"


if __name__ == "__main__":
  launch.set_allocator()
  sys.exit(command.run(main))
