"""Settings of the models and tasks that methods of vision and language stand on. Imports no jax."""

from __future__ import annotations

import dataclasses

from jaxmethods.errors import InputError

# Rendered tasks, then real ones out of packages, in alphabetic order within each.
EMBEDDED_TASKS = (
  "backgrounds", "colours", "counts", "digits", "fills", "glyph-digits", "letters", "mnist", "pairs",
  "places", "shapes", "sketched-shapes",
)  # fmt: skip
# Real photographs and drawings of the data folder.
FOLDER_TASKS = ("cifar10", "office-amazon", "office-caltech", "office-dslr", "office-webcam",
                "pacs-art", "pacs-cartoon", "pacs-photo", "pacs-sketch")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallClip:
  """A CLIP of 0.3M parameters and its pretraining on pairs that we render: once, kept in the cache."""

  width: int = 64  # of the image tower
  layers: int = 4
  text_width: int = 64
  text_layers: int = 2
  heads: int = 4
  patch: int = 8
  projection: int = 64
  context: int = 40  # longest text in tokens, with learnt prompts
  pairs: int = 24_000
  steps: int = 4000
  batch_size: int = 64
  learning_rate: float = 2e-3
  seed: int = 0

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      if field.type == "int" and field.name != "seed" and getattr(self, field.name) < 1:
        raise InputError(f"clip.{field.name}: must be at least 1, got {getattr(self, field.name)}")
    if not self.learning_rate > 0:
      raise InputError(f"clip.learning_rate: must be positive, got {self.learning_rate}")
    if self.batch_size > self.pairs:
      raise InputError(f"clip.batch_size: {self.batch_size} is more than {self.pairs} pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSize:
  """How much of a task is used; a task with less has less."""

  train: int = 256  # images
  test: int = 100
  validation: int = 0  # more images, beside training and test, to choose settings by
  seed: int = 0  # of rendering and of the split

  def __post_init__(self) -> None:
    if self.validation < 0:
      raise InputError(f"tasks.validation: must be at least 0, got {self.validation}")
    for name in ("train", "test"):
      if getattr(self, name) < 1:
        raise InputError(f"tasks.{name}: must be at least 1, got {getattr(self, name)}")
