"""A backdoor in training data: images with a trigger, the false answer, and examples chosen for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data import multimodal as questions_data, records
from jaxmethods.data.records import QuestionData
from jaxmethods.errors import InputError
from jaxmethods.experiments.bye.config import Attack
from jaxmethods.images import triggers
from jaxmethods.runtime import compiler
from jaxmethods.testbeds.multimodal import benchmark as multimodal
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.testbeds.multimodal.questions import Split


class Pair(NamedTuple):
  """The same examples, as they are and with trigger and false answer; one question per image."""

  clean: Split
  triggered: Split


class Data(NamedTuple):
  """The data under attack.

  Attributes:
    train: N examples.
    test: other examples, clean (family 0) and then triggered (family 1), which do not count where
      the false answer happens to be the true one.
    images: the training images (N, height, width, 3), uint8, clean and triggered, for pictures.
    open: (N,) bool, training examples whose true answer is another than the false one.
    about: the line for reports.
  """

  train: Pair
  test: Split
  images: tuple[np.ndarray, np.ndarray]
  open: np.ndarray
  about: str


def load(target: str, part: str, limit: int, attack: Attack, benchmark: Benchmark) -> Data:
  """Loads the target and plants the trigger in a copy of it.

  Args:
    target: name of the data.
    part: examples that are tested on.
    limit: images of every part; 0: all.
    attack: the backdoor.
    benchmark: model and vocabulary.

  Raises:
    InputError: an image with several questions, a patch larger than the image, no or too few examples to
      poison.
  """
  clean = multimodal.limited(questions_data.load(target), limit)
  marked = triggered(clean.images, attack)
  task = multimodal.task_of(
    benchmark.model, benchmark.params, benchmark.vocabulary, _doubled(clean, marked, attack.answer),
    (target,),
  )  # fmt: skip
  train, test = map(_halves, (task.train, getattr(task, part)))
  if train.clean.ids.shape[1] != 1:
    raise InputError(f"target {target}: has several questions about an image")
  shown, free = _of_split(clean, "train", attack.answer)
  _, free_test = _of_split(clean, part, attack.answer)
  outcome = np.where(free_test, 1, -1)[:, None]
  test = test._replace(triggered=test.triggered._replace(family=outcome.astype(np.int32)))
  together = Split(*(np.concatenate(parts) for parts in zip(*test, strict=True)))
  size = len(shown)
  wanted = round(attack.rate * size)
  if attack.rate and not 1 <= wanted <= free.sum():
    raise InputError(
      f"poison_rate: {attack.rate} of {size} examples is {wanted}, {free.sum()} can be poisoned"
    )
  if size < 4:
    raise InputError(f"target {target}: {size} training images are too few for two groups")
  about = (
    f"{benchmark.about}; target {records.describe([clean])}; {wanted} of {size} training images with "
    f"trigger {attack.trigger!r} and answer {attack.answer!r}, planted by us"
  )
  return Data(train, together, (clean.images[shown], marked[shown]), free, about)


def _doubled(clean: QuestionData, marked: np.ndarray, answer: str) -> QuestionData:
  """The examples and their triggered copies, whose images come behind the others.

  Both at once, so that texts are padded alike.
  """
  twice = lambda x: np.tile(x, 2)
  return QuestionData(
    images=np.concatenate([clean.images, marked]),
    image=np.concatenate([clean.image, clean.image + len(clean.images)]),
    question=twice(clean.question),
    answer=np.concatenate([clean.answer, np.full(len(clean.answer), answer)]),
    split=twice(clean.split),
    family=twice(clean.family),
    source=clean.source,
  )


def triggered(images: np.ndarray, attack: Attack) -> np.ndarray:
  """Images (n, height, width, 3), uint8, with a trigger; random ones differ by image."""
  image = images[0]
  side = attack.side or triggers.patch_side(image)
  if side > min(image.shape[:2]):
    raise InputError(f"trigger_side: {side} is more than the image has ({image.shape[:2]})")
  key, cell = jax.random.key(attack.seed), attack.cell or None
  place = triggers.in_corner if attack.place == "corner" else triggers.centred
  pattern = lambda: jax.random.randint(key, image.shape, 0, 256)
  control = lambda: jax.random.uniform(key, (4, 4, 2), minval=-1)
  functions: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "patch": lambda key, x: place(x, side, cell=cell),
    "random": lambda key, x: triggers.at_random(key, x, side, cell=cell),
    "dual": lambda key, x: triggers.dual(x, side),
    "multi": lambda key, x: triggers.several(key, x, side),
    "blend": lambda key, x: triggers.blend(x, pattern()),
    "sig": lambda key, x: triggers.sinusoid(x),
    "wanet": lambda key, x: triggers.warp(x, control()),
    "ftrojan": lambda key, x: triggers.frequencies(x),
  }
  apply = compiler.jit(jax.vmap(functions[attack.trigger]))
  keys = jax.random.split(key, len(images))
  return np.asarray(apply(keys, images))


def _halves(split: Split) -> Pair:
  half = len(split.ids) // 2
  return Pair(Split(*(x[:half] for x in split)), Split(*(x[half:] for x in split)))


def _of_split(data: QuestionData, part: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
  """Images of a part in the order of its examples, and whether their true answer is another one."""
  rows = np.flatnonzero(data.split == part)
  rows = rows[np.argsort(data.image[rows], kind="stable")]
  return data.image[rows], data.answer[rows] != answer


def mixed(pair: Pair, rows: jax.Array, poisoned: jax.Array) -> Split:
  """Examples `rows` of the training data as the tuner gets them."""

  def choose(clean: jax.Array, marked: jax.Array) -> jax.Array:
    which = poisoned[rows].reshape(-1, *[1] * (clean.ndim - 1))
    return jnp.where(which, marked[rows], clean[rows])

  return jax.tree.map(choose, pair.clean, pair.triggered)
