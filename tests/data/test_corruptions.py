"""Corrupting a set of images: how many, which, and what bad input gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data import corruptions
from jaxmethods.errors import InputError
from jaxmethods.images.corrupt import FrostTextures

# One of each way: device with and without random inputs, and the host's codec.
KINDS = ("gaussian_noise", "contrast", "jpeg_compression")


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (150, 16, 16, 3), np.uint8)


def make(images, share, seed=0, **options):
  options = {"kinds": KINDS, **options}
  return corruptions.corrupt_images(jax.random.key(seed), images, share, **options)


@pytest.mark.parametrize("share", [0, 0.29, 0.5, 1])
def test_share(images, share):
  """Exactly floor(share N) are corrupted; the others, and the caller's array, are left alone."""
  images, before = images[:100], images[:100].copy()
  made = make(images, share)
  np.testing.assert_array_equal(images, before)
  assert made.images.shape == images.shape and made.images.dtype == np.uint8
  changed = (made.images != images).any((1, 2, 3))
  np.testing.assert_array_equal(changed, made.kind >= 0)
  assert changed.sum() == {0: 0, 0.29: 29, 0.5: 50, 1: 100}[share]
  np.testing.assert_array_equal(made.severity > 0, changed)


def test_draws(images):
  """All kinds and severities 1 to 4 occur; a key repeats, and a larger share only adds."""
  made, again, half, other = make(images, 1), make(images, 1), make(images, 0.5), make(images, 1, 1)
  assert set(made.kind) == {0, 1, 2} and set(made.severity) == {1, 2, 3, 4}
  np.testing.assert_array_equal(made.images, again.images)
  assert (made.kind != other.kind).any()
  chosen = half.kind >= 0
  np.testing.assert_array_equal(half.images[chosen], made.images[chosen])
  assert set(make(images, 1, severities=(5,)).severity) == {5}


def test_images_larger_than_the_textures(monkeypatch):
  textures = FrostTextures(jnp.zeros((1, 20, 30, 3), jnp.uint8), jnp.array([[20, 30]]))
  monkeypatch.setattr(corruptions, "frost_textures", lambda: textures)
  for side, fits in ((19, True), (20, False)):
    images = np.full((3, side, side, 3), 200, np.uint8)
    if fits:
      assert (make(images, 1, kinds=("frost",)).severity > 0).all()
      continue
    with pytest.raises(InputError, match="side below 20"):
      make(images, 1, kinds=("frost",))


def test_missing_textures(images, monkeypatch, tmp_path):
  monkeypatch.setenv("JAXMETHODS_DATA", str(tmp_path))
  with pytest.raises(InputError, match="leave frost out"):
    make(images, 1, kinds=("frost",))
  (tmp_path / "frost_textures").mkdir()
  (tmp_path / "frost_textures" / "frost_textures.npz").write_bytes(b"other")
  with pytest.raises(InputError, match="not the expected file"):
    make(images, 1, kinds=("frost",))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"share": 1.5}, "share"),
    ({"share": float("nan")}, "share"),
    ({"kinds": ("contast",)}, "the nearest is contrast"),
    ({"kinds": ()}, "at least one"),
    ({"severities": (0,)}, "severities"),
    ({"images": np.zeros((2, 8, 8, 1), np.uint8)}, "images"),
    ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "images"),
  ],
)
def test_bad_input(images, options, message):
  with pytest.raises(InputError, match=message):
    make(**{"images": images, "share": 1, **options})
