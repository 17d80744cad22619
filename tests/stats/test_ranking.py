"""Ranking metrics against scikit-learn, at the edges, and resampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.stats import ranking

RANK = jax.jit(ranking.ranking)


def case(seed, n=40, levels=9):
  rng = np.random.default_rng(seed)
  positive = rng.random(n) < 0.4
  score = np.round(rng.normal(size=n) + 0.7 * positive, 0 if levels else 5)
  return score.astype("f4"), positive


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [0, 9])
def test_like_scikit_learn(seed, levels):
  metrics = pytest.importorskip("sklearn.metrics")
  score, positive = case(seed, levels=levels)
  for sign, wanted in ((1, positive), (-1, ~positive)):  # both conventions
    got = RANK(sign * score, wanted)
    np.testing.assert_allclose(got.auroc, metrics.roc_auc_score(wanted, sign * score), atol=1e-6)
    precision, recall, _ = metrics.precision_recall_curve(wanted, sign * score)
    np.testing.assert_allclose(got.aupr, metrics.auc(recall, precision), atol=1e-6)
    fpr, tpr, _ = metrics.roc_curve(wanted, sign * score)
    np.testing.assert_allclose(got.fpr95, np.interp(0.95, tpr, fpr), atol=1e-6)


def test_the_ends_of_the_scale():
  positive = np.array([False] * 25 + [True] * 15)
  score = np.arange(40.0)
  perfect, reversed_, constant = (RANK(s, positive) for s in (score, -score, 0 * score))
  np.testing.assert_allclose(perfect, (1, 1, 0), atol=1e-6)
  np.testing.assert_allclose(reversed_.auroc, 0, atol=1e-6)
  np.testing.assert_allclose(constant.auroc, 0.5, atol=1e-6)
  np.testing.assert_allclose(constant.fpr95, 0.95, atol=1e-6)


@pytest.mark.parametrize("only", [True, False])
def test_one_class_is_undefined(only):
  assert np.isnan(RANK(np.arange(5.0), np.full(5, only))).all()


def test_fpr_by_steps():
  curve = ranking.roc_curve(jnp.array([5.0, 4, 3, 2, 1]), jnp.array([1, 0, 1, 0, 1]) == 1)
  np.testing.assert_allclose(ranking.fpr_at(curve, 2 / 3, "step"), 0.5)
  np.testing.assert_allclose(ranking.fpr_at(curve, 0.95, "step"), 1.0)
  np.testing.assert_allclose(ranking.fpr_at(curve, 0.5), 0.5)  # half way up a vertical step
  np.testing.assert_allclose(ranking.fpr_at(curve, 1 / 3), 0.5)  # level there: its far end


def test_a_weight_is_a_repeat_and_zero_is_absence():
  score, positive = case(1)
  weight = np.random.default_rng(0).integers(0, 4, len(score))
  repeated = RANK(np.repeat(score, weight), np.repeat(positive, weight))
  np.testing.assert_allclose(RANK(score, positive, weight), repeated, atol=1e-6)


def test_bootstrap_is_centred_on_the_sample():
  score, positive = case(2, n=200)
  drawn = ranking.bootstrap(jax.random.key(0), jnp.asarray(score), jnp.asarray(positive), draws=300)
  plain = RANK(score, positive)
  error = np.sqrt(plain.auroc * (1 - plain.auroc) / 80)
  assert drawn.auroc.shape == (300,)
  assert abs(drawn.auroc.mean() - plain.auroc) < 0.01
  assert 0.3 * error < drawn.auroc.std() < 2 * error


def test_strata():
  rng = np.random.default_rng(0)
  stratum, noise = rng.integers(0, 4, 200), rng.normal(size=200)
  positive = rng.random(200) < (stratum + 1) / 6  # strata alone tell much
  score = jnp.asarray(stratum, jnp.float32)
  found = ranking.stratified_auroc(score, jnp.asarray(positive), jnp.asarray(stratum))
  assert float(found) == 0.5
  assert float(ranking.ranking(score, jnp.asarray(positive)).auroc) > 0.6
  score = jnp.asarray(positive + noise - 10 * stratum, jnp.float32)
  right = count = 0.0
  for s in range(4):
    a, b = (
      np.asarray(score)[(stratum == s) & positive],
      np.asarray(score)[(stratum == s) & ~positive],
    )
    right, count = right + (a[:, None] > b).sum(), count + len(a) * len(b)
  found = ranking.stratified_auroc(score, jnp.asarray(positive), jnp.asarray(stratum))
  np.testing.assert_allclose(found, right / count, rtol=1e-5)
  one = ranking.stratified_auroc(score, jnp.asarray(positive), jnp.zeros(200, int))
  np.testing.assert_allclose(one, ranking.ranking(score, jnp.asarray(positive)).auroc, rtol=1e-5)
  twice = ranking.stratified_auroc(
    score, jnp.asarray(positive), jnp.asarray(stratum), jnp.full(200, 2.0)
  )
  np.testing.assert_allclose(twice, found, rtol=1e-5)
  nothing = ranking.stratified_auroc(score, jnp.asarray(positive), jnp.arange(200))
  assert np.isnan(nothing)
