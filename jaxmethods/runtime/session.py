"""The one path of the entry points: start, build, train or restore, report.

Imports no jax before `start`: what is wrong with the workdir is said at once.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxmethods.errors import InputError
from jaxmethods.runtime import command, launch, workdir as workdir_lib
from jaxmethods.runtime.command import Given
from jaxmethods.runtime.experiment import Experiment, State
from jaxmethods.runtime.waiting import waiting

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from jaxmethods.runtime.report import Facts


class Session(NamedTuple):
  """A method that is ready to run.

  Attributes:
    given: the command line.
    workdir: directory of the run.
    experiment: what its room built.
    mesh: devices to use; None for one.
    writer: whether this process writes and prints.
  """

  given: Given
  workdir: Path
  experiment: Experiment
  mesh: Mesh | None
  writer: bool


class Outcome(NamedTuple):
  """A state, the step it is of, and its evaluation."""

  step: int
  state: State
  metrics: Mapping[str, object]


def start(given: Given, workdir: Path) -> Session:
  """Starts the devices and builds the method."""
  return build(given, workdir, launch.start(given.args))


def build(given: Given, workdir: Path, mesh: Mesh | None) -> Session:
  """Builds the method on devices that are started.

  Raises:
    InputError: the run in `workdir` was made with other data.
  """
  with waiting("preparing data and model", quiet=not is_writer()):
    experiment = given.method.build(given.config, mesh)
  workdir_lib.check_data(workdir, experiment.about)
  return Session(given, workdir, experiment, mesh, is_writer())


def is_writer() -> bool:
  """Tells whether this process is the one that writes and prints."""
  import jax

  return jax.process_index() == 0


def train(session: Session) -> Outcome:
  """Trains to the end, from the last checkpoint if there is one.

  Raises:
    Stopped: SIGTERM or SIGINT came; the state has been saved.
  """
  from jaxmethods.runtime import loop

  given, workdir, name = session.given, session.workdir, session.given.args.method

  def create_workdir() -> None:
    workdir_lib.create(workdir, given.config, method=name)
    workdir_lib.keep_data(workdir, session.experiment.about)

  state, metrics = loop.train(
    session.experiment,
    given.config,
    workdir,
    create_workdir=create_workdir,
    title=name,
    mesh=session.mesh,
    debug=given.args.debug,
  )
  return Outcome(session.experiment.num_steps, state, metrics)


def restore(session: Session) -> Outcome:
  """Restores the last checkpoint and evaluates it."""
  from jaxmethods.runtime import loop

  checkpoints = session.workdir / workdir_lib.CHECKPOINTS
  return Outcome(
    *loop.evaluate(session.experiment, session.given.config, checkpoints, session.mesh)
  )


def report(session: Session, outcome: Outcome) -> Path | None:
  """Writes report.html with its pictures and files; returns the page, None where others write."""
  # By every process: they may compute on the whole mesh.
  with waiting("drawing the pictures", quiet=not session.writer):
    figures = session.experiment.figures(outcome.state)
    files = session.experiment.files(outcome.state)
  if not session.writer:
    return None
  from jaxmethods.runtime import report as page  # matplotlib takes 0.6 s

  return page.write(
    session.workdir,
    facts=facts(session.given, _seconds(session.workdir)),
    about=session.experiment.about,
    step=outcome.step,
    metrics=outcome.metrics,
    figures=figures,
    files=files,
  )


def facts(given: Given, seconds: float) -> Facts:
  """Collects what a page says of a run: paper, command, settings, device, time."""
  import jax

  from jaxmethods.runtime.report import Facts

  entry, device = given.asked.entry, jax.devices()[0]
  changed = command.changed(given)
  settings = ", ".join(
    f"{key} {now!r} (default {usual!r})" for key, (usual, now) in changed.items()
  )
  on = f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}"
  run = [
    ("command", given.asked.words),
    ("other than the default", settings or "nothing"),
    ("device", on),
    ("seconds of training", f"{seconds:,.1f}"),
    ("date", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
  ]
  short = command.is_short(given)
  if entry is None:
    return Facts(given.args.method, short=short, run=run)
  return Facts(entry.title, entry.paper, entry.summary, short, run)


def _seconds(workdir: Path) -> float:
  """Returns the seconds of all steps, those before an interruption too."""
  from jaxmethods.runtime import metric_log

  lines = metric_log.read(workdir) if (workdir / metric_log.METRICS).exists() else []
  return sum(line.get("seconds", 0.0) for line in lines)


def check_export(session: Session, form: str) -> None:
  """Refuses a format that a run does not have, before it is trained.

  Raises:
    InputError: names the formats that there are.
  """
  export = session.experiment.export
  if export is None:
    raise InputError(f"--format {form}: {session.given.args.method} has no model of other formats")
  if form not in export.formats:
    why = f" ({export.why_not})" if export.why_not else ""
    raise InputError(f"--format {form}: this run has {', '.join(export.formats)} only{why}")


def export(session: Session, outcome: Outcome, form: str, folder: Path) -> None:
  """Writes the model of a state, and its card, where the writer is.

  An earlier export that lies there is replaced.

  Raises:
    InputError: the folder holds something else, or cannot be written.
  """
  from jaxmethods.runtime import card

  check_export(session, form)
  exporter = session.experiment.export
  assert exporter is not None
  with waiting(f"writing {folder}", quiet=not session.writer):
    if session.writer:
      workdir_lib.empty(folder, card.NAME)
    exporter.write(outcome.state, form, folder)
  if session.writer:
    text = card.text(
      facts=facts(session.given, _seconds(session.workdir)),
      about=session.experiment.about,
      step=outcome.step,
      metrics=outcome.metrics,
      form=form,
      base=exporter.base,
    )
    workdir_lib.write_text(folder / card.NAME, text)


def finished(session: Session) -> tuple[int, Path] | None:
  """Returns (step, page) of a run that was done to its end and reported as it stands, else None."""
  kept = workdir_lib.read_finished(session.workdir)
  step = session.experiment.num_steps
  return (step, session.workdir / workdir_lib.REPORT) if kept == step else None


def require_checkpoints(workdir: Path) -> None:
  """Raises where there is nothing to evaluate.

  Raises:
    InputError: `workdir` holds no checkpoints.
  """
  if not (workdir / workdir_lib.CHECKPOINTS).is_dir():
    raise InputError(f"--workdir {workdir}: there is no run with a checkpoint")
