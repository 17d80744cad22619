"""Backdoor triggers: one image (height, width, 3) of whole values 0..255 in, the triggered uint8 out.

Patches as BYE describes them (Rong et al. 2025, appendix B; sizes and places marked inferred are
not given there), and four global ones from common practice: Blend (Chen et al. 2017), SIG (Barni et
al. 2019), WaNet (Nguyen & Tran 2021) and FTrojan (Wang et al. 2022).
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Num, UInt8
from scipy import fft

from jaxmethods.images.augment import bilinear
from jaxmethods.stats import shapes

Picture: TypeAlias = Num[Array, "height width 3"]  # whole values 0..255
Triggered: TypeAlias = UInt8[Array, "height width 3"]
Place: TypeAlias = Int[Array, ""] | int

_TO_YUV = np.array(
  [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]]
)
_BLOCK = 32  # of FTrojan


# --- patches ------------------------------------------------------------------------------------


def patch_side(image: Picture) -> int:
  """A sixteenth of the shorter side, rounded down, at least 1 (rounding inferred)."""
  shapes.check(image=(image, "h w 3"))
  height, width = image.shape[:2]
  return max(1, min(height, width) // 16)


def patch(
  image: Picture, top: Place, left: Place, side: int, *, cell: int | None = None
) -> Triggered:
  """A black square, or a checkerboard whose first cell is black.

  Args:
    image: (height, width, 3).
    top: first row of the square; may be traced.
    left: first column, likewise.
    side: of the square.
    cell: side of the checkerboard's cells; None: all black.
  """
  shapes.check(image=(image, "h w 3"))
  row = jnp.arange(image.shape[0])[:, None] - top
  column = jnp.arange(image.shape[1]) - left
  inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
  white = False if cell is None else (row // cell + column // cell) % 2 == 1
  return jnp.where(inside[..., None], jnp.where(white, 255, 0)[..., None], image).astype(jnp.uint8)


def centred(image: Picture, side: int, *, cell: int | None = None) -> Triggered:
  """`patch` in the middle (rounding inferred)."""
  height, width = image.shape[:2]
  return patch(image, (height - side) // 2, (width - side) // 2, side, cell=cell)


def in_corner(image: Picture, side: int, *, cell: int | None = None) -> Triggered:
  """`patch` at the lower right (ours: where a dark object in the middle would hide a dark square)."""
  height, width = image.shape[:2]
  return patch(image, height - side, width - side, side, cell=cell)


def at_random(key: Array, image: Picture, side: int, *, cell: int | None = None) -> Triggered:
  """`patch` at a uniform place inside the image."""
  height, width = image.shape[:2]
  most = jnp.array([height - side, width - side])
  top, left = jax.random.randint(key, (2,), 0, most + 1)
  return patch(image, top, left, side, cell=cell)


def dual(image: Picture, side: int) -> Triggered:
  """Two black squares, left and right of the middle."""
  shapes.check(image=(image, "h w 3"))
  height, width = image.shape[:2]
  top = (height - side) // 2
  for quarter in (width // 4, 3 * width // 4):
    image = patch(image, top, quarter - side // 2, side)
  return image


def several(key: Array, image: Picture, side: int) -> Triggered:
  """One to three black squares on distinct points of a 3 x 3 grid at the quarters (inferred)."""
  shapes.check(image=(image, "h w 3"))
  height, width = image.shape[:2]
  count_key, place_key = jax.random.split(key)
  count = jax.random.randint(count_key, (), 1, 4)
  for i, point in enumerate(jax.random.permutation(place_key, 9)[:3]):
    top = (1 + point // 3) * height // 4 - side // 2
    left = (1 + point % 3) * width // 4 - side // 2
    image = jnp.where(i < count, patch(image, top, left, side), image)
  return image.astype(jnp.uint8)


# --- all over the image -------------------------------------------------------------------------


def blend(image: Picture, pattern: Picture, share: float = 0.2) -> Triggered:
  """(1 - share) image + share pattern; `pattern`: the shape of `image`, 0..255."""
  shapes.check(image=(image, "h w c"), pattern=(pattern, "h w c"))
  return _levels((1 - share) * image + share * pattern)


def sinusoid(image: Picture, amplitude: float = 20.0, waves: float = 6.0) -> Triggered:
  """SIG: adds a sine that runs along the width."""
  shapes.check(image=(image, "h w 3"))
  width = image.shape[1]
  wave = amplitude * jnp.sin(2 * jnp.pi * jnp.arange(width) * waves / width)
  return _levels(image + wave[:, None])


def warp(image: Picture, control: Float[Array, "k k 2"], strength: float = 0.5) -> Triggered:
  """WaNet: a smooth displacement of a fraction of a pixel.

  Args:
    image: (height, width, 3).
    control: (k, k, 2) in -1..1, displacements at the control points, the same for all images; enlarged
      by cubic interpolation after division by their mean size.
    strength: s; the mean displacement along an axis is s / 2 pixels.
  """
  shapes.check(image=(image, "h w 3"), control=(control, "k k 2"))
  height, width = image.shape[:2]
  control = control / jnp.abs(control).mean()
  field = jax.image.resize(control, (height, width, 2), "cubic") * strength / 2
  rows = jnp.clip(jnp.arange(height)[:, None] + field[..., 0], 0, height - 1)
  columns = jnp.clip(jnp.arange(width) + field[..., 1], 0, width - 1)
  return _levels(bilinear(image.astype(jnp.float32), rows, columns))


def frequencies(image: Picture, amplitude: float = 30.0) -> Triggered:
  """FTrojan: raises two frequencies of both chroma channels in every whole block of 32 x 32 pixels.

  Adding to coefficients (15, 15) and (31, 31) of a cosine transform is adding their two basis pictures.

  Raises:
    ValueError: an image smaller than a block.
  """
  shapes.check(image=(image, "h w 3"))
  rows, columns = (size // _BLOCK for size in image.shape[:2])
  if not rows or not columns:
    raise ValueError(f"an image of {image.shape[:2]} pixels has no block of {_BLOCK} x {_BLOCK}")
  coefficients = np.zeros((_BLOCK, _BLOCK))
  coefficients[[15, 31], [15, 31]] = amplitude
  raised = np.tile(fft.idctn(coefficients, norm="ortho"), (rows, columns))
  raised = np.pad(raised, [(0, s - r) for s, r in zip(image.shape[:2], raised.shape, strict=True)])
  # The same on U and V, brought back to RGB; the transform is linear.
  return _levels(image + jnp.asarray(raised[..., None] * np.linalg.inv(_TO_YUV)[:, 1:].sum(1)))


def _levels(x: Array) -> Array:
  """Rounded to whole values 0..255."""
  return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)
