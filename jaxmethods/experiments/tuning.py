"""The experiment of every method that tunes the desk model on one target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.adapters.targets import flatten
from jaxmethods.errors import InputError
from jaxmethods.experiments import multimodal
from jaxmethods.experiments.multimodal import Benchmark
from jaxmethods.experiments.questions import Split, accuracies, draw
from jaxmethods.experiments.tuning_config import BudgetConfig, TuningConfig
from jaxmethods.methods.mllm_tuning import metrics
from jaxmethods.methods.mllm_tuning.tuner import (
  Tuner,
  TuningState,
  adamw,
  answer_loss,
  init_state,
  tuning_step,
)
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment


def check_finite(params: Mapping[str, Any]) -> None:
  """Refuses pretrained weights with NaN or infinities in them.

  Raises:
    InputError: names the first such tensor.
  """
  for path, x in flatten(params).items():
    if not np.isfinite(np.asarray(x, np.float32)).all():
      raise InputError(f"pretrained weights: {path} has values that are not finite")


def rates_of(config: BudgetConfig) -> dict[str, float]:
  """Learning rate of every group that a tuner may name."""
  return {
    "decoder": config.learning_rate,
    "adapter": config.learning_rate,
    "prompt": config.learning_rate,
    "projector": config.projector_rate,
  }


def build(
  config: TuningConfig,
  tuner: Tuner,
  *,
  benchmark: Benchmark | None = None,
  rates: Mapping[str, float] | None = None,
) -> Experiment:
  """Composes the experiment.

  The order of the data follows the state's key: seeds differ in it, rows of one seed do not.

  Args:
    config: budget, target, rates.
    tuner: how it is tuned.
    benchmark: default: the desk benchmark of `config`.
    rates: default: `rates_of(config)`.
  """
  benchmark = benchmark or multimodal.load(config.desk, (config.target,))
  check_finite(benchmark.params)
  model, target = benchmark.model, benchmark.targets[config.target]
  count = len(target.train.ids)
  if config.batch_size > count:
    raise InputError(f"batch_size: {config.batch_size} is more than the {count} training images")
  optimiser = adamw(rates or rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  update = tuning_step(tuner, model, optimiser, answer_loss, clip=config.clip)
  probe = draw(target.train, jax.random.key(0), 0, min(config.probe_size, count))
  test = test_of(benchmark, config)
  data = jax.device_put(target.train)

  def init(key: jax.Array) -> TuningState:
    return init_state(tuner, optimiser, key, benchmark.params, probe)

  def batches(k: int) -> Iterator[Split]:
    del k  # the state knows its step
    while True:
      yield data

  def step(state: TuningState, data: Split) -> tuple[TuningState, dict[str, jax.Array]]:
    key = jax.random.wrap_key_data(state.key)
    return update(state, draw(data, key, state.step, config.batch_size))

  def evaluate(state: TuningState, test: Any) -> dict[str, jax.Array]:
    return table(tuned(tuner, model, state), benchmark, config, test)

  return Experiment(
    init=init,
    batches=batches,
    step=step,
    evaluate=evaluate,
    test=test,
    figures=lambda state: {},
    num_steps=config.steps,
    about=benchmark.about,
  )


def tuned(tuner: Tuner, model: Any, state: TuningState) -> Any:
  """The model that is kept in the end, as a function of its inputs."""
  if tuner.finalize is None:
    return lambda *args, **kwargs: tuner.apply(model, *state.tuner, *args, **kwargs)
  params = tuner.finalize(*state.tuner)
  return lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)


def test_of(benchmark: Benchmark, config: TuningConfig) -> dict[str, Any]:
  """What is evaluated on, and what the pretrained model scores there: {"source", "target", "before"}."""
  target = benchmark.targets[config.target]
  splits = {
    "source": getattr(benchmark.upstream, config.split),
    "target": getattr(target, config.split),
  }
  families = {"source": benchmark.upstream.families, "target": target.families}

  @compiler.jit
  def scores(params, splits):
    return {
      name: multimodal.evaluate(benchmark.model, params, splits[name], families[name])
      for name in splits
    }

  splits = jax.device_put(splits)
  return {**splits, "before": scores(benchmark.params, splits)}


def table(run: Any, benchmark: Benchmark, config: TuningConfig, test: Any) -> dict[str, jax.Array]:
  """The columns of the survey, H first: what a comparison ranks by."""
  target = benchmark.targets[config.target]
  families = benchmark.upstream.families
  after = accuracies(run, test["source"], families)
  (reached,) = accuracies(run, test["target"], target.families).values()
  before = test["before"]
  stack = lambda scores: jnp.stack([scores[name] for name in families])
  summary = metrics.summary(
    stack(before["source"]), stack(after), before["target"][config.target], reached
  )
  return {"H": summary.pop("H"), **{name: after[name] for name in families}, **summary}
