"""The user's own arrays: image folders and npz archives."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmethods.data.pictures import SUFFIXES, as_pictures, open_picture
from jaxmethods.data.records import ArrayData, own_source
from jaxmethods.errors import InputError


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
  unread = _unread(path, groups, nested)
  everything = [file for members in files.values() for file, _ in members]
  pixels = dict(zip(everything, _decode_alike(everything, image_size), strict=True))
  splits = {
    split: (np.stack([pixels[f] for f, _ in members]), np.array([y for _, y in members], np.int32))
    for split, members in files.items()
  }
  return ArrayData(splits, len(names), own_source(f"folder:{path}", f"{path}{unread}"))


def _unread(path: Path, groups: dict[str, list[Path]], nested: bool) -> str:
  """Says which files of a folder are left out, for the report.

  Raises:
    InputError: a class without images, or images deeper than those of the other classes.
  """
  folders = [folder for each in groups.values() for folder in each]
  for folder in folders:
    inside = next((f for f in _subfolders(folder) if _images(f)), None)
    if inside:
      raise InputError(f"{inside}: images are deeper here than in the first folder: use one depth")
    if not _images(folder):
      raise InputError(f"{folder}: a class without images: fill it, or take it away")
  tops = [path, *(_subfolders(path) if nested else [])]
  others = [f for top in tops for f in top.iterdir() if f.is_file()]
  others += [f for folder in folders for f in folder.iterdir() if f.suffix.lower() not in SUFFIXES]
  others = [f for f in others if not f.name.startswith(".")]
  some = ", ".join(sorted({f.name for f in others})[:3])
  return f" ({len(others)} files not read, such as {some})" if others else ""


def load_npz(path: Path) -> ArrayData:
  """Arrays of an npz archive.

  Recognised keys, where SPLIT is any name:
    `x`, `y`: the split "all"; with `domain` (n,) ints and `domains` (names) one split per domain, with
      `client` (n,) ints one per client;
    `SPLIT_x`, `SPLIT_y` or `x_SPLIT`, `y_SPLIT`;
    `SPLIT_jpeg` (uint8: encoded images, concatenated), `SPLIT_offset` (n + 1), `SPLIT_y`;
    optional `classes`: class names (their number is the number of classes).
  Arrays under other names are not read, and named in the report.

  Pictures are (n, h, w) or (n, h, w, c), see `pictures.as_pictures`; features (n, d).

  Raises:
    InputError: naming the key that is missing or does not fit.
  """
  name = f"npz:{path}"
  if not path.is_file():
    raise InputError(f"{name}: no such file")
  try:
    with np.load(path) as archive:
      arrays = dict(archive)
  except Exception as error:  # whatever a damaged archive makes zipfile, zlib and numpy do
    raise InputError(f"{name}: not a readable npz archive ({error})") from None
  pairs = _find_pairs(name, arrays)
  splits = _by_group(name, _read_pairs(name, arrays, pairs), arrays)
  labels = np.concatenate([y for _, y in splits.values()])
  num_classes = len(arrays["classes"]) if "classes" in arrays else int(labels.max()) + 1
  if labels.max() >= num_classes:
    raise InputError(f"{name}: label {labels.max()}, but {num_classes} classes")
  read = {*_OPTIONAL, *(key for pair in pairs.values() for key in pair)}
  unread = sorted(key for key in arrays if key not in read and not key.endswith("_offset"))
  origin = f"{path} (arrays not read: {', '.join(unread)})" if unread else str(path)
  return ArrayData(splits, num_classes, own_source(name, origin))


_OPTIONAL = ("domain", "domains", "client", "classes")
_GROUPS = ("domain", "client")


def _find_pairs(name: str, arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, str]]:
  """Split -> names of its two arrays."""
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
      f"{name}: expected x and y, or train_x and train_y; it has {', '.join(arrays)}"
    )
  for x_key, y_key in pairs.values():
    if y_key not in arrays:
      raise InputError(f"{name}: {x_key} without {y_key}")
  return pairs


def _read_pairs(
  name: str, arrays: dict[str, np.ndarray], pairs: dict[str, tuple[str, str]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The checked arrays of every split."""
  plain: dict[str, np.ndarray] = {}
  ready: dict[str, np.ndarray] = {}
  for split, (x_key, y_key) in pairs.items():
    x, y = arrays[x_key], arrays[y_key]
    encoded = x_key.endswith("_jpeg")
    if encoded:
      x = _decoded(name, x_key, x, arrays.get(f"{split}_offset"))
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or not len(x):
      rows = [a.shape[0] if a.ndim else "no" for a in (x, y)]
      raise InputError(f"{name}: {x_key} has {rows[0]} rows, {y_key} {rows[1]}")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
      raise InputError(f"{name}: {y_key}: expected class numbers 0, 1, ...")
    if x.dtype.kind not in "biuf" or x.ndim not in (2, 3, 4) or not x.size:
      raise InputError(
        f"{name}: {x_key}: expected numbers, features (n, d) or pictures (n, h, w, c), got "
        f"{x.dtype} {x.shape}"
      )
    with np.errstate(over="ignore"):
      finite = np.isfinite(x.astype(np.float32))
    if not finite.all():
      row = int(finite.reshape(len(x), -1).all(1).argmin())
      raise InputError(f"{name}: {x_key}: row {row} is not finite")
    (ready if encoded or x.ndim == 2 else plain)[x_key] = x
  ready |= as_pictures(plain, name)
  return {
    split: (_features(ready[x_key]), arrays[y_key].astype(np.int32))
    for split, (x_key, y_key) in pairs.items()
  }


def _features(x: np.ndarray) -> np.ndarray:
  return x if x.dtype == np.uint8 else x.astype(np.float32)


def _decoded(name: str, key: str, x: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
  """The images of a concatenation of files."""
  if offset is None:
    raise InputError(f"{name}: {key} without {key.removesuffix('_jpeg')}_offset")
  files = (x[start:end].tobytes() for start, end in itertools.pairwise(offset))
  images = [open_picture(io.BytesIO(data), f"{name}: {key} {i}") for i, data in enumerate(files)]
  if len({image.shape for image in images}) != 1:
    raise InputError(f"{name}: {key}: expected images of one size")
  return np.stack(images)


def _by_group(
  name: str, splits: dict[str, tuple[np.ndarray, np.ndarray]], arrays: dict[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The split "all" cut by the domain or the client of every example, if the archive tells one."""
  kinds = [kind for kind in _GROUPS if kind in arrays]
  if not kinds:
    return splits
  if len(kinds) > 1 or list(splits) != ["all"]:
    raise InputError(f"{name}: {kinds[-1]}: expected beside x and y alone")
  (kind,), (x, y) = kinds, splits["all"]
  group = arrays[kind]
  if group.ndim != 1 or not np.issubdtype(group.dtype, np.integer):
    raise InputError(f"{name}: {kind}: expected numbers 0, 1, ...")
  if len(group) != len(x):
    raise InputError(f"{name}: {kind} has {len(group)} rows, x {len(x)}")
  numbers = range(int(group.max()) + 1)
  names = arrays.get("domains", numbers) if kind == "domain" else [f"client {k}" for k in numbers]
  if group.min() < 0 or group.max() >= len(names):
    raise InputError(f"{name}: {kind} outside 0..{len(names) - 1}")
  cut = {str(each): (x[group == k], y[group == k]) for k, each in enumerate(names)}
  for each, (_, y) in cut.items():
    if not len(y):
      raise InputError(f"{name}: {kind} {each!r} has no example")
  return cut


def _subfolders(path: Path) -> list[Path]:
  return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(path: Path) -> list[Path]:
  return sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")


def _decode_alike(paths: list[Path], image_size: int | None) -> Iterable[np.ndarray]:
  """Images of one shape: grey if all are, else RGB."""
  images = [open_picture(path) for path in paths]
  if image_size is not None:
    images = [_resized(image, image_size) for image in images]
  if any(image.shape[-1] == 3 for image in images):
    images = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images]
  for path, image in zip(paths, images, strict=True):
    if image.shape != images[0].shape:
      size, expected = (f"{im.shape[1]}x{im.shape[0]}" for im in (image, images[0]))
      raise InputError(f"{path}: {size} pixels, the others {expected}: pass an image_size")
  return images


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
  """A picture (height, width, c) brought to (size, size, c)."""
  image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  made = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
  return made.reshape(size, size, -1)
