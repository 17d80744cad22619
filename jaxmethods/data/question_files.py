"""Questions about images from the user's disk: one JSON object a line, images beside it.

A line is {"image": PATH, "question": TEXT, "answer": TEXT}, or in LLaVA's form {"image": PATH,
"conversations": [{"value": question}, {"value": answer}]}; PATH is below the file's folder or absolute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxmethods.data.pictures import open_picture
from jaxmethods.errors import InputError


class Question(NamedTuple):
  """A question about the image in a file."""

  image: Path
  question: str
  answer: str


def read_questions(path: Path) -> list[Question]:
  """Reads a file of questions; images are checked to exist, and opened only when they are needed.

  Raises:
    InputError: the file is missing or empty, a line is malformed, or an image is missing; named by line.
  """
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read as text: {error}") from None
  questions = [
    _question(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
  ]
  if not questions:
    raise InputError(f"{path}: has no questions")
  return questions


def _question(line: str, path: Path, number: int) -> Question:
  where = f"{path}, line {number}"
  try:
    entry: Any = json.loads(line)
    if "conversations" in entry:
      asked, answered = (turn["value"] for turn in entry["conversations"][:2])
    else:
      asked, answered = entry["question"], entry["answer"]
    image = path.parent / entry["image"]
    text = [part.replace("<image>", "").strip() for part in (asked, answered)]
  except (ValueError, KeyError, TypeError, AttributeError):
    raise InputError(f"{where}: expected image, question and answer, got {line[:80]}") from None
  if not all(text):
    raise InputError(f"{where}: question or answer is empty")
  if not image.is_file():
    raise InputError(f"{where}: there is no image {image}")
  return Question(image, *text)


def check_disjoint(train: list[Question], test: list[Question], name: str) -> None:
  """Raises `InputError` if an image is both trained and tested on."""
  if shared := {q.image for q in train} & {q.image for q in test}:
    first = min(shared)
    raise InputError(
      f"{name}: {len(shared)} of its images are in the training data too, such as {first}"
    )


def open_square(path: Path, colour: tuple[int, int, int]) -> np.ndarray:
  """The image (side, side, 3) uint8 in the middle of a square of one colour, as LLaVA-1.5 pads.

  Raises:
    InputError: it cannot be read as an image.
  """
  pixels = open_picture(path)
  image = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
  side = max(image.size)
  square = Image.new("RGB", (side, side), colour)
  square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return np.asarray(square)
