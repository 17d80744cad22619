"""Random views of one image: the plain crop of supervised training and SimCLR's weak view.

Chen et al. 2020, "A simple framework for contrastive learning of visual representations", with the
constants of RAHFL (code). Images are square, (side, side, 3) with whole values 0..255 in any numeric
type; views are float32 with whole values 0..255.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num

from jaxmethods.images import augment
from jaxmethods.images.colour import shift_hue
from jaxmethods.stats import shapes

Square: TypeAlias = Num[Array, "side side 3"]  # whole values 0..255
View: TypeAlias = Float[Array, "side side 3"]
Border = Literal["reflect", "constant"]
_ATTEMPTS = 10  # at a crop that fits, as in torchvision
_LARGEST_BLUR = 2.0


def crop_and_flip(
  key: Array, image: Square, *, pad: int = 4, border: Border = "reflect", flip: bool = True
) -> View:
  """The image shifted by up to `pad` pixels each way, mirrored half the time.

  Args:
    key: random key.
    image: (side, side, 3).
    pad: width of the border that crops may reach into.
    border: "reflect" (private images) or "constant", zeros (public ones).
    flip: whether a mirror image means the same, as it does not of digits.

  >>> jm.images.crop_and_flip(key, jnp.ones((8, 8, 3))).shape
  (8, 8, 3)
  """
  shapes.check(image=(image, "side side 3"))
  crop_key, flip_key = jax.random.split(key)
  padded = _pad(image, pad, border)
  row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
  cut = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
  return _flip(flip_key, cut) if flip else cut


def public_view(
  key: Array, image: Square, *, pad: int = 4, degrees: float = 15.0, flip: bool = True
) -> View:
  """A view of a public image: crop with a border of zeros, mirror, rotation by up to `degrees`.

  The rotation is bilinear, as AugMix's (inferred).
  """
  shapes.check(image=(image, "side side 3"))
  crop_key, turn_key = jax.random.split(key)
  turn = jax.random.uniform(turn_key, minval=-degrees, maxval=degrees)
  moved = crop_and_flip(crop_key, image, pad=pad, border="constant", flip=flip)
  return augment.rotate(moved, turn)


def weak_view(
  key: Array,
  image: Square,
  *,
  pad: int = 4,
  smallest: float = 0.2,
  jitter: float = 0.4,
  hue: float = 0.1,
  flip: bool = True,
) -> View:
  """SimCLR's view: resized crop, colour jitter (0.8), grey (0.2), blur (0.5), mirror (0.5).

  Args:
    key: random key.
    image: (side, side, 3).
    pad: width of the mirrored border added before the crop.
    smallest: least share of the padded image's area that a crop keeps.
    jitter: brightness, contrast and saturation are scaled by 1 - jitter..1 + jitter,
    hue: and the hue is turned by up to this share of the circle, all four in random order.
    flip: whether a mirror image means the same.

  >>> jm.images.weak_view(key, jnp.full((8, 8, 3), 100.0)).shape
  (8, 8, 3)
  """
  shapes.check(image=(image, "side side 3"))
  crop_key, jitter_key, blur_key, flip_key, chance_key = jax.random.split(key, 5)
  jittered, grey, blurred = jax.random.uniform(chance_key, (3,)) < jnp.array([0.8, 0.2, 0.5])
  x = resized_crop(crop_key, _pad(image, pad, "reflect"), image.shape[0], smallest)
  x = jnp.where(jittered, colour_jitter(jitter_key, x, jitter, hue), x)
  x = jnp.where(grey, augment.grey(x)[..., None], x)
  sigma = jax.random.uniform(blur_key, minval=0.1, maxval=_LARGEST_BLUR)
  x = jnp.where(blurred, _blur(x, sigma), x)
  return _flip(flip_key, x) if flip else x


def resized_crop(key: Array, image: Square, side: int, smallest: float) -> View:
  """A random part of the image, bilinearly resized to (side, side, 3).

  Its share of the area is uniform in (smallest, 1), the logarithm of its aspect in +-log(4/3); the first
  of ten draws that fits is taken (cut to the image if none does).
  """
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  size = image.shape[0]
  shapes.check(image=(image, "side side 3"))
  area = size**2 * jax.random.uniform(area_key, (_ATTEMPTS,), minval=smallest)
  limit = jnp.log(4 / 3)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (_ATTEMPTS,), minval=-limit, maxval=limit))
  sizes = jnp.round(jnp.sqrt(jnp.stack([area / aspect, area * aspect])))
  first = jnp.argmax((sizes <= size).all(0))
  extent = jnp.minimum(sizes[:, first], size)
  start = jnp.floor(jax.random.uniform(place_key, (2,)) * (size - extent + 1))
  rows, columns = jax.vmap(_resize, (0, 0, None, None))(start, extent, size, side)
  return jnp.floor(augment.along_axes(rows, columns, image.astype(jnp.float32)) + 0.5)


def colour_jitter(key: Array, image: Square, strength: float, hue: float) -> View:
  """Brightness, contrast, saturation and hue changed at random, in random order."""
  shapes.check(image=(image, "side side 3"))
  order_key, factor_key, hue_key = jax.random.split(key, 3)
  factor = jax.random.uniform(factor_key, (3,), minval=1 - strength, maxval=1 + strength)
  turn = jax.random.uniform(hue_key, minval=-hue, maxval=hue)
  branches = (
    lambda x: augment.brightness(x, factor[0]),
    lambda x: augment.contrast(x, factor[1]),
    lambda x: augment.color(x, factor[2]),
    lambda x: jnp.floor(255 * shift_hue(x / 255, turn) + 0.5),
  )
  order = jax.random.permutation(order_key, len(branches))
  step = lambda x, which: (jax.lax.switch(which, branches, x), None)
  return jax.lax.scan(step, image.astype(jnp.float32), order)[0]


def _pad(image: Square, pad: int, border: Border) -> Array:
  return jnp.pad(image.astype(jnp.float32), ((pad, pad), (pad, pad), (0, 0)), border)


def _flip(key: Array, image: Square) -> Array:
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _resize(start: Array, extent: Array, size: int, side: int) -> Array:
  """Matrix (side, size) that resizes start..start + extent of an axis; averages when it shrinks."""
  scale = extent / side
  centre = start + (jnp.arange(side)[:, None] + 0.5) * scale
  pixel = jnp.arange(size) + 0.5
  weight = jnp.maximum(0, 1 - jnp.abs(pixel - centre) / jnp.maximum(scale, 1))
  weight = jnp.where((pixel > start) & (pixel < start + extent), weight, 0)
  return weight / weight.sum(1, keepdims=True)


def _blur(image: Square, sigma: Array) -> Array:
  """Gaussian blur, the edge continued."""
  side, reach = image.shape[0], int(4 * _LARGEST_BLUR)
  shift = jnp.arange(-reach, reach + 1)
  weight = jax.nn.softmax(-(shift**2) / (2 * sigma**2))
  source = jnp.clip(jnp.arange(side)[:, None] + shift, 0, side - 1)
  operator = jnp.tensordot(weight, jax.nn.one_hot(source, side), (0, 1), precision="highest")
  return jnp.floor(augment.along_axes(operator, operator, image) + 0.5)
