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
from jaxmethods.errors import InputError
from jaxmethods.runtime import command, launch

if TYPE_CHECKING:
  from jaxmethods.runtime.experiment import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  parser = command.parser("eval.run", "Evaluates the last checkpoint of a run and shows it.")
  args, overrides = command.parse(parser, argv)

  if args.list:
    print(experiments.listing())
    return 0

  from jaxmethods.runtime import config as config_lib
  from jaxmethods.runtime import workdir as workdir_lib

  method = experiments.load(args.method)
  file = command.config_file(args)

  def load(file: Path | None, short: bool) -> RunConfig:
    return config_lib.load(
      method.Config, file, short=short, overrides=overrides, method=args.method
    )

  config = load(file, args.short)
  untrained = method.untrained(config)
  workdir = args.workdir or command.default_workdir(args, file, "eval-" if untrained else "")
  checkpoints = workdir / workdir_lib.CHECKPOINTS
  if untrained:
    workdir_lib.check(workdir, config, method=args.method)
  else:
    if not checkpoints.is_dir():
      raise InputError(f"--workdir {workdir}: there is no run with a checkpoint")
    config = load(args.config or workdir / workdir_lib.CONFIG, False)
  if args.print_config:
    print(config_lib.to_yaml(config, method=args.method), end="")
    return 0
  mesh = launch.start(args)
  experiment = method.build(config, mesh)

  import jax

  from jaxmethods.runtime import loop, report

  if untrained:
    create = lambda: workdir_lib.create(workdir, config, method=args.method)
    try:
      state, metrics = loop.train(
        experiment, config, workdir, create_workdir=create, title=args.method, mesh=mesh,
        debug=args.debug,
      )  # fmt: skip
    except loop.Stopped as stopped:
      print(stopped, flush=True)
      return stopped.status
    step = experiment.num_steps
  else:
    step, state, metrics = loop.evaluate(experiment, config, checkpoints, mesh)
  # By every process: they may compute on the whole mesh.
  figures, files = experiment.figures(state), experiment.files(state)
  if jax.process_index() == 0:
    page = report.write(
      workdir,
      title=args.method,
      about=experiment.about,
      step=step,
      metrics=metrics,
      figures=figures,
      files=files,
    )
    workdir_lib.write_json(
      workdir / "results.json", {"method": args.method, "step": step, "metrics": metrics}
    )
    print(experiment.about)
    report.print_table(
      f"{args.method} after step {step}",
      ("metric", "value"),
      report.metric_rows(metrics),
    )
    print(f"see {page}")
  return 0


if __name__ == "__main__":
  launch.set_allocator()
  sys.exit(command.run(main))
