"""Random views of photographs, and maps of a frozen network on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmethods.data.vision_sources import efficientnet_lite0
from jaxmethods.images import augment
from jaxmethods.methods import adafreq
from jaxmethods.models.efficientnet import EfficientNet, normalised
from jaxmethods.runtime import compiler
from jaxmethods.trees import Key, Params, Tree

# The last block of each stage whose map is read, at 1/8, 1/16 and 1/32 of the pixels.
_FINE, _MIDDLE, _COARSE = "blocks_4", "blocks_10", "blocks_15"
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
  """EfficientNet-Lite0 and the side at which it sees photographs."""

  params: Tree
  resolution: int


def load_frozen(resolution: int) -> Frozen:
  """Loads the weights.

  Raises:
    InputError: the package that carries them is missing.
  """
  return Frozen(efficientnet_lite0()[0], resolution)


def feature_maps(params: Params, pixels: Array, resolution: int) -> Array:
  """Computes maps of three stages, laid over each other.

  Args:
    params: of EfficientNet-Lite0.
    pixels: (B, side, side, 3) in 0..255.
    resolution: side to which they are brought, a multiple of 32.

  Returns:
    (B, g, g, 472), g a sixteenth of the resolution.
  """
  x = jax.image.resize(
    pixels.astype(jnp.float32), (len(pixels), resolution, resolution, 3), "linear"
  )
  wanted = (_FINE, _MIDDLE, _COARSE)
  _, kept = EfficientNet().apply(
    {"params": params},
    normalised(x),
    capture_intermediates=lambda module, method: method == "__call__" and module.name in wanted,
  )
  maps = [kept["intermediates"][name]["__call__"][0] for name in wanted]
  grid = maps[1].shape[:3]
  return jnp.concatenate([jax.image.resize(m, (*grid, m.shape[-1]), "linear") for m in maps], -1)


def frozen_maps(frozen: Frozen, images: np.ndarray) -> np.ndarray:
  """Computes the maps of photographs (n, side, side, 3) uint8 as they are, (n, g, g, C) float16."""
  run = _mapper(frozen, lambda images, key: Pair(centred(images), None))
  return np.asarray(run(images, jax.random.key(0)).original)


def drawn_maps(frozen: Frozen, recipe: Recipe, images: np.ndarray, copies: int, key: Key) -> Pair:
  """Draws views of photographs and computes the maps of both halves, (copies, n, g, g, C) float16."""
  run = _mapper(frozen, lambda images, key: views(recipe, key, images))
  drawn = [run(images, jax.random.fold_in(key, copy)) for copy in range(copies)]
  return jax.tree.map(lambda *parts: np.stack(parts), *drawn)


def _mapper(
  frozen: Frozen, draw: Callable[[Array, Key], Pair]
) -> Callable[[np.ndarray, Key], Pair]:
  """Returns (images, key) -> maps of both views, a few photographs at a time."""

  @compiler.jit
  def program(params: Tree, images: Array, key: Key) -> Pair:
    pair = draw(images, key)
    maps = lambda pixels: feature_maps(params, pixels, frozen.resolution).astype(jnp.float16)
    high = None if pair.high is None else maps(255 * pair.high)
    return Pair(maps(127.5 * (pair.original + 1)), high)

  def run(images: np.ndarray, key: Key) -> Pair:
    parts = []
    for start in range(0, len(images), _AT_ONCE):
      some = images[start : start + _AT_ONCE]
      padded = np.concatenate([some, np.zeros((_AT_ONCE - len(some), *some.shape[1:]), np.uint8)])
      drawn = program(frozen.params, padded, jax.random.fold_in(key, start))
      parts.append(jax.tree.map(lambda x, some=some: np.asarray(x)[: len(some)], drawn))
    return jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)

  return run
