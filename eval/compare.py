"""Compares a method with its baselines, many seeds each: `python -m eval.compare --method NAME`.

Every row is trained alike. Finished rows, and the one under way, are kept in the workdir: the same
command continues a comparison that was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmethods import experiments
from jaxmethods.errors import InputError, hint
from jaxmethods.runtime import command, comparing, launch, search, studies

if TYPE_CHECKING:
  from jaxmethods.runtime.command import Given
  from jaxmethods.runtime.experiment import RunConfig, Values
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
  plan = comparing.planned(given, rows, search.parse(args.tune)) if args.tune else None
  bench = comparing.Bench(given, workdir, launch.start(args), header)
  rows, searches = comparing.searched(bench, rows, plan) if plan else (rows, {})
  results, about = [], ""
  for name, config in rows.items():
    about, result = comparing.trained_row(bench, name, config, first=not about)
    results.append(result)
  if session.is_writer():
    _show(given, workdir, about, results, study, searches)
  return 0


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
