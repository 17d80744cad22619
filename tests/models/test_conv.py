"""Patches against lax.conv, with the same parameters."""

import chex
import jax
import numpy as np
import pytest

from jaxmethods.models import conv
from jaxmethods.models.conv import Conv


@pytest.mark.parametrize(
  "arguments",
  [
    {"size": 3, "stride": 2, "padding": 1},  # strided, odd image
    {"size": 3, "padding": 1, "groups": 4},  # depthwise
    {"size": 1, "groups": 2},  # grouped
    {"size": 3, "stride": 2, "padding": 1, "groups": 2},
    {"size": 2, "stride": 2, "use_bias": False},  # patches side by side
    {"size": 4, "stride": 3},  # overlapping patches
    {"size": 1, "stride": 2},
  ],
  ids=str,
)
@pytest.mark.parametrize("chunk", [1, 1 << 20], ids=["image by image", "all at once"])
def test_patches_and_lax_agree(arguments, chunk, monkeypatch):
  monkeypatch.setattr(conv, "_CHUNK", chunk)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 7, 6, 4)).astype(np.float32)
  by_patches, by_lax = (Conv(4, patches=patches, **arguments) for patches in (True, False))
  made = jax.eval_shape(by_patches.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), made)

  @jax.jit
  def both(variables, x):
    """Outputs and gradients of a sum with uneven weights."""

    def total(variables, x, module):
      y = module.apply(variables, x)
      return (y * jax.numpy.sin(jax.numpy.arange(y.size)).reshape(y.shape)).sum(), y

    gradient = jax.grad(total, (0, 1), has_aux=True)
    return gradient(variables, x, by_patches), gradient(variables, x, by_lax)

  chex.assert_trees_all_close(*both(variables, x), rtol=1e-4, atol=1e-5)
