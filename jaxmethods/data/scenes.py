"""Pictures with captions that we render ourselves: shapes, and letters and digits from fonts.

A picture is a row of attributes; its caption mentions some of them. Everything follows from a seed, and
nothing here is real: sources of it say "rendered by us". Some pairs of colour and shape (`held_out`),
some fonts (`TASK_FONTS`) and some styles (`TASK_STYLES`) are kept for tests.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32  # pixels a side

SHAPES = (
  "circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "crescent", "arrow",
)  # fmt: skip
COLOURS = {
  "red": (0.9, 0.1, 0.1), "orange": (1.0, 0.55, 0.0), "yellow": (0.95, 0.9, 0.1),
  "green": (0.1, 0.65, 0.15), "turquoise": (0.15, 0.85, 0.8), "blue": (0.15, 0.25, 0.95),
  "purple": (0.55, 0.1, 0.75), "pink": (1.0, 0.55, 0.75), "brown": (0.5, 0.3, 0.1),
  "white": (1.0, 1.0, 1.0),
}  # fmt: skip
BACKGROUNDS = {
  "black": (0.03, 0.03, 0.03), "grey": (0.5, 0.5, 0.5), "beige": (0.9, 0.85, 0.7),
  "navy": (0.05, 0.08, 0.3), "olive": (0.35, 0.38, 0.1), "silver": (0.78, 0.78, 0.82),
}  # fmt: skip
FILLS = ("plain", "striped", "dotted", "checked", "hollow", "shaded")
COUNTS = ("one", "two", "three", "four", "five")
PLACES = ("middle", "left", "right", "top", "bottom")
EXTENTS = ("small", "large")
STYLES = {"flat": "drawing", "sketch": "sketch", "blurred": "painting", "noisy": "photo"}
TASK_STYLES = ("dim", "inverted", "coarse")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
GLYPHS = (*DIGITS, *LETTERS)
_CHARACTERS = (*"0123456789", *(letter.upper() for letter in LETTERS))

FONTS = (
  "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic",
  "STIXGeneral", "STIXGeneralItalic", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip
TASK_FONTS = ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "STIXGeneralBol", "cmr10", "cmti10")

# What captions can name, in the order of `Pairs.shown`.
ATTRIBUTES = (
  "shape", "colour", "background", "fill", "count", "place", "extent", "glyph", "style",
)  # fmt: skip

# A place's centre, in shares of the side.
_CENTRES = {
  "middle": (0.5, 0.5), "left": (0.24, 0.5), "right": (0.76, 0.5), "top": (0.5, 0.24),
  "bottom": (0.5, 0.76),
}  # fmt: skip
# Where the objects of a group stand.
_GROUPS = (
  ((0.5, 0.5),),
  ((0.27, 0.5), (0.73, 0.5)),
  ((0.27, 0.3), (0.73, 0.3), (0.5, 0.74)),
  ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
  ((0.22, 0.22), (0.78, 0.22), (0.5, 0.5), (0.22, 0.78), (0.78, 0.78)),
)


@dataclasses.dataclass(frozen=True)
class Attributes:
  """What pictures show, one entry a picture; numbers index the tuples above.

  Attributes:
    shape, colour, background, fill, count, place, extent: of scenes; `count` is one less.
    glyph: index of `GLYPHS`, -1 for a scene.
    font: index of `FONTS`, or beyond them of `TASK_FONTS`.
    style: index of `STYLES`, or beyond them of `TASK_STYLES`.
  """

  shape: np.ndarray
  colour: np.ndarray
  background: np.ndarray
  fill: np.ndarray
  count: np.ndarray
  place: np.ndarray
  extent: np.ndarray
  glyph: np.ndarray
  font: np.ndarray
  style: np.ndarray

  def __len__(self) -> int:
    return len(self.shape)


class Pairs(NamedTuple):
  """Pictures with captions.

  Attributes:
    images: (n, 32, 32, 3) uint8.
    captions: n of them.
    shown: numbers of `ATTRIBUTES` that pictures have (n, A), -2 where a picture has none.
    named: those that captions name (n, A), -1 where a caption does not say.
  """

  images: np.ndarray
  captions: list[str]
  shown: np.ndarray
  named: np.ndarray


def held_out(colour: np.ndarray, shape: np.ndarray) -> np.ndarray:
  """Tells which pairs are never pretrained on: every fifth."""
  return (colour + shape) % 5 == 0


_PAIRS = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
HELD_OUT = tuple(pair for pair in _PAIRS if held_out(*map(np.array, pair)))
SEEN = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)


def draw_attributes(random: np.random.Generator, count: int, glyphs: float = 0.0) -> Attributes:
  """Draws attributes as pretraining has them.

  Args:
    random: generator.
    count: of pictures.
    glyphs: share of letters and digits.
  """
  among = lambda options: random.integers(0, len(options), count)
  colour, shape = among(COLOURS), among(SHAPES)
  clash = held_out(colour, shape)
  shape = np.where(clash, (shape + random.integers(1, 5, count)) % len(SHAPES), shape)
  number = np.where(random.random(count) < 0.5, 0, among(COUNTS))
  return Attributes(
    shape=shape,
    colour=colour,
    background=among(BACKGROUNDS),
    fill=np.where(random.random(count) < 0.4, 0, among(FILLS)),
    count=number,
    place=np.where(random.random(count) < 0.4, 0, among(PLACES)),
    extent=among(EXTENTS),
    glyph=np.where(random.random(count) < glyphs, _glyph(random, count), -1),
    font=among(FONTS),
    style=among(STYLES),
  )


def _glyph(random: np.random.Generator, count: int) -> np.ndarray:
  """Digits and letters in equal parts."""
  digit, letter = (random.integers(0, len(of), count) for of in (DIGITS, LETTERS))
  return np.where(random.random(count) < 0.5, digit, len(DIGITS) + letter)


def pretraining_pairs(count: int, seed: int) -> Pairs:
  """Renders pictures of all pretraining attributes, 40 % of them letters and digits."""
  random = np.random.default_rng(seed)
  attributes = draw_attributes(random, count, glyphs=0.4)
  captions, named = described(attributes, random)
  return Pairs(render(attributes, random), captions, shown(attributes), named)


def depict(prompts: Sequence[str], random: np.random.Generator, noise: float) -> np.ndarray:
  """Renders what prompts name, (n, 32, 32, 3) uint8, as `named_attributes` understands them.

  It stands for a text-to-image model that is right most of the time, in the styles of pretraining.
  """
  return render(named_attributes(prompts, random, noise), random)


def named_attributes(
  prompts: Sequence[str], random: np.random.Generator, noise: float
) -> Attributes:
  """Attributes that prompts name; everything else, and a share of pictures, is drawn at random.

  Args:
    prompts: as `captions` writes them, n of them.
    random: generator.
    noise: share of pictures that show anything.
  """
  drawn = draw_attributes(random, len(prompts))
  fields = {field.name: getattr(drawn, field.name).copy() for field in dataclasses.fields(drawn)}
  for i in np.flatnonzero(random.random(len(prompts)) >= noise).tolist():
    words = prompts[i].rstrip(".").split()
    fields["count"][i] = 0
    for word in words:
      for name, options in _NAMED.items():
        if word in options and not (name == "count" and word == words[-1]):
          fields[name][i] = options.index(word)
    if "digit" in words or "letter" in words:
      fields["count"][i], fields["glyph"][i] = 0, GLYPHS.index(words[-1])
    elif "on" in words:
      fields["background"][i] = list(BACKGROUNDS).index(words[-1])
  return Attributes(**fields)


_NAMED: dict[str, tuple[str, ...]] = {
  "shape": SHAPES,
  "colour": tuple(COLOURS),
  "fill": FILLS,
  "count": COUNTS,
  "place": PLACES,
}


# --- captions -------------------------------------------------------------------------------------


def plural(noun: str) -> str:
  """The plural of a shape."""
  return noun + ("es" if noun.endswith("s") else "s")


# How often a caption of a scene names what, relatively; and how many of them.
_MENTIONS = {
  "shape": 0.38, "colour": 0.16, "fill": 0.15, "place": 0.13, "background": 0.12, "extent": 0.06,
}  # fmt: skip
_HOW_MANY = (0.6, 0.3, 0.1)


def shown(attributes: Attributes) -> np.ndarray:
  """Numbers of `ATTRIBUTES` (n, A), -2 where a picture has none: a letter has no shape."""
  columns = {name: getattr(attributes, name).astype(np.int32) for name in ATTRIBUTES}
  scene, alone = attributes.glyph < 0, attributes.count == 0
  for name in ("shape", "fill", "count"):
    columns[name] = np.where(scene, columns[name], -2)
  for name in ("place", "extent"):
    columns[name] = np.where(scene & alone, columns[name], -2)
  columns["glyph"] = np.where(scene, -2, columns["glyph"])
  return np.stack(list(columns.values()), axis=1)


def described(attributes: Attributes, random: np.random.Generator) -> tuple[list[str], np.ndarray]:
  """Writes a caption for each picture, which names its number and one to three other attributes.

  Returns:
    captions; what each names (n, A): a number of `ATTRIBUTES`, -1 for what it does not say.
  """
  there, count = shown(attributes), len(attributes)
  at = {name: k for k, name in enumerate(ATTRIBUTES)}
  named = np.full_like(there, -1)
  weights = np.log(list(_MENTIONS.values())) + random.gumbel(size=(count, len(_MENTIONS)))
  wanted = 1 + random.choice(len(_HOW_MANY), count, p=_HOW_MANY)
  # A number above one is itself something to say.
  wanted -= (attributes.count > 0) & (random.random(count) < 0.5)
  weights = np.where(there[:, [at[name] for name in _MENTIONS]] < 0, -np.inf, weights)
  place = (-weights).argsort(1).argsort(1)
  chosen = (place < wanted[:, None]) & np.isfinite(weights)
  glyph = attributes.glyph >= 0
  sometimes = random.random((count, len(_MENTIONS))) < 0.15
  for k, name in enumerate(_MENTIONS):
    known = name in ("colour", "background")
    says = np.where(glyph, sometimes[:, k] & known, chosen[:, k])
    named[says, at[name]] = there[says, at[name]]
  for name in ("count", "glyph"):
    named[:, at[name]] = np.where(there[:, at[name]] < 0, -1, there[:, at[name]])
  mediums = np.array([*STYLES.values(), *["photo"] * len(TASK_STYLES)])[attributes.style]
  says = (random.random(count) < 0.25) & (mediums != "photo")  # any picture may be called a photo
  named[says, at["style"]] = attributes.style[says]
  plain = np.where(random.random(count) < 0.3, "photo", "picture")
  mediums = np.where(says, mediums, plain)
  return [_caption(row, str(m)) for row, m in zip(named.tolist(), mediums, strict=True)], named


def _caption(named: Sequence[int], medium: str) -> str:
  """One sentence about what is named, see `described`."""
  of = dict(zip(ATTRIBUTES, named, strict=True))
  ground = f" on {list(BACKGROUNDS)[of['background']]}" if of["background"] >= 0 else ""
  words = [tuple(COLOURS)[of["colour"]]] if of["colour"] >= 0 else []
  if of["glyph"] >= 0:
    kind = "digit" if of["glyph"] < len(DIGITS) else "letter"
    return f"a {medium} of the {' '.join([*words, kind, GLYPHS[of['glyph']]])}{ground}."
  for name, options in (("fill", FILLS), ("extent", EXTENTS)):
    if of[name] >= 0:
      words.insert(0, options[of[name]])
  noun = SHAPES[of["shape"]] if of["shape"] >= 0 else "object"
  number, noun = ("a", noun) if of["count"] == 0 else (COUNTS[of["count"]], plural(noun))
  where = f" at the {PLACES[of['place']]}" if of["place"] >= 0 else ""
  return f"a {medium} of {' '.join([number, *words, noun])}{where}{ground}."


# --- rendering --------------------------------------------------------------------------------------


def render(attributes: Attributes, random: np.random.Generator) -> np.ndarray:
  """Renders pictures, (n, 32, 32, 3) uint8; angle, place, size and colour vary a little."""
  parts = []
  for start in range(0, len(attributes), 2000):
    rows = {
      field.name: getattr(attributes, field.name)[start : start + 2000]
      for field in dataclasses.fields(attributes)
    }
    parts.append(_render(Attributes(**rows), random))
  return np.concatenate(parts) if parts else np.empty((0, SIZE, SIZE, 3), np.uint8)


def _render(of: Attributes, random: np.random.Generator) -> np.ndarray:
  n = len(of)
  grounds = np.array(list(BACKGROUNDS.values()), np.float32)[of.background]
  inks = np.array(list(COLOURS.values()), np.float32)[of.colour]
  inks = np.clip(inks + random.normal(0, 0.04, inks.shape), 0, 1)
  image = np.broadcast_to(grounds[:, None, None], (n, SIZE, SIZE, 3)).astype(np.float32)
  cover = _glyphs(of, random)
  scenes = of.glyph < 0
  cover[scenes] = _objects(of, random)[scenes]
  shade = np.ones((n, SIZE, SIZE, 1), np.float32)
  slope = np.linspace(1.0, 0.25, SIZE, dtype=np.float32)[None, :, None, None]
  shade = np.where((scenes & (of.fill == 5))[:, None, None, None], slope, shade)
  image = image * (1 - cover[..., None]) + inks[:, None, None] * shade * cover[..., None]
  return (np.clip(_styled(image, of, random), 0, 1) * 255).astype(np.uint8)


def _objects(of: Attributes, random: np.random.Generator) -> np.ndarray:
  """How much of every pixel objects cover, (n, 32, 32)."""
  n = len(of)
  cover = np.zeros((n, SIZE, SIZE), np.float32)
  y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
  for slot in range(len(COUNTS)):
    rows = np.flatnonzero((of.count >= slot) & (of.glyph < 0))
    if not len(rows):
      continue
    centre = np.array([_centre(of, int(i), slot) for i in rows], np.float32) * SIZE
    centre += random.uniform(-1.2, 1.2, centre.shape)
    alone = of.count[rows] == 0
    radius = np.where(alone, np.where(of.extent[rows] == 0, 5.5, 10.0), 5.0)
    moved = alone & (of.place[rows] > 0)  # must stay inside of the picture
    radius = np.where(moved, np.minimum(radius, 7.5), radius) * random.uniform(0.9, 1.1, len(rows))
    angle = random.uniform(-0.25, 0.25, len(rows))
    cos, sin = (f(angle)[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
    scale = radius[:, None, None].astype(np.float32)
    dx = (x[None] - centre[:, 0, None, None]) / scale
    dy = (y[None] - centre[:, 1, None, None]) / scale
    inside = _distance(of.shape[rows], dx * cos + dy * sin, dy * cos - dx * sin) * scale
    alpha = np.clip(0.5 - inside, 0, 1) * _texture(of.fill[rows], inside, x, y, random)
    cover[rows] = np.maximum(cover[rows], alpha)
  return cover


def _centre(of: Attributes, i: int, slot: int) -> tuple[float, float]:
  return _CENTRES[PLACES[of.place[i]]] if of.count[i] == 0 else _GROUPS[of.count[i]][slot]


def _distance(shape: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Roughly the distance to the edge of each shape in its own units, negative inside."""
  out = np.empty_like(u)
  for index, name in enumerate(SHAPES):
    rows = shape == index
    if rows.any():
      out[rows] = _EDGES[name](u[rows], v[rows])
  return out


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  x, y = 1.25 * u, 0.2 - 1.25 * v
  return 0.4 * np.cbrt((x**2 + y**2 - 1) ** 3 - x**2 * y**3)


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  head = np.maximum(np.abs(u) - (0.95 + v) * 0.8, v)
  return np.minimum(head, np.maximum(np.abs(u) - 0.22, np.abs(v - 0.35) - 0.55))


_EDGES = {
  "circle": lambda u, v: np.hypot(u, v) - 0.9,
  "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
  "triangle": lambda u, v: np.maximum(0.87 * np.abs(u) - 0.5 * v, v) - 0.5,
  "star": lambda u, v: np.hypot(u, v) - (0.6 + 0.38 * np.cos(5 * (np.arctan2(v, u) + np.pi / 2))),
  "cross": lambda u, v: np.minimum(
    np.maximum(np.abs(u) - 0.28, np.abs(v) - 0.95), np.maximum(np.abs(v) - 0.28, np.abs(u) - 0.95)
  ),
  "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.22,
  "heart": _heart,
  "diamond": lambda u, v: 1.4 * np.abs(u) + np.abs(v) - 1,
  "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.8 - np.hypot(u - 0.5, v)),
  "arrow": _arrow,
}


def _texture(
  fill: np.ndarray, inside: np.ndarray, x: np.ndarray, y: np.ndarray, random: np.random.Generator
) -> np.ndarray:
  """How much of an object's pixels its fill leaves."""
  phase = random.integers(0, 4, (len(fill), 1, 1))
  patterns = {
    "striped": np.where((x + y + phase) % 4 < 2, 1, 0.15),
    "dotted": np.where(((x + phase) % 3 < 1) & ((y + phase) % 3 < 1), 0.1, 1),
    "checked": np.where(((x + phase) // 3 + (y + phase) // 3) % 2 < 1, 1, 0.15),
    "hollow": np.clip(inside + 2.2, 0, 1),
  }
  left = np.ones_like(inside)
  for index, name in enumerate(FILLS):
    rows = fill == index
    if name in patterns and rows.any():
      left[rows] = patterns[name][rows]
  return left


def _glyphs(of: Attributes, random: np.random.Generator) -> np.ndarray:
  """How much of every pixel letters and digits cover, (n, 32, 32)."""
  cover = np.zeros((len(of), SIZE, SIZE), np.float32)
  for i in np.flatnonzero(of.glyph >= 0):
    letters = _font((*FONTS, *TASK_FONTS)[of.font[i]], int(random.integers(18, 31)))
    image = Image.new("L", (SIZE, SIZE))
    place = tuple(SIZE / 2 + random.uniform(-2, 2, 2))
    ImageDraw.Draw(image).text(place, _CHARACTERS[of.glyph[i]], 255, letters, anchor="mm")
    turned = image.rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR)
    cover[i] = np.asarray(turned, np.float32) / 255
  return cover


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
  wheel = importlib.metadata.distribution("matplotlib")
  path = Path(str(wheel.locate_file(f"matplotlib/mpl-data/fonts/ttf/{name}.ttf")))
  return ImageFont.truetype(io.BytesIO(path.read_bytes()), size)


def _styled(image: np.ndarray, of: Attributes, random: np.random.Generator) -> np.ndarray:
  """Redraws every picture in its style."""
  out = image.copy()
  for index, name in enumerate((*STYLES, *TASK_STYLES)):
    rows = of.style == index
    if rows.any():
      out[rows] = _REDRAWN[name](image[rows], random)
  return out


def _sketch(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
  """Colours pale on paper, edges dark."""
  grey = image.mean(-1)
  edges = np.abs(np.diff(grey, axis=1, append=grey[:, -1:])) + np.abs(
    np.diff(grey, axis=2, append=grey[:, :, -1:])
  )
  paper = 0.75 + 0.25 * image
  return paper * (1 - np.clip(2.5 * edges, 0, 0.9))[..., None]


def _blurred(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
  for axis in (1, 2):
    image = (np.roll(image, 1, axis) + image + np.roll(image, -1, axis)) / 3
  return image


def _noisy(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
  light = random.uniform(0.7, 1.15, (len(image), 1, 1, 1))
  return image * light + random.normal(0, 0.08, image.shape)


def _dim(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
  return 0.25 + 0.35 * image + random.normal(0, 0.06, image.shape)


def _coarse(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
  n = len(image)
  blocks = image.reshape(n, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))
  return blocks.repeat(2, 1).repeat(2, 2) + random.normal(0, 0.05, image.shape)


_REDRAWN = {
  "flat": lambda image, random: image,
  "sketch": _sketch,
  "blurred": _blurred,
  "noisy": _noisy,
  "dim": _dim,
  "inverted": lambda image, random: 1 - image,
  "coarse": _coarse,
}
