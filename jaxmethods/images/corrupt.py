"""The common corruptions of CIFAR-10-C, one image at a time, their random inputs given or drawn.

Hendrycks & Dietterich 2019, "Benchmarking neural network robustness to common corruptions and
perturbations", with the constants for small images that RAHFL uses (code). Every corruption takes a
square RGB image, (side, side, 3) with whole values 0..255, a severity 1..5 that may be traced, and its
random inputs; it gives uint8, truncated. What is linear along an axis (blur, zoom) is a (side, side)
matrix made once on the host, one per severity. JPEG needs a host codec: `jaxmethods.data.corruptions`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Num, UInt8
from scipy import ndimage

from jaxmethods.images.augment import along_axes, bilinear, correlate
from jaxmethods.images.colour import from_hsv, to_hsv
from jaxmethods.stats import shapes

Square: TypeAlias = Num[Array, "side side 3"]  # whole values 0..255
Corrupted: TypeAlias = UInt8[Array, "side side 3"]
Severity: TypeAlias = Int[Array, ""] | int  # 1..5

# Five entries each, for the severities 1 to 5.
_GAUSSIAN = (0.04, 0.06, 0.08, 0.09, 0.10)
_SPECKLE = (0.06, 0.1, 0.12, 0.16, 0.2)
_SHOT = (500, 250, 100, 75, 50)
_IMPULSE = (0.01, 0.02, 0.03, 0.05, 0.07)
_DEFOCUS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))  # radius, sigma
_BLUR = (0.4, 0.6, 0.7, 0.8, 1)
_GLASS_SIGMA = (0.05, 0.25, 0.4, 0.25, 0.4)
_GLASS_ROUNDS = (1, 1, 1, 2, 2)
_MOTION = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))  # radius, sigma
_ZOOM_COUNT = (7, 12, 16, 21, 26)
_SNOW_ZOOM = (1, 1, 1.75, 2.25, 1.25)
_SNOW = (  # location, scale, threshold, radius, sigma, share of the image
  (0.1, 0.2, 0.6, 8, 3, 0.95),
  (0.1, 0.2, 0.5, 10, 4, 0.9),
  (0.15, 0.3, 0.55, 10, 4, 0.9),
  (0.25, 0.3, 0.6, 12, 6, 0.85),
  (0.3, 0.3, 0.65, 14, 12, 0.8),
)
_FROST = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))  # image, texture
_FOG = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))  # amount, decay of the roughness
_BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_SATURATE = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))  # factor, offset
_ELASTIC_SIGMA = (0, 0.2, 0.06, 0.04, 0.03)  # this and the next in sides of the image
_ELASTIC = ((0, 0.08), (0.05, 0.07), (0.08, 0.06), (0.1, 0.05), (0.1, 0.03))  # shift, affine
_PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)

_GREY = (0.299, 0.587, 0.114)


class FrostTextures(NamedTuple):
  """Pictures of frost, padded to one size."""

  pixels: Num[Array, "T height width 3"]  # 0..255
  sizes: Int[Array, "T 2"]  # height and width without the padding


# --- noise --------------------------------------------------------------------------------------


def gaussian_noise(
  image: Square, severity: Severity, normal: Float[Array, "side side 3"]
) -> Corrupted:
  """Adds s z; `normal`: z, the shape of `image`."""
  shapes.check(image=(image, "side side 3"), normal=(normal, "side side 3"))
  return _levels(_unit(image) + _at(_GAUSSIAN, severity) * normal)


def speckle_noise(
  image: Square, severity: Severity, normal: Float[Array, "side side 3"]
) -> Corrupted:
  """Adds s x z; `normal`: z, the shape of `image`. Not among the fifteen."""
  shapes.check(image=(image, "side side 3"), normal=(normal, "side side 3"))
  x = _unit(image)
  return _levels(x + x * _at(_SPECKLE, severity) * normal)


def shot_noise(image: Square, severity: Severity, counts: Num[Array, "side side 3"]) -> Corrupted:
  """Photons counted; `counts`: Poisson(c x), the shape of `image`, which they stand for."""
  shapes.check(image=(image, "side side 3"), counts=(counts, "side side 3"))
  return _levels(counts / _at(_SHOT, severity))


def impulse_noise(
  image: Square,
  severity: Severity,
  hit: Bool[Array, "side side 3"],
  salt: Bool[Array, "side side 3"],
) -> Corrupted:
  """Values turn black or white.

  Args:
    image: (side, side, 3).
    severity: 1..5.
    hit: uniform (0, 1), the shape of `image`: below p the value is replaced,
    salt: uniform (0, 1): by 1 if at most one half, else by 0.
  """
  shapes.check(image=(image, "side side 3"), hit=(hit, "side side 3"), salt=(salt, "side side 3"))
  return _levels(jnp.where(hit <= _at(_IMPULSE, severity), salt <= 0.5, _unit(image)))


# --- blur ---------------------------------------------------------------------------------------


def defocus_blur(image: Square, severity: Severity) -> Corrupted:
  """A disc, softened; the border is mirrored without repeating the edge."""
  shapes.check(image=(image, "side side 3"))
  kernel = _at(_discs(), severity)
  reach = kernel.shape[0] // 2
  padded = jnp.pad(_unit(image), ((reach, reach), (reach, reach), (0, 0)), "reflect")
  return _levels(correlate(padded, kernel))


def gaussian_blur(image: Square, severity: Severity) -> Corrupted:
  """Gaussian blur with the edge continued. Not among the fifteen."""
  shapes.check(image=(image, "side side 3"))
  return _levels(_both_axes(_at(_blurs(image.shape[0], _BLUR), severity), _unit(image)))


def glass_blur(
  image: Square, severity: Severity, offsets: Num[Array, "2 inner inner 2"]
) -> Corrupted:
  """Blur, pixels displaced by one, blur again.

  The published loop means to swap neighbours but copies, from pixels that it has not visited yet:
  one gather of the image as it was.

  Args:
    image: (side, side, 3).
    severity: 1..5.
    offsets: (2, side - 2, side - 2, 2) in {-1, 0}: dx and dy of the pixels from row and column 2 on, in
      both rounds; some severities have one round.
  """
  shapes.check(image=(image, "side side 3"), offsets=(offsets, "2 inner inner 2"))
  side = image.shape[0]
  x = _glass_pass(image, severity)
  place = jnp.arange(2, side)
  for i, (dx, dy) in enumerate(jnp.moveaxis(offsets.astype(jnp.int32), -1, 1)):
    moved = x.at[2:, 2:].set(x[place[:, None] + dy, place + dx])
    x = jnp.where(i < _at(_GLASS_ROUNDS, severity), moved, x)
  return _glass_pass(x, severity).astype(jnp.uint8)


def _glass_pass(image: Square, severity: Severity) -> Array:
  """Gaussian blur, truncated to whole levels as the published code does in float64, (h, w, c) int32.

  Two truncations follow each other: a hair at a whole level would count twice. So only the change of a
  pixel is computed, exactly zero where its neighbours equal it; there the level is looked up.
  """
  x = image.astype(jnp.float32)
  weights, flat = _glass_tables()
  weight = _at(weights, severity)
  reach = len(weight)

  def change(x: Array, axis: int) -> Array:
    """Blurred minus x, along an axis."""
    size = x.shape[axis]
    margin = [(reach, reach) if i == axis else (0, 0) for i in range(x.ndim)]
    padded = jnp.pad(x, margin, "edge")
    part = lambda k: jax.lax.slice_in_dim(padded, reach + k, reach + k + size, axis=axis) - x
    near = jnp.stack([part(k) + part(-k) for k in range(1, reach + 1)])
    return jnp.tensordot(weight, near, 1, precision="highest")

  rows = change(x, 0)
  total = rows + change(x, 1) + change(rows, 1)
  levels = image.astype(jnp.int32)
  kept = jnp.asarray(flat)[severity - 1, levels]
  return jnp.where(total == 0, kept, levels + jnp.floor(total).astype(jnp.int32))


@functools.cache
def _glass_tables() -> tuple[np.ndarray, np.ndarray]:
  """By severity: weights at distances 1, 2, .. (5, reach); levels of flat images (5, 256)."""
  reach = max(int(4 * sigma + 0.5) for sigma in _GLASS_SIGMA)
  weights, levels = [], []
  for sigma in _GLASS_SIGMA:
    point = np.zeros(2 * reach + 1)
    point[reach] = 1
    weights.append(ndimage.gaussian_filter(point, sigma, mode="nearest")[reach + 1 :])
    values = np.repeat(np.arange(256) / 255, 9).reshape(256, 3, 3)
    blurred = ndimage.gaussian_filter(values, (0, sigma, sigma), mode="nearest")
    levels.append((np.clip(blurred[:, 1, 1], 0, 1) * 255).astype(np.int32))
  return np.stack(weights), np.stack(levels)


def motion_blur(image: Square, severity: Severity, angle: Float[Array, ""]) -> Corrupted:
  """The image drawn out in one direction; `angle`: () degrees, in -45..45."""
  shapes.check(image=(image, "side side 3"))
  radius, sigma = _at(_MOTION, severity)
  return _levels(_draw_out(_unit(image), radius, sigma, angle, longest=9))


def zoom_blur(image: Square, severity: Severity) -> Corrupted:
  """Mean of the image and of its centre enlarged by 1, 1.01, 1.02, ..."""
  shapes.check(image=(image, "side side 3"))
  x, most = _unit(image), max(_ZOOM_COUNT)
  count = _at(_ZOOM_COUNT, severity)
  # A step of 1.01 - 1, not 0.01: the size of the last zoom, 32.5, is rounded up (code).
  zooms = _zooms(image.shape[0], tuple(1 + (1.01 - 1) * i for i in range(most)))
  zoomed = jax.vmap(_both_axes, (0, None))(jnp.asarray(zooms, jnp.float32), x)
  used = (jnp.arange(most) < count)[:, None, None, None]
  return _levels((x + jnp.where(used, zoomed, 0).sum(0)) / (count + 1))


# --- weather ------------------------------------------------------------------------------------


def snow(
  image: Square, severity: Severity, normal: Float[Array, "side side"], angle: Float[Array, ""]
) -> Corrupted:
  """Flakes in motion over a whitened image.

  Args:
    image: (side, side, 3).
    severity: 1..5.
    normal: standard normal (side, side).
    angle: () degrees, in -135..-45.
  """
  shapes.check(image=(image, "side side 3"), normal=(normal, "side side"))
  location, scale, threshold, radius, sigma, share = _at(_SNOW, severity)
  zoom = _at(_zooms(image.shape[0], _SNOW_ZOOM), severity)
  layer = _both_axes(zoom, location + scale * normal)
  layer = _unit(_levels(jnp.where(layer < threshold, 0, layer)))
  layer = _unit(_levels(_draw_out(layer, radius, sigma, angle, longest=14)))[..., None]
  x = _unit(image)
  grey = (x * jnp.array(_GREY)).sum(-1, keepdims=True)
  whitened = share * x + (1 - share) * jnp.maximum(x, 1.5 * grey + 0.5)
  return _levels(whitened + layer + layer[::-1, ::-1])


def frost(image: Square, severity: Severity, texture: Num[Array, "side side 3"]) -> Corrupted:
  """A texture laid over the image; `texture`: 0..255, the shape of `image`."""
  shapes.check(image=(image, "side side 3"), texture=(texture, "side side 3"))
  share, amount = _at(_FROST, severity)
  return _levels(share * _unit(image) + amount * _unit(texture))


def fog(image: Square, severity: Severity, mist: Float[Array, "side side"]) -> Corrupted:
  """Mist added, brightest value kept; `mist`: (side, side) in 0..1, see `plasma`."""
  shapes.check(image=(image, "side side 3"), mist=(mist, "side side"))
  x = _unit(image)
  amount, _ = _at(_FOG, severity)
  return _levels((x + amount * mist[..., None]) * x.max() / (x.max() + amount))


def plasma(
  uniform: Float[Array, " n"], decay: Float[Array, ""] | float
) -> Float[Array, "side side"]:
  """Fractal height map on a torus, by diamonds and squares (Fournier, Fussell & Carpenter 1982).

  Every level halves the mesh: first the centres of the squares, then the middles of the horizontal, then
  of the vertical edges, each the mean of its four neighbours plus noise. The noise is uniform in
  +-roughness^2, the square being the published code's; roughness starts at 100.

  Args:
    uniform: (side^2 - 1,) in (-1, 1), in that order; side is a power of two.
    decay: divides the roughness after every level.

  Returns:
    (side, side) in 0..1.
  """
  shapes.check(uniform=(uniform, "n"))
  side = math.isqrt(len(uniform) + 1)
  if side**2 != len(uniform) + 1 or side & (side - 1):
    raise ValueError(f"expected 4^n - 1 draws, got {len(uniform)}")
  heights, used = jnp.zeros((1, 1), uniform.dtype), 0
  roughness = jnp.asarray(100.0, uniform.dtype)
  while (size := len(heights)) < side:
    noise = uniform[used : used + 3 * size**2].reshape(3, size, size) * roughness**2
    pairs = heights + jnp.roll(heights, -1, 0)
    centres = (pairs + jnp.roll(pairs, -1, 1)) / 4 + noise[0]
    neighbours = heights + jnp.roll(heights, -1, 1) + centres + jnp.roll(centres, 1, 0)
    horizontal = neighbours / 4 + noise[1]
    neighbours = pairs + centres + jnp.roll(centres, 1, 1)
    vertical = neighbours / 4 + noise[2]
    mesh = jnp.stack([jnp.stack([heights, horizontal], -1), jnp.stack([vertical, centres], -1)], 1)
    heights, used, roughness = mesh.reshape(2 * size, -1), used + 3 * size**2, roughness / decay
  return (heights - heights.min()) / (heights.max() - heights.min())


# --- colour -------------------------------------------------------------------------------------


def brightness(image: Square, severity: Severity) -> Corrupted:
  """Adds to the value of HSV."""
  shapes.check(image=(image, "side side 3"))
  hue, saturation, value = to_hsv(_unit(image))
  value = jnp.clip(value + _at(_BRIGHTNESS, severity), 0, 1)
  return _levels(from_hsv(hue, saturation, value))


def contrast(image: Square, severity: Severity) -> Corrupted:
  """Draws every channel towards its mean."""
  shapes.check(image=(image, "side side 3"))
  x = _unit(image)
  mean = x.mean((0, 1))
  return _levels((x - mean) * _at(_CONTRAST, severity) + mean)


def saturate(image: Square, severity: Severity) -> Corrupted:
  """Scales and lifts the saturation of HSV. Not among the fifteen."""
  shapes.check(image=(image, "side side 3"))
  hue, saturation, value = to_hsv(_unit(image))
  factor, offset = _at(_SATURATE, severity)
  return _levels(from_hsv(hue, jnp.clip(saturation * factor + offset, 0, 1), value))


# --- geometry -----------------------------------------------------------------------------------


def elastic_transform(
  image: Square,
  severity: Severity,
  points: Float[Array, "3 2"],
  dx: Float[Array, "side side"],
  dy: Float[Array, "side side"],
) -> Corrupted:
  """A random affine map, then a smooth random displacement.

  Args:
    image: (side, side, 3).
    severity: 1..5.
    points: uniform (-1, 1), (3, 2): by how much of the range three corners of the central square, x and
      y, are moved.
    dx: uniform (-1, 1), (side, side): smoothed, the displacement.
    dy: as dx.
  """
  shapes.check(
    image=(image, "side side 3"), points=(points, "3 2"), dx=(dx, "side side"), dy=(dy, "side side")
  )
  side = image.shape[0]
  reach, spread = side * _at(_ELASTIC, severity)
  low, high = side // 2 - side // 3, side // 2 + side // 3
  corners = jnp.array([[high, high], [high, low], [low, low]], jnp.float32)
  moved = jnp.concatenate([corners + spread * points, jnp.ones((3, 1))], 1)
  back = jnp.linalg.solve(moved, corners)
  y, x = jnp.meshgrid(*2 * [jnp.arange(side, dtype=jnp.float32)], indexing="ij")
  source_x, source_y = (x * a + y * b + c for a, b, c in back.T)
  warped = bilinear(_unit(image), _fold(source_y, 0, side - 1), _fold(source_x, 0, side - 1))
  sigmas = tuple(side * sigma for sigma in _ELASTIC_SIGMA)
  blur = _at(_blurs(side, sigmas, truncate=3.0, mode="reflect"), severity)
  x, y = x + reach * _both_axes(blur, dx), y + reach * _both_axes(blur, dy)
  return _levels(bilinear(warped, _fold(y, -0.5, side - 0.5), _fold(x, -0.5, side - 0.5)))


def pixelate(image: Square, severity: Severity) -> Corrupted:
  """Fewer pixels, enlarged again; whole levels after every axis."""
  shapes.check(image=(image, "side side 3"))
  smaller, larger = (_at(table, severity) for table in _boxes(image.shape[0]))
  x = image.astype(jnp.float32)
  for operator in (smaller, larger):
    for axis in (1, 0):
      made = jnp.tensordot(operator, x, (1, axis), precision="highest")
      x = jnp.floor(jnp.moveaxis(made, 0, axis) + 0.5)
  return x.astype(jnp.uint8)


# --- random inputs ------------------------------------------------------------------------------

# In the order of CIFAR-10-C, without its last, jpeg_compression; then those outside the fifteen.
FUNCTIONS: dict[str, Callable[..., Array]] = {
  "gaussian_noise": gaussian_noise,
  "shot_noise": shot_noise,
  "impulse_noise": impulse_noise,
  "defocus_blur": defocus_blur,
  "glass_blur": glass_blur,
  "motion_blur": motion_blur,
  "zoom_blur": zoom_blur,
  "snow": snow,
  "frost": frost,
  "fog": fog,
  "brightness": brightness,
  "contrast": contrast,
  "elastic_transform": elastic_transform,
  "pixelate": pixelate,
  "speckle_noise": speckle_noise,
  "gaussian_blur": gaussian_blur,
  "saturate": saturate,
}


def corrupt(
  key: Array,
  kind: str,
  image: Square,
  severity: Severity,
  textures: FrostTextures | None = None,
) -> Corrupted:
  """One image, corrupted with random inputs of its own.

  Args:
    key: random key.
    kind: one of `FUNCTIONS`.
    image: (side, side, 3), whole values 0..255.
    severity: () int, 1..5.
    textures: for "frost" alone.

  Returns:
    uint8, the shape of `image`.
  """
  shapes.check(image=(image, "side side 3"))
  return FUNCTIONS[kind](image, severity, *draw(key, kind, image, severity, textures))


def draw(
  key: Array,
  kind: str,
  image: Square,
  severity: Severity,
  textures: FrostTextures | None = None,
) -> tuple[Array, ...]:
  """The random inputs of a corruption, in the order in which its function takes them.

  Args:
    key: random key.
    kind: one of `FUNCTIONS`.
    image: (side, side, 3), whole values 0..255.
    severity: () int, 1..5.
    textures: for "frost" alone; they must be larger than the image.

  Raises:
    ValueError: for another kind, or frost without textures.
  """
  if kind not in FUNCTIONS:
    raise ValueError(f"kind must be one of {', '.join(FUNCTIONS)}, got {kind!r}")
  if kind == "frost" and textures is None:
    raise ValueError("frost needs textures")
  side = image.shape[0]
  uniform = functools.partial(jax.random.uniform, key)
  # One call of the generator for each kind if it can be: compiling it is most of the compile time.
  match kind:
    case "gaussian_noise" | "speckle_noise":
      return (jax.random.normal(key, image.shape),)
    case "shot_noise":
      return (jax.random.poisson(key, _at(_SHOT, severity) * _unit(image)),)
    case "impulse_noise":
      return tuple(uniform((2, *image.shape)))
    case "glass_blur":
      return (-jnp.round(uniform((2, side - 2, side - 2, 2))).astype(jnp.int32),)
    case "motion_blur":
      return (uniform(minval=-45.0, maxval=45.0),)
    case "snow":
      flakes, turn = jax.random.split(key)
      angle = jax.random.uniform(turn, minval=-135.0, maxval=-45.0)
      return jax.random.normal(flakes, (side, side)), angle
    case "frost":
      assert textures is not None
      which, row, column = uniform((3,))
      index = jnp.floor(which * len(textures.sizes)).astype(jnp.int32)
      free = textures.sizes[index] - side
      row, column = jnp.floor(jnp.stack([row, column]) * free).astype(jnp.int32)
      patch = jax.lax.dynamic_slice(
        textures.pixels, (index, row, column, 0), (1, *image.shape)
      )  # fmt: skip
      return (patch[0],)
    case "fog":
      _, decay = _at(_FOG, severity)
      size = 1 << (side - 1).bit_length()
      return (plasma(uniform((size**2 - 1,), minval=-1.0), decay)[:side, :side],)
    case "elastic_transform":
      flat = uniform((6 + 2 * side**2,), minval=-1.0)
      return flat[:6].reshape(3, 2), *flat[6:].reshape(2, side, side)
  return ()


# --- helpers ------------------------------------------------------------------------------------


def _at(table: Sequence | np.ndarray, severity: Severity) -> Array:
  return jnp.asarray(table, jnp.float32)[severity - 1]


def _unit(image: Square) -> Array:
  return image.astype(jnp.float32) / 255


def _levels(x: Array) -> Array:
  """0..1 to uint8, truncated; a whole level that float32 puts a hair too low stays."""
  return jnp.floor(255 * jnp.clip(x, 0, 1) + 1e-3).astype(jnp.uint8)


def _both_axes(operator: Array, x: Array) -> Array:
  """Applies (side, side) to the rows and the columns of (side, side, ...)."""
  return along_axes(operator, operator, x)


def _fold(position: Array, low: float, high: float) -> Array:
  """Mirrors positions at both ends until they lie between them."""
  span = high - low
  return high - jnp.abs(jnp.mod(position - low, 2 * span) - span)


def _draw_out(
  x: Array, radius: Array, sigma: Array, angle: Float[Array, ""], *, longest: int
) -> Array:
  """Weighted sum of the image shifted along a direction, edges continued.

  Args:
    x: (side, side, ...).
    radius: 2 radius + 1 shifts by 0, 1, 2, ...
    sigma: weights fall as exp(-shift^2 / (2 sigma^2)).
    angle: direction in degrees.
    longest: largest radius possible.
  """
  step, pixel = jnp.arange(2 * longest + 1), jnp.arange(x.shape[0])
  weight = jnp.where(step <= 2 * radius, jnp.exp(-(step**2) / (2 * sigma**2)), 0)
  turn = jnp.deg2rad(angle)
  dx, dy = (-jnp.ceil(step * part - 0.5) for part in (jnp.cos(turn), jnp.sin(turn)))
  rows, columns = (
    jnp.clip(pixel - shift[:, None], 0, len(pixel) - 1).astype(jnp.int32) for shift in (dy, dx)
  )
  shifted = x[rows[:, :, None], columns[:, None, :]]
  return jnp.tensordot(weight / weight.sum(), shifted, 1, precision="highest")


@functools.cache
def _discs() -> np.ndarray:
  """Kernels of `defocus_blur`, (5, 5, 5)."""
  y, x = np.mgrid[-2:3, -2:3]
  kernels = []
  for radius, sigma in _DEFOCUS:
    disc = (x**2 + y**2 <= radius**2).astype(float)
    soft = np.exp(-(np.arange(-1, 2) ** 2) / (2 * sigma**2))
    soft /= soft.sum()
    kernels.append(ndimage.convolve(disc / disc.sum(), np.outer(soft, soft), mode="constant"))
  return np.stack(kernels)


@functools.cache
def _blurs(
  side: int, sigmas: tuple[float, ...], truncate: float = 4.0, mode: str = "nearest"
) -> np.ndarray:
  """Gaussian blur along an axis as matrices, (len(sigmas), side, side)."""
  options = {"truncate": truncate, "mode": mode}
  return np.stack([ndimage.gaussian_filter(np.eye(side), (s, 0), **options) for s in sigmas])


@functools.cache
def _zooms(side: int, factors: tuple[float, ...]) -> np.ndarray:
  """The centre of an axis enlarged to its length as matrices, (len(factors), side, side)."""
  operators = np.zeros((len(factors), side, side))
  for operator, factor in zip(operators, factors, strict=True):
    kept = math.ceil(side / factor)
    start = (side - kept) // 2
    enlarged = ndimage.zoom(np.eye(kept), (factor, 1), order=1)
    trim = (len(enlarged) - side) // 2
    operator[:, start : start + kept] = enlarged[trim : trim + side]
  return operators


@functools.cache
def _boxes(side: int) -> tuple[np.ndarray, np.ndarray]:
  """Matrices of `pixelate`, there and back, each (5, side, side); rows and columns not used are 0."""

  def box(size: int, out: int) -> np.ndarray:
    ratio = size / out
    distance = np.arange(size) + 0.5 - (np.arange(out)[:, None] + 0.5) * ratio
    inside = (distance / max(ratio, 1) > -0.5) & (distance / max(ratio, 1) <= 0.5)
    operator = np.zeros((side, side))
    operator[:out, :size] = inside / inside.sum(1, keepdims=True)
    return operator

  sizes = [int(side * share) for share in _PIXELATE]
  return np.stack([box(side, n) for n in sizes]), np.stack([box(n, side) for n in sizes])
