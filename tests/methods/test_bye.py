"""Properties of BYE's entropies, layer profile and decision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods import bye
from jaxmethods.stats.mixtures import Mixture

N, L, H, T = 300, 5, 4, 49


def rows(seed=0, tokens=60):
  logits = np.random.default_rng(seed).normal(size=(N, L, H, tokens))
  return jax.nn.softmax(jnp.asarray(3 * logits, jnp.float32))


def planted(seed=0, share=0.1, gap=1.2, bimodal=(1, 3)):
  """Entropies with a low group of poisoned examples in some layers, six of their deviations away."""
  rng = np.random.default_rng(seed)
  poisoned = rng.random(N) < share
  entropies = 3 + 0.2 * rng.normal(size=(N, L))
  entropies[:, list(bimodal)] -= gap * poisoned[:, None]
  return jnp.asarray(entropies, jnp.float32), jnp.asarray(poisoned)


def test_limits_of_the_entropy():
  uniform = jnp.full((H, T), 1 / T)
  np.testing.assert_allclose(bye.image_entropy(uniform, 0, T), np.log(T), atol=1e-5)
  one = jnp.zeros((H, T)).at[:, 3].set(0.2)
  assert bye.image_entropy(one, 0, T) < 1e-6
  assert jnp.isnan(bye.image_entropy(jnp.zeros((H, T)), 0, T))
  value = bye.image_entropy(rows(), 5, T)
  assert value.shape == (N, L)
  assert (value >= 0).all()
  assert (value <= np.log(T) + 1e-6).all()


def test_what_the_entropy_does_not_see():
  attention = rows()
  expected = bye.image_entropy(attention, 5, T)
  close = lambda value: np.testing.assert_allclose(value, expected, atol=1e-5)
  rng = np.random.default_rng(1)
  image = attention[..., 5 : 5 + T]
  close(bye.image_entropy(image[..., rng.permutation(T)], 0, T))
  close(bye.image_entropy(attention[:, :, rng.permutation(H)], 5, T))
  close(bye.image_entropy(0.3 * attention, 5, T))
  longer = jnp.concatenate([attention[..., :2], attention, attention], -1)  # more text around it
  close(bye.image_entropy(longer, 7, T))


def test_half_precision_is_summed_in_float32():
  attention = rows().astype(jnp.bfloat16)
  expected = bye.image_entropy(attention.astype(jnp.float32), 5, T)
  np.testing.assert_allclose(bye.image_entropy(attention, 5, T), expected, atol=1e-5)


def test_missing_values_become_the_mean_of_the_layer():
  entropies, _ = planted()
  holes = entropies.at[0, 1].set(jnp.nan).at[:, 4].set(jnp.nan)
  filled, missing = bye.fill_missing(holes)
  assert missing == 1 + N
  np.testing.assert_allclose(filled[0, 1], entropies[1:, 1].mean(), rtol=1e-5)
  np.testing.assert_array_equal(filled[:, 2], entropies[:, 2])
  profile = bye.profile(filled)
  assert np.isfinite(profile.separation).all()
  np.testing.assert_array_equal(profile.kept, [False, True, False, True, False])


def test_separation_is_invariant_to_shift_and_scale():
  entropies, _ = planted()
  expected = bye.profile(entropies).separation
  np.testing.assert_allclose(bye.profile(2 * entropies - 7).separation, expected, rtol=1e-2)


def test_the_two_indices_bound_each_other():
  std = jax.random.uniform(jax.random.key(0), (100, 2), minval=0.01)
  mean = jnp.sort(jax.random.normal(jax.random.key(1), (100, 2)))
  mixture = Mixture(jnp.full((100, 2), 0.5), mean, std)
  paper, code = bye.separation_index(mixture, "paper"), bye.separation_index(mixture)
  assert (code <= paper).all()
  assert (paper <= np.sqrt(2) * code * (1 + 1e-6)).all()
  with pytest.raises(ValueError, match="index"):
    bye.separation_index(mixture, "root")


@pytest.mark.parametrize("split", ["gmm", "kmeans"])
def test_the_plant_is_found(split):
  entropies, poisoned = planted()
  find = jax.jit(lambda e: bye.clean(e, bye.profile(e).kept, split=split).removed)
  np.testing.assert_array_equal(find(entropies), poisoned)
  order = np.random.default_rng(2).permutation(N)
  np.testing.assert_array_equal(find(entropies[order]), poisoned[order])
  both = jnp.stack([entropies, entropies[order]])
  np.testing.assert_array_equal(jax.vmap(find)(both), jnp.stack([poisoned, poisoned[order]]))


def test_float32_agrees_with_float64():
  entropies, _ = planted()
  narrow = bye.profile(entropies)
  with jax.enable_x64(True):
    wide = bye.profile(jnp.asarray(np.asarray(entropies), jnp.float64))
  there = np.asarray(narrow.kept)
  assert there.any()
  for a, b in zip(narrow.mixture, wide.mixture, strict=True):
    np.testing.assert_allclose(a[there], b[there], atol=1e-4)


def test_no_bimodal_layer_removes_nothing():
  entropies, _ = planted(gap=0)
  verdict = bye.clean(entropies, bye.profile(entropies).kept)
  assert not verdict.found
  assert not verdict.removed.any()
  assert not bye.below_threshold(entropies, jnp.zeros(L, bool), T).any()


def test_constant_entropies_are_finite():
  profile = bye.profile(jnp.full((N, L), 2.0))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(profile))
  assert not profile.kept.any()
  verdict = bye.clean(jnp.full((N, L), 2.0), jnp.ones(L, bool))
  assert np.isfinite(verdict.low).all()
  assert not verdict.removed.any()


def test_extreme_high_scores_are_not_removed():
  rng = np.random.default_rng(0)
  wide, narrow = 1 + 0.8 * rng.normal(size=60), 3 + 0.05 * rng.normal(size=240)
  score = jnp.asarray(np.concatenate([wide, narrow, [6.0]]), jnp.float32)[:, None]
  layers = jnp.ones(1, bool)
  verdict = bye.clean(score, layers)
  assert verdict.guarded >= 1
  assert not verdict.removed[-1]
  assert verdict.low[-1] > 0.5  # its posterior alone would have removed it
  assert bye.clean(score, layers, guard=False).removed[-1]


def test_equal_variances_are_cut_at_one_score():
  entropies, _ = planted(gap=0.5, bimodal=range(L))
  verdict = bye.clean(entropies, jnp.ones(L, bool))
  assert 0 < verdict.removed.sum() < N
  assert verdict.score[verdict.removed].max() < verdict.score[~verdict.removed].min()


def test_a_handful_of_outliers_can_be_kept_from_being_a_group():
  entropies, _ = planted(gap=0)
  outliers = entropies.at[:2, 0].set(30.0)
  assert bye.profile(outliers).kept[0]
  assert bye.profile(outliers).reversed[0]  # and their layer is reported: the rare group is above
  assert not bye.profile(outliers, min_weight=0.02).kept[0]


def test_too_few_examples():
  with pytest.raises(ValueError, match="at least 4"):
    bye.clean(jnp.ones((3, 2)), jnp.ones(2, bool))
  with pytest.raises(ValueError, match="split"):
    bye.clean(jnp.ones((4, 2)), jnp.ones(2, bool), split="median")


def test_shapes_are_checked_at_the_door():
  entropies, layers = jnp.zeros((8, L)), jnp.ones(L, bool)
  with pytest.raises(ValueError, match=r"layers: expected shape \(L=5,\), got \(4,\)"):
    bye.clean(entropies, layers[1:])
  with pytest.raises(ValueError, match="layers: expected"):
    bye.mean_entropy(entropies, layers[1:])
  with pytest.raises(ValueError, match="entropies: expected"):
    bye.profile(entropies[0])
  with pytest.raises(ValueError, match="entropies: expected"):
    bye.fill_missing(entropies[0])
  with pytest.raises(ValueError, match="rows: expected"):
    bye.image_entropy(jnp.ones(T), 0, T)
  with pytest.raises(ValueError, match="outside of 60 keys"):
    bye.head_mean(rows(), 20, T)
  with pytest.raises(ValueError, match="mean: expected"):
    bye.divergence(Mixture(*(jnp.ones((4, 3)),) * 3))


def test_separation_without_poison():
  found = {i: bye.null_separation(jax.random.key(0), 800, 20, i) for i in ("code", "paper")}
  normal, uniform, levels = found["paper"]
  assert (uniform > 2).mean() > 0.8  # flat values pass the paper's index
  assert (found["code"] < 2).all()  # and nothing passes the code's
  assert np.median(normal) < np.median(levels) < 3 and np.median(normal) < np.median(uniform)
  with pytest.raises(ValueError, match="4"):
    bye.null_separation(jax.random.key(0), 3, 2)


def test_a_layer_that_is_no_further_apart_than_clean_data_is_not_used():
  flat = jnp.linspace(0, 1, 800)[:, None]
  entropies, _ = planted()
  null = float(bye.null_separation(jax.random.key(0), 800, 20, "paper").max())
  assert bye.profile(flat, index="paper").kept.all()
  assert not bye.profile(flat, index="paper", null=null).kept.any()
  kept = bye.profile(entropies, index="paper").kept
  np.testing.assert_array_equal(bye.profile(entropies, index="paper", null=null).kept, kept)
