"""Folders of images with an `image_text.csv`: what text-to-image models are asked to leave behind."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxmethods.errors import InputError

FILE = "image_text.csv"
_FATAL = 0.01  # share of rows whose image is missing


class ImageTexts(NamedTuple):
  """Images (n, side, side, 3) uint8, their texts, and what was left out, in words."""

  images: np.ndarray
  texts: list[str]
  left_out: str


def read_image_texts(folder: Path, count: int, side: int) -> ImageTexts:
  """Reads the first `count` pairs of a folder, in the order of their file names.

  An image that is missing is left out and named; one that is black all over (a safety filter's) is
  left out too. Images are resized on the shorter side and cut at the centre.

  Args:
    folder: has `image_text.csv` with the columns image and text, and the images.
    count: how many pairs at most.
    side: of the images.

  Raises:
    InputError: no such file or columns, no pair at all, or more than 1 % of the images are missing.
  """
  rows = sorted(_rows(folder / FILE))
  missing = [image for image, _ in rows if not (folder / image).is_file()]
  if len(missing) > _FATAL * len(rows):
    raise InputError(
      f"{folder / FILE}: {len(missing)} of {len(rows)} images are missing, the first is {missing[0]}"
    )
  images: list[np.ndarray] = []
  texts: list[str] = []
  black = 0
  gone = set(missing)
  for image, text in rows:
    if image in gone:
      continue
    pixels = _opened(folder / image, side)
    if not pixels.any():
      black += 1
      continue
    images.append(pixels)
    texts.append(text)
    if len(images) == count:
      break
  if not images:
    raise InputError(f"{folder / FILE}: has no pair that can be used")
  named = f"{len(missing)} missing ({', '.join(missing[:3])})" if missing else ""
  dark = f"{black} black" if black else ""
  return ImageTexts(np.stack(images), texts, "; ".join(filter(None, (named, dark))))


def _rows(file: Path) -> list[tuple[str, str]]:
  try:
    with file.open(encoding="utf-8", newline="") as stream:
      reader = csv.DictReader(stream)
      if not {"image", "text"} <= set(reader.fieldnames or ()):
        raise InputError(f"{file}: needs the columns image and text, has {reader.fieldnames}")
      rows = [(row["image"] or "", row["text"] or "") for row in reader]
  except OSError as error:
    raise InputError(f"{file}: cannot be read: {error.strerror}") from None
  except (UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{file}: is no table of text ({error})") from None
  for number, (image, text) in enumerate(rows, start=2):
    if not image or not text.strip():
      raise InputError(f"{file}, line {number}: has no {'text' if image else 'image'}")
  if not rows:
    raise InputError(f"{file}: has no rows")
  return rows


def _opened(path: Path, side: int) -> np.ndarray:
  try:
    with Image.open(path) as opened:
      image = opened.convert("RGB")
  except (OSError, SyntaxError, ValueError) as error:
    raise InputError(f"{path}: not a readable image ({error})") from None
  scale = side / min(image.size)
  width, height = (max(round(n * scale), side) for n in image.size)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - side) // 2, (height - side) // 2
  return np.asarray(image.crop((left, top, left + side, top + side)))
