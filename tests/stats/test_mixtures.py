"""The best split in two, and mixtures of two Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st

from jaxmethods.stats import mixtures

split = jax.jit(mixtures.two_means)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=12, max_size=12))
def test_the_split_is_the_best_one(values):
  x = np.array(values, np.float32)
  upper = np.asarray(split(x))

  def cost(upper):
    return sum(((part - part.mean()) ** 2).sum() for part in (x[upper], x[~upper]) if len(part))

  best = min(cost(x > threshold) for threshold in x)
  assert np.isclose(cost(upper), best, rtol=1e-4, atol=1e-3)
  if upper.any():
    assert x[upper].min() > x[~upper].max()
  else:
    assert len(set(values)) == 1


def test_negative_and_positive_values_are_ordered():
  x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  np.testing.assert_array_equal(mixtures._sorted(jnp.asarray(x)), np.sort(x))


def test_a_fit_recovers_what_was_drawn():
  rng = np.random.default_rng(0)
  x = np.where(rng.random(20_000) < 0.2, rng.normal(-1, 0.3, 20_000), rng.normal(2, 0.8, 20_000))
  mixture = mixtures.fit(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(mixture.weight, [0.2, 0.8], atol=0.01)
  np.testing.assert_allclose(mixture.mean, [-1, 2], atol=0.03)
  np.testing.assert_allclose(mixture.std, [0.3, 0.8], atol=0.03)
  # A fixed point of EM: moments under the posteriors are the parameters.
  upper = mixtures.upper_posterior(jnp.asarray(x, jnp.float32), mixture)
  np.testing.assert_allclose(upper.mean(), mixture.weight[1], atol=1e-4)
  np.testing.assert_allclose((upper * x).sum() / upper.sum(), mixture.mean[1], atol=1e-3)


def test_an_empty_component_is_finite():
  mixture = mixtures.fit(jnp.full(10, 3.0))
  np.testing.assert_allclose(mixture.weight.sum(), 1)
  np.testing.assert_allclose(mixture.mean, 3)
  np.testing.assert_allclose(mixture.std, 1e-3, rtol=1e-3)
  assert np.isfinite(mixtures.upper_posterior(jnp.full(10, 3.0), mixture)).all()
