"""The image operations of AugMix, exact on 8-bit images, and AugMix itself.

Hendrycks et al. 2020, "AugMix: a simple data processing method to improve robustness and uncertainty".
Every operation takes one image, (h, w, c) with whole values 0..255 in any numeric type, and gives
float32 with whole values 0..255, bit for bit the result of the host library that the published code uses
(affine ones within one level).
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Num

from jaxmethods.stats import shapes

# The nine operations of AugMix, in the order that a draw counts them: first those that look every value
# up in a table. The four enhancements overlap the test corruptions and are off in the paper.
OPERATIONS = (
  "autocontrast", "posterize", "solarize", "equalize", "rotate", "shear_x", "shear_y", "translate_x",
  "translate_y",
)  # fmt: skip
_VALUES = 256
_BYTES = 4  # of a word

Image: TypeAlias = Num[Array, "h w c"]  # whole values 0..255
Scalar: TypeAlias = Num[Array, ""]


def look_up(image: Image, table: Num[Array, "c 256"]) -> Image:
  """Replaces every value by its entry in the channel's table: (h, w, c), (c, 256) -> (h, w, c)."""
  shapes.check(image=(image, "h w c"), table=(table, "c 256"))
  flat = image.astype(jnp.int32) + _VALUES * jnp.arange(image.shape[2])
  return table.reshape(-1).at[flat].get(mode="promise_in_bounds").astype(jnp.float32)


def autocontrast(image: Image) -> Image:
  """Stretches every channel to 0..255; a flat channel stays."""
  shapes.check(image=(image, "h w c"))
  return look_up(image, _autocontrast_table(image))


def equalize(image: Image) -> Image:
  """Flattens every channel's histogram."""
  shapes.check(image=(image, "h w c"))
  return look_up(image, _equalize_table(image))


def _autocontrast_table(image: Image) -> Array:
  x, value = image.astype(jnp.int32), jnp.arange(_VALUES)
  low, high = x.min((0, 1))[:, None], x.max((0, 1))[:, None]
  short, row_of = _short_of_whole()
  row = jnp.asarray(short)[jnp.asarray(row_of)[low[:, 0], high[:, 0]]]
  less = (row[:, value // 8] >> (7 - value % 8)) & 1
  stretched = (value - low) * 255 // jnp.maximum(high - low, 1) - less
  return jnp.where(high > low, stretched, value)


@functools.cache
def _short_of_whole() -> tuple[np.ndarray, np.ndarray]:
  """Where the host library's float64 product falls below the whole level that it should be.

  Returns:
    bits by value, (rows, 32) uint8, the first row empty; the row of each (low, high), (256, 256).
  """
  value, high = np.arange(_VALUES), np.arange(_VALUES)[:, None]
  rows, row_of = [np.zeros(32, np.uint8)], np.zeros((_VALUES, _VALUES), np.int32)
  for low in range(_VALUES - 1):
    span = np.maximum(high - low, 1)
    scale = 255.0 / span
    level = (value * scale - low * scale).astype(np.int32)
    less = (level < (value - low) * 255 // span) & (low <= value) & (value <= high)
    for each in np.flatnonzero(less.any(1)):
      row_of[low, each] = len(rows)
      rows.append(np.packbits(less[each]))
  return np.stack(rows), row_of


def _equalize_table(image: Image) -> Array:
  channels, value = image.shape[2], jnp.arange(_VALUES)
  flat = image.astype(jnp.int32) + _VALUES * jnp.arange(channels)
  histogram = jnp.zeros(channels * _VALUES, jnp.int32).at[flat.reshape(-1)].add(1)
  histogram = histogram.reshape(channels, _VALUES)
  last = jnp.where(histogram > 0, value, 0).max(1)
  at_last = jnp.take_along_axis(histogram, last[:, None], 1)
  step = (histogram.sum(1, keepdims=True) - at_last) // 255
  below = jnp.cumsum(histogram, 1) - histogram
  table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
  changed = (step > 0) & ((histogram > 0).sum(1, keepdims=True) > 1)
  return jnp.where(changed, table, value)


def posterize(image: Image, bits: Scalar | int) -> Image:
  """Keeps the `bits` highest bits."""
  step = 2 ** (8 - jnp.asarray(bits, jnp.int32))
  return (image.astype(jnp.int32) // step * step).astype(jnp.float32)


def solarize(image: Image, threshold: Scalar | int) -> Image:
  """Inverts values from `threshold` on."""
  x = image.astype(jnp.float32)
  return jnp.where(x < threshold, x, 255 - x)


def affine(image: Image, matrix: Float[Array, 6]) -> Image:
  """Bilinear resampling, 0 outside the image, truncated to whole values.

  Args:
    image: (h, w, c), c at most 4.
    matrix: (a, b, c, d, e, f): the pixel with centre (x, y) is read at
      (a x + b y + c, d x + e y + f).
  """
  shapes.check(image=(image, "h w c"), matrix=(matrix, "6"))
  height, width, channels = image.shape
  if channels > _BYTES:
    raise ValueError(f"image: at most {_BYTES} channels, got {channels}")
  y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
  a, b, c, d, e, f = matrix
  source_x, source_y = a * x + b * y + c, d * x + e * y + f
  inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
  rows, columns = source_y - 0.5, source_x - 0.5
  top, left = jnp.floor(rows), jnp.floor(columns)
  place = lambda start, size: jnp.clip(start, -1, size - 1).astype(jnp.int32) + 1
  at = place(top, height) * (width + 2) + place(left, width)
  down, right = rows - top, columns - left
  weights = ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)
  # The channels of a pixel in the bytes of one word: four gathers of words, however many there are.
  shifts = 8 * jnp.arange(channels)
  word = jnp.pad((image.astype(jnp.int32) << shifts).sum(-1), 1, "edge").reshape(-1)
  value = jnp.zeros(image.shape)
  for offset, weight in zip((0, 1, width + 2, width + 3), weights, strict=True):
    near = word.at[at + offset].get(mode="promise_in_bounds")[..., None]
    value += jnp.where(inside, weight, 0)[..., None] * ((near >> shifts) & 255)
  return jnp.floor(value)


def bilinear(
  image: Image, rows: Float[Array, "a b"], columns: Float[Array, "a b"]
) -> Float[Array, "a b c"]:
  """Values of (h, w, c) at fractional positions (h', w'), indices clipped to the edge."""
  shapes.check(image=(image, "h w c"), rows=(rows, "a b"), columns=(columns, "a b"))
  height, width, channels = image.shape
  top, left = jnp.floor(rows), jnp.floor(columns)
  down, right = (rows - top)[..., None], (columns - left)[..., None]
  # The four neighbours side by side: one gather for each position, not four.
  x = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
  corners = jnp.concatenate([x[:-1, :-1], x[:-1, 1:], x[1:, :-1], x[1:, 1:]], axis=-1)
  place = lambda start, size: jnp.clip(start, -1, size - 1).astype(jnp.int32) + 1
  flat = place(top, height) * (width + 1) + place(left, width)
  near = corners.reshape(-1, 4 * channels).at[flat].get(mode="promise_in_bounds")
  top_left, top_right, low_left, low_right = jnp.split(near, 4, axis=-1)
  above = top_left * (1 - right) + top_right * right
  below = low_left * (1 - right) + low_right * right
  return above * (1 - down) + below * down


def rotate(image: Image, degrees: Scalar | float) -> Image:
  """Turns counter-clockwise about the centre."""
  return affine(image, _rotation(image.shape, degrees))


def shear_x(image: Image, factor: Scalar | float) -> Image:
  """Reads the pixel (x, y) at x + factor y."""
  return affine(image, _matrix(b=factor))


def shear_y(image: Image, factor: Scalar | float) -> Image:
  """Reads the pixel (x, y) at y + factor x."""
  return affine(image, _matrix(d=factor))


def translate_x(image: Image, pixels: Scalar | float) -> Image:
  """Reads the pixel (x, y) at x + pixels."""
  return affine(image, _matrix(c=pixels))


def translate_y(image: Image, pixels: Scalar | float) -> Image:
  """Reads the pixel (x, y) at y + pixels."""
  return affine(image, _matrix(f=pixels))


def _rotation(shape: tuple[int, ...], degrees: Scalar | float) -> Array:
  t = -jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
  cos, sin, cx, cy = jnp.cos(t), jnp.sin(t), shape[1] / 2, shape[0] / 2
  return jnp.stack([cos, sin, cx - cx * cos - cy * sin, -sin, cos, cy + cx * sin - cy * cos])


def _matrix(b=0.0, c=0.0, d=0.0, f=0.0) -> Array:
  return jnp.stack([jnp.asarray(v, jnp.float32) for v in (1.0, b, c, d, 1.0, f)])


def color(image: Image, factor: Scalar | float) -> Image:
  """Saturation: 0 is grey, 1 the image."""
  shapes.check(image=(image, "h w 3"))
  return _enhance(image, grey(image)[..., None], factor)


def contrast(image: Image, factor: Scalar | float) -> Image:
  """Contrast: 0 is the mean grey level, 1 the image."""
  shapes.check(image=(image, "h w 3"))
  return _enhance(image, jnp.round(grey(image).mean()), factor)


def brightness(image: Image, factor: Scalar | float) -> Image:
  """Brightness: 0 is black, 1 the image."""
  return _enhance(image, jnp.float32(0), factor)


def sharpness(image: Image, factor: Scalar | float) -> Image:
  """Sharpness: 0 is smoothed (border kept), 1 the image."""
  shapes.check(image=(image, "h w c"))
  x = image.astype(jnp.float32)
  weights = jnp.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], jnp.float32)
  smooth = x.at[1:-1, 1:-1].set(jnp.floor(correlate(x, weights) / 13 + 0.5))
  return _enhance(x, smooth, factor)


def correlate(
  image: Num[Array, "h w ..."], kernel: Num[Array, "a b"]
) -> Num[Array, "rows columns ..."]:
  """Weighted sums of (h, w, ...) under a kernel (a, b), where it fits: (h - a + 1, w - b + 1, ...)."""
  shapes.check(kernel=(kernel, "a b"))
  rows, columns = kernel.shape
  height, width = image.shape[0] - rows + 1, image.shape[1] - columns + 1
  total = jnp.zeros((height, width, *image.shape[2:]), image.dtype)
  for i in range(rows):
    for j in range(columns):
      total += kernel[i, j] * image[i : i + height, j : j + width]
  return total


def along_axes(
  rows: Float[Array, "a h"], columns: Float[Array, "b w"], image: Num[Array, "h w ..."]
) -> Float[Array, "a b ..."]:
  """Applies (a, h) to the rows and (b, w) to the columns of (h, w, ...): (a, b, ...)."""
  shapes.check(rows=(rows, "a h"), columns=(columns, "b w"))
  return jnp.einsum("ij,jk...,lk->il...", rows, image, columns, precision="highest")


def grey(image: Image) -> Float[Array, "h w"]:
  """Grey levels (h, w) of (h, w, 3), in whole values."""
  shapes.check(image=(image, "h w 3"))
  weighted = image.astype(jnp.int32) * jnp.array([19595, 38470, 7471])
  return ((weighted.sum(-1) + 32768) >> 16).astype(jnp.float32)


def _enhance(image: Image, degenerate: Array, factor: Scalar | float) -> Array:
  x = image.astype(jnp.float32)
  return jnp.floor(jnp.clip(degenerate + factor * (x - degenerate), 0, 255))


# --- AugMix -------------------------------------------------------------------------------------


def random_operation(key: Array, image: Image, severity: float = 3.0) -> Image:
  """One of the nine operations, uniformly, at a random strength.

  Args:
    key: random key.
    image: (h, w, c), whole values 0..255.
    severity: the strength's level l is uniform in (0.1, severity).

  Returns:
    float32, the shape of `image`.
  """
  shapes.check(image=(image, "h w c"))
  which_key, level_key, sign_key = jax.random.split(key, 3)
  level = jax.random.uniform(level_key, minval=0.1, maxval=severity)
  sign = jax.random.rademacher(sign_key, (), jnp.float32)
  shear = sign * 0.03 * level
  shift = sign * jnp.floor(level * (image.shape[1] / 3) / 10)
  value = jnp.arange(_VALUES)

  def by_table(x: Array) -> Array:
    same = lambda table: jnp.broadcast_to(table, (x.shape[2], _VALUES))
    tables = jnp.stack([
      _autocontrast_table(x),
      same(posterize(value, 4 - jnp.floor(0.4 * level))),
      same(solarize(value, 256 - jnp.floor(25.6 * level))),
    ])  # fmt: skip
    return look_up(x, tables[jnp.minimum(which, 2)])

  def by_place(x: Array) -> Array:
    matrices = jnp.stack([
      _rotation(x.shape, sign * jnp.floor(3 * level)),
      _matrix(b=shear),
      _matrix(d=shear),
      _matrix(c=shift),
      _matrix(f=shift),
    ])  # fmt: skip
    return affine(x, matrices[jnp.maximum(which - 4, 0)])

  which = jax.random.randint(which_key, (), 0, len(OPERATIONS))
  # Three branches, not nine: mapped over images by vmap, all of them are computed for each.
  kind = (which >= 3).astype(jnp.int32) + (which >= 4)
  return jax.lax.switch(kind, (by_table, equalize, by_place), image.astype(jnp.float32))


def augmix(
  key: Array, image: Image, *, severity: float = 3.0, width: int = 3, depth: int = 3
) -> Image:
  """AugMix of one image: a random mixture of chains of random operations, mixed with the image.

  Args:
    key: random key.
    image: (h, w, c), whole values 0..255.
    severity: of the operations.
    width: number of chains.
    depth: longest chain; each has 1..depth operations.

  Returns:
    float32 in 0..255, (1 - m) image + m sum_i w_i chain_i with w ~ Dirichlet(1), m ~ Beta(1, 1). Mixing
    before normalising is the same as after it, because the weights are convex.

  >>> jm.images.augmix(key, jnp.full((8, 8, 3), 100)).shape
  (8, 8, 3)
  """
  shapes.check(image=(image, "h w c"))
  chain_key, weight_key, mix_key = jax.random.split(key, 3)
  x = image.astype(jnp.float32)

  def chain(key: Array) -> Array:
    depth_key, step_key = jax.random.split(key)
    length = jax.random.randint(depth_key, (), 1, depth + 1)

    def step(out: Array, numbered: tuple[Array, Array]) -> tuple[Array, None]:
      i, key = numbered
      work = lambda out: random_operation(key, out, severity)
      return jax.lax.cond(i < length, work, lambda out: out, out), None

    steps = jnp.arange(depth), jax.random.split(step_key, depth)
    return jax.lax.scan(step, x, steps)[0]

  chains = jax.lax.map(chain, jax.random.split(chain_key, width))
  weights = jax.random.dirichlet(weight_key, jnp.ones(width))
  return mix(x, chains, weights, jax.random.uniform(mix_key))


def mix(
  image: Float[Array, " ..."],
  chains: Float[Array, "W ..."],
  weights: Float[Array, " W"],
  share: Float[Array, ""],
) -> Float[Array, " ..."]:
  """(1 - m) image + m sum_i w_i chain_i: image (...), chains (W, ...), weights (W,), m ()."""
  shapes.check(weights=(weights, "W"))
  shapes.check_leading(weights.shape[0], chains=chains)
  return (1 - share) * image + share * jnp.tensordot(weights, chains, 1)


def normalise(
  image: Num[Array, "... c"], mean: Num[Array, " c"], std: Num[Array, " c"]
) -> Float[Array, "... c"]:
  """(image / 255 - mean) / std per channel.

  >>> jm.images.normalise(jnp.full((1, 1, 1), 255), jnp.array([0.5]), jnp.array([0.5])).item()
  1.0
  """
  shapes.check(image=(image, "... c"), mean=(mean, "c"), std=(std, "c"))
  return (image / 255 - mean) / std
