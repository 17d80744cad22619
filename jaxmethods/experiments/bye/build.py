"""Composes the experiment: a poisoned target, two tunings with a defence between them, pictures."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.adapters.low_rank import lora
from jaxmethods.data.array_cache import cached_tree, described
from jaxmethods.experiments.bye import figures, planting, tunings
from jaxmethods.experiments.bye.config import AFTERWARDS, ONCE, Config, attack, criteria
from jaxmethods.experiments.bye.detection import attention_maps, null_separations
from jaxmethods.experiments.bye.planting import Data
from jaxmethods.experiments.bye.tunings import Parts, State, Work
from jaxmethods.runtime import checks, compiler, loop
from jaxmethods.runtime.experiment import Experiment, in_common
from jaxmethods.testbeds.multimodal import benchmark as multimodal
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.testbeds.multimodal.questions import Split, check_size
from jaxmethods.testbeds.multimodal.tuning import rates_of
from jaxmethods.trees import Params
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TunerState

_FORMAT = b"first tuning 1"  # changes when the first tuning changes


def build(
  config: Config, mesh: Mesh | None = None, *, benchmark: Benchmark | None = None
) -> Experiment:
  """Composes the experiment; `benchmark`: default the desk benchmark of `config`.

  Raises:
    InputError: a mesh, or a target that does not fit.
  """
  checks.no_mesh("bye", mesh)
  benchmark = benchmark or multimodal.load(config.desk, ())
  data, tuner = load(config, benchmark), tuner_of(config)
  null = nulls_of(config, len(data.open))
  data = data._replace(about=data.about + described_nulls(null, config))
  found = criteria(config)._replace(null=max(null.values(), default=0.0))
  parts = Parts(
    benchmark.model, tuner,
    tuners.adamw(rates_of(config), tuner.rates, config.steps, warmup=config.warmup), config.clip,
    config.steps, config.batch_size, config.defence, config.drop_share, found,
    config.restart, config.poison_rate * len(data.open) / data.open.sum(),
  )  # fmt: skip
  train, params, test = jax.device_put((data.train, benchmark.params, data.test))
  # Plain jit: `init` may be traced, and compiler options are for programs that are not part of others.
  started = jax.jit(functools.partial(tunings.start, parts))
  free = jnp.asarray(data.open)
  init = lambda key: started(key, params, train, free)
  batches = functools.partial(works, train, params)
  step = functools.partial(tunings.step, parts)
  evaluate = functools.partial(tunings.evaluate, parts)
  pictures = functools.partial(draw, parts, data)
  if config.defence in ONCE or not config.reuse:
    num_steps = config.steps * (1 if config.defence in ONCE else 2)
    return Experiment(init, batches, step, evaluate, test, pictures, num_steps, data.about)
  settings = described(in_common(config, AFTERWARDS), "Config")
  read = [np.asarray(x) for x in jax.tree.leaves((benchmark.params, data.train))]
  advance = lambda state: loop.advance(
    compiler.jit(step), state, batches(0), config.steps, "first tuning"
  )
  tuned = functools.partial(after_first, init, advance, config.steps, settings, read)
  second = lambda k: batches(config.steps + k)
  return Experiment(tuned, second, step, evaluate, test, pictures, config.steps, data.about)


def load(config: Config, benchmark: Benchmark) -> Data:
  """Loads the target with the backdoor in it.

  Raises:
    InputError: see `planting.load`; fewer examples than a batch has.
  """
  limit = config.desk.limit
  data = planting.load(config.target, config.split, limit, attack(config), benchmark)
  check_size(data.train.clean, config.batch_size)
  return data


def nulls_of(config: Config, count: int) -> dict[str, float]:
  """Separations without poison, for rows that look at layers; empty where they are not asked for."""
  if config.defence in ONCE or not config.null_draws:
    return {}
  return null_separations(count, config.null_draws, config.index)


def described_nulls(null: dict[str, float], config: Config) -> str:
  """Says what separation is no sign of poison, for the first line of the report."""
  if not null:
    return ""
  each = ", ".join(f"{name} {value:.2f}" for name, value in null.items())
  draws = f"95 % of {config.null_draws} draws without poison"
  return f"; separation ({config.index}) of {draws}, at most: {each}"


def tuner_of(config: Config) -> Tuner:
  """All of projector and language model, or LoRA in it and the projector."""
  if config.adapter == "full":
    return tuners.selected(tuners.EVERYTHING)
  return tuners.adapted(lora(config.rank, config.alpha, config.dropout))


def works(train: planting.Pair, params: Params, first: int) -> Iterator[Work]:
  """Inputs of the steps from `first` on."""
  for number in itertools.count(first):
    yield Work(jnp.int32(number), train, params)


def after_first(
  init: Callable[[jax.Array], State],
  advance: Callable[[State], State],
  steps: int,
  settings: bytes,
  read: list[np.ndarray],
  key: jax.Array,
) -> State:
  """The state after the first tuning, in which the rows of a comparison agree; then cached.

  Args:
    init: key -> state.
    advance: state -> state after the first tuning.
    steps: of it.
    settings: those it depends on.
    read: arrays it depends on.
    key: of the run.
  """
  state = init(key)
  if isinstance(key, jax.core.Tracer):  # only the shapes are asked for
    return state
  compute: Callable[[], TunerState] = lambda: advance(state).tuning.tuner
  depends: list[bytes | np.ndarray] = [
    _FORMAT,
    settings,
    np.asarray(jax.random.key_data(key)),
    *read,
  ]
  first = cached_tree("first_tuning", depends, jax.tree.structure(state.first), compute)
  tuning = state.tuning._replace(tuner=first, step=jnp.int32(steps))
  return state._replace(tuning=tuning, first=first)


def draw(parts: Parts, data: Data, state: State) -> dict[str, Figure]:
  """Pictures, where there is a first model and poison to look for."""
  if state.first is None or state.judgement is None or not state.poisoned.any():
    return {}
  poisoned, kept = np.asarray(state.poisoned), np.asarray(state.kept)
  shown = np.flatnonzero(poisoned)[: figures.SHOWN]
  # The same images with and without trigger, as one batch.
  columns = zip(*data.train, strict=True)
  pairs = Split(*(np.concatenate([x[shown] for x in parts]) for parts in columns))
  maps = compiler.jit(functools.partial(attention_maps, parts.tuner, parts.model))(
    state.first, pairs
  )
  clean, marked = data.images
  judgement = jax.device_get(state.judgement)
  found = parts.criteria
  pictures = {
    "entropies": figures.entropies(
      judgement, poisoned, max(found.tau, found.null), found.separation
    ),
    "attention": figures.attention(
      (clean[shown], marked[shown]), np.split(np.asarray(maps), 2, axis=1)
    ),
  }
  if not kept.all():
    seen = np.where(poisoned[:, None, None, None], marked, clean)
    pictures["removed"] = figures.removed(seen, poisoned, kept)
  return pictures
