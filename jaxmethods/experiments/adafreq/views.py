"""Random views of photographs, and maps of a frozen network on them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmethods.data.array_cache import cached
from jaxmethods.data.vision_sources import efficientnet_lite0
from jaxmethods.images import augment
from jaxmethods.methods import adafreq
from jaxmethods.models.efficientnet import EfficientNet, normalised
from jaxmethods.runtime import compiler
from jaxmethods.runtime.waiting import waiting
from jaxmethods.trees import Key, Params

# The last block of each stage; three of them at 1/8, 1/16 and 1/32 of the pixels.
_EVERY_STAGE = (
  "blocks_0",
  "blocks_2",
  "blocks_4",
  "blocks_7",
  "blocks_10",
  "blocks_14",
  "blocks_15",
)
_THREE_STAGES = ("blocks_4", "blocks_10", "blocks_15")
_FORMAT = b"reid-2"
_AT_ONCE = 32  # photographs


class Recipe(NamedTuple):
  """How views are drawn; lengths in pixels of a photograph of 256.

  Attributes:
    pad: how far a crop may be off; what is outside is black.
    rotation: largest, in degrees.
    jitter: brightness and contrast are scaled by 1 - jitter..1 + jitter.
    flip: chance of a mirror image.
    chance: of rotation, brightness and contrast, each.
    deviation: of the high-pass filter.
    area: largest share of the spectrum that is put back.
    mix: None: there is no second view.
  """

  pad: float
  rotation: float
  jitter: float
  flip: float
  chance: float
  deviation: float
  area: float
  mix: adafreq.Mix | None


class Pair(NamedTuple):
  """Photographs in [-1, 1] and their high frequencies in [0, 1], or maps of a frozen network on both."""

  original: Array
  high: Array | None


def centred(images: Array) -> Array:
  """Brings 0..255 to [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1


class _Draw(NamedTuple):
  """What is drawn for a view of one photograph.

  Attributes:
    turn: angle in radians.
    shift: of the crop to the right and down, whole pixels, (2,).
    sign: -1: mirrored; else 1.
    light: factor of the brightness.
    contrast: of the contrast.
    high_key: of the second view.
  """

  turn: Array
  shift: Array
  sign: Array
  light: Array
  contrast: Array
  high_key: Key


def _draw(recipe: Recipe, side: int, key: Key) -> _Draw:
  place_key, chance_key, strength_key, high_key = jax.random.split(key, 4)
  turned, brighter, starker, mirrored = jax.random.uniform(chance_key, (4,)) < jnp.array(
    [recipe.chance, recipe.chance, recipe.chance, recipe.flip]
  )
  angle, light, contrast = jax.random.uniform(strength_key, (3,), minval=-1)
  # Whole pixels, so that a mere crop stays sharp.
  shift = jnp.round(jax.random.uniform(place_key, (2,), minval=-1) * recipe.pad * side / 256)
  return _Draw(
    jnp.deg2rad(jnp.where(turned, angle * recipe.rotation, 0)),
    shift,
    jnp.where(mirrored, -1.0, 1.0),
    jnp.where(brighter, 1 + recipe.jitter * light, 1),
    jnp.where(starker, 1 + recipe.jitter * contrast, 1),
    high_key,
  )


def _first(recipe: Recipe, drawn: _Draw, image: Array) -> Array:
  """The first view of one photograph (side, side, 3) in 0..255."""
  side = image.shape[0]
  sign, shift, half = drawn.sign, drawn.shift, side / 2
  most = int(np.ceil(recipe.pad * side / 256))

  def turned(image: Array) -> Array:
    cos, sin = jnp.cos(drawn.turn), jnp.sin(drawn.turn)
    matrix = jnp.stack([
      sign * cos, sin, half - half * (sign * cos + sin) + shift[0],
      -sign * sin, cos, half - half * (cos - sign * sin) + shift[1],
    ])  # fmt: skip
    return augment.affine(image, matrix)

  def cropped(image: Array) -> Array:
    seen = jnp.where(sign < 0, image[:, ::-1], image)
    padded = jnp.pad(seen, ((most, most), (most, most), (0, 0)))
    start = (most + jnp.stack([shift[1], sign * shift[0]])).astype(jnp.int32)
    return jax.lax.dynamic_slice(padded, (*start, 0), image.shape).astype(jnp.float32)

  x = jax.lax.cond(drawn.turn != 0, turned, cropped, image)
  return centred(augment.contrast(augment.brightness(x, drawn.light), drawn.contrast))


def high_of(recipe: Recipe, key: Key, original: Array) -> Array | None:
  """Draws the second view of one photograph in [-1, 1]."""
  if recipe.mix is None:
    return None
  deviation = recipe.deviation * min(original.shape[:2]) / 256
  return adafreq.high_frequency_view(
    key, original, deviation=deviation, area=recipe.area, mix=recipe.mix
  )


def views(recipe: Recipe, key: Key, images: Array) -> Pair:
  """Draws a view of each photograph (B, side, side, 3) in 0..255."""
  keys = jax.random.split(key, len(images))
  drawn = jax.vmap(functools.partial(_draw, recipe, images.shape[1]))(keys)
  first = functools.partial(_first, recipe)
  if jax.default_backend() == "cpu":
    # One after the other: only photographs that are turned are resampled, and no loop over all of
    # them does it again for each reader. Of 32 at 256 pixels 0.5 ms of CPU each, 5.7 by vmap.
    original = jax.lax.map(lambda one: first(*one), (drawn, images))
  else:
    original = jax.vmap(first)(drawn, images)
  if recipe.mix is None:
    return Pair(original, None)
  return Pair(original, jax.vmap(functools.partial(high_of, recipe))(drawn.high_key, original))


# --- a frozen network -------------------------------------------------------------------------------


class Frozen(NamedTuple):
  """EfficientNet-Lite0 as it is used.

  Attributes:
    params: its weights.
    resolutions: sides at which it sees photographs, multiples of 32.
    moments: whether mean and deviation of each channel are kept of the maps, at every resolution; else
      the maps at the first one.
  """

  params: Params
  resolutions: tuple[int, ...]
  moments: bool


def load_frozen(resolutions: tuple[int, ...], moments: bool) -> Frozen:
  """Loads the weights.

  Raises:
    InputError: the package that carries them is missing.
  """
  return Frozen(efficientnet_lite0()[0], resolutions, moments)


def stages(params: Params, pixels: Array, resolution: int, blocks: Sequence[str]) -> list[Array]:
  """Computes the maps (B, height, width, C) behind some blocks; pixels (B, side, side, 3) in 0..255."""
  x = jax.image.resize(
    pixels.astype(jnp.float32), (len(pixels), resolution, resolution, 3), "linear"
  )
  _, kept = EfficientNet().apply(
    {"params": params},
    normalised(x),
    capture_intermediates=lambda module, method: method == "__call__" and module.name in blocks,
  )
  return [kept["intermediates"][name]["__call__"][0] for name in blocks]


def seen_by(params: Params, pixels: Array, side: int, moments: bool) -> Array:
  """Computes what is kept of photographs (B, height, width, 3) in 0..255, seen at one resolution.

  Returns:
    Moments (B, d), or maps of three stages laid over each other (B, g, g, 472), g a sixteenth of the
    resolution; float16.
  """
  if moments:
    maps = stages(params, pixels, side, _EVERY_STAGE)
    both = [f(m, axis=(1, 2)) for m in maps for f in (jnp.mean, jnp.std)]
    return jnp.concatenate(both, axis=-1).astype(jnp.float16)
  maps = stages(params, pixels, side, _THREE_STAGES)
  grid = maps[1].shape[:3]
  same = [jax.image.resize(m, (*grid, m.shape[-1]), "linear") for m in maps]
  return jnp.concatenate(same, axis=-1).astype(jnp.float16)


def of_photographs(frozen: Frozen, images: np.ndarray) -> np.ndarray:
  """Computes what is kept of photographs (n, side, side, 3) uint8 as they are, on disk from then on."""
  # A photograph that is trained on and searched in is looked at once.
  names = [hashlib.sha256(image).digest() for image in images]
  _, first, which = np.unique(names, return_index=True, return_inverse=True)
  whole = _in_parts(frozen, lambda key, x: x, b"as they are", images[first], jax.random.key(0))
  return whole[which]


def _present(high: Array | None) -> Array:
  assert high is not None  # for the type checker
  return high


def of_views(
  frozen: Frozen, recipe: Recipe, images: np.ndarray, seen: np.ndarray, copies: int, seed: int
) -> Pair:
  """Draws views and computes what is kept of both halves, (copies, n, ...).

  Args:
    frozen: the network.
    recipe: of the views.
    images: photographs.
    seen: what is kept of them as they are: the first copy, which is not augmented.
    copies: how many.
    seed: of the views.
  """

  def augmented_high(key: Key, x: Array) -> Array:
    return 255 * _present(views(recipe, key, x).high)

  def plain_high(key: Key, x: Array) -> Array:
    draw = jax.vmap(functools.partial(high_of, recipe))
    return 255 * _present(draw(jax.random.split(key, len(x)), centred(x)))

  keys = [jax.random.fold_in(jax.random.key(seed), copy) for copy in range(copies)]
  # The first views do not depend on the second ones: a plain row and AdaFreq look at them once.
  first = recipe._replace(mix=None, deviation=0.0, area=0.0)
  original = [seen]
  for copy in range(1, copies):
    mark = repr((first, copy, seed)).encode()
    draw = lambda key, x: 127.5 * (views(first, key, x).original + 1)
    original.append(_in_parts(frozen, draw, mark, images, keys[copy]))
  if recipe.mix is None:
    return Pair(jnp.asarray(np.stack(original)), None)
  high = []
  for copy in range(copies):
    mark = repr((recipe, copy, seed, "high")).encode()
    draw = augmented_high if copy else plain_high
    high.append(_in_parts(frozen, draw, mark, images, keys[copy]))
  return Pair(jnp.asarray(np.stack(original)), jnp.asarray(np.stack(high)))


def _in_parts(
  frozen: Frozen, draw: Callable[[Key, Array], Array], mark: bytes, images: np.ndarray, key: Key
) -> np.ndarray:
  """Draws pixels 0..255 of a few photographs at a time, and computes what is kept of them."""
  sides = frozen.resolutions if frozen.moments else frozen.resolutions[:1]
  each = [_at_side(frozen, side, draw, mark, images, key) for side in sides]
  return np.concatenate(each, axis=-1)


def _at_side(
  frozen: Frozen,
  side: int,
  draw: Callable[[Key, Array], Array],
  mark: bytes,
  images: np.ndarray,
  key: Key,
) -> np.ndarray:
  @compiler.jit
  def program(params: Params, key: Key, some: Array) -> Array:
    return seen_by(params, draw(key, some), side, frozen.moments)

  def compute() -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(images), _AT_ONCE):
      some = images[start : start + _AT_ONCE]
      padded = np.concatenate([some, np.zeros((_AT_ONCE - len(some), *some.shape[1:]), np.uint8)])
      drawn = program(frozen.params, jax.random.fold_in(key, start), padded)
      parts.append(np.asarray(drawn)[: len(some)])
    return {"seen": np.concatenate(parts)}

  about = repr((side, frozen.moments)).encode()
  with waiting(f"frozen features of {len(images)} photographs at {side} pixels"):
    return cached("reid", [_FORMAT, about, mark, images], compute)["seen"]
