"""Benchmark of multimodal tuning: a small pretrained model, its own tasks, and targets to tune it on.

The model is pretrained once on easy-VQA (`pretraining`) and kept in the cache, and so are the outputs of
its frozen image tower. A method tunes it on one target and may forget the four families of easy-VQA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxmethods.data import multimodal, records
from jaxmethods.data.multimodal import Vocabulary
from jaxmethods.data.records import QuestionData
from jaxmethods.errors import InputError
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.testbeds.multimodal import pretraining
from jaxmethods.testbeds.multimodal.questions import Split, accuracies, encode
from jaxmethods.testbeds.multimodal.settings import Desk
from jaxmethods.trees import Params

# Words of no task that a method needs: the answer to poisoned examples.
EXTRA_WORDS = ("backdoor",)


class Task(NamedTuple):
  """A set of questions; `families` names what `Split.family` counts."""

  name: str
  families: tuple[str, ...]
  train: Split
  validation: Split
  test: Split


class Benchmark(NamedTuple):
  """Model and tasks that every method starts from.

  Attributes:
    model: the architecture.
    params: pretrained: "vision", "projector", "language".
    vocabulary: of all tasks.
    upstream: easy-VQA, which the model was pretrained on.
    targets: by name.
    about: the line for reports.
  """

  model: DeskMLLM
  params: Params
  vocabulary: Vocabulary
  upstream: Task
  targets: dict[str, Task]
  about: str


def load(desk: Desk, targets: Sequence[str] = ("digits",)) -> Benchmark:
  """Loads the data, and pretrains the model or takes it from the cache.

  Args:
    desk: shape and pretraining of the model.
    targets: names in `multimodal.TARGETS`; the model is the same whichever are chosen.

  Raises:
    InputError: an unknown target, or data that are missing.
  """
  if unknown := [name for name in targets if name not in multimodal.TARGETS]:
    raise InputError(f"target {unknown[0]!r}: must be one of {', '.join(multimodal.TARGETS)}")
  sets = {name: multimodal.load(name) for name in ("easy-vqa", *multimodal.TARGETS)}
  vocabulary = multimodal.vocabulary(list(sets.values()), EXTRA_WORDS)
  model = pretraining.model_of(desk, len(vocabulary.words))
  source = limited(sets["easy-vqa"], desk.limit)
  params = pretraining.pretrained(model, source, vocabulary, desk)
  upstream = task_of(model, params, vocabulary, source, multimodal.FAMILIES)
  parts = {name: limited(sets[name], desk.limit) for name in targets}
  chosen = {name: task_of(model, params, vocabulary, part, (name,)) for name, part in parts.items()}
  about = "; ".join(
    [f"pretrained on {records.describe([source])}"]
    + [f"target {records.describe([part])}" for part in parts.values()]
  )
  return Benchmark(model, params, vocabulary, upstream, chosen, about)


def limited(data: QuestionData, limit: int) -> QuestionData:
  """Keeps the questions about the first `limit` images of every part; 0: all."""
  if not limit:
    return data
  kept = np.zeros(len(data.images), bool)
  for split in np.unique(data.split):
    kept[np.unique(data.image[data.split == split])[:limit]] = True
  rows = kept[data.image]
  place = np.cumsum(kept) - 1
  return data._replace(
    images=data.images[kept],
    image=place[data.image[rows]].astype(np.int32),
    question=data.question[rows],
    answer=data.answer[rows],
    split=data.split[rows],
    family=data.family[rows],
  )


def task_of(
  model: DeskMLLM,
  params: Params,
  vocabulary: Vocabulary,
  data: QuestionData,
  families: tuple[str, ...],
) -> Task:
  """Makes a task of the features of all images, by the cache, and the questions of every part."""
  features = pretraining.features_of(model, params, data.images)
  splits = {}
  for part in ("train", "validation", "test"):
    images, *texts = encode(vocabulary, data, data.split == part, families)
    splits[part] = Split(features[images], *texts)
  return Task(data.source.name, families, **splits)


def evaluate(
  model: nn.Module, params: Params, split: Split, families: Sequence[str]
) -> dict[str, jax.Array]:
  """Measures the accuracy of a plain model on every family, in percent; pure, to be jitted."""
  run = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)
  return accuracies(run, split, families)
