"""The written-out derivative of the gated unit against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.stats.activations import swiglu


def test_swiglu_and_its_gradients():
  gate, up, weight = (
    jax.random.normal(key, (5, 7)) for key in jax.random.split(jax.random.key(0), 3)
  )
  plain = lambda gate, up: jax.nn.silu(gate) * up
  # exp(90) is no float32: both tails must stay finite.
  gate = gate.at[0, :2].set(jnp.array([90.0, -90.0]))
  np.testing.assert_array_equal(swiglu(gate, up), plain(gate, up))
  ours, autodiff = (
    jax.grad(lambda *x: jnp.sum(weight * f(*x)), (0, 1))(gate, up)  # noqa: B023
    for f in (swiglu, plain)
  )
  for a, b in zip(ours, autodiff, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
