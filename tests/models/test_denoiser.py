"""What the denoiser promises beyond the recorded outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.models.denoiser import Denoiser


def test_one_body_and_its_other():
  model, rng = Denoiser(8, 1, 2, 8, ordered=False), np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, points, t = draw(2, 5, 1, 3), draw(2, 4, 6), np.array([0, 7])
  made = jax.eval_shape(model.init, jax.random.key(0), x, t, other=points)
  variables = jax.tree.map(lambda leaf: 0.3 * draw(*leaf.shape), made)
  run = jax.jit(
    lambda x, points, mask, seen: model.apply(variables, x, t, None, mask, points, seen)
  )
  # Frames and points outside the masks have no influence, and points have no order.
  mask, seen = np.arange(7) < np.array([[5], [7]]), np.arange(5) < np.array([[4], [5]])
  x, points = draw(2, 7, 1, 3), draw(2, 5, 6)
  out = run(x, points, mask, seen)
  assert np.abs(out).max() > 0.01
  other_x, other_points = x.copy(), points.copy()
  other_x[0, 5:], other_points[0, 4:] = 9.0, 9.0
  np.testing.assert_allclose(run(other_x, other_points, mask, seen)[0, :5], out[0, :5], atol=1e-5)
  turned = run(x, points[:, ::-1], mask, seen[:, ::-1])
  np.testing.assert_allclose(turned[mask], out[mask], rtol=0, atol=1e-5)


def test_output_is_zero_at_the_start():
  x, t = np.ones((1, 2, 2, 3), np.float32), np.array([3])
  out, _ = jax.jit(lambda: Denoiser(4, 1, 1, 4).init_with_output(jax.random.key(0), x, t))()
  assert not np.any(out)


@pytest.mark.parametrize("bodies", [1, 2, 3])
def test_needs_exactly_one_other(bodies):
  x = jnp.zeros((1, 2, bodies, 3))
  other = None if bodies == 1 else jnp.zeros((1, 2, 4))
  with pytest.raises(ValueError, match="two bodies, or one body and the tokens"):
    Denoiser(8, 1, 2, 8).init(jax.random.key(0), x, jnp.zeros(1), other=other)
