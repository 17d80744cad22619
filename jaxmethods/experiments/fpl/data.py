"""One task in one or several domains, split into training and test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxmethods.data import files, records, sources
from jaxmethods.data.records import ArrayData
from jaxmethods.testbeds.vision_language import tasks
from jaxmethods.testbeds.vision_language.settings import TaskSize

_VALIDATION = 0.25  # of the training examples, where a task has no part of its own
_SIDE = 224  # of images of folders
_TEMPLATE = "a photo of a {}."


class Images(NamedTuple):
  """Pictures of several domains, padded to the largest.

  Attributes:
    x: (D, n, h, w, 3).
    y: labels, -1 where there is no picture.
  """

  x: UInt8[np.ndarray, "D n h w 3"]
  y: Int[np.ndarray, "D n"]


class Data(NamedTuple):
  """Arrays of an experiment.

  Attributes:
    domains: names.
    classes: names.
    templates: prompts with `{}` for a class.
    train, test: pictures.
    about: first line of the report.
  """

  domains: list[str]
  classes: tuple[str, ...]
  templates: tuple[str, ...]
  train: Images
  test: Images
  about: str


def load(name: str, size: TaskSize, held_out: str) -> Data:
  """Loads a set of domains, one task, or `folder:PATH` with domain/class/image.

  Args:
    name: of `tasks.DOMAIN_SETS` or of a task, or a folder.
    size: of every domain; folders are taken whole.
    held_out: `test`, or `validation` to test on pictures beside both (`size.validation`), or on a part
      of training where there are none.

  Raises:
    InputError: an unknown name, or data that are missing.
  """
  if name.startswith("folder:"):
    found = _folder(name)
  elif name in tasks.DOMAIN_SETS:
    found = tasks.load_domains(name, size)
  else:
    found = {name: tasks.load_task(name, size)}
  first, *_ = found.values()
  parts = [_parts(task, held_out) for task in found.values()]
  train, test = (_stacked([pair[i] for pair in parts]) for i in (0, 1))
  sets = [
    ArrayData({"train": one, "test": two}, len(task.classes), task.source)
    for task, (one, two) in zip(found.values(), parts, strict=True)
  ]
  about = f"{records.describe(sets)}; tested on {held_out}"
  return Data(list(found), first.classes, first.templates[:1], train, test, about)


def _folder(name: str) -> dict[str, tasks.Task]:
  """Domains of a folder, by class and file name; of ten in a row the last two are tests (code)."""
  loaded = sources.load_arrays(name, image_size=_SIDE)
  folder = files.local_path(name.removeprefix("folder:"))
  nested = "all" not in loaded.splits
  holders = [folder / split for split in loaded.splits] if nested else [folder]
  names = sorted({
    path.name for holder in holders for path in holder.iterdir()
    if path.is_dir() and not path.name.startswith(".")
  })  # fmt: skip
  classes = tuple(each.replace("_", " ").lower() for each in names)
  found = {}
  for split, (x, y) in loaded.splits.items():
    x, test = np.broadcast_to(x, (*x.shape[:3], 3)), np.arange(len(y)) % 10 > 7
    pairs = (x[~test], y[~test]), (x[test], y[test])
    found[split] = tasks.Task(split, classes, (_TEMPLATE,), *pairs, loaded.source)
  return found


def _parts(task: tasks.Task, held_out: str) -> tuple[tuple, tuple]:
  if held_out == "test":
    return task.train, task.test
  if len(task.validation[1]):
    return task.train, task.validation
  cut = max(1, round(len(task.train[1]) * _VALIDATION))
  x, y = task.train
  return (x[cut:], y[cut:]), (x[:cut], y[:cut])


def _stacked(parts: list[tuple[np.ndarray, np.ndarray]]) -> Images:
  longest = max(len(y) for _, y in parts)
  extra = lambda y: (0, longest - len(y))
  x = np.stack([np.pad(x, [extra(y), (0, 0), (0, 0), (0, 0)]) for x, y in parts])
  return Images(x, np.stack([np.pad(y, extra(y), constant_values=-1) for _, y in parts]))
