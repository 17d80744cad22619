"""Questions about images that a laptop can learn: easy-VQA out of its wheel, and three targets.

| name | what |
| --- | --- |
| `easy-vqa` | 48,248 questions of four families about 5,000 images of one coloured shape |
| `digits` | scikit-learn's 1,797 digits, drawn large: "which digit is shown?" |
| `counting` | shapes that we draw: "how many shapes are shown?" (generated) |
| `captions` | easy-VQA's images: "describe the image", answered by three words |
| `checking` | the images of `digits`: "is the digit three", answered by yes or no |

Nothing is ever chosen on "test": that is the published test part (easy-VQA) or a fixed one (the others),
and "validation" is cut from the training part.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from jaxmethods.data import embedded
from jaxmethods.data.files import wheel_file, wheel_files
from jaxmethods.data.records import QuestionData, Source
from jaxmethods.errors import InputError, hint

IMAGE_SIZE = 64
FAMILIES = ("shape", "colour", "yesno_shape", "yesno_colour")
TARGETS = ("digits", "counting", "captions", "checking")

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_MARKS = ("<pad>", "<bos>", "<ans>")
_VALIDATION_IMAGES = 400  # the last of easy-VQA's training images
_PUBLISHED = {"train": 4000, "test": 1000}
_SHA256 = {
  "train": (
    "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5",
    "5ccb1e586318a54fe7322ad8802bc9240366c8d90895a01773f96e61436742a3",
  ),
  "test": (
    "0d4630a51bafec65343e2f6af9cdd20cf8eae214344ef57636202eec409553f7",
    "90f80d7b9868bfadacfbe1f0873d4ab0b2a71e12f31626bb8e557e28fbb5301c",
  ),
}
_EASY_VQA_CITATION = "Zhou, easy-VQA, 2019, https://victorzhou.com/blog/easy-vqa"


def load(name: str) -> QuestionData:
  """Loads questions by name; see the module docstring.

  Raises:
    InputError: an unknown name, or a wheel that is missing or changed.
  """
  loaders = {
    "easy-vqa": easy_vqa,
    "digits": digits,
    "counting": counting,
    "captions": captions,
    "checking": checking,
  }
  if name not in loaders:
    raise InputError(f"unknown questions {name!r}: {hint(name, loaders, 'sources')}")
  return loaders[name]()


@functools.cache
def easy_vqa() -> QuestionData:
  """Easy-VQA with its published test part; the last 400 training images are for validation."""
  images: list[np.ndarray] = []
  rows, origin = [], ""
  for part, count in _PUBLISHED.items():
    of_questions, of_images = _SHA256[part]
    text, origin = wheel_file("easy-vqa", f"easy_vqa/data/{part}/questions.json", of_questions)
    names = [f"easy_vqa/data/{part}/images/{i}.png" for i in range(count)]
    contents, _ = wheel_files("easy-vqa", names, of_images)
    start = len(images)
    images += [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in contents]
    first_held_out = count - _VALIDATION_IMAGES if part == "train" else count
    for question, answer, image in json.loads(text):
      question = question.removesuffix("?")
      split = "validation" if image >= first_held_out else part
      rows.append((start + image, question, answer, split, _family(question, answer)))
  source = Source("easy-vqa", origin, "MIT", _EASY_VQA_CITATION, real=True)
  return _record(np.stack(images), rows, source)


@functools.cache
def digits(seed: int = 0) -> QuestionData:
  """Handwritten digits drawn as 8x8 squares of dark ink on a light background, 500 of them for testing.

  One pixel of the digit covers one image token of `models.desk_mllm`.

  Args:
    seed: of the split (1,167 training, 130 validation, 500 test) and of the backgrounds.
  """
  data = embedded.load_arrays("digits")
  x, labels = data.splits["all"]
  random = np.random.default_rng(seed)
  order = random.permutation(len(x))
  split = np.full(len(x), "train", dtype="<U10")
  split[order[:500]], split[order[500:630]] = "test", "validation"
  side = IMAGE_SIZE // x.shape[1]
  light = random.uniform(230, 255, size=(len(x), 1, 1, 3))
  images = np.rint(light * (1 - x)).astype(np.uint8).repeat(side, axis=1).repeat(side, axis=2)
  rows = [
    (i, "which digit is shown", NUMBERS[label], split[i], "digits")
    for i, label in enumerate(labels)
  ]
  origin = f"{data.source.origin}, drawn at {IMAGE_SIZE} pixels by us"
  return _record(images, rows, data.source._replace(origin=origin))


@functools.cache
def counting(
  train: int = 1500, validation: int = 150, test: int = 500, seed: int = 0
) -> QuestionData:
  """Images of one to six shapes that we draw; "how many shapes are shown".

  Shapes lie in different cells of a three by three grid, so that none hides another.
  """
  random = np.random.default_rng(seed)
  splits = ["train"] * train + ["validation"] * validation + ["test"] * test
  images, rows = [], []
  for i, split in enumerate(splits):
    count = int(random.integers(1, 7))
    images.append(_draw_shapes(random, count))
    rows.append((i, "how many shapes are shown", NUMBERS[count], split, "counting"))
  source = Source("counting", "drawn by us from a seed", "none needed", "none", real=False)
  return _record(np.stack(images), rows, source)


@functools.cache
def captions() -> QuestionData:
  """Captions "a COLOUR SHAPE" of the easy-VQA images whose questions tell both; its splits."""
  data = easy_vqa()
  shapes, colours = image_labels(data)
  split_of = dict(zip(data.image.tolist(), data.split.tolist(), strict=True))
  rows = [
    (i, "describe the image", f"a {COLOURS[colour]} {SHAPES[shape]}", split_of[i], "captions")
    for i, (shape, colour) in enumerate(zip(shapes, colours, strict=True))
    if shape >= 0 and colour >= 0
  ]
  origin = f"{data.source.origin}, captions put together by us from its answers"
  return _record(data.images, rows, data.source._replace(name="captions", origin=origin))


@functools.cache
def checking(seed: int = 0) -> QuestionData:
  """Yes-or-no questions about the images of `digits`, in its splits: "is the digit three".

  Half of them name the right digit. All words occur in the other sets, so the vocabulary stays the same.

  Args:
    seed: of the split and of what is asked.
  """
  data = digits(seed)
  random = np.random.default_rng((seed, 1))
  right = random.random(len(data.image)) < 0.5
  rows = []
  for image, answer, split, true in zip(data.image, data.answer, data.split, right, strict=True):
    others = [word for word in NUMBERS if word != answer]
    named = answer if true else others[random.integers(len(others))]
    rows.append((image, f"is the digit {named}", "yes" if true else "no", split, "checking"))
  origin = f"{data.source.origin}, questions put together by us"
  return _record(data.images, rows, data.source._replace(name="checking", origin=origin))


def image_labels(data: QuestionData) -> tuple[np.ndarray, np.ndarray]:
  """Shape and colour (N,) of every easy-VQA image as its questions tell them; -1 where none does."""
  words = [{*text.split()} for text in data.question.tolist()]
  # "what is the blue shape" tells the colour too; "is there no circle" tells a circle if answered "no".
  told = [
    known | {answer}
    if answer not in ("yes", "no")
    else known
    if (answer == "no") == bool(known & {"no", "not"})
    else set()
    for known, answer in zip(words, data.answer.tolist(), strict=True)
  ]
  labels = []
  for names in (SHAPES, COLOURS):
    label = np.full(len(data.images), -1, np.int32)
    for image, known in zip(data.image, told, strict=True):
      if found := known.intersection(names):
        label[image] = names.index(found.pop())
    labels.append(label)
  return labels[0], labels[1]


class Vocabulary(NamedTuple):
  """A word is a token; unknown words are errors."""

  words: tuple[str, ...]

  @property
  def spoken(self) -> tuple[str, ...]:
    """The words without <pad>, <bos> and <ans>."""
    return self.words[len(_MARKS) :]

  @property
  def pad(self) -> int:
    return self.words.index("<pad>")

  @property
  def begin(self) -> int:
    """Begins a text."""
    return self.words.index("<bos>")

  @property
  def answer(self) -> int:
    """Stands between question and answer."""
    return self.words.index("<ans>")

  def encode(self, text: str) -> list[int]:
    """Ids of the words of a text."""
    unknown = [word for word in text.split() if word not in self.words]
    if unknown:
      raise InputError(f"{text!r}: the word {unknown[0]!r} is not in the vocabulary")
    return [self.words.index(word) for word in text.split()]

  def decode(self, ids: Iterable[int]) -> str:
    """The words of ids."""
    return " ".join(self.words[i] for i in ids)

  def prompt(self, question: str) -> list[int]:
    """<bos> question <ans>."""
    return [self.begin, *self.encode(question), self.answer]


def vocabulary(sets: Sequence[QuestionData], extra: Sequence[str] = ()) -> Vocabulary:
  """All words of the sets and some extra ones, sorted, behind <pad>, <bos> and <ans>."""
  words = set(extra)
  for data in sets:
    for text in {*data.question.tolist(), *data.answer.tolist()}:
      words.update(text.split())
  return Vocabulary((*_MARKS, *sorted(words)))


def _family(question: str, answer: str) -> str:
  if answer in ("yes", "no"):
    return "yesno_shape" if set(SHAPES) & set(question.split()) else "yesno_colour"
  return "shape" if answer in SHAPES else "colour"


def _draw_shapes(random: np.random.Generator, count: int) -> np.ndarray:
  light = random.integers(230, 256, size=3)
  image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(int(c) for c in light))
  draw = ImageDraw.Draw(image)
  cell = IMAGE_SIZE / 3
  for place in random.choice(9, count, replace=False):
    centre = cell * (np.array([place % 3, place // 3]) + 0.5) + random.uniform(-2, 2, size=2)
    radius = random.uniform(5, 8)
    colour = tuple(int(c) for c in random.integers(0, 180, size=3))
    (left, top), (right, bottom) = centre - radius, centre + radius
    shape = random.integers(3)
    if shape == 0:
      draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == 1:
      draw.rectangle((left, top, right, bottom), fill=colour)
    else:
      draw.polygon([(left, bottom), (right, bottom), (centre[0], top)], fill=colour)
  return np.asarray(image)


def _record(images: np.ndarray, rows: Sequence[tuple], source: Source) -> QuestionData:
  image, question, answer, split, family = zip(*rows, strict=True)
  return QuestionData(
    images,
    np.array(image, np.int32),
    np.array(question),
    np.array(answer),
    np.array(split),
    np.array(family),
    source,
  )
