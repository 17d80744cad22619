"""Properties of the corruptions: ranges, determinism, severity, what must stay as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmethods.images import corrupt

SIDE = 32
SEVERITIES = jnp.arange(1, 6)
# What takes no random input.
FIXED = {
  "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "gaussian_blur", "saturate",
}  # fmt: skip


def cloud(key):
  """A coloured image with the spectrum of a natural one: a fractal in every channel."""
  draws = jax.random.uniform(key, (3, SIDE**2 - 1), minval=-1.0)
  heights = jax.vmap(corrupt.plasma, (0, None))(draws, 2.0)
  return jnp.round(255 * jnp.moveaxis(heights, 0, -1)).astype(jnp.uint8)


@pytest.fixture(scope="module")
def images():
  return jax.jit(jax.vmap(cloud))(jax.random.split(jax.random.key(0), 8))


@pytest.fixture(scope="module")
def textures():
  """Two pictures of noise; the padding of the smaller one is black."""
  pixels = np.random.default_rng(0).integers(100, 256, (2, 50, 60, 3), np.uint8)
  pixels[1, 40:], pixels[1, :, 35:] = 0, 0
  return corrupt.FrostTextures(jnp.asarray(pixels), jnp.array([[50, 60], [40, 35]]))


@pytest.fixture(scope="module")
def run(textures):
  """Corrupts (N,) images at (5,) severities, a key each: one program a kind."""

  def make(kind):
    one = lambda key, image, s: corrupt.corrupt(key, kind, image, s, textures)
    each = jax.vmap(jax.vmap(one, (None, None, 0)))
    return jax.jit(lambda keys, images: each(keys, images, jnp.tile(SEVERITIES, (len(keys), 1))))

  programs = {kind: make(kind) for kind in corrupt.FUNCTIONS}
  return lambda kind, seed, images: np.asarray(
    programs[kind](jax.random.split(jax.random.key(seed), len(images)), images)
  )


@pytest.fixture(scope="module")
def corrupted(run, images):
  return {kind: run(kind, 1, images) for kind in corrupt.FUNCTIONS}


@pytest.mark.parametrize("kind", corrupt.FUNCTIONS)
def test_draws(run, images, corrupted, kind):
  """Shape and type stay; the same key gives the same image, another one another image."""
  made = corrupted[kind]
  assert made.shape == (8, 5, SIDE, SIDE, 3) and made.dtype == np.uint8
  np.testing.assert_array_equal(run(kind, 1, images), made)
  assert (run(kind, 2, images) == made).all() == (kind in FIXED)


def test_severity(images, corrupted):
  """Severer is farther from the image: 5 than 1 for each kind, every step for the mean of all."""
  clean = np.asarray(images, float)[:, None]
  distance = {
    kind: np.sqrt(((made - clean) ** 2).mean((0, 2, 3, 4))) for kind, made in corrupted.items()
  }
  # Not ordered as published: less colour, then more; a smaller affine map, but more displacement.
  del distance["saturate"], distance["elastic_transform"]
  for kind, by_severity in distance.items():
    assert by_severity[4] > by_severity[0], kind
  assert (np.diff(np.mean(list(distance.values()), axis=0)) > 0).all()


@pytest.mark.parametrize(
  "kind", ["defocus_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform",
           "pixelate", "gaussian_blur"],
)  # fmt: skip
def test_flat_images_stay(run, kind):
  levels = jnp.array([0, 1, 51, 127, 128, 200, 254, 255], jnp.uint8)
  flat = jnp.broadcast_to(levels[:, None, None, None], (8, SIDE, SIDE, 3))
  made = run(kind, 3, flat)
  np.testing.assert_array_equal(made, np.broadcast_to(np.asarray(flat)[:, None], made.shape))


def test_glass_is_the_published_loop(images):
  """The gather equals the loop that visits the pixels from the last one back and copies."""
  image = np.asarray(images[0])
  offsets = np.random.default_rng(0).integers(-1, 1, (2, SIDE - 2, SIDE - 2, 2))
  # At severity 1 the blur is none, and there is one round.
  expected = image.copy()
  for row in range(SIDE - 1, 1, -1):
    for column in range(SIDE - 1, 1, -1):
      dx, dy = offsets[0, row - 2, column - 2]
      expected[row, column] = expected[row + dy, column + dx]
  np.testing.assert_array_equal(corrupt.glass_blur(image, 1, jnp.asarray(offsets)), expected)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("side", [15, 32])
def test_glass_blur_in_float64(side, severity):
  """Both truncations are those of the published float64, in flat regions too."""
  random = np.random.default_rng(severity)
  image = random.integers(0, 256, (side, side, 3)).astype(np.uint8)
  image[: side // 2] = image[:1, :1]
  offsets = random.integers(-1, 1, (2, side - 2, side - 2, 2))
  sigma, rounds = [(0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)][severity - 1]
  blurred = lambda x: ndimage.gaussian_filter(x / 255, (sigma, sigma, 0), mode="nearest")
  expected = np.uint8(blurred(image) * 255)
  rows, columns = np.mgrid[2:side, 2:side]
  for dx, dy in np.moveaxis(offsets[:rounds], -1, 1):
    expected[2:, 2:] = expected[rows + dy, columns + dx]
  expected = np.uint8(np.clip(blurred(expected), 0, 1) * 255)
  made = np.asarray(corrupt.glass_blur(image, severity, jnp.asarray(offsets)))
  difference = np.abs(made.astype(int) - expected)
  assert difference.max() <= 1
  assert (difference > 0).mean() < 0.002


def test_frost_keeps_to_the_picture(textures, images):
  """No draw reaches into the padding."""
  keys = jax.random.split(jax.random.key(0), 200)
  draw = lambda key: corrupt.draw(key, "frost", images[0], 1, textures)[0]
  assert jax.jit(jax.vmap(draw))(keys).min() >= 100


@pytest.mark.parametrize("kind", corrupt.FUNCTIONS)
def test_other_sizes(textures, kind):
  """Sides that are no power of two keep their shape."""
  image = jax.ShapeDtypeStruct((20, 20, 3), jnp.uint8)
  one = lambda x, s: corrupt.corrupt(jax.random.key(0), kind, x, s, textures)
  made = jax.eval_shape(one, image, jax.ShapeDtypeStruct((), jnp.int32))
  assert made.shape == image.shape and made.dtype == image.dtype


def test_bad_input(images):
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="kind must be one of"):
    corrupt.draw(key, "rain", images[0], 1)
  with pytest.raises(ValueError, match="textures"):
    corrupt.draw(key, "frost", images[0], 1)
  with pytest.raises(ValueError, match="draws"):
    corrupt.plasma(jnp.zeros(100), 2.0)
  with pytest.raises(ValueError, match="image: expected shape"):
    corrupt.corrupt(key, "fog", images[0, :10], 1)
