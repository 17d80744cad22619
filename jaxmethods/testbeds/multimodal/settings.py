"""Settings that every method of tuning a multimodal model has. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxmethods.errors import InputError, nearest
from jaxmethods.runtime.experiment import RunConfig

Target = Literal["digits", "counting", "captions", "checking"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Desk:
  """The model of desk size and its pretraining on easy-VQA (ours): once, kept in the cache."""

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
    for field in dataclasses.fields(self):
      least = 0 if field.name in ("words", "seed", "limit") else 1
      value = getattr(self, field.name)
      if field.type == "int" and value < least:
        raise ValueError(f"desk.{field.name}: must be at least {least}, got {value}")
    for name in ("tower_rate", "learning_rate"):
      if not getattr(self, name) > 0:
        raise ValueError(f"desk.{name}: must be positive, got {getattr(self, name)}")
    for width, heads in (("width", "num_heads"), ("tower_width", "tower_heads")):
      if getattr(self, width) % getattr(self, heads):
        raise ValueError(f"desk.{width}: must be a multiple of desk.{heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A real LLaVA-style model, and questions and images from disk, in place of the desk model.

  Files of questions have one JSON object a line; see `data.question_files`.
  """

  model: str = ""  # hf:FOLDER; empty: the desk model
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
    for name in ("test_questions", "max_length", "chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"checkpoint.{name}: must be at least 1, got {getattr(self, name)}")
    if len(self.padding) != 3 or not all(0 <= c <= 255 for c in self.padding):
      raise ValueError(f"checkpoint.padding: must be three of 0..255, got {self.padding}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig(RunConfig):
  """What all rows share: the model, the budget and its schedule."""

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

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("batch_size", "probe_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
    for name in ("learning_rate", "clip"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")
    if self.projector_rate < 0:
      raise ValueError(f"projector_rate: must not be negative, got {self.projector_rate}")
    if not 0 <= self.warmup < 1:
      raise ValueError(f"warmup: must be in [0, 1), got {self.warmup}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig(BudgetConfig):
  """The same for one target."""

  target: Target = "digits"


def at_their_rates(config: Any, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Rows of a comparison: the config with the changes of each, at its learning rate in `config.rates`.

  Raises:
    InputError: `rates` names no row.
  """
  for name in config.rates:
    if name not in changes:
      raise InputError(f"rates: {name!r} is no row, the nearest is {nearest(name, changes)}")
  rate = lambda name: config.rates.get(name, config.learning_rate)
  return {
    name: dataclasses.replace(config, learning_rate=rate(name), **change)
    for name, change in changes.items()
  }
