"""Questions about images from the user's disk: one JSON object a line, or one array; images beside it.

A line is {"image": PATH, "question": TEXT, "answer": TEXT}, or in LLaVA's form {"image": PATH,
"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}; PATH is below
the file's folder or absolute. As in LLaVA, the mark <image> may stand anywhere in the question, and what
"gpt" says before the first question is left out. One question about one image is supported: lines with
several turns, a system turn, several images or none are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxmethods.data import files, json_lines
from jaxmethods.data.json_lines import Line
from jaxmethods.data.pictures import open_picture
from jaxmethods.data.records import sealed
from jaxmethods.errors import InputError

_EXPECTED = "expected image, question and answer"
_MARK = "<image>"
_ROLES = ("human", "gpt")


class Question(NamedTuple):
  """A question about the image in a file."""

  image: Path
  question: str
  answer: str


def read_questions(path: Path) -> list[Question]:
  """Reads a file of questions; images are checked to exist, and opened only when they are needed.

  Raises:
    InputError: the file is missing or empty, a line is malformed or of a kind that is not supported, or
      an image is missing; named by line.
  """
  questions = [_question(line, path.parent) for line in _lines(path)]
  if not questions:
    raise InputError(f"{path}: has no questions")
  return questions


def _lines(path: Path) -> Iterator[Line]:
  """The entries of a file: of its lines, or of the array that it is, as LLaVA's own files."""
  try:
    text = path.read_bytes().decode("utf-8-sig").lstrip()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read as text: {error}") from None
  if not text.startswith("["):
    yield from json_lines.read(path, malformed=_EXPECTED)
    return
  try:
    entries = json_lines.parsed(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: is no JSON array: {error}") from None
  for number, entry in enumerate(entries, 1):
    yield Line(f"{path}, entry {number}", entry)


def _question(line: Line, folder: Path) -> Question:
  where, entry = line
  try:
    if "conversations" in entry and {"question", "answer"} & set(entry):
      raise InputError(f"{where}: has a conversation and a question: which one is meant?")
    if "conversations" in entry:
      asked, answered = _turns(entry["conversations"], where)
    else:
      asked, answered = entry["question"], entry["answer"]
    image = _image(entry, where)
  except (KeyError, TypeError, AttributeError):
    raise InputError(f"{where}: {_EXPECTED}, got {str(entry)[:80]}") from None
  asked, answered = _text(asked, where, "question"), _text(answered, where, "answer")
  if asked.count(_MARK) > 1:
    raise InputError(f"{where}: {_MARK} stands {asked.count(_MARK)} times: one image is supported")
  asked = asked.replace(_MARK, "").strip()
  if not (asked and answered):
    raise InputError(f"{where}: question or answer is empty")
  if not _is_file(folder / image):
    raise InputError(f"{where}: there is no image {str(folder / image)[:200]}")
  return Question(folder / image, asked, answered)


def _is_file(path: Path) -> bool:
  """Tells whether there is a file; there is none under a name that no system allows."""
  try:
    return path.is_file()
  except (OSError, ValueError):
    return False


def _turns(turns: Any, where: str) -> tuple[Any, Any]:
  """What is asked and answered in a conversation of one turn each."""
  speakers = [turn.get("from") for turn in turns]
  if unknown := sorted({key for turn in turns for key in turn} - {"from", "value"}):
    raise InputError(f"{where}: {unknown[0]!r} of a turn: such an option is not supported")
  if any(speakers):  # without names the turns alternate
    odd = [speaker for speaker in speakers if speaker not in _ROLES]
    if odd:
      raise InputError(
        f"{where}: a turn from {odd[0]!r}: expected human and gpt; LLaVA has a system text of its own"
      )
    if speakers[0] == "gpt":
      turns, speakers = turns[1:], speakers[1:]
    expected = [_ROLES[i % 2] for i in range(len(speakers))]
    if speakers != expected:
      raise InputError(f"{where}: human and gpt must take turns, got {', '.join(speakers)}")
  if len(turns) > 2:
    raise InputError(
      f"{where}: {len(turns)} turns: one question and its answer are supported; a line for each"
    )
  if len(turns) < 2:
    raise InputError(f"{where}: the conversation has no question with an answer")
  asked, answered = turns
  return asked["value"], answered["value"]


def _image(entry: dict[str, Any], where: str) -> str:
  """The one image of a line."""
  image = entry.get("image")
  if not image:
    raise InputError(f"{where}: has no image: lines of text alone are not supported")
  if isinstance(image, list):
    if len(image) != 1:
      raise InputError(f"{where}: {len(image)} images: one is supported")
    (image,) = image
  if not isinstance(image, str):
    raise InputError(f"{where}: image: expected a path, got {str(image)[:80]}")
  return image


def _text(value: Any, where: str, name: str) -> str:
  """A text; whole numbers are written as they are, other numbers have no one spelling."""
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if not isinstance(value, str):
    raise InputError(f"{where}: {name}: expected a text, got {str(value)[:80]}: put it in quotes")
  return value.strip()


def described(file: str, questions: Sequence[Question], used: int | None = None) -> str:
  """Says for reports which questions a run uses, with the digest by which it knows them again.

  The digest is over the texts, and over the contents of the images.

  Args:
    file: they come from.
    questions: all of the file.
    used: how many of them are used; None: all.
  """
  digest = hashlib.sha256()
  for image, question, answer in questions:
    digest.update(json.dumps([files.digest(image), question, answer]).encode())
  count = len(questions) if used is None else min(used, len(questions))
  of = "" if count == len(questions) else f" of {len(questions)}"
  return sealed(file, digest.hexdigest(), f"{count}{of} questions")


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
