"""Composes the tuning of the small model on several tasks at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.experiments.thanora import rows
from jaxmethods.experiments.thanora.config import Config
from jaxmethods.experiments.thanora.figures import figures
from jaxmethods.experiments.thanora.preview import Reading, second_moments
from jaxmethods.methods import thanora as method
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.multimodal import benchmark as multimodal, tuning
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.testbeds.multimodal.questions import Split, accuracies, shuffled_rows
from jaxmethods.trees import Params
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Run, Tuner, TuningState, Update

_PREVIEW_CHUNK = 50


class Mixture(NamedTuple):
  """Questions of several tasks.

  Attributes:
    questions: all tasks, one after the other; `family` is the task.
    start: first row of every task, and the end, (T + 1,).
  """

  questions: Split
  start: np.ndarray

  @property
  def sizes(self) -> np.ndarray:
    """Number of examples of every task, (T,)."""
    return np.diff(self.start)


class Order(NamedTuple):
  """Order of the training data.

  Attributes:
    start: see `Mixture`.
    sizes: examples of every task in a batch.
    batch_size: examples of a batch of the whole mixture.
    balanced: whether every task has its own part of a batch.
  """

  start: np.ndarray
  sizes: list[int]
  batch_size: int
  balanced: bool


class Kept(NamedTuple):
  """The choice of the models that are evaluated in the end.

  Attributes:
    row: name of the row.
    tuner: way of tuning.
    model: architecture.
    tasks: names of the tasks.
    families: names of the upstream tasks.
    drop, keep: see `rows.put_together`.
  """

  row: str
  tuner: Tuner
  model: DeskMLLM
  tasks: tuple[str, ...]
  families: tuple[str, ...]
  drop: float
  keep: float


def build(config: Config, benchmark: Benchmark | None = None) -> Experiment:
  """Composes the experiment; the benchmark is by default the one of the config."""
  benchmark = benchmark or multimodal.load(config.desk, config.tasks)
  tuning.check_finite(benchmark.params)
  names, model, params = tuple(config.tasks), benchmark.model, benchmark.params
  train = mixed([benchmark.targets[name].train for name in names], names, benchmark.vocabulary.pad)
  separate, balanced = config.row in rows.SEPARATE, config.sampler == "balanced"
  sizes = rows.batch_sizes(
    names, train.sizes, config.batch_size, balanced=balanced, apart=balanced or separate
  )
  order = Order(train.start, sizes, config.batch_size, balanced)
  tuner = rows.tuner_of(config)
  optimiser = tuners.adamw(tuning.rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  update = tuners.tuning_step(tuner, model, optimiser, tuners.answer_loss, clip=config.clip)
  plan = start_of(config, benchmark, train)
  one = lambda key: tuners.init_state(tuner, optimiser, key, params, plan)
  data = jax.device_put(train.questions)
  families = benchmark.upstream.families
  kept = Kept(config.row, tuner, model, names, families, config.drop, config.keep)
  draw = functools.partial(figures, names, config.start == "preview")
  shares = ", ".join(f"{name} {n}" for name, n in zip(names, train.sizes, strict=True))
  return Experiment(
    init=functools.partial(_init_each, one, len(names)) if separate else one,
    batches=lambda k: itertools.repeat(data),  # the state knows its step
    step=functools.partial(_step_each if separate else _step, update, order),
    evaluate=functools.partial(_evaluate, kept),
    # Pretrained weights are an argument, where models are merged into them.
    test=test_of(benchmark, names, config.split) | {"pretrained": params if separate else {}},
    figures=draw if config.row == "thanora" else lambda state: {},
    num_steps=config.steps,
    about=f"{benchmark.about}; {config.sampler} mixture of {shares} training questions",
    validation_items=sum(len(benchmark.targets[name].validation.ids) for name in names),
  )


# --- data ---------------------------------------------------------------------------------------


def mixed(parts: Sequence[Split], names: Sequence[str], pad: int) -> Mixture:
  """Joins tasks one after the other, texts padded to the longest.

  Raises:
    InputError: a task without questions.
  """
  questions, length = (max(part.ids.shape[axis] for part in parts) for axis in (1, 2))
  whole = []
  for task, (part, name) in enumerate(zip(parts, names, strict=True)):
    if not len(part.ids) or (np.asarray(part.family) < 0).all():
      raise InputError(f"task {name}: has no questions")
    more = [(0, 0), (0, questions - part.ids.shape[1]), (0, length - part.ids.shape[2])]
    whole.append(
      Split(
        np.asarray(part.features),
        np.pad(part.ids, more, constant_values=pad),
        np.pad(part.labels, more, constant_values=IGNORED),
        np.pad(np.where(part.family >= 0, task, -1), more[:2], constant_values=-1).astype(np.int32),
      )
    )
  start = np.cumsum([0, *(len(part.ids) for part in parts)])
  return Mixture(Split(*map(np.concatenate, zip(*whole, strict=True))), start)


def test_of(benchmark: Benchmark, names: Sequence[str], part: str) -> dict[str, Any]:
  """Collects the test questions, and the mean upstream score of the pretrained model.

  Args:
    benchmark: tasks and model.
    names: tasks of the mixture.
    part: "test" or "validation".
  """
  chosen = [getattr(benchmark.targets[name], part) for name in names]
  tasks = jax.device_put(mixed(chosen, names, benchmark.vocabulary.pad).questions)
  source = jax.device_put(getattr(benchmark.upstream, part))
  families = {"source": benchmark.upstream.families}
  before = tuning.pretrained_scores(benchmark, {"source": source}, families)["source"]
  mean = jnp.stack(list(before.values())).mean()
  return {"tasks": tasks, "source": source, "before": mean}


# --- training -----------------------------------------------------------------------------------


def _drawn(order: Order, data: Split, state: TuningState, task: int | None) -> tuners.Batch:
  """Draws the next batch of one task, or of the mixture."""
  key = jax.random.wrap_key_data(state.key)
  if task is None and not order.balanced:
    chosen = [shuffled_rows(key, state.step, int(order.start[-1]), order.batch_size)]
  else:
    counts = np.diff(order.start)
    chosen = [
      order.start[t] + shuffled_rows(key, state.step, int(counts[t]), order.sizes[t])
      for t in (range(len(counts)) if task is None else [task])
    ]
  return {name: x[jnp.concatenate(chosen)] for name, x in data._asdict().items()}


def _step(
  update: Update, order: Order, state: TuningState, data: Split
) -> tuple[TuningState, dict[str, jax.Array]]:
  """Updates one model by a batch of the mixture."""
  return update(state, _drawn(order, data, state, None))


def _init_each(one: Callable[[jax.Array], TuningState], tasks: int, key: jax.Array) -> TuningState:
  """Starts a model for every task; the states are stacked."""
  states = [one(jax.random.fold_in(key, t)) for t in range(tasks)]
  return jax.tree.map(lambda *x: jnp.stack(x), *states)


def _step_each(
  update: Update, order: Order, state: TuningState, data: Split
) -> tuple[TuningState, dict[str, jax.Array]]:
  """Updates the model of every task by a batch of that task; metrics are means."""
  done = []
  for t in range(len(order.sizes)):
    one = jax.tree.map(lambda x, t=t: x[t], state)
    done.append(update(one, _drawn(order, data, one, t)))
  states, metrics = (
    jax.tree.map(lambda *x: jnp.stack(x), *part) for part in zip(*done, strict=True)
  )
  return states, jax.tree.map(jnp.mean, metrics)


# --- evaluation ---------------------------------------------------------------------------------


def _evaluate(kept: Kept, state: TuningState, test: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Measures the mean accuracy over the tasks, each task, and the change of the upstream ones."""
  runs = models_of(kept, state, test["pretrained"])
  scores = [accuracies(run, test["tasks"], kept.tasks) for run in runs]
  reached = {name: scores[t % len(runs)][name] for t, name in enumerate(kept.tasks)}
  upstream = [accuracies(run, test["source"], kept.families) for run in runs]
  source = jnp.stack([jnp.stack(list(of.values())).mean() for of in upstream]).mean()
  return {
    "Mean": jnp.stack(list(reached.values())).mean(),
    **reached,
    "Source": source,
    "F": source - test["before"],
  }


def models_of(kept: Kept, state: TuningState, pretrained: Params) -> list[Run]:
  """Returns the final model; for "single" that of every task."""
  model, tuner = kept.model, kept.tuner
  if kept.row not in rows.SEPARATE:
    return [tuning.tuned(tuner, model, state)]
  assert tuner.finalize is not None
  each = range(len(kept.tasks))
  tuned = [tuner.finalize(*jax.tree.map(lambda x, t=t: x[t], state.tuner)) for t in each]
  if kept.row != "single":  # one of the ways of merging
    key = jax.random.wrap_key_data(state.key[0])
    merged = rows.put_together(kept.row, pretrained, tuned, key, drop=kept.drop, keep=kept.keep)
    return [_plain(model, merged)]
  return [_plain(model, params) for params in tuned]


def _plain(model: DeskMLLM, params: Params) -> Run:
  """Returns a model with its parameters as a function of its inputs."""
  return lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)


# --- preview ------------------------------------------------------------------------------------


def start_of(config: Config, benchmark: Benchmark, train: Mixture) -> dict[str, Any]:
  """Plans the start of a row by its preview; empty for rows that start without data."""
  if not rows.needs_preview(config):
    return {}
  moments = moments_of(
    benchmark,
    train,
    config.preview,
    rows.targets_of(config),
    together=config.row == "corda",
    centred=config.centred,
  )
  return rows.plan_of(config, benchmark.params, moments)


def moments_of(
  benchmark: Benchmark,
  train: Mixture,
  count: int,
  targets: str,
  *,
  together: bool = False,
  centred: bool = False,
) -> dict[str, np.ndarray]:
  """Measures second moments of the inputs of every layer on a preview of every task.

  Args:
    benchmark: model and vocabulary.
    train: training questions.
    count: questions of every task that are read.
    targets: regular expression on kernel paths.
    together: whether all tasks have one moment.
    centred: whether means are taken out.
  """
  ends = itertools.pairwise(train.start.tolist())
  tasks: Iterable[Iterable[Split]] = [_chunks(train.questions, *of, count) for of in ends]
  read = functools.partial(_read, benchmark.model, benchmark.vocabulary.pad)
  begin = functools.partial(method.no_inputs, centred=centred)
  return second_moments(benchmark.params, tasks, read, targets, together=together, begin=begin)


def _read(model: DeskMLLM, pad: int, params: Params, part: Split) -> Reading:
  """Reads a batch: the image first, then the texts about it."""
  text = (part.ids != pad) & (part.family >= 0)[..., None]
  run = lambda: model.apply({"params": params}, part.ids, features=part.features, logits="none")
  return run, [None, text.reshape(-1, text.shape[-1])]


def _chunks(questions: Split, start: int, end: int, count: int) -> Iterator[Split]:
  """Cuts the first `count` of the rows from `start` to `end` into batches."""
  end = min(end, start + count)
  for first in range(start, end, _PREVIEW_CHUNK):
    yield Split(*(x[first : min(first + _PREVIEW_CHUNK, end)] for x in questions))
