"""Tuning one model on several tasks at once: the heavy half of the ThanoRA experiment."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.adapters import low_rank, preview
from jaxmethods.adapters.adapter import layers_of
from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.errors import InputError
from jaxmethods.methods import thanora as method
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import benchmark as multimodal
from jaxmethods.testbeds.multimodal import tuning
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.testbeds.multimodal.questions import Split, accuracies, shuffled_rows
from jaxmethods.trees import flatten, owner
from jaxmethods.tuning import posterior
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TuningState

if TYPE_CHECKING:
  from jaxmethods.experiments.thanora.config import Config

# Rows that train one model for every task; all but the first put them together afterwards.
SEPARATE = ("single", "average", "dare", "ties")
_PREVIEW_CHUNK = 50


class Mixture(NamedTuple):
  """Questions of several tasks.

  Attributes:
    questions: of all tasks, one task after the other; `family` is the task.
    start: where every task begins, (T + 1,).
  """

  questions: Split
  start: np.ndarray

  @property
  def sizes(self) -> np.ndarray:
    return np.diff(self.start)


def build(config: Config, benchmark: Benchmark | None = None) -> Experiment:
  """Composes the experiment; the benchmark is by default the one of the config."""
  benchmark = benchmark or multimodal.load(config.desk, config.tasks)
  tuning.check_finite(benchmark.params)
  pad = benchmark.vocabulary.pad
  parts = [benchmark.targets[name] for name in config.tasks]
  train = mixed([task.train for task in parts], config.tasks, pad)
  tests = mixed([getattr(task, config.split) for task in parts], config.tasks, pad)
  separate = config.row in SEPARATE
  tuner, model = tuner_of(config), benchmark.model
  optimiser = tuners.adamw(tuning.rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  update = tuners.tuning_step(tuner, model, optimiser, tuners.answer_loss, clip=config.clip)
  moments: dict[str, Any] = moments_of(config, benchmark, train) if needs_preview(config) else {}
  sizes = batch_sizes(config, train.sizes)
  data = jax.device_put(train.questions)

  def init(key: jax.Array) -> TuningState:
    one = lambda key: tuners.init_state(tuner, optimiser, key, benchmark.params, moments)
    if not separate:
      return one(key)
    states = [one(jax.random.fold_in(key, t)) for t in range(len(config.tasks))]
    return jax.tree.map(lambda *x: jnp.stack(x), *states)

  def batches(k: int) -> Iterator[Split]:
    del k  # the state knows its step
    while True:
      yield data

  def drawn(data: Split, state: TuningState, task: int | None) -> dict[str, jax.Array]:
    """The next batch of one task, or of the mixture."""
    key = jax.random.wrap_key_data(state.key)
    if task is not None or config.sampler == "balanced":
      tasks = range(len(config.tasks)) if task is None else [task]
      rows = [
        train.start[t] + shuffled_rows(key, state.step, int(train.sizes[t]), sizes[t])
        for t in tasks
      ]
    else:
      rows = [shuffled_rows(key, state.step, int(train.start[-1]), config.batch_size)]
    return {name: x[jnp.concatenate(rows)] for name, x in data._asdict().items()}

  def step(state: TuningState, data: Split) -> tuple[TuningState, dict[str, jax.Array]]:
    if not separate:
      return update(state, drawn(data, state, None))
    done = []
    for t in range(len(config.tasks)):
      one = jax.tree.map(lambda x, t=t: x[t], state)
      done.append(update(one, drawn(data, one, t)))
    states, metrics = (
      jax.tree.map(lambda *x: jnp.stack(x), *part) for part in zip(*done, strict=True)
    )
    return states, jax.tree.map(jnp.mean, metrics)

  def evaluate(state: TuningState, test: Any) -> dict[str, jax.Array]:
    runs = models_of(config, tuner, benchmark, state)
    scores = [accuracies(run, test["tasks"], config.tasks) for run in runs]
    reached = {name: scores[t % len(runs)][name] for t, name in enumerate(config.tasks)}
    kept = [accuracies(run, test["source"], benchmark.upstream.families) for run in runs]
    source = jnp.stack([jnp.stack(list(of.values())).mean() for of in kept]).mean()
    return {
      "Mean": jnp.stack(list(reached.values())).mean(),
      **reached,
      "Source": source,
      "F": source - test["before"],
    }

  source = jax.device_put(getattr(benchmark.upstream, config.split))
  before = tuning.pretrained_scores(
    benchmark, {"source": source}, {"source": benchmark.upstream.families}
  )["source"]
  test = {
    "tasks": jax.device_put(tests.questions),
    "source": source,
    "before": jnp.stack(list(before.values())).mean(),
  }
  shares = ", ".join(f"{name} {n}" for name, n in zip(config.tasks, train.sizes, strict=True))
  return Experiment(
    init=init,
    batches=batches,
    step=step,
    evaluate=evaluate,
    test=test,
    figures=functools.partial(figures, config) if config.row == "thanora" else lambda state: {},
    num_steps=config.steps,
    about=f"{benchmark.about}; {config.sampler} mixture of {shares} training questions",
  )


# --- data ---------------------------------------------------------------------------------------


def mixed(parts: list[Split], names: list[str], pad: int) -> Mixture:
  """Tasks one after the other, texts padded to the longest.

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


def batch_sizes(config: Config, counts: np.ndarray) -> list[int]:
  """Examples of every task in a batch: its share of the mixture, or equal parts.

  Args:
    config: the tasks, the batch.
    counts: examples of every task.

  Raises:
    InputError: a task is smaller than its part, or its part is empty.
  """
  shares = counts / counts.sum()
  if config.sampler == "balanced":
    shares = np.full(len(shares), 1 / len(shares))
  sizes = np.floor(config.batch_size * shares).astype(int)
  for name, size, count in zip(config.tasks, sizes, counts, strict=True):
    apart = config.row in SEPARATE or config.sampler == "balanced"
    if size > count or (apart and size == 0):
      raise InputError(
        f"task {name}: {count} examples give it {size} of a batch of {config.batch_size}; "
        "change batch_size or sampler"
      )
  if config.batch_size > counts.sum():
    raise InputError(f"batch_size: {config.batch_size} is more than the {counts.sum()} examples")
  return sizes.tolist()


# --- rows ---------------------------------------------------------------------------------------


def tuner_of(config: Config) -> Tuner:
  """The row that a config names; those that train apart are LoRA."""
  update = (config.rank, config.alpha, config.dropout)
  targets = config.targets or tuners.LINEARS
  also = tuners.PROJECTOR if config.train_projector else None
  if config.row == "thanora":
    return method.tuner(
      *update,
      tasks=len(config.tasks),
      temperature=config.temperature,
      gain=config.gain or None,
      weight=config.spr_weight,
      spectrum=config.spectrum,
      orth_on=config.orth_on,
      damping=config.damping,
      start=config.start,
      compensate=config.compensate,
      cooperative=config.cooperative,
      targets=targets,
      also=also,
    )
  if config.row == "corda":
    return method.corda(*update, damping=config.damping, targets=targets, also=also)
  if config.row in ("hydralora", "loramoe"):
    kind = {"hydralora": low_rank.hydralora, "loramoe": low_rank.loramoe}[config.row]
    return tuners.adapted(kind(*update, config.experts), targets, also)
  return tuners.adapted(
    (low_rank.dora if config.row == "dora" else low_rank.lora)(*update), targets, also
  )


def models_of(
  config: Config, tuner: Tuner, benchmark: Benchmark, state: TuningState
) -> list[Callable[..., Any]]:
  """The model that is kept in the end; for "single" that of every task."""
  model = benchmark.model
  if config.row not in SEPARATE:
    return [tuning.tuned(tuner, model, state)]
  assert tuner.finalize is not None
  count = len(config.tasks)
  tuned = [tuner.finalize(*jax.tree.map(lambda x, t=t: x[t], state.tuner)) for t in range(count)]
  if config.row != "single":
    key = jax.random.wrap_key_data(state.key[0])
    tuned = [put_together(config, benchmark.params, tuned, key)]
  run = lambda params: lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)
  return [run(params) for params in tuned]


def put_together(config: Config, before: Any, tuned: list[Any], key: jax.Array) -> Any:
  """One model out of one for every task, tensor by tensor."""
  leaves, structure = jax.tree.flatten(before)
  keys = jax.random.split(key, len(leaves))

  def merge(key: jax.Array, before: jax.Array, *after: jax.Array) -> jax.Array:
    stack = jnp.stack(after)
    if config.row == "ties":
      return posterior.ties(before, stack - before, config.keep)
    if config.row == "dare":
      dropped = jax.random.bernoulli(key, config.drop, stack.shape)
      stack = posterior.dare(before, stack, dropped, config.drop)
    return stack.mean(0)

  parts = zip(keys, leaves, *map(jax.tree.leaves, tuned), strict=True)
  return jax.tree.unflatten(structure, [merge(*part) for part in parts])


# --- preview ------------------------------------------------------------------------------------


def needs_preview(config: Config) -> bool:
  """Whether the row starts from data."""
  return config.row == "corda" or (config.row == "thanora" and config.start == "preview")


def moments_of(config: Config, benchmark: Benchmark, train: Mixture) -> dict[str, np.ndarray]:
  """Second moments of what every layer is fed by the first `preview` training questions of a task."""
  model, pad = benchmark.model, benchmark.vocabulary.pad

  def read(params, part: Split):
    text = (part.ids != pad) & (part.family >= 0)[..., None]
    masks = [None, text.reshape(-1, text.shape[-1])]  # the image first, then the texts about it
    run = lambda: model.apply({"params": params}, part.ids, features=part.features, logits="none")
    return run, masks

  def chunks(start: int, end: int) -> Iterator[Split]:
    end = min(end, start + config.preview)
    for first in range(start, end, _PREVIEW_CHUNK):
      yield Split(*(x[first : min(first + _PREVIEW_CHUNK, end)] for x in train.questions))

  tasks = [chunks(*ends) for ends in itertools.pairwise(train.start.tolist())]
  return second_moments(config, benchmark.params, tasks, read)


def second_moments(
  config: Config,
  params: Any,
  tasks: Iterable[Iterable[Any]],
  read: Callable[[Any, Any], tuple[Callable[[], Any], list[jax.Array | None]]],
  begin: Callable[[int], method.Moment] = method.no_inputs,
) -> dict[str, np.ndarray]:
  """Second moments of the inputs of every layer, all tokens but padding.

  Args:
    config: the layers, and whether tasks are kept apart.
    params: of the model.
    tasks: the batches of every task.
    read: (params, batch) -> (what applies the model, masks of the calls of a layer), as `preview` wants.
    begin: width -> the moment before anything was seen.

  Returns:
    By the path of the layer (T, in, in), or (1, in, in) for corda; on the host.
  """
  targets = config.targets or tuners.LINEARS
  flat = flatten(params)
  widths = {owner(path): flat[path].shape[0] for path in preview.linear_targets(params, targets)}

  @functools.partial(compiler.jit, donate_argnums=1)
  def add(params, summaries, batch):
    run, masks = read(params, batch)
    return preview.linear_inputs(run, params, targets, method.add_inputs, summaries, masks)

  seen = []
  for batches in tasks:
    summaries = {path: begin(width) for path, width in widths.items()}
    for batch in batches:
      summaries = add(params, summaries, batch)
    seen.append(jax.device_get(summaries))
  if config.row == "corda":
    seen = [jax.tree.map(lambda *x: sum(x), *seen)]
  second = lambda moment: np.asarray(method.second_moment(moment))
  return {path: np.stack([second(summaries[path]) for summaries in seen]) for path in widths}


# --- pictures -----------------------------------------------------------------------------------


def figures(config: Config, state: TuningState) -> dict[str, Figure]:
  """Complexity of every task along the layers, and the ranks that came of it."""
  extra = jax.device_get(state.tuner.extra)
  paths = list(layers_of(state.tuner.trainable["adapter"]))
  whose = [*range(len(config.tasks)), method.COOPERATIVE]
  ranks = np.stack([(extra["owner"] == task).sum(1) for task in whose], axis=1)
  names = [path.removeprefix("language/") for path in paths]
  pictures = {"ranks": _table(ranks, names, [*config.tasks, "cooperative"])}
  if config.start == "preview":
    pictures["entropy"] = _curves(extra["entropy"], names, config.tasks)
  return pictures


def _table(ranks: np.ndarray, layers: list[str], columns: list[str]) -> Figure:
  figure, axes = plt.subplots(
    figsize=(2.5 + 0.9 * len(columns), 1.2 + 0.24 * len(layers)), layout="constrained"
  )
  axes.imshow(ranks, aspect="auto", cmap="Blues")
  for (row, column), rank in np.ndenumerate(ranks):
    dark = rank > 0.6 * ranks.max()
    axes.text(column, row, rank, ha="center", va="center", fontsize=7, color="w" if dark else "k")
  axes.set_yticks(range(len(layers)), layers, fontsize=7)
  axes.set_xticks(range(len(columns)), columns, fontsize=8)
  axes.set_title("rank of every block", fontsize=10)
  axes.spines[:].set_visible(False)
  return figure


def _curves(entropy: np.ndarray, layers: list[str], tasks: list[str]) -> Figure:
  """One panel for each kind of layer, depth along the x axis."""
  kinds = sorted({name.split("/")[-1] for name in layers})
  figure, axes = plt.subplots(
    1, len(kinds), figsize=(1.7 * len(kinds), 2.6), sharey=True, squeeze=False, layout="constrained"
  )
  for kind, axis in zip(kinds, axes.flat, strict=True):
    rows = [i for i, name in enumerate(layers) if name.split("/")[-1] == kind]
    for task, name in enumerate(tasks):
      axis.plot(range(len(rows)), entropy[rows, task], marker="o", markersize=3, label=name)
    axis.set_title(kind, fontsize=9)
    axis.set_xticks(range(len(rows)))
    axis.spines[["top", "right"]].set_visible(False)
  axes[0, 0].set_ylabel("normalised spectral entropy")
  figure.supxlabel("layer", fontsize=9)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper center", ncols=len(tasks), frameon=False, fontsize=8
  )
  return figure
