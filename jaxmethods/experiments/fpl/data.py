"""One task in one or several domains, split into training and test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxmethods.errors import InputError
from jaxmethods.testbeds.vision_language import tasks
from jaxmethods.testbeds.vision_language.settings import TaskSize

_VALIDATION = 0.25  # of the training examples


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
  """Loads a set of domains or one task; `held_out: validation` tests on a part of training.

  Raises:
    InputError: an unknown name, data that are missing, a class without training examples.
  """
  found = (
    tasks.load_domains(name, size)
    if name in tasks.DOMAIN_SETS
    else {name: tasks.load_task(name, size)}
  )
  first, *_ = found.values()
  parts = [_parts(task, held_out) for task in found.values()]
  train, test = (_stacked([pair[i] for pair in parts]) for i in (0, 1))
  if missing := set(range(len(first.classes))) - set(train.y.ravel().tolist()):
    raise InputError(f"{name}: class {min(missing)} has no training example")
  count = lambda images: int((images.y >= 0).sum())
  sources = [task.source for task in found.values()]
  once = lambda values: ", ".join(dict.fromkeys(values))
  kind = once("real" if source.real else "generated" for source in sources)
  about = (
    f"{name} ({len(found)} domains: {', '.join(found)}; {len(first.classes)} classes; {count(train)} "
    f"examples, {count(test)} for {held_out}); {kind} data; from {once(s.origin for s in sources)}; "
    f"licence: {once(s.licence for s in sources)}"
  )
  return Data(list(found), first.classes, first.templates[:1], train, test, about)


def _parts(task: tasks.Task, held_out: str) -> tuple[tuple, tuple]:
  if held_out == "test":
    return task.train, task.test
  cut = max(1, round(len(task.train[1]) * _VALIDATION))
  x, y = task.train
  return (x[cut:], y[cut:]), (x[:cut], y[:cut])


def _stacked(parts: list[tuple[np.ndarray, np.ndarray]]) -> Images:
  longest = max(len(y) for _, y in parts)
  extra = lambda y: (0, longest - len(y))
  x = np.stack([np.pad(x, [extra(y), (0, 0), (0, 0), (0, 0)]) for x, y in parts])
  return Images(x, np.stack([np.pad(y, extra(y), constant_values=-1) for _, y in parts]))
