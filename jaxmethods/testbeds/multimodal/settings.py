"""Settings of all methods that tune a multimodal model. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from jaxmethods.errors import InputError, hint
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig, Selection

Target = Literal["digits", "counting", "captions", "checking"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Desk:
  """The small model and its pretraining on easy-VQA (ours): once, kept in the cache."""

  width: int = 96  # of the language model
  num_layers: int = 3
  num_heads: int = 4
  mlp_width: int = 256
  tower_width: int = 64
  tower_layers: int = 2
  tower_heads: int = 4
  tower_steps: int = 500  # of 64 images: shape and colour, then the tower is frozen
  tower_rate: float = 2e-3
  steps: int = 800  # of 16 images with 8 questions each
  learning_rate: float = 1e-3
  words: int = 2  # further questions an image: a word that answers itself
  seed: int = 0
  limit: int = 0  # images kept of every part of every data set; 0: all

  def __post_init__(self) -> None:
    least_0 = ("words", "seed", "limit")
    counts = (f.name for f in dataclasses.fields(self) if f.type == "int" and f.name not in least_0)
    checks.at_least(self, 1, *counts, prefix="desk.")
    checks.at_least(self, 0, *least_0, prefix="desk.")
    checks.positive(self, "tower_rate", "learning_rate", prefix="desk.")
    for width, heads in (("width", "num_heads"), ("tower_width", "tower_heads")):
      divides = getattr(self, width) % getattr(self, heads) == 0
      checks.require(divides, f"desk.{width}", f"must be a multiple of desk.{heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A real LLaVA-style model, and questions and images from disk, in place of the small model.

  Files of questions have one JSON object a line; see `data.question_files`.
  """

  model: str = ""  # hf:FOLDER; empty: the small model
  train: str = ""  # file of the target's training questions
  test: str = ""  # file of its test questions
  upstream: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> file; tested only
  test_questions: int = 500  # of every file
  max_length: int = 2048  # tokens, the image's too (code)
  padding: list[int] = dataclasses.field(
    default_factory=lambda: [122, 116, 104]
  )  # mean colour (code)
  chunk: int = 4  # questions that are answered at once
  scan_layers: bool = True  # False: rows that choose single layers work, compilation takes longer
  remat: bool = True
  dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation

  def __post_init__(self) -> None:
    checks.at_least(self, 1, "test_questions", "max_length", "chunk", prefix="checkpoint.")
    colour = len(self.padding) == 3 and all(0 <= c <= 255 for c in self.padding)
    checks.require(colour, "checkpoint.padding", f"must be three of 0..255, got {self.padding}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig(RunConfig):
  """The model, the budget and its schedule, the same for all rows."""

  steps: int = 350  # of the verified recipe: 9.6 epochs of the digits
  log_every: int = 10
  eval_every: int = 350
  checkpoint_every: int = 50
  desk: Desk = dataclasses.field(default_factory=Desk)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  split: Literal["test", "validation"] = "test"  # what is evaluated; rates are chosen on validation
  batch_size: int = 32
  learning_rate: float = 1e-3  # of what is trained in the language model, or of the adapter
  projector_rate: float = 1e-3
  warmup: float = 0.03
  clip: float = 1.0
  probe_size: int = 128  # target training images for methods that need statistics

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`; all seeds of a comparison on a checkpoint read the same batches."""
    return "initialisation" if self.checkpoint.model else "initialisation and order of the data"

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(self, 1, "batch_size", "probe_size")
    checks.positive(self, "learning_rate", "clip")
    checks.at_least(self, 0, "projector_rate")
    checks.within(self, "[0, 1)", "warmup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig(BudgetConfig):
  """The budget of tuning on one target."""

  target: Target = "digits"


Config = TypeVar("Config", bound=BudgetConfig)


def at_their_rates(
  config: Config, rates: Mapping[str, float], changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Config]:
  """Makes the rows of a comparison, each at its own learning rate.

  Args:
    config: what all rows share.
    rates: learning rates by row; rows without one have that of the config.
    changes: fields of every row that differ from the config.

  Raises:
    InputError: `rates` names no row.
  """
  for name in rates:
    if name not in changes:
      raise InputError(f"rates: {name!r} is no row; {hint(name, changes, 'rows')}")
  return {
    name: dataclasses.replace(config, learning_rate=rates.get(name, config.learning_rate), **change)
    for name, change in changes.items()
  }


def selected_by(
  config: BudgetConfig, metric: str, gained: str, floors: Mapping[str, float] | None = None
) -> Selection | None:
  """Chooses settings of a row by a metric on validation; None with files, which have no such part.

  Args:
    config: of the row.
    metric: the highest wins.
    gained: metric of what is learnt, beside "Source", which may be lost.
    floors: metric -> least value.
  """
  if config.checkpoint.model:
    return None
  judged = dataclasses.replace(config, split="validation")
  return Selection(judged, metric, floors or {}, (gained, "Source"))
