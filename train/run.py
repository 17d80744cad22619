"""Trains a method: `python -m train.run --method NAME`. The same command resumes a stopped run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxmethods import experiments
from jaxmethods.runtime import command, launch


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  parser = command.parser("train.run", "Trains a method. The same command resumes a stopped run.")
  given = command.read(parser, argv, experiments)
  if given is None:
    return 0
  args, method, config, file = given

  from jaxmethods.runtime import workdir as workdir_lib

  workdir = args.workdir or command.default_workdir(args, file)
  workdir_lib.check(workdir, config, may_extend=True, method=args.method)
  mesh = launch.start(args)
  experiment = method.build(config, mesh)

  import jax

  from jaxmethods.runtime import loop

  if jax.process_index() == 0:
    print(experiment.about, flush=True)
  try:
    state, metrics = loop.train(
      experiment,
      config,
      workdir,
      create_workdir=lambda: workdir_lib.create(workdir, config, method=args.method),
      title=args.method,
      mesh=mesh,
      debug=args.debug,
    )
  except loop.Stopped as stopped:
    print(stopped, flush=True)
    return stopped.status
  # By every process: they may compute on the whole mesh.
  figures, files = experiment.figures(state), experiment.files(state)
  if jax.process_index() == 0:
    from jaxmethods.runtime import report  # matplotlib takes 0.6 s

    page = report.write(
      workdir,
      title=args.method,
      about=experiment.about,
      step=experiment.num_steps,
      metrics=metrics,
      figures=figures,
      files=files,
    )
    print(f"{experiment.num_steps} steps done; see {page}")
  return 0


if __name__ == "__main__":
  launch.set_allocator()
  sys.exit(command.run(main))
