"""One experiment from many seeds side by side: what eval.compare runs for each row."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import special

from jaxmethods.errors import Stopped
from jaxmethods.runtime import compiler, loop
from jaxmethods.runtime.checkpoints import Checkpoints
from jaxmethods.runtime.experiment import Batch, Experiment, Metrics, RunConfig, State, Values
from jaxmethods.runtime.launch import replicate
from jaxmethods.runtime.metric_log import Display
from jaxmethods.runtime.waiting import waiting


class Trained(NamedTuple):
  """Result of one row of a comparison.

  Attributes:
    values: metric -> value of each seed.
    seconds: wall time, with compilation and evaluation.
    step_seconds: median wall time of one step of one seed; None if there were too few to tell.
    step_bytes: what a device holds during a step (of all seeds, where they run in one program); None
      where the backend does not tell.
    along: metric -> (points, seeds) values along the run, from its start on; None: not measured.
  """

  values: dict[str, list[float]]
  seconds: float
  step_seconds: float | None
  step_bytes: int | None
  along: dict[str, list[list[float]]] | None = None


class _Programs(NamedTuple):
  """Step, evaluation, and (state, batch) -> bytes of a step, each of all seeds."""

  step: Callable
  evaluate: Callable
  num_bytes: Callable[[State, Batch], int | None]


# "state", "sums" (metric -> (seeds,)), "seconds" (1,) and, if points along the run are asked for,
# "along" (metric -> (points, seeds)): all that a killed comparison needs.
_Kept: TypeAlias = dict[str, State]


def train(
  experiment: Experiment,
  config: RunConfig,
  directory: Path,
  *,
  seeds: int,
  seed_map: str,
  title: str,
  mesh: Mesh | None = None,
  along: int = 0,
) -> Trained:
  """Trains `seeds` copies and returns what they reach, per seed, and what it cost.

  Every metric is the mean over the last `config.average_last` evaluations. A killed call continues
  from its last checkpoint in `directory`.

  Args:
    experiment: what to train.
    config: its settings; seed i starts from `config.seed + i`.
    directory: where the run under way is kept.
    seeds: number of copies.
    seed_map: "vmap" (one program, all seeds at once), "scan" (one program, one seed after the
      other, which needs the temporaries of one) or "loop" (the program of one seed, called for
      each).
    title: name beside the progress bar.
    mesh: devices to use; None for one.
    along: parts of the run, at whose ends, and at its start, all metrics are kept; 0: none.

  Raises:
    Stopped: SIGTERM or SIGINT came; the state has been saved.
  """
  experiment, last = loop.ordered(experiment), experiment.num_steps
  quiet = jax.process_index() != 0
  with waiting(f"{title}: making the first states", quiet=quiet):
    copies = [experiment.init(jax.random.key(config.seed + seed)) for seed in range(seeds)]
  shapes = jax.eval_shape(experiment.evaluate, copies[0], experiment.test)
  names = [name for name, value in shapes.items() if value.shape == ()]
  state, programs = _over_seeds(experiment, copies, seed_map, mesh)
  del copies

  with Checkpoints(directory) as checkpoints, loop.Signals() as signals:
    kept: _Kept = {
      "state": state,
      "sums": {name: np.zeros(seeds) for name in names},
      "seconds": np.zeros(1),
    }
    if along:
      kept["along"] = {name: np.zeros((along + 1, seeds)) for name in names}
    start, kept = checkpoints.restore(kept) or (0, kept)
    del state  # the loop donates it
    with Display(title, start, last, quiet=jax.process_index() != 0) as display:
      tools = loop.Tools(checkpoints, signals, None, display)
      kept, times, num_bytes = _steps(experiment, config, programs, tools, start, kept)
  count = len(_evaluated(config, last))
  return Trained(
    {name: (np.asarray(kept["sums"][name]) / count).tolist() for name in names},
    seconds=float(kept["seconds"][0]),
    # By seed; the first one compiles.
    step_seconds=float(np.median(times[1:]) / seeds) if len(times) > 1 else None,
    step_bytes=num_bytes,
    along={name: np.asarray(x).tolist() for name, x in kept["along"].items()} if along else None,
  )


def joined(parts: Sequence[Trained]) -> Trained:
  """Puts seeds that were trained one by one together."""
  times = [part.step_seconds for part in parts if part.step_seconds is not None]
  sizes = [part.step_bytes for part in parts if part.step_bytes is not None]
  return Trained(
    {name: [value for part in parts for value in part.values[name]] for name in parts[0].values},
    seconds=sum(part.seconds for part in parts),
    step_seconds=float(np.median(times)) if times else None,
    step_bytes=max(sizes, default=None),
    along=_side_by_side([part.along for part in parts if part.along]),
  )


def _side_by_side(
  parts: Sequence[dict[str, list[list[float]]]],
) -> dict[str, list[list[float]]] | None:
  """Joins what was measured along the runs of several seeds."""
  names = parts[0] if parts else ()
  return {name: np.hstack([part[name] for part in parts]).tolist() for name in names} or None


def points_along(last: int, along: int) -> list[int]:
  """Returns the steps at which a run of `last` steps is measured: its start, then `along` ends."""
  return [round(i * last / along) for i in range(along + 1)]


def _steps(
  experiment: Experiment,
  config: RunConfig,
  programs: _Programs,
  tools: loop.Tools,
  start: int,
  kept: _Kept,
) -> tuple[_Kept, list[float], int | None]:
  """Does the steps after `start`; returns (kept, seconds of a step between two logs, its bytes)."""
  last, evaluated = experiment.num_steps, _evaluated(config, experiment.num_steps)
  state, sums, earlier = kept.pop("state"), kept["sums"], float(kept["seconds"][0])
  path = _Path(kept.get("along"), last)
  batches, batch, times = experiment.batches(start), None, []
  clock = time.perf_counter()
  since = (start, clock)
  if start == 0 and path.asks(0):
    path.keep(0, _fetch(programs.evaluate(state, experiment.test)))
  for k in range(start + 1, last + 1):
    batch = next(batches)
    if k == start + 1:
      with waiting("compiling the step", quiet=jax.process_index() != 0):
        state, metrics = programs.step(state, batch)
    else:
      state, metrics = programs.step(state, batch)
    if k in evaluated or path.asks(k):
      with waiting("evaluating", quiet=jax.process_index() != 0):
        measured = _fetch(programs.evaluate(state, experiment.test))
      path.keep(k, measured)
      if k in evaluated:
        sums = {name: sums[name] + measured[name] for name in sums}
    logged = k % config.log_every == 0 or k == last
    if logged:
      tools.display.update(k, {"loss": float(np.mean(_fetch(metrics)["loss"]))})
      now = (k, time.perf_counter())
      times.append((now[1] - since[1]) / (now[0] - since[0]))
      since = now
    stop = tools.signals.received(agree=logged)
    seconds = np.array([earlier + time.perf_counter() - clock])
    if stop or k % config.checkpoint_every == 0 or k == last:
      tools.checkpoints.save(k, {"state": state, "sums": sums, "seconds": seconds, **path.kept})
    if stop and k < last:
      tools.checkpoints.wait()
      raise Stopped(stop.name, 128 + stop, k)
  num_bytes = programs.num_bytes(state, batch) if start < last else None
  seconds = np.array([earlier + time.perf_counter() - clock])
  return {"state": state, "sums": sums, "seconds": seconds, **path.kept}, times, num_bytes


class _Path:
  """What is measured along a run: metric -> (points, seeds); nothing where it is None."""

  def __init__(self, along: dict[str, np.ndarray] | None, last: int):
    count = len(next(iter(along.values()))) - 1 if along else 0
    self._steps = points_along(last, count) if count else []
    self.kept = {"along": {name: np.array(x) for name, x in along.items()}} if along else {}

  def asks(self, step: int) -> bool:
    """Tells whether a step is measured."""
    return step in self._steps

  def keep(self, step: int, measured: Metrics) -> None:
    """Keeps the metrics of a step that is measured."""
    for i in (i for i, k in enumerate(self._steps) if k == step):
      for name, values in self.kept["along"].items():
        values[i] = measured[name]


def _evaluated(config: RunConfig, last: int) -> list[int]:
  """Returns the steps whose evaluations are averaged."""
  steps = (last - i * config.eval_every for i in range(config.average_last))
  return [k for k in steps if k > 0]


def summarize(values: Sequence[float]) -> Values:
  """Returns {"mean", "ci95", "values"}; ci95 is the half width of Student's 95% interval."""
  finite = bool(np.all(np.isfinite(values)))
  n = len(values)
  spread = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 and finite else None
  return {
    "mean": float(np.mean(values)) if finite else None,
    "ci95": None if spread is None else float(special.stdtrit(n - 1, 0.975)) * spread,
    "values": [value if np.isfinite(value) else None for value in values],
  }


def _over_seeds(
  experiment: Experiment, copies: list[State], seed_map: str, mesh: Mesh | None
) -> tuple[State, _Programs]:
  """Returns the state of all seeds, and their programs; batches and test are shared."""
  if seed_map == "loop":
    states = replicate(copies, mesh)
    one_step, one_evaluate = loop.compile_experiment(experiment, states[0], mesh)

    def step(states: list[State], batch: Batch) -> tuple[list[State], list[Metrics]]:
      done = [one_step(state, batch) for state in states]
      return [state for state, _ in done], [metrics for _, metrics in done]

    return states, _Programs(
      step,
      lambda states, test: [one_evaluate(state, test) for state in states],
      lambda states, batch: compiler.num_bytes(one_step, states[0], batch),
    )

  def mapped(function: Callable) -> Callable:
    if seed_map == "vmap":
      return jax.vmap(function, in_axes=(0, None))
    return lambda states, data: jax.lax.map(lambda state: function(state, data), states)

  together = experiment._replace(
    step=mapped(experiment.step), evaluate=mapped(experiment.evaluate), programs=None
  )
  state = replicate(jax.tree.map(lambda *leaves: jnp.stack(leaves), *copies), mesh)
  every_step, evaluate = loop.compile_experiment(together, state, mesh)
  num_bytes = functools.partial(compiler.num_bytes, every_step)
  return state, _Programs(every_step, evaluate, num_bytes)


def _fetch(metrics: Metrics | list[Metrics]) -> dict[str, np.ndarray]:
  """Returns metrics with a leading axis of seeds, from either form that `_over_seeds` makes."""
  metrics = jax.device_get(metrics)
  if isinstance(metrics, list):
    return {name: np.stack([one[name] for one in metrics]) for name in metrics[0]}
  return dict(metrics)
