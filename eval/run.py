"""Evaluates the last checkpoint of a run: `python -m eval.run --method NAME --workdir DIR`.

Where a method has nothing to train (its `untrained(config)` says so), there need be no run: the cases
are worked off here, and the same command continues where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmethods import experiments
from jaxmethods.runtime import command, launch

if TYPE_CHECKING:
  from jaxmethods.runtime.session import Outcome, Session


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  parser = command.parser("eval.run", "Evaluates the last checkpoint of a run and shows it.")
  asked = command.ask(parser, argv, experiments)
  if asked is None:
    return 0

  from jaxmethods.runtime import session, workdir as workdir_lib

  args, given = asked.args, command.given(asked)
  untrained = given.method.untrained(given.config)
  workdir = command.workdir(given, "eval-" if untrained else "")
  kept, asked_for = workdir / workdir_lib.CONFIG, args.short or args.config
  if not untrained:
    session.require_checkpoints(workdir)
  # The config of the run that is there, unless another one is asked for.
  if not untrained or (args.workdir and kept.exists() and not asked_for):
    file = args.config or kept
    given = given._replace(config=command.load(asked, file), file=file)
    untrained = given.method.untrained(given.config)
  if untrained:
    workdir_lib.check(workdir, given.config, method=args.method)
  if command.printed(given):
    return 0
  run = session.start(given, workdir)
  done = session.train(run) if untrained else session.restore(run)
  if page := session.report(run, done):
    _show(run, done, page)
  return 0


def _show(run: Session, done: Outcome, page: Path) -> None:
  """Writes results.json and prints the metrics."""
  from jaxmethods.runtime import report, workdir

  method = run.given.args.method
  results = {"method": method, "step": done.step, "metrics": done.metrics}
  workdir.write_json(run.workdir / "results.json", results)
  print(run.experiment.about)
  if run.experiment.table:
    report.print_table(method, *run.experiment.table(done.state))
  report.print_table(
    f"{method} after step {done.step}", ("metric", "value"), report.metric_rows(done.metrics)
  )
  print(f"see {page}")


if __name__ == "__main__":
  launch.set_allocator()
  sys.exit(command.run(main))
