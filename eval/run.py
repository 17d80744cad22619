"""Evaluates the last checkpoint of a run: `python -m eval.run --method NAME --workdir DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxmethods.errors import InputError
from jaxmethods.runtime import command, launch


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  parser = command.parser("eval.run", "Evaluates the last checkpoint of a run and shows it.")
  args, overrides = command.parse(parser, argv)

  from jaxmethods import experiments

  if args.list:
    print(experiments.listing())
    return 0

  from jaxmethods.runtime import config as config_lib
  from jaxmethods.runtime import workdir as workdir_lib

  method = experiments.load(args.method)
  workdir = args.workdir or command.default_workdir(args, command.config_file(args))
  file = args.config or workdir / workdir_lib.CONFIG
  checkpoints = workdir / workdir_lib.CHECKPOINTS
  if not checkpoints.is_dir():
    raise InputError(f"--workdir {workdir}: there is no run with a checkpoint")
  config = config_lib.load(method.Config, file, overrides=overrides, method=args.method)
  if args.print_config:
    print(config_lib.to_yaml(config, method=args.method), end="")
    return 0
  mesh = launch.start(args)
  experiment = method.build(config, mesh)

  import jax

  from jaxmethods.runtime import loop, report

  step, state, metrics = loop.evaluate(experiment, config, checkpoints, mesh)
  figures = experiment.figures(state)  # by every process: it may compute on the whole mesh
  if jax.process_index() == 0:
    page = report.write(
      workdir,
      title=args.method,
      about=experiment.about,
      step=step,
      metrics=metrics,
      figures=figures,
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
