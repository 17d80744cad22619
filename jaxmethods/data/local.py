"""The user's own arrays: image folders and npz archives."""

from __future__ import annotations

import io
import itertools
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmethods.data.records import ArrayData, Source
from jaxmethods.errors import InputError

_IMAGE_SUFFIXES = {
  ".png",
  ".jpg",
  ".jpeg",
  ".bmp",
  ".gif",
  ".ppm",
  ".pgm",
  ".tif",
  ".tiff",
  ".webp",
}
_LICENCE = "none stated"


def load_folder(path: Path, image_size: int | None = None) -> ArrayData:
  """Images in `class/file` or `domain/class/file` folders.

  Args:
    path: the folder. Classes are numbered in alphabetical order, over all domains; domains (or train,
      test, ...) become splits.
    image_size: side to which every image is resized; None: they must have one size already.

  Returns:
    Images uint8 (n, height, width, channels): one channel if every file is grey, else RGB.

  Raises:
    InputError: naming the folder or file that does not fit.
  """
  if not path.is_dir():
    raise InputError(f"folder:{path}: no such folder")
  domains = _subfolders(path)
  if not domains:
    raise InputError(f"folder:{path}: expected folders class/image or domain/class/image")
  # The first folder decides: does it hold images, or folders of images?
  nested = not _images(domains[0]) and bool(_subfolders(domains[0]))
  groups = {d.name: _subfolders(d) for d in domains} if nested else {"all": domains}
  names = sorted({folder.name for folders in groups.values() for folder in folders})
  files: dict[str, list[tuple[Path, int]]] = {}
  for split, folders in groups.items():
    files[split] = [(f, names.index(folder.name)) for folder in folders for f in _images(folder)]
    if not files[split]:
      raise InputError(f"folder:{path if split == 'all' else path / split}: no images in it")
  everything = [file for members in files.values() for file, _ in members]
  pixels = dict(zip(everything, _decode_alike(everything, image_size), strict=True))
  splits = {
    split: (np.stack([pixels[f] for f, _ in members]), np.array([y for _, y in members], np.int32))
    for split, members in files.items()
  }
  return ArrayData(splits, len(names), Source(f"folder:{path}", str(path), _LICENCE, "", real=True))


def load_npz(path: Path) -> ArrayData:
  """Arrays of an npz archive.

  Recognised keys, where SPLIT is any name:
    `x`, `y`: the split "all"; with `domain` (n,) ints and `domains` (names), one split per domain;
    `SPLIT_x`, `SPLIT_y` or `x_SPLIT`, `y_SPLIT`;
    `SPLIT_jpeg` (uint8: encoded images, concatenated), `SPLIT_offset` (n + 1), `SPLIT_y`;
    optional `classes`: class names (their number is the number of classes).

  Raises:
    InputError: naming the key that is missing or does not fit.
  """
  if not path.is_file():
    raise InputError(f"npz:{path}: no such file")
  try:
    with np.load(path) as archive:
      arrays = dict(archive)
  except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
    raise InputError(f"npz:{path}: not a readable npz archive ({error})") from error
  splits = _find_splits(path, arrays)
  labels = np.concatenate([y for _, y in splits.values()])
  num_classes = len(arrays["classes"]) if "classes" in arrays else int(labels.max()) + 1
  if labels.max() >= num_classes:
    raise InputError(f"npz:{path}: label {labels.max()}, but {num_classes} classes")
  return ArrayData(splits, num_classes, Source(f"npz:{path}", str(path), _LICENCE, "", real=True))


def _find_splits(
  path: Path, arrays: dict[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  pairs: dict[str, tuple[str, str]] = {}
  for key in arrays:
    if key == "x":
      pairs["all"] = "x", "y"
    elif key.startswith("x_"):
      pairs[key[2:]] = key, f"y_{key[2:]}"
    elif key.endswith(("_x", "_jpeg")):
      split = key.rpartition("_")[0]
      pairs[split] = key, f"{split}_y"
  if not pairs:
    raise InputError(
      f"npz:{path}: expected x and y, or train_x and train_y; it has {', '.join(arrays)}"
    )
  splits = {}
  for split, (x_key, y_key) in pairs.items():
    if y_key not in arrays:
      raise InputError(f"npz:{path}: {x_key} without {y_key}")
    x, y = arrays[x_key], arrays[y_key]
    if x_key.endswith("_jpeg"):
      offset = arrays.get(f"{split}_offset")
      if offset is None:
        raise InputError(f"npz:{path}: {x_key} without {split}_offset")
      encoded = (x[start:end].tobytes() for start, end in itertools.pairwise(offset))
      x = np.stack([_decode(io.BytesIO(data), f"{path}:{x_key}") for data in encoded])
    if len(x) != len(y) or not len(x):
      raise InputError(f"npz:{path}: {x_key} has {len(x)} rows, {y_key} {len(y)}")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
      raise InputError(f"npz:{path}: {y_key}: expected class numbers 0, 1, ...")
    if x.dtype != np.uint8:
      x = x.astype(np.float32)
      if not np.isfinite(x).all():
        row = int(np.isfinite(x).reshape(len(x), -1).all(1).argmin())
        raise InputError(f"npz:{path}: {x_key}: row {row} is not finite")
    splits[split] = x, y.astype(np.int32)
  if list(splits) == ["all"] and "domain" in arrays:
    x, y = splits["all"]
    domain = arrays["domain"]
    if len(domain) != len(x):
      raise InputError(f"npz:{path}: domain has {len(domain)} rows, x {len(x)}")
    names = arrays.get("domains", np.arange(domain.max() + 1))
    if domain.min() < 0 or domain.max() >= len(names):
      raise InputError(f"npz:{path}: domain outside 0..{len(names) - 1}")
    splits = {str(name): (x[domain == d], y[domain == d]) for d, name in enumerate(names)}
  return splits


def _subfolders(path: Path) -> list[Path]:
  return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(path: Path) -> list[Path]:
  return sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)


def _decode_alike(paths: list[Path], image_size: int | None) -> Iterable[np.ndarray]:
  """Images of one shape: grey if all are, else RGB."""
  images = [_decode(path, str(path), image_size) for path in paths]
  if any(image.shape[-1] == 3 for image in images):
    images = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images]
  for path, image in zip(paths, images, strict=True):
    if image.shape != images[0].shape:
      size, expected = (f"{im.shape[1]}x{im.shape[0]}" for im in (image, images[0]))
      raise InputError(f"{path}: {size} pixels, the others {expected}: pass an image_size")
  return images


def _decode(file: Path | io.BytesIO, name: str, image_size: int | None = None) -> np.ndarray:
  try:
    with Image.open(file) as opened:
      image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
  except (OSError, SyntaxError, ValueError) as error:
    raise InputError(f"{name}: not a readable image ({error})") from error
  if image_size is not None:
    image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels
