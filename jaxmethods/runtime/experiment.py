"""What a method gives the loop (`Experiment`), and the settings every run has (`RunConfig`).

This module must stay importable without jax: `--help` and argument errors answer before it loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from jaxmethods.runtime import checks

if TYPE_CHECKING:
  from pathlib import Path

  import jax
  from jax.sharding import Mesh
  from matplotlib.figure import Figure


# `trees.PyTree` without jax.
State: TypeAlias = Any
Batch: TypeAlias = Any
Test: TypeAlias = Any
Metrics: TypeAlias = Mapping[str, Any]  # name -> scalar array, on the device until it is logged
Values: TypeAlias = dict[str, Any]  # name -> number or list of numbers, as JSON holds it
Config = TypeVar("Config", bound="RunConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Settings that every method's config inherits; all can be set from YAML or the command line."""

  seed: int = 1  # of the initialisation and the order of batches; eval.compare counts up from it
  steps: int = 100  # training steps; communication rounds for federated methods
  log_every: int = 1  # steps between two lines of metrics.jsonl
  eval_every: int = 1  # steps between two evaluations; their metrics join that step's line
  checkpoint_every: int = 10  # steps between two checkpoints
  keep_checkpoints: int = 3  # the newest that stay on disk
  average_last: int = 1  # eval.compare reports the mean of this many last evaluations

  @property
  def seeds_vary(self) -> str:
    """For eval.compare: which parts of a run differ from seed to seed."""
    return "initialisation"

  @property
  def counted(self) -> tuple[str, ...]:
    """For eval.compare: fields that count on from seed to seed, for which data are made anew."""
    return ()

  def __post_init__(self) -> None:
    checks.sound(self)
    checks.at_least(
      self,
      1,
      "steps",
      "log_every",
      "eval_every",
      "checkpoint_every",
      "keep_checkpoints",
      "average_last",
    )


def in_common(config: Config, free: Iterable[str]) -> Config:
  """What rows of a comparison have in common: `config` without its choices of `free`.

  They have their defaults, and so has what every run has beside `steps`: no part of a computation
  whose result is shared may depend on any of these.
  """
  run = {field.name for field in dataclasses.fields(RunConfig)} - {"steps"}
  plain: Values = {
    field.name: field.default
    for field in dataclasses.fields(config)
    if field.name in run.union(free)
  }
  return dataclasses.replace(config, **plain)


class Export(NamedTuple):
  """How a trained model leaves in the formats of others.

  Attributes:
    formats: those that this run has, of "peft", "hf", "merged".
    write: (state, format, folder) -> None; the folder is there and empty.
    base: name of the model that was tuned.
    why_not: said where a format is missing.
  """

  formats: tuple[str, ...]
  write: Callable[[State, str, Path], None]
  base: str
  why_not: str = ""


class Experiment(NamedTuple):
  """A training run as data and pure functions; the loop, eval and compare know nothing else.

  Attributes:
    init: key -> state. One pytree holding everything that a checkpoint needs.
    batches: k -> iterator over the batches of steps k, k+1, ...; deterministic, so that a
      resumed run repeats nothing. Arrays that stay on the device may be part of every batch.
    step: (state, batch) -> (state, metrics). Pure; the caller jits it and donates the state, or
      maps it over a leading axis of seeds. `metrics` has at least "loss".
    evaluate: (state, test) -> metrics. Pure and mappable like `step`; its first entry is the
      metric that a comparison ranks by.
    test: what `evaluate` reads, as arrays. An argument, not a closure: jit bakes closed-over arrays
      into the program text (measured: 20 MB of data became 40 MB of program).
    figures: state -> {name: matplotlib figure}; what a person would rather look at than read.
      Every process calls it, since it may compute on the whole mesh; one writes the pictures.
    num_steps: number of steps of the whole run.
    about: one line for the top of every report: the data, how many examples, where from, and
      whether real or generated.
    files: state -> {file name: text or bytes}; what a run leaves in its workdir beside the pictures.
    programs: (step, evaluate) once more, made of several jitted programs that the loop calls as they
      are: XLA compiles them side by side. None: the loop jits each as one.
    export: how the model leaves in the formats of others; None: it does not.
    validation_items: size of the validation split; 0: not told.
    table: state -> header and lines of a table that eval.run prints before the metrics.
  """

  init: Callable[[jax.Array], State]
  batches: Callable[[int], Iterator[Batch]]
  step: Callable[[State, Batch], tuple[State, Metrics]]
  evaluate: Callable[[State, Test], Metrics]
  test: Test
  figures: Callable[[State], dict[str, Figure]]
  num_steps: int
  about: str
  files: Callable[[State], Mapping[str, str | bytes]] = lambda state: {}
  programs: tuple[Callable, Callable] | None = None
  export: Export | None = None
  validation_items: int = 0
  table: Callable[[State], tuple[Sequence[str], Sequence[Sequence[str]]]] | None = None


class Selection(NamedTuple):
  """How a setting of a row is chosen: on validation items, never on test ones.

  Attributes:
    config: the row, evaluated on validation.
    metric: the highest mean over seeds wins.
    floors: metric -> least mean of a setting that may win.
    trade: (metric that is gained, metric that may be lost) along a run, if there are such.
  """

  config: RunConfig
  metric: str
  floors: Mapping[str, float] = {}
  trade: tuple[str, str] | None = None


class Room(NamedTuple):
  """A method as the entry points use it; `build` and `comparison` import jax when they are called.

  Attributes:
    Config: frozen dataclass.
    rows: config -> {row name: config}, the method and its baselines.
    build: (config, mesh or None) -> Experiment.
    untrained: config -> whether there is nothing to train.
    comparison: rows of the JSON of eval.compare -> {name: figure}.
    studies: config -> {name: `runtime.studies.Study`}, questions that other rows answer.
    selection: config of a row -> how a setting of it is chosen; None: there is no validation split.
  """

  Config: type[RunConfig]
  rows: Callable[[RunConfig], dict[str, RunConfig]]
  build: Callable[[RunConfig, Mesh | None], Experiment]
  untrained: Callable[[RunConfig], bool]
  comparison: Callable[[list[Values]], dict[str, Figure]]
  studies: Callable[[RunConfig], Mapping[str, tuple]] = lambda config: {}
  selection: Callable[[RunConfig], Selection | None] = lambda config: None
