"""One experiment from many seeds side by side: what eval.compare runs for each row."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import special

from jaxmethods.runtime import compiler, loop
from jaxmethods.runtime.checkpoints import Checkpoints
from jaxmethods.runtime.experiment import Experiment, RunConfig, State
from jaxmethods.runtime.launch import replicate
from jaxmethods.runtime.metric_log import Display


class Trained(NamedTuple):
  """What a row of a comparison came to.

  Attributes:
    values: metric -> value of each seed.
    seconds: wall time, with compilation and evaluation.
    step_seconds: median wall time of one step of one seed; None if there were too few to tell.
    step_bytes: what a device holds during a step (of all seeds, where they run in one program); None
      where the backend does not tell.
  """

  values: dict[str, list[float]]
  seconds: float
  step_seconds: float | None
  step_bytes: int | None


def train(
  experiment: Experiment,
  config: RunConfig,
  directory: Path,
  *,
  seeds: int,
  seed_map: str,
  title: str,
  mesh: Mesh | None = None,
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

  Raises:
    loop.Stopped: SIGTERM or SIGINT came; the state has been saved.
  """
  experiment, last = loop.ordered(experiment), experiment.num_steps
  copies = [experiment.init(jax.random.key(config.seed + seed)) for seed in range(seeds)]
  shapes = jax.eval_shape(experiment.evaluate, copies[0], experiment.test)
  names = [name for name, value in shapes.items() if value.shape == ()]
  sums = {name: np.zeros(seeds) for name in names}
  state, step, evaluate, num_bytes = _over_seeds(experiment, copies, seed_map, mesh)
  del copies
  evaluated = [last - i * config.eval_every for i in range(config.average_last)]
  evaluated = [k for k in evaluated if k > 0]

  writer = jax.process_index() == 0
  with Checkpoints(directory) as checkpoints, loop.Signals() as signals:
    # What a killed comparison needs: the states, and what was measured so far.
    start, kept = 0, {"state": state, "sums": sums, "seconds": np.zeros(1)}
    if restored := checkpoints.restore(kept):
      start, kept = restored
    state, sums = kept["state"], kept["sums"]
    earlier, clock = float(kept["seconds"][0]), time.perf_counter()
    del kept
    batch, since, times = None, (start, clock), []
    with Display(title, start, last, quiet=not writer) as display:
      batches = experiment.batches(start)
      for k in range(start + 1, last + 1):
        batch = next(batches)
        state, metrics = step(state, batch)
        if k in evaluated:
          measured = _fetch(evaluate(state, experiment.test))
          sums = {name: sums[name] + measured[name] for name in sums}
        logged = k % config.log_every == 0 or k == last
        if logged:
          display.update(k, {"loss": float(np.mean(_fetch(metrics)["loss"]))})
          now = (k, time.perf_counter())
          times.append((now[1] - since[1]) / (now[0] - since[0]) / seeds)
          since = now
        stop = signals.received(agree=logged)
        seconds = earlier + time.perf_counter() - clock
        if stop or k % config.checkpoint_every == 0 or k == last:
          kept = {"state": state, "sums": sums, "seconds": np.array([seconds])}
          checkpoints.save(k, kept)
        if stop and k < last:
          checkpoints.wait()
          raise loop.Stopped(stop.name, 128 + stop, k)
  values = {name: (np.asarray(sums[name]) / len(evaluated)).tolist() for name in names}
  return Trained(
    values,
    seconds=earlier + time.perf_counter() - clock,
    step_seconds=float(np.median(times[1:])) if len(times) > 1 else None,  # the first one compiles
    step_bytes=num_bytes(state, batch) if start < last else None,
  )


def summarize(values: Sequence[float]) -> dict[str, Any]:
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
) -> tuple[State, Callable, Callable, Callable]:
  """Returns (state, step, evaluate, bytes of a step) of all seeds; batches and test are shared."""
  if seed_map == "loop":
    states = replicate(copies, mesh)
    one_step, one_evaluate = loop.compile_experiment(experiment, states[0], mesh)

    def step(states: list[State], batch: Any) -> tuple[list[State], list[Any]]:
      done = [one_step(state, batch) for state in states]
      return [state for state, _ in done], [metrics for _, metrics in done]

    return (
      states,
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
  return state, every_step, evaluate, functools.partial(compiler.num_bytes, every_step)


def _fetch(metrics: Any) -> dict[str, np.ndarray]:
  """Returns metrics with a leading axis of seeds, from either form that `_over_seeds` makes."""
  metrics = jax.device_get(metrics)
  if isinstance(metrics, list):
    return {name: np.stack([one[name] for one in metrics]) for name in metrics[0]}
  return metrics
