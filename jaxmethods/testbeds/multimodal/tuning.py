"""The experiment of every method that tunes the desk model on one target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.data.array_cache import cached
from jaxmethods.errors import InputError
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import benchmark as multimodal
from jaxmethods.testbeds.multimodal import figures as tuning_figures
from jaxmethods.testbeds.multimodal.benchmark import Benchmark, Task
from jaxmethods.testbeds.multimodal.questions import (
  Split,
  accuracies,
  check_size,
  choose_questions,
  draw,
)
from jaxmethods.testbeds.multimodal.settings import BudgetConfig, TuningConfig
from jaxmethods.trees import flatten, unflatten
from jaxmethods.tuning import metrics
from jaxmethods.tuning.tuner import (
  Tuner,
  TunerState,
  TuningState,
  adamw,
  answer_loss,
  init_state,
  tuning_step,
)

# B of LoRA+ learns this much faster than A (orig).
_LORA_PLUS = 16.0


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
    "adapter_b": _LORA_PLUS * config.learning_rate,
    "prompt": config.learning_rate,
    "projector": config.projector_rate,
  }


def build(
  config: TuningConfig,
  tuner: Tuner,
  *,
  benchmark: Benchmark | None = None,
  rates: Mapping[str, float] | None = None,
  probe: Any = None,
  mixture: bool = False,
) -> Experiment:
  """Composes the experiment.

  The order of the data follows the state's key: seeds differ in it, rows of one seed do not.

  Args:
    config: budget, target, rates.
    tuner: how it is tuned.
    benchmark: default: the desk benchmark of `config`.
    rates: default: `rates_of(config)`.
    probe: what `tuner.init` is given; default: `probe_of` the target.
    mixture: whether half of every batch is upstream data, which no method may use: a reference.
  """
  benchmark = benchmark or multimodal.load(config.desk, (config.target,))
  check_finite(benchmark.params)
  model, target = benchmark.model, benchmark.targets[config.target]
  check_size(target.train, config.batch_size)
  optimiser = adamw(rates or rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  update = tuning_step(tuner, model, optimiser, answer_loss, clip=config.clip)
  if probe is None:
    probe = probe_of(target, config.probe_size)
  test = test_of(benchmark, config)
  data = jax.device_put((target.train, *((benchmark.upstream.train,) if mixture else ())))

  def init(key: jax.Array) -> TuningState:
    return init_state(tuner, optimiser, key, benchmark.params, probe)

  def batches(k: int) -> Iterator[tuple[Split, ...]]:
    del k  # the state knows its step
    while True:
      yield data

  def step(state: TuningState, data: tuple[Split, ...]) -> tuple[TuningState, dict[str, jax.Array]]:
    key = jax.random.wrap_key_data(state.key)
    return update(state, batch_of(data, key, state.step, config.batch_size))

  def evaluate(state: TuningState, test: Any) -> dict[str, jax.Array]:
    columns = table(tuned(tuner, model, state), benchmark, config, test)
    return columns | {
      "params_percent": 100 * num_trainable(state.tuner) / num_parameters(benchmark.params),
      "mergeable": jnp.float32(tuner.finalize is not None),
    }

  return Experiment(
    init=init,
    batches=batches,
    step=step,
    evaluate=evaluate,
    test=test,
    figures=lambda state: {
      "accuracy": tuning_figures.before_and_after(compiler.jit(evaluate)(state, test), test)
    },
    num_steps=config.steps,
    about=benchmark.about,
  )


def probe_of(task: Task, size: int) -> dict[str, jax.Array]:
  """Up to `size` training images of a task with one question each."""
  key = jax.random.key(0)
  return choose_questions(draw(task.train, key, 0, min(size, len(task.train.ids))), key, 1)


def batch_of(
  data: tuple[Split, ...], key: jax.Array, step: jax.Array, size: int
) -> dict[str, jax.Array]:
  """A batch of one task, or in equal parts of several, one question for each image."""
  parts = []
  for i, split in enumerate(data):
    task_key = key if i == 0 else jax.random.fold_in(key, i)  # more tasks do not reorder the first
    share = size // len(data) + (i < size % len(data))
    batch = draw(split, task_key, step, share)
    chosen = jax.random.fold_in(jax.random.fold_in(task_key, 1), step)
    parts.append(batch if split.ids.shape[1] == 1 else choose_questions(batch, chosen, 1))
  longest = max(part["ids"].shape[-1] for part in parts)

  def joined(name: str, fill: int | None = None) -> jax.Array:
    arrays = [part[name] for part in parts]
    if fill is not None:
      pad = lambda x: [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])]
      arrays = [jnp.pad(x, pad(x), constant_values=fill) for x in arrays]
    return jnp.concatenate(arrays)

  return {
    "features": joined("features"),
    "ids": joined("ids", 0),
    "labels": joined("labels", IGNORED),
  }


def num_parameters(params: Any) -> int:
  """Number of entries."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def num_trainable(state: TunerState) -> jax.Array:
  """Trained entries, without those that a mask holds: fixed (of an adapter), at zero (of LoRASculpt)."""
  masks = [leaf for path, leaf in flatten(state.frozen).items() if path.endswith("/mask")]
  masks += jax.tree.leaves(state.extra.get("masks", {}))
  held = sum((jnp.sum(~mask) for mask in masks), start=jnp.zeros((), int))
  return num_parameters(state.trainable) - held


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
  return jax.device_put({**splits, "before": pretrained_scores(benchmark, splits, families)})


def pretrained_scores(
  benchmark: Benchmark, splits: Mapping[str, Split], families: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
  """{split: {family: accuracy}} of the pretrained model, by the cache."""

  def scores() -> dict[str, np.ndarray]:
    each = compiler.jit(
      lambda params, splits: {
        name: multimodal.evaluate(benchmark.model, params, splits[name], families[name])
        for name in splits
      }
    )(benchmark.params, splits)
    return {
      f"{name}/{family}": np.asarray(x) for name, of in each.items() for family, x in of.items()
    }

  depends = [b"scores 1", repr(benchmark.model).encode(), *jax.tree.leaves(benchmark.params)]
  return unflatten(
    cached("desk_scores", [*depends, *map(np.asarray, jax.tree.leaves(splits))], scores)
  )


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
