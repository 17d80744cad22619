"""One experiment from many seeds, in one program: what eval.compare runs for each row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import special

from jaxmethods.runtime import loop
from jaxmethods.runtime.checkpoints import Checkpoints
from jaxmethods.runtime.experiment import Experiment, RunConfig
from jaxmethods.runtime.launch import replicate
from jaxmethods.runtime.metric_log import Display


def train(
  experiment: Experiment,
  config: RunConfig,
  directory: Path,
  *,
  seeds: int,
  seed_map: str,
  title: str,
  mesh: Mesh | None = None,
) -> tuple[dict[str, list[float]], float]:
  """Trains `seeds` copies and returns what they reach, per seed, and the seconds it took.

  Every metric is the mean over the last `config.average_last` evaluations. A killed call continues
  from its last checkpoint in `directory`.

  Args:
    experiment: what to train.
    config: its settings; seed i starts from `config.seed + i`.
    directory: where the run under way is kept.
    seeds: number of copies.
    seed_map: "vmap" (all at once) or "scan" (one after the other inside the program, which needs
      the temporaries of one).
    title: name beside the progress bar.
    mesh: devices to use; None for one.

  Returns:
    ({metric: [value of each seed]}, seconds).

  Raises:
    loop.Stopped: SIGTERM or SIGINT came; the state has been saved.
  """
  experiment = _mapped(loop.ordered(experiment), seed_map)
  last = experiment.num_steps
  copies = [experiment.init(jax.random.key(config.seed + seed)) for seed in range(seeds)]
  state = replicate(jax.tree.map(lambda *leaves: jnp.stack(leaves), *copies), mesh)
  del copies
  step, evaluate = loop.compile_experiment(experiment, state, mesh)
  shapes = jax.eval_shape(experiment.evaluate, state, experiment.test)
  sums = {name: np.zeros(seeds) for name, value in shapes.items() if value.shape == (seeds,)}
  names = list(sums)
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
    with Display(title, start, last, quiet=not writer) as display:
      batches = experiment.batches(start)
      for k in range(start + 1, last + 1):
        state, metrics = step(state, next(batches))
        if k in evaluated:
          measured = jax.device_get(evaluate(state, experiment.test))
          sums = {name: sums[name] + measured[name] for name in sums}
        logged = k % config.log_every == 0 or k == last
        if logged:
          loss = jax.device_get(metrics["loss"])
          display.update(k, {"loss": float(np.mean(loss))})
        stop = signals.received(agree=logged)
        seconds = earlier + time.perf_counter() - clock
        if stop or k % config.checkpoint_every == 0 or k == last:
          kept = {"state": state, "sums": sums, "seconds": np.array([seconds])}
          checkpoints.save(k, kept)
        if stop and k < last:
          checkpoints.wait()
          raise loop.Stopped(stop.name, 128 + stop, k)
  values = {name: (np.asarray(sums[name]) / len(evaluated)).tolist() for name in names}
  return values, earlier + time.perf_counter() - clock


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


def _mapped(experiment: Experiment, seed_map: str) -> Experiment:
  """Returns the experiment over a leading axis of seeds; they share the batches and the test."""

  def over_seeds(function: Callable) -> Callable:
    if seed_map == "vmap":
      return jax.vmap(function, in_axes=(0, None))
    return lambda states, data: jax.lax.map(lambda state: function(state, data), states)

  return experiment._replace(
    step=over_seeds(experiment.step), evaluate=over_seeds(experiment.evaluate)
  )
