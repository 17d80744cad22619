"""Views: range and determinism, what each may and may not change."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmethods.images import views
from jaxmethods.images.colour import from_hsv, shift_hue, to_hsv

SIDE = 16
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
KEYS = jax.random.split(jax.random.key(0), 256)


def many(view):
  program = jax.jit(jax.vmap(view, (0, None)))
  return lambda image: np.asarray(program(KEYS, image))


@pytest.mark.parametrize("name", ["crop_and_flip", "public_view", "weak_view"])
def test_range_and_draws(name):
  view = many(getattr(views, name))
  made = view(IMAGE)
  assert made.shape == (256, SIDE, SIDE, 3) and made.dtype == np.float32
  assert made.min() >= 0 and made.max() <= 255
  np.testing.assert_array_equal(made, np.floor(made))
  assert (made[0] != made[1]).any()
  np.testing.assert_array_equal(made, view(IMAGE))
  if name == "weak_view":
    # A fifth without colour; a grey image stays grey whatever the jitter.
    without = (made == made[..., :1]).all((1, 2, 3)).mean()
    assert 0.12 < without < 0.28
    grey = view(np.repeat(IMAGE[..., :1], 3, -1))
    np.testing.assert_array_equal(grey, np.repeat(grey[..., :1], 3, -1))


def test_crops_are_windows():
  """Every view is one of the 81 windows of the padded image or its mirror, and all occur evenly."""
  padded = np.pad(IMAGE, ((4, 4), (4, 4), (0, 0)), "reflect")
  windows = {}
  for row in range(9):
    for column in range(9):
      window = padded[row : row + SIDE, column : column + SIDE]
      for mirrored in (False, True):
        exact = np.ascontiguousarray(window[:, ::-1] if mirrored else window)
        windows[exact.tobytes()] = row, column, mirrored
  made = many(views.crop_and_flip)(IMAGE).astype(np.uint8)
  found = np.array([windows[view.tobytes()] for view in made])
  np.testing.assert_allclose(found.mean(0), [4, 4, 0.5], atol=0.6)


@pytest.mark.parametrize(("start", "extent"), [((0, 0), (16, 16)), ((2, 3), (9, 12))])
@pytest.mark.parametrize("side", [8, 16])
def test_resize_is_pillows(start, extent, side):
  """The matrices give what Pillow's bilinear resize of the cropped image gives."""
  rows, columns = (views._resize(s, e, SIDE, side) for s, e in zip(start, extent, strict=True))
  made = np.einsum("ij,jkc,lk->ilc", rows, IMAGE, columns)
  (top, left), (height, width) = start, extent
  crop = Image.fromarray(IMAGE[top : top + height, left : left + width])
  expected = np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR), float)
  assert np.abs(made - expected).max() <= 1


def test_hue():
  """Equal to the standard library's conversion; there and back; a full turn changes nothing."""
  x = jnp.asarray(IMAGE / 255, jnp.float32)
  np.testing.assert_allclose(from_hsv(*to_hsv(x)), x, atol=1e-6)
  np.testing.assert_allclose(shift_hue(x, 1.0), x, atol=1e-5)

  def turned(pixel):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value)

  expected = np.apply_along_axis(turned, -1, np.asarray(x, float))
  np.testing.assert_allclose(shift_hue(x, 0.3), expected, atol=1e-5)
