"""Backdoor triggers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft

from jaxmethods.images import triggers

SIZE = (40, 64, 3)


@pytest.fixture(scope="module")
def image():
  return jnp.asarray(np.random.default_rng(0).integers(60, 200, SIZE), jnp.uint8)


def changed(image, triggered):
  assert triggered.dtype == jnp.uint8
  return np.asarray(image != triggered).any(-1)


def test_the_corner(image):
  where = changed(image, triggers.in_corner(image, 12, cell=3))
  assert where[-12:, -12:].all()
  assert where.sum() == 144
  cells = np.asarray(triggers.in_corner(image, 12, cell=3))[-12:, -12:, 0].reshape(4, 3, 4, 3)
  assert (cells == cells[:, :1, :, :1]).all()
  np.testing.assert_array_equal(cells[:2, 0, :2, 0], [[0, 255], [255, 0]])


def test_random_places_lie_inside_and_reach_every_edge(image):
  place = lambda key: triggers.at_random(key, image, 8)
  made = jax.jit(jax.vmap(place))(jax.random.split(jax.random.key(0), 600))
  where = np.asarray(made == 0).all(-1)
  assert (where.sum((1, 2)) == 64).all()
  assert where.any((0, 2)).all()
  assert where.any((0, 1)).all()


def test_several_squares(image):
  make = lambda key: triggers.several(key, image, 2)
  made = jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(0), 100))
  counts = np.asarray(made == 0).all(-1).sum((1, 2)) / 4
  assert set(counts.tolist()) == {1, 2, 3}


def test_blend(image):
  pattern = jnp.full(SIZE, 255)
  np.testing.assert_array_equal(triggers.blend(image, pattern, 0.0), image)
  np.testing.assert_array_equal(triggers.blend(image, pattern, 1.0), pattern)
  expected = np.round(0.8 * np.asarray(image, np.float64) + 51)
  np.testing.assert_allclose(triggers.blend(image, pattern), expected, atol=1)


def test_sinusoid(image):
  shift = np.asarray(triggers.sinusoid(image), int) - np.asarray(image, int)
  assert (shift == shift[:1, :, :1]).all()
  spectrum = np.abs(np.fft.rfft(shift[0, :, 0]))
  assert spectrum.argmax() == 6
  np.testing.assert_allclose(shift.max(), 20, atol=1)


def test_warp(image):
  control = jax.random.uniform(jax.random.key(0), (4, 4, 2), minval=-1)
  np.testing.assert_array_equal(triggers.warp(image, control, 0.0), image)
  smooth = jnp.broadcast_to(4 * jnp.arange(40)[:, None, None], SIZE).astype(jnp.uint8)
  shift = np.asarray(triggers.warp(smooth, control), int) - np.asarray(smooth, int)
  assert 0 < np.abs(shift).mean() < 3  # a fraction of a pixel is a fraction of 4 levels
  assert np.abs(shift).max() <= 8


def test_frequencies(image):
  shift = np.asarray(triggers.frequencies(image), float) - np.asarray(image, float)
  assert (shift[32:] == 0).all()  # no whole block there
  np.testing.assert_allclose(shift[:32, :32], shift[:32, 32:], atol=1)
  chroma = shift[:32, :32] @ np.array([-0.14713, -0.28886, 0.436])
  coefficients = fft.dctn(chroma, norm="ortho")
  np.testing.assert_allclose(coefficients[[15, 31], [15, 31]], 30, atol=1.5)
  coefficients[[15, 31], [15, 31]] = 0
  assert np.abs(coefficients).max() < 3  # of rounding
  luma = shift[:32, :32] @ np.array([0.299, 0.587, 0.114])
  assert np.abs(fft.dctn(luma, norm="ortho")).max() < 3
  with pytest.raises(ValueError, match="block"):
    triggers.frequencies(jnp.zeros((16, 64, 3), jnp.uint8))
