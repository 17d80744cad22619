"""Composes the experiment of every method that tunes the small model on one target."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.data.array_cache import cached
from jaxmethods.errors import InputError
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.multimodal import benchmark as multimodal, figures as tuning_figures
from jaxmethods.testbeds.multimodal.benchmark import Benchmark, Task
from jaxmethods.testbeds.multimodal.pretraining import described_model
from jaxmethods.testbeds.multimodal.questions import (
  Split,
  accuracies,
  check_size,
  choose_questions,
  draw,
)
from jaxmethods.testbeds.multimodal.settings import BudgetConfig, TuningConfig
from jaxmethods.trees import Params, PyTree, Tree, flatten, unflatten
from jaxmethods.tuning import metrics
from jaxmethods.tuning.tuner import (
  Run,
  Tuner,
  TunerState,
  TuningState,
  Update,
  adamw,
  answer_loss,
  init_state,
  tuning_step,
)

# B of LoRA+ learns this much faster than A (orig).
_LORA_PLUS = 16.0


def check_finite(params: Params) -> None:
  """Refuses pretrained weights with NaN or infinities.

  Raises:
    InputError: names the first such tensor.
  """
  for path, x in flatten(params).items():
    if not np.isfinite(np.asarray(x, np.float32)).all():
      raise InputError(f"pretrained weights: {path} has values that are not finite")


def rates_of(config: BudgetConfig) -> dict[str, float]:
  """Returns the learning rate of every group that a tuner may name."""
  return {
    "decoder": config.learning_rate,
    "adapter": config.learning_rate,
    "adapter_b": _LORA_PLUS * config.learning_rate,
    "prompt": config.learning_rate,
    "projector": config.projector_rate,
  }


class Scores(NamedTuple):
  """The parts of an evaluation that do not change during a run.

  Attributes:
    tuner: way of tuning.
    model: architecture.
    families: tasks that the model was pretrained on.
    target: name of the task that it is tuned on.
    size: number of pretrained parameters.
  """

  tuner: Tuner
  model: nn.Module
  families: tuple[str, ...]
  target: str
  size: int


def build(
  config: TuningConfig,
  tuner: Tuner,
  *,
  benchmark: Benchmark | None = None,
  rates: Mapping[str, float] | None = None,
  probe: PyTree = None,
  mixture: bool = False,
) -> Experiment:
  """Composes the experiment.

  The order of the data follows the key of the state: seeds differ in it, rows of one seed do not.

  Args:
    config: budget, target, rates.
    tuner: way of tuning.
    benchmark: tasks and model; default: those of the config.
    rates: learning rates by group; default: `rates_of(config)`.
    probe: argument of `tuner.init`; default: `probe_of` the target.
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
  size = num_parameters(benchmark.params)
  scores = Scores(tuner, model, benchmark.upstream.families, config.target, size)
  evaluate = functools.partial(_evaluate, scores)
  return Experiment(
    init=lambda key: init_state(tuner, optimiser, key, benchmark.params, probe),
    batches=lambda k: itertools.repeat(data),  # the state knows its step
    step=functools.partial(_step, update, config.batch_size),
    evaluate=evaluate,
    test=test,
    figures=functools.partial(_figures, evaluate, test),
    num_steps=config.steps,
    about=benchmark.about,
    validation_items=len(target.validation.ids),
  )


def _step(
  update: Update, size: int, state: TuningState, data: tuple[Split, ...]
) -> tuple[TuningState, dict[str, jax.Array]]:
  """Draws the next batch and updates the state."""
  key = jax.random.wrap_key_data(state.key)
  return update(state, batch_of(data, key, state.step, size))


def _evaluate(scores: Scores, state: TuningState, test: Params) -> dict[str, jax.Array]:
  """Measures the columns of the survey, the trained share and whether the update merges."""
  tuner = scores.tuner
  run = tuned(tuner, scores.model, state)
  return table(run, scores.families, scores.target, test) | {
    "params_percent": 100 * num_trainable(state.tuner) / scores.size,
    "mergeable": jnp.float32(tuner.finalize is not None),
  }


def _figures(
  evaluate: Callable[[TuningState, PyTree], dict[str, jax.Array]], test: PyTree, state: TuningState
) -> dict[str, Figure]:
  """Draws the accuracy before and after tuning."""
  after = compiler.jit(evaluate)(state, test)
  return {"accuracy": tuning_figures.before_and_after(after, test["before"])}


def probe_of(task: Task, size: int) -> dict[str, jax.Array]:
  """Draws up to `size` training images of a task with one question each."""
  key = jax.random.key(0)
  return choose_questions(draw(task.train, key, 0, min(size, len(task.train.ids))), key, 1)


def batch_of(
  data: tuple[Split, ...], key: jax.Array, step: jax.Array, size: int
) -> dict[str, jax.Array]:
  """Draws a batch of one task, or in equal parts of several, one question for each image."""
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


def num_parameters(params: PyTree) -> int:
  """Counts the entries of a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def num_trainable(state: TunerState) -> jax.Array:
  """Counts trained entries without those that a mask holds: fixed (adapters), at zero (LoRASculpt)."""
  masks = [leaf for path, leaf in flatten(state.frozen).items() if path.endswith("/mask")]
  masks += jax.tree.leaves(state.extra.get("masks", {}))
  held = sum((jnp.sum(~mask) for mask in masks), start=jnp.zeros((), int))
  return num_parameters(state.trainable) - held


def tuned(tuner: Tuner, model: nn.Module, state: TuningState) -> Run:
  """Returns the final model as a function of its inputs."""
  if tuner.finalize is None:
    return lambda *args, **kwargs: tuner.apply(model, *state.tuner, *args, **kwargs)
  params = tuner.finalize(*state.tuner)
  return lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)


def test_of(benchmark: Benchmark, config: TuningConfig) -> Tree:
  """Collects test questions, "source" and "target", and the scores of the pretrained model, "before"."""
  target = benchmark.targets[config.target]
  splits = {
    "source": getattr(benchmark.upstream, config.split),
    "target": getattr(target, config.split),
  }
  families = {"source": benchmark.upstream.families, "target": target.families}
  return jax.device_put({**splits, "before": pretrained_scores(benchmark, splits, families)})


def pretrained_scores(
  benchmark: Benchmark, splits: Mapping[str, Split], families: Mapping[str, Sequence[str]]
) -> Tree:
  """Measures {split: {family: accuracy}} of the pretrained model, by the cache."""

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

  shape = described_model(benchmark.model)
  depends = [b"scores 1", shape, *jax.tree.leaves(benchmark.params)]
  return unflatten(
    cached("desk_scores", [*depends, *map(np.asarray, jax.tree.leaves(splits))], scores)
  )


def table(run: Run, families: Sequence[str], target: str, test: Params) -> dict[str, jax.Array]:
  """Measures the columns of the survey, H first: the metric that a comparison ranks by.

  Args:
    run: tuned model.
    families: names of the upstream tasks.
    target: name of the target.
    test: see `test_of`.
  """
  after = accuracies(run, test["source"], families)
  reached = accuracies(run, test["target"], (target,))[target]
  before = test["before"]
  stack = lambda scores: jnp.stack([scores[name] for name in families])
  summary = metrics.summary(
    stack(before["source"]), stack(after), before["target"][target], reached
  )
  return {"H": summary.pop("H"), **{name: after[name] for name in families}, **summary}
