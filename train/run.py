"""Trains a method: `python -m train.run --method NAME`. The same command resumes a stopped run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxmethods import experiments
from jaxmethods.runtime import command, launch
from train.export import FORMATS


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  parser = command.parser("train.run", "Trains a method. The same command resumes a stopped run.")
  parser.add_argument(
    "--export", choices=FORMATS, help="also write the model for others, as train.export does"
  )
  given = command.read(parser, argv, experiments)
  if given is None:
    return 0

  from jaxmethods.runtime import session, workdir as workdir_lib

  workdir = command.workdir(given)
  workdir_lib.check(workdir, given.config, may_extend=True, method=given.args.method)
  run = session.start(given, workdir)
  wanted = given.args.export
  if wanted:
    session.check_export(run, wanted)
  if run.writer:
    print(run.experiment.about, flush=True)
  if kept := session.finished(run):
    step, page = kept
    if run.writer:
      print(f"{step} steps done before; see {page}")
    if wanted:
      session.export(run, session.restore(run), wanted, workdir / f"export-{wanted}")
    return 0
  done = session.train(run)
  if shown := session.report(run, done):
    workdir_lib.keep_finished(workdir, done.step)
    print(f"{done.step} steps done; see {shown}")
  if wanted:
    session.export(run, done, wanted, workdir / f"export-{wanted}")
    if run.writer:
      print(f"see {workdir / f'export-{wanted}'}")
  return 0


if __name__ == "__main__":
  launch.set_allocator()
  sys.exit(command.run(main))
