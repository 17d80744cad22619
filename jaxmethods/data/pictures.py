"""Pictures from files and arrays of pictures, made uint8 in 0..255 or float32 in 0..1 by one rule.

Files say what their values mean. Arrays do not: it is told from the range of all their values, and
refused where two readings are possible.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jaxmethods.errors import InputError

SUFFIXES = {
  ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp",
}  # fmt: skip

_CHANNELS = (1, 3)
_MOST_PIXELS = 1 << 26  # 8192 x 8192: more is a damaged header, or an attack
_GREY = ("1", "L", "LA", "La")
_BITS_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_STILL = ("MPO",)  # photographs whose further frames are previews


def open_picture(file: Path | io.BytesIO, name: str = "") -> np.ndarray:
  """Reads a picture as it is meant to be seen.

  Upright by its EXIF orientation, on white where it is transparent, 16 bits brought to 8.

  Args:
    file: path or contents.
    name: for errors; default the path.

  Returns:
    (height, width, 1) uint8 if the file is grey, else (height, width, 3).

  Raises:
    InputError: no readable picture, an oversized one, several frames, or values without a stated range.
  """
  name = name or str(file)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow's own limit on sizes; ours is below
      with Image.open(file) as opened:
        _check_header(opened, name)
        upright = ImageOps.exif_transpose(opened)
        pixels = np.asarray(_in_8_bits(upright, name))
  except InputError:
    raise
  except Exception as error:  # the decoders raise whatever a damaged file makes them do
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    raise InputError(f"{name}: not a readable image ({reason})") from None
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _check_header(opened: Image.Image, name: str) -> None:
  if opened.width * opened.height > _MOST_PIXELS:
    raise InputError(
      f"{name}: {opened.width} x {opened.height} pixels are more than {_MOST_PIXELS}: make it smaller"
    )
  if (frames := getattr(opened, "n_frames", 1)) > 1 and opened.format not in _STILL:
    raise InputError(f"{name}: has {frames} frames: save the one that is meant as a picture")


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
  """The picture as "L" or "RGB"."""
  if image.mode in _BITS_16 or (image.mode == "I" and image.format == "PNG"):
    return Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).astype(np.uint8))
  if image.mode in ("I", "F"):
    low, high = image.getextrema()
    raise InputError(f"{name}: values of 32 bits, {low} to {high}, have no stated range")
  grey = image.mode in _GREY
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("L" if grey else "RGB")


def as_pictures(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
  """Brings arrays of pictures of one source to one form.

  | values | read as |
  | --- | --- |
  | uint8 | levels 0..255 |
  | bool | 0 and 255 |
  | whole or not, highest 128 to 255 | levels 0..255 |
  | float within 0..1 | itself |
  | -1..1, beyond -0.5 and 0.5 | (x + 1) / 2 |
  | whole, highest 32768 to 65535 | x / 65535 |

  Everything else is ambiguous. Arrays of one type are judged together; one that alone would mean
  something else is refused.

  Args:
    arrays: by name; (n, h, w), or (n, h, w, c) with one or three channels.
    name: of the source, for errors.

  Returns:
    (n, h, w, c) each, uint8 or float32 in 0..1.

  Raises:
    InputError: channels first or missing, or an ambiguous range, which is named.
  """
  for key, x in arrays.items():
    _check_layout(x, f"{name}: {key}")
  own = {key: _range(x) for key, x in arrays.items()}
  made = {}
  for key, x in arrays.items():
    alike = [own[other] for other, y in arrays.items() if y.dtype == x.dtype]
    low, high, whole = zip(*alike, strict=True)
    together = _Range(min(low), max(high), all(whole))
    meant, alone = (_form(x.dtype, seen) for seen in (together, own[key]))
    if meant is None:
      raise InputError(f"{name}: {key}: {_unclear(x.dtype, together)}")
    if alone and {alone, meant} not in ({meant}, {"bytes", "levels"}) and own[key].high > 0:
      beside = f"beside others from {together.low:g} to {together.high:g}"
      raise InputError(f"{name}: {key}: {_unclear(x.dtype, own[key])} ({beside})")
    made[key] = _FORMS[meant](x)
  return {key: x[..., None] if x.ndim == 3 else x for key, x in made.items()}


class _Range(NamedTuple):
  """Lowest and highest value, and whether all are whole."""

  low: float
  high: float
  whole: bool


def _range(x: np.ndarray) -> _Range:
  whole = x.dtype.kind in "iub" or bool((x == np.rint(x)).all())
  return _Range(x.min(), x.max(), whole)


def _check_layout(x: np.ndarray, where: str) -> None:
  if x.ndim == 3 or (x.ndim == 4 and x.shape[3] in _CHANNELS and x.shape[1] not in _CHANNELS):
    return
  shape = f"{where} has shape {x.shape}"
  if x.ndim == 4 and x.shape[1] in _CHANNELS and x.shape[3] not in _CHANNELS:
    raise InputError(f"{shape}: channels must come last: save x.transpose(0, 2, 3, 1)")
  if x.ndim == 4 and x.shape[1] in _CHANNELS:
    raise InputError(f"{shape}: cannot tell which axis holds the channels")
  raise InputError(f"{shape}: expected pictures (n, h, w) or (n, h, w, c) with 1 or 3 channels")


# What the values of pictures mean -> uint8 in 0..255 or float32 in 0..1.
_FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "flags": lambda x: x.astype(np.uint8) * np.uint8(255),
  "bytes": lambda x: x.astype(np.uint8),
  "levels": lambda x: x.astype(np.float32) / 255,
  "shares": lambda x: x.astype(np.float32),
  "signed": lambda x: (x.astype(np.float32) + 1) / 2,
  "16 bits": lambda x: (x / 65535).astype(np.float32),
}


def _form(dtype: np.dtype, seen: _Range) -> str | None:
  """What values of a type in a range mean, a key of `_FORMS`; None where it cannot be told."""
  low, high, whole = seen
  if dtype.kind == "b":
    return "flags"
  if dtype == np.uint8 and high != 1:
    return "bytes"
  if low >= 0 and 128 <= high <= 255:
    return "bytes" if whole else "levels"
  if dtype.kind == "f" and low >= 0 and high <= 1:
    return "shares"
  if dtype.kind == "f" and -1 <= low < -0.5 and 0.5 < high <= 1:
    return "signed"
  if low >= 0 and 32768 <= high <= 65535 and whole:
    return "16 bits"
  return None


def _unclear(dtype: np.dtype, seen: _Range) -> str:
  return (
    f"cannot tell what pictures with values from {seen.low:g} to {seen.high:g} ({dtype}) mean: save "
    "them as uint8 in 0..255, or as float in 0..1"
  )
