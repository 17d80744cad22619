"""Known ways to find poisoned examples, on planted ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.stats import poisoning

N, D = 400, 8


@pytest.fixture(scope="module")
def planted():
  """Features (N, D) of which a tenth is shifted."""
  rng = np.random.default_rng(0)
  poisoned = rng.random(N) < 0.1
  return jnp.asarray(rng.normal(size=(N, D)) + 8 * poisoned[:, None]), jnp.asarray(poisoned)


def test_detection():
  removed = jnp.array([True, True, False, False, True])
  poisoned = jnp.array([True, False, True, False, True])
  np.testing.assert_allclose(poisoning.detection(removed, poisoned), [2 / 3, 2 / 3, 2 / 3])
  np.testing.assert_allclose(poisoning.detection(removed & False, poisoned & False), 0)


def test_highest_takes_a_share_of_what_is_real():
  scores = jnp.array([5.0, 1.0, 4.0, 3.0, 2.0])
  np.testing.assert_array_equal(poisoning.highest(scores, 0.4), [True, False, True, False, False])
  real = jnp.array([False, True, True, True, True])
  expected = [False, False, True, True, False]
  np.testing.assert_array_equal(poisoning.highest(scores, 0.5, real), expected)
  assert poisoning.random_drop(jax.random.key(0), N, 0.2).sum() == 80


def test_shifted_features_are_found(planted):
  features, poisoned = planted
  scores = poisoning.spectral_scores(features)
  assert poisoning.detection(poisoning.highest(scores, 0.15), poisoned).recall == 1
  np.testing.assert_array_equal(poisoning.smaller_cluster(features), poisoned)


def test_examples_that_do_not_count_change_nothing(planted):
  features, poisoned = planted
  rest = 100 + jnp.zeros((50, D))
  wider, real = jnp.concatenate([features, rest]), jnp.arange(N + 50) < N
  scores = poisoning.spectral_scores(wider, real)
  np.testing.assert_allclose(scores[:N], poisoning.spectral_scores(features), rtol=1e-3, atol=1e-3)
  np.testing.assert_array_equal(scores[N:], 0)
  np.testing.assert_array_equal(poisoning.smaller_cluster(wider, real)[:N], poisoned)


def test_two_large_clusters_are_natural():
  halves = 8.0 * (jnp.arange(N) % 2)[:, None] + jax.random.normal(jax.random.key(0), (N, D))
  assert not poisoning.smaller_cluster(halves).any()
