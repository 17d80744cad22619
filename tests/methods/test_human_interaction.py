"""Properties of human interaction: limits, invariances, gradients, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods.human_interaction import rotations

# --- rotations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e-7, 1e-5, 1.0])
def test_the_direction_of_almost_nothing_has_no_gradient(size):
  x = jnp.array([size, 0, 0])
  unit, gradient = jax.value_and_grad(lambda x: rotations.unit(x)[1] + rotations.unit(x)[0])(x)
  assert np.abs(gradient).max() <= 1e6
  if size < 1e-6:
    assert not np.any(gradient)
  else:
    np.testing.assert_allclose(unit, 1)
    np.testing.assert_allclose(gradient, [0, 1 / size, 0], rtol=1e-6, atol=0.1)


def test_opposite_directions_have_no_exploding_gradient():
  ahead = jnp.array([0.6, 0, 0.8])
  turn = lambda v: rotations.between(ahead, v).sum()
  assert np.isfinite(jax.grad(turn)(-ahead)).all()
  np.testing.assert_allclose(rotations.rotate(rotations.between(ahead, -ahead[::-1]), ahead),
                             -ahead[::-1], atol=1e-6)  # fmt: skip
