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
_FORMAT = b"reid-1"
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


def one_view(recipe: Recipe, key: Key, image: Array) -> Pair:
  """Draws a view of one photograph (side, side, 3) in 0..255."""
  place_key, chance_key, strength_key, high_key = jax.random.split(key, 4)
  side = image.shape[0]
  turned, brighter, starker, mirrored = jax.random.uniform(chance_key, (4,)) < jnp.array(
    [recipe.chance, recipe.chance, recipe.chance, recipe.flip]
  )
  angle, light, contrast = jax.random.uniform(strength_key, (3,), minval=-1)
  # One resampling for crop, mirror and rotation. Whole pixels, so that a mere crop stays sharp.
  shift = jnp.round(jax.random.uniform(place_key, (2,), minval=-1) * recipe.pad * side / 256)
  turn = jnp.deg2rad(jnp.where(turned, angle * recipe.rotation, 0))
  sign = jnp.where(mirrored, -1.0, 1.0)
  cos, sin, half = jnp.cos(turn), jnp.sin(turn), side / 2
  matrix = jnp.stack([
    sign * cos, sin, half - half * (sign * cos + sin) + shift[0],
    -sign * sin, cos, half - half * (cos - sign * sin) + shift[1],
  ])  # fmt: skip
  x = augment.affine(image, matrix)
  x = augment.brightness(x, jnp.where(brighter, 1 + recipe.jitter * light, 1))
  x = centred(augment.contrast(x, jnp.where(starker, 1 + recipe.jitter * contrast, 1)))
  return Pair(x, high_of(recipe, high_key, x))


def high_of(recipe: Recipe, key: Key, original: Array) -> Array | None:
  """Draws the second view of one photograph in [-1, 1]."""
  if recipe.mix is None:
    return None
  deviation = recipe.deviation * min(original.shape[:2]) / 256
  return adafreq.high_frequency_view(
    key, original, deviation=deviation, area=recipe.area, mix=recipe.mix
  )


def views(recipe: Recipe, key: Key, images: Array) -> Pair:
  """Draws a view of each photograph (B, side, side, 3)."""
  keys = jax.random.split(key, len(images))
  return jax.vmap(functools.partial(one_view, recipe))(keys, images)


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


def seen_by(frozen: Frozen, pixels: Array) -> Array:
  """Computes what is kept of photographs (B, side, side, 3) in 0..255.

  Returns:
    Moments (B, d), or maps of three stages laid over each other (B, g, g, 472), g a sixteenth of the
    resolution; float16.
  """
  if frozen.moments:
    maps = [
      m for side in frozen.resolutions for m in stages(frozen.params, pixels, side, _EVERY_STAGE)
    ]
    moments = [f(m, axis=(1, 2)) for m in maps for f in (jnp.mean, jnp.std)]
    return jnp.concatenate(moments, axis=-1).astype(jnp.float16)
  maps = stages(frozen.params, pixels, frozen.resolutions[0], _THREE_STAGES)
  grid = maps[1].shape[:3]
  same = [jax.image.resize(m, (*grid, m.shape[-1]), "linear") for m in maps]
  return jnp.concatenate(same, axis=-1).astype(jnp.float16)


def of_photographs(frozen: Frozen, images: np.ndarray) -> np.ndarray:
  """Computes what is kept of photographs (n, side, side, 3) uint8 as they are, on disk from then on."""
  # A photograph that is trained on and searched in is looked at once.
  names = [hashlib.sha256(image).digest() for image in images]
  _, first, which = np.unique(names, return_index=True, return_inverse=True)
  draw = lambda key, x: {"original": x}
  return _in_parts(frozen, draw, b"as they are", images[first], jax.random.key(0))["original"][
    which
  ]


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

  def augmented(key: Key, x: Array) -> dict[str, Array]:
    pair = views(recipe, key, x)
    high = {} if pair.high is None else {"high": 255 * pair.high}
    return {"original": 127.5 * (pair.original + 1)} | high

  def as_it_is(key: Key, x: Array) -> dict[str, Array]:
    high = jax.vmap(functools.partial(high_of, recipe))(jax.random.split(key, len(x)), centred(x))
    return {} if high is None else {"high": 255 * high}

  parts = []
  for copy in range(copies):
    key = jax.random.fold_in(jax.random.key(seed), copy)
    mark = repr((recipe, copy, seed)).encode()
    drawn = _in_parts(frozen, augmented if copy else as_it_is, mark, images, key)
    parts.append(drawn if copy else {"original": seen, **drawn})
  stacked = {name: jnp.asarray(np.stack([part[name] for part in parts])) for name in parts[0]}
  return Pair(stacked["original"], stacked.get("high"))


def _in_parts(
  frozen: Frozen,
  draw: Callable[[Key, Array], dict[str, Array]],
  mark: bytes,
  images: np.ndarray,
  key: Key,
) -> dict[str, np.ndarray]:
  """Draws pixels 0..255 of a few photographs at a time, and computes what is kept of them."""

  @compiler.jit
  def program(params: Params, key: Key, some: Array) -> dict[str, Array]:
    network = frozen._replace(params=params)
    return {name: seen_by(network, pixels) for name, pixels in draw(key, some).items()}

  def compute() -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(images), _AT_ONCE):
      some = images[start : start + _AT_ONCE]
      padded = np.concatenate([some, np.zeros((_AT_ONCE - len(some), *some.shape[1:]), np.uint8)])
      drawn = program(frozen.params, jax.random.fold_in(key, start), padded)
      parts.append({name: np.asarray(x)[: len(some)] for name, x in drawn.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  return cached("reid", [_FORMAT, repr(frozen[1:]).encode(), mark, images], compute)
