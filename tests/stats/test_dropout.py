"""Statistics of the hash mask, and what both generators promise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmethods.stats.dropout import dropout, hash_bits, hash_dropout

# Keys as people make them: small seeds, neighbours, and the products of split and fold_in.
KEYS = [
  *(jax.random.key(seed) for seed in (0, 1, 2, 3)),
  *jax.random.split(jax.random.key(7), 2),
  *(jax.random.fold_in(jax.random.key(8), step) for step in (0, 1)),
]


def drops(key, shape=(2048, 128), rate=0.1):
  return np.asarray(hash_dropout(jnp.ones(shape), rate, key)) == 0


def plausible(p_value):
  # About 100 such tests run with fixed keys; 1e-5 each leaves no room for luck either way.
  return p_value > 1e-5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_of_zeros_overall_and_per_row_and_column(rate):
  for key in KEYS:
    zero = drops(key, rate=rate)
    assert plausible(stats.binomtest(int(zero.sum()), zero.size, rate).pvalue)
    for axis in (0, 1):
      count, n = zero.sum(axis), zero.shape[axis]
      chi2 = float(((count - n * rate) ** 2).sum() / (n * rate * (1 - rate)))
      p = stats.chi2.cdf(chi2, count.size)
      assert plausible(p) and plausible(1 - p)


def test_masks_of_different_keys_are_independent():
  for i, a in enumerate(KEYS):
    for b in KEYS[:i]:
      x, y = drops(a, rate=0.3), drops(b, rate=0.3)
      table = np.array([[(x & y).sum(), (x & ~y).sum()], [(~x & y).sum(), (~x & ~y).sum()]])
      assert plausible(stats.chi2_contingency(table).pvalue)


@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (1, 0), (2, 0), (7, 3), (64, 0)])
def test_neighbouring_entries_are_independent(shift):
  for key in KEYS:
    x = drops(key, rate=0.3)
    y = np.roll(x, shift, (0, 1))
    table = np.array([[(x & y).sum(), (x & ~y).sum()], [(~x & y).sum(), (~x & ~y).sum()]])
    assert plausible(stats.chi2_contingency(table).pvalue)


def test_bytes_are_uniform():
  for key in KEYS:
    bits = np.asarray(hash_bits(key, (1 << 16,)))
    for shift in (0, 8, 16, 24):
      assert plausible(stats.chisquare(np.bincount((bits >> shift) & 255, minlength=256)).pvalue)


@pytest.mark.parametrize("generator", ["hash", "threefry"])
def test_keeps_the_mean_and_passes_the_gradient_through_the_same_mask(generator):
  x = jnp.full((512, 64), 3.0)
  y, pull = jax.vjp(lambda x: dropout(x, 0.25, jax.random.key(3), generator), x)
  assert set(np.unique(y)) == {0.0, 4.0}
  np.testing.assert_allclose(y.mean(), 3.0, rtol=0.02)
  chex.assert_trees_all_equal(pull(jnp.ones_like(x))[0], y / 3.0)
  jitted = jax.jit(lambda x: dropout(x, 0.25, jax.random.key(3), generator))(x)
  chex.assert_trees_all_equal(jitted, y)


def test_vmap_over_keys_equals_a_loop():
  keys, x = jax.random.split(jax.random.key(0), 5), jnp.ones((5, 33, 7))
  mapped = jax.vmap(lambda x, k: hash_dropout(x, 0.4, k))(x, keys)
  chex.assert_trees_all_equal(
    mapped, jnp.stack([hash_dropout(a, 0.4, k) for a, k in zip(x, keys, strict=True)])
  )


def test_only_the_key_is_stored_for_the_backward_pass():
  _, pull = jax.vjp(lambda x: hash_dropout(x, 0.5, jax.random.key(0)), jnp.ones((256, 256)))
  assert sum(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size")) < 256


def test_dtype_rate_zero_and_bad_input():
  x = jnp.ones((4, 4), jnp.bfloat16)
  assert dropout(x, 0.5, jax.random.key(0), "hash").dtype == jnp.bfloat16
  assert dropout(x, 0.0, jax.random.key(0)) is x
  for rate in (-0.1, 1.0, float("nan")):
    with pytest.raises(ValueError, match="dropout rate"):
      dropout(x, rate, jax.random.key(0))
  with pytest.raises(ValueError, match="generator"):
    dropout(x, 0.5, jax.random.key(0), "mersenne")
