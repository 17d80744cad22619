"""The training loop: the only one, for every method."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxmethods.errors import InputError, Stopped
from jaxmethods.runtime import compiler
from jaxmethods.runtime.checkpoints import Checkpoints
from jaxmethods.runtime.experiment import (
  Batch,
  Experiment,
  Metrics,
  RunConfig,
  State,
  Test,
  Values,
)
from jaxmethods.runtime.launch import replicate
from jaxmethods.runtime.metric_log import Display, MetricLog, plain
from jaxmethods.runtime.waiting import waiting
from jaxmethods.runtime.workdir import CHECKPOINTS


class Tools(NamedTuple):
  """What a run is kept, logged, shown and stopped with; only one process has a log."""

  checkpoints: Checkpoints
  signals: Signals
  log: MetricLog | None
  display: Display


def train(
  experiment: Experiment,
  config: RunConfig,
  workdir: Path,
  *,
  create_workdir: Callable[[], None],
  title: str,
  mesh: Mesh | None = None,
  debug: bool = False,
) -> tuple[State, Values]:
  """Runs an experiment to its end, from its last checkpoint if `workdir` has one.

  Args:
    experiment: what to train.
    config: settings of the run.
    workdir: where checkpoints and metrics are kept.
    create_workdir: called once the experiment has shown that it can start, so that bad input
      leaves nothing behind.
    title: name beside the progress bar.
    mesh: devices to use; None for one.
    debug: whether NaNs are traced to the operation that made them.

  Returns:
    The final state, and the metrics of its evaluation.

  Raises:
    InputError: the loss is not finite; the last good checkpoint is kept.
    Stopped: SIGTERM or SIGINT came; the state has been saved.
  """
  writer = jax.process_index() == 0
  experiment = ordered(experiment)
  with waiting("making the first state", quiet=not writer):
    state = replicate(experiment.init(jax.random.key(config.seed)), mesh)
  step, evaluate = compile_experiment(experiment, state, mesh, donate=not debug)
  if writer:
    create_workdir()

  with Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints) as checkpoints:
    with waiting("restoring the checkpoint", quiet=not writer):
      start, state = checkpoints.restore(state) or (0, state)
    if start and writer:
      print(f"continuing from step {start} in {workdir}", flush=True)
    with (
      Signals() as signals,
      MetricLog(workdir, start) if writer else contextlib.nullcontext() as log,
      Display(title, start, experiment.num_steps, quiet=not writer) as display,
    ):
      tools = Tools(checkpoints, signals, log, display)
      state, evaluated = _steps(experiment, config, (step, evaluate), tools, start, state, debug)
  # {}: the run was complete already.
  if not evaluated:
    with waiting("evaluating", quiet=not writer):
      evaluated = plain(jax.device_get(evaluate(state, experiment.test)))
  return state, evaluated


def _steps(
  experiment: Experiment,
  config: RunConfig,
  programs: tuple[Callable, Callable],
  tools: Tools,
  start: int,
  state: State,
  debug: bool,
) -> tuple[State, Values]:
  """Does the steps after `start`; returns the state and its evaluation, {} without a step."""
  (step, evaluate), last = programs, experiment.num_steps
  batches, evaluated = experiment.batches(start), Values()
  pending: dict[int, Metrics] = {}  # step -> metrics still on the device
  clock = time.perf_counter()
  for k in range(start + 1, last + 1):
    with _nan_named(k, debug), _first_of(k == start + 1, "compiling the step", tools):
      state, pending[k] = step(state, next(batches))
    logged = k % config.log_every == 0 or k == last
    if logged:
      metrics = _fetch_checked(pending)
      if _evaluation_due(k, config, last):
        with waiting("evaluating", quiet=not tools.log):
          evaluated = plain(jax.device_get(evaluate(state, experiment.test)))
        metrics |= evaluated
      seconds, clock = time.perf_counter() - clock, time.perf_counter()
      if tools.log:
        tools.log.write(k, {"loss": metrics["loss"], **metrics, "seconds": round(seconds, 4)})
    tools.display.update(k, {"loss": metrics["loss"], **evaluated} if logged else None)
    stop = tools.signals.received(agree=logged)
    if stop or k % config.checkpoint_every == 0 or k == last:
      _fetch_checked(pending)  # a state whose loss is not finite must not replace a good one
      if tools.log:
        tools.log.sync()
      tools.checkpoints.save(k, state)
    if stop and k < last:
      tools.checkpoints.wait()
      raise Stopped(stop.name, 128 + stop, k)
  return state, evaluated


def evaluate(
  experiment: Experiment, config: RunConfig, checkpoints: Path, mesh: Mesh | None = None
) -> tuple[int, State, Values]:
  """Returns (step, state, metrics) of the newest checkpoint in the directory `checkpoints`."""
  experiment, quiet = ordered(experiment), jax.process_index() != 0
  with waiting("making the first state", quiet=quiet):
    state = replicate(experiment.init(jax.random.key(config.seed)), mesh)
  with (
    waiting("restoring the checkpoint", quiet=quiet),
    Checkpoints(checkpoints, read_only=True) as reader,
  ):
    restored = reader.restore(state)
  if restored is None:
    raise InputError(f"{checkpoints}: there is no complete checkpoint yet")
  step, state = restored
  _, evaluate = compile_experiment(experiment, state, mesh)
  with waiting("evaluating", quiet=quiet):
    return step, state, plain(jax.device_get(evaluate(state, experiment.test)))


def compile_experiment(
  experiment: Experiment, state: State, mesh: Mesh | None, *, donate: bool = True
) -> tuple[Callable, Callable]:
  """Returns (step, evaluate), jitted, unless the experiment brings programs of its own.

  On a mesh the state keeps the sharding that `init` gave it (or XLA might choose another one after
  the first step, and compile again), and metrics come out replicated, so that every process can
  read them.
  """
  if experiment.programs:
    return experiment.programs
  sharding: State = None
  replicated: jax.sharding.NamedSharding | None = None
  if mesh:
    sharding = jax.tree.map(lambda x: x.sharding, state)
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
  step = compiler.jit(
    experiment.step,
    donate_argnums=0 if donate else (),
    out_shardings=(sharding, replicated) if mesh else None,
  )
  return step, compiler.jit(experiment.evaluate, out_shardings=replicated)


def advance(
  step: Callable[[State, Batch], tuple[State, Metrics]],
  state: State,
  batches: Iterator[Batch],
  count: int,
  title: str,
) -> State:
  """Does `count` steps of what several runs share, with progress; nothing is written."""
  with Display(title, 0, count) as display:
    for k in range(1, count + 1):
      state, metrics = step(state, next(batches))
      shown = k % max(count // 20, 1) == 0 or k == count
      display.update(k, {"loss": float(metrics["loss"])} if shown else None)
  return state


def ordered(experiment: Experiment) -> Experiment:
  """Returns the experiment with metrics that keep their order through jit, which sorts a dict."""

  def step(state: State, batch: Batch) -> tuple[State, OrderedDict]:
    state, metrics = experiment.step(state, batch)
    return state, OrderedDict(metrics)

  def evaluate(state: State, test: Test) -> OrderedDict:
    return OrderedDict(experiment.evaluate(state, test))

  return experiment._replace(step=step, evaluate=evaluate)


def _first_of(first: bool, what: str, tools: Tools) -> contextlib.AbstractContextManager:
  """Says that the first call of a program waits for the compiler."""
  return waiting(what, quiet=not tools.log) if first else contextlib.nullcontext()


def _evaluation_due(k: int, config: RunConfig, last: int) -> bool:
  """Tells whether a multiple of `eval_every` lies between the logged step `k` and the one before it."""
  previous = (k - 1) // config.log_every * config.log_every
  return k == last or k // config.eval_every > previous // config.eval_every


def _fetch_checked(pending: dict[int, Metrics]) -> Values:
  """Empties `pending`; returns its last metrics. Raises if a loss in it is not finite."""
  fetched = jax.device_get(pending)
  pending.clear()
  for k, metrics in fetched.items():
    for name, value in metrics.items():
      if "loss" in name and not np.all(np.isfinite(value)):
        raise _not_finite(k, f"{name} is {value}")
  return plain(fetched[max(fetched)]) if fetched else {}


def _not_finite(k: int, problem: str) -> InputError:
  return InputError(
    f"step {k}: {problem}; the last checkpoint before it is kept. Try a smaller learning rate; "
    "--debug names the operation that makes a NaN"
  )


@contextlib.contextmanager
def _nan_named(k: int, debug: bool) -> Iterator[None]:
  """Names the step at which jax_debug_nans stopped, after the traceback of the operation."""
  try:
    yield
  except FloatingPointError as error:
    if debug:
      traceback.print_exception(error)
    raise _not_finite(k, str(error).split("\n", 1)[0]) from None


_Handler: TypeAlias = (
  Callable[[int, FrameType | None], object] | int | None
)  # as signal.signal says


class Signals:
  """Remembers SIGTERM and SIGINT until the loop can act; a second one acts at once."""

  def __init__(self) -> None:
    self._received: signal.Signals | None = None
    self._previous: dict[int, _Handler] = {}

  def __enter__(self) -> Signals:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self._received = signal.Signals(number)
    for other in self._previous:
      signal.signal(other, signal.SIG_DFL)

  def received(self, *, agree: bool) -> signal.Signals | None:
    """Returns the signal to act upon now.

    Several processes must save at the same step, so they act on a signal to any of them, and only
    at steps where `agree` is true in all.
    """
    if jax.process_count() == 1:
      return self._received
    if not agree:
      return None
    numbers = multihost_utils.process_allgather(np.int32(self._received or 0))
    return signal.Signals(int(numbers.max())) if numbers.max() else None
