"""Enhancements of 8-bit images against the host library, all cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxmethods.images import augment


def test_autocontrast_of_every_pair_of_levels():
  """A channel of each (low, high) with all levels between them."""
  stretch = jax.jit(augment.autocontrast)
  low, high = np.triu_indices(256)
  levels = np.clip(np.arange(256), low[:, None], high[:, None]).astype(np.uint8)  # (pairs, 256)
  for rows in np.array_split(levels, 8):
    expected = [np.asarray(ImageOps.autocontrast(Image.fromarray(row[None]))) for row in rows]
    made = jax.lax.map(lambda row: stretch(row[None, :, None]), jnp.asarray(rows), batch_size=256)
    np.testing.assert_array_equal(made[..., 0], np.stack(expected))


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (32, 31)])
def test_autocontrast_of_colour(shape):
  image = np.random.default_rng(0).integers(30, 99, (*shape, 3)).astype(np.uint8)
  expected = ImageOps.autocontrast(Image.fromarray(image))
  np.testing.assert_array_equal(augment.autocontrast(image), np.asarray(expected))
