"""Properties of attacks, defences and metrics of the safety suite: limits, invariances, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import (
  attacks,
  defences,
  editing,
  likelihood,
  memorisation,
  preferences,
  privacy,
  unlearning,
  watermark,
)
from jaxmethods.models import tiny_gpt
from jaxmethods.stats.losses import IGNORED

KEY = jax.random.key(0)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# --- likelihood, memorisation ---------------------------------------------------------------------


def test_ignored_tokens_do_not_count():
  logits = draw(2, 5, 7)
  labels = jnp.array([[3, 1, 2, IGNORED, 4], [IGNORED] * 5])
  total = likelihood.sequence_log_probability(logits, labels)
  by_hand = jax.nn.log_softmax(logits[0])[jnp.array([0, 1, 3]), jnp.array([1, 2, 4])].sum()
  close(total, [by_hand, 0])  # the label at position 0 has no logits
  close(likelihood.sequence_log_probability(logits, labels, average=True), [by_hand / 3, 0])
  close(likelihood.mean_token_nll(logits, labels), -by_hand / 3)


def test_a_later_token_never_changes_earlier_logits():
  rng, width = np.random.default_rng(0), 4
  shapes = {
    "wte": (6, width), "wpe": (5, width), "head": (width, 6), "lnf_g": (width,), "lnf_b": (width,),
    "0.wqkv": (width, 12), "0.wo": (width, width), "0.w1": (width, 8), "0.b1": (8,),
    "0.w2": (8, width), "0.b2": (width,), "0.ln1_g": (width,), "0.ln1_b": (width,),
    "0.ln2_g": (width,), "0.ln2_b": (width,),
  }  # fmt: skip
  params = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
  logits = jax.jit(tiny_gpt.read, static_argnums=2)(
    params, jnp.array([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]), 2
  ).logits
  np.testing.assert_array_equal(logits[0, :3], logits[1, :3])
  assert (logits[0, 3] != logits[1, 3]).any()


def test_exposure_ends_and_ties():
  nll = jnp.array([2.0, 1.0, 2.0, 3.0])
  rank = memorisation.exposure_rank(nll, jnp.arange(4))
  np.testing.assert_array_equal(rank, [2, 1, 2, 4])
  close(memorisation.exposure(rank, 4), [1, 2, 1, 0])


def test_membership_of_equal_and_of_separate_scores():
  equal = memorisation.membership(jnp.ones(5), jnp.ones(7))
  close([equal.auc, equal.tpr], [0.5, 0])
  apart = memorisation.membership(jnp.arange(5.0) + 9, jnp.arange(7.0))
  close([apart.auc, apart.tpr], [1, 1])
  with pytest.raises(InputError, match="both classes"):
    memorisation.membership(jnp.ones(0), jnp.ones(3))


def test_min_k_takes_the_least_likely_real_tokens():
  log_p = jnp.array([[-1.0, -5, -2, -3, -99], [-4.0, -9, -9, -9, -9]])
  mask = jnp.array([[True] * 4 + [False], [True] + [False] * 4])
  close(memorisation.min_k_score(log_p, mask, fraction=0.5), [-4, -4])
  with pytest.raises(InputError, match="fraction"):
    memorisation.min_k_score(log_p, mask, fraction=0)


# --- privacy --------------------------------------------------------------------------------------


def square_loss(params, example):
  x, y = example
  return (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


PARAMS = {"w": draw(3, 4), "v": draw(4, seed=1)}
BATCH = (draw(6, 3, seed=2), draw(6, seed=3))


def private(batch=BATCH, real=None, **settings):
  real = jnp.ones(len(batch[0]), bool) if real is None else real
  given = {"clip_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": 6.0, **settings}
  return privacy.private_gradient(square_loss, PARAMS, batch, real, KEY, **given)


def same(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: close(x, y, tolerance), a, b)


def test_clipping_bounds_every_example_and_leaves_small_ones():
  _, gradients = privacy.per_example_gradients(square_loss, PARAMS, BATCH)
  norms = privacy.global_norms(gradients)
  for b, norm in enumerate(norms):
    one = privacy.clipped_sum(gradients, 1.0, jnp.arange(6) == b)
    size = np.sqrt(sum(float((x**2).sum()) for x in one.values()))
    close(size, min(1.0, norm), 2e-6)
    loop = jax.grad(square_loss)(PARAMS, jax.tree.map(lambda x, b=b: x[b], BATCH))
    same(jax.tree.map(lambda g, b=b: g[b], gradients), loop)


def test_no_noise_and_no_clipping_is_the_plain_gradient():
  mean = lambda params: jax.vmap(square_loss, (None, 0))(params, BATCH).mean()
  loss, gradient = jax.value_and_grad(mean)(PARAMS)
  found = private(clip_norm=np.inf)
  same(found.gradient, gradient)
  close(found.loss, loss)
  same(private(clip_norm=np.inf, microbatch=2).gradient, gradient)


def test_padding_contributes_nothing_even_if_it_is_nan():
  real = jnp.arange(6) < 4
  x, y = BATCH
  padded = (x.at[4:].set(jnp.nan), y)
  same(private(padded, real).gradient, private((x[:4], y[:4])).gradient)
  # Nobody drawn: the noise alone, divided by the expected size all the same.
  empty = private(real=jnp.zeros(6, bool), noise_multiplier=2.0)
  noise = privacy.standard_normal(KEY, PARAMS)
  same(empty.gradient, jax.tree.map(lambda z: 2.0 * 0.5 * z / 6.0, noise))


def test_zero_gradients_stay_zero():
  zero = jax.tree.map(lambda p: jnp.zeros((2, *p.shape)), PARAMS)
  total = privacy.clipped_sum(zero, 1.0, jnp.ones(2, bool))
  same(total, jax.tree.map(jnp.zeros_like, PARAMS))


def deviation_of_noise(mechanism, batch):
  """Standard deviation that a mechanism adds to the mean of `batch` zero gradients, times batch."""
  zeros = jnp.zeros((batch, 20000))
  noise = jax.random.normal(KEY, (20000,))
  return float(mechanism(zeros, noise).std()) * batch


def right(gradients, z):
  total = privacy.clipped_sum(gradients, 2.0, jnp.ones(len(gradients), bool))
  return privacy.noisy_mean(
    total, z, clip_norm=2.0, noise_multiplier=1.5, expected_batch_size=len(gradients)
  )


def noise_after_averaging(gradients, z):
  total = privacy.clipped_sum(gradients, 2.0, jnp.ones(len(gradients), bool))
  return total / len(gradients) + 1.5 * 2.0 * z


def clipping_the_mean(gradients):
  mean = gradients.mean(0)
  return mean * jnp.minimum(1, 2.0 / jnp.linalg.norm(mean)) * len(gradients)


def influence(summed):
  """How far one example moves a sum: the sensitivity that the noise must hide."""
  others = jnp.tile(jnp.array([1.0, 0]), (7, 1))
  with_one, without = (
    jnp.concatenate([others, x[None]]) for x in (jnp.array([0, 900.0]), jnp.zeros(2))
  )
  return float(jnp.linalg.norm(summed(with_one) - summed(without)))


def test_planted_bugs_are_caught():
  close(deviation_of_noise(right, 8), 1.5 * 2.0, 0.02)
  assert deviation_of_noise(noise_after_averaging, 8) > 7 * 1.5 * 2.0
  assert influence(lambda g: privacy.clipped_sum(g, 2.0, jnp.ones(len(g), bool))) <= 2.0 + 1e-5
  assert influence(clipping_the_mean) > 4 * 2.0


def test_poisson_batches():
  sizes = []
  capacity = privacy.poisson_capacity(200, 0.1)
  sample = jax.jit(lambda key: privacy.poisson_batch(key, 200, 0.1, capacity))
  for key in jax.random.split(KEY, 50):
    batch = sample(key)
    assert len(set(batch.rows.tolist())) == capacity
    assert batch.dropped == 0
    sizes.append(int(batch.real.sum()))
  assert 17 < np.mean(sizes) < 23
  assert np.std(sizes) > 2  # a fixed size is another mechanism
  short = privacy.poisson_batch(KEY, 200, 1.0, 150)
  assert short.dropped == 50


def test_accountant_moves_the_right_way():
  base = privacy.epsilon(0.05, 1.0, 100, 1e-5)
  assert privacy.epsilon(0.05, 1.0, 200, 1e-5) > base
  assert privacy.epsilon(0.1, 1.0, 100, 1e-5) > base
  assert privacy.epsilon(0.05, 1.5, 100, 1e-5) < base
  assert privacy.epsilon(0.05, 1.0, 100, 1e-5, conversion="classic") > base
  np.testing.assert_allclose(privacy.rdp_per_step(1.0, 2.0, [2, 9]), [2 / 8, 9 / 8])
  # Towards q = 1 the sum tends to the closed form.
  np.testing.assert_allclose(
    privacy.rdp_per_step(1 - 1e-12, 2.0), privacy.rdp_per_step(1.0, 2.0), rtol=1e-6
  )
  # A published figure of the classic form: q .01, sigma 4, 10^4 steps, delta 1e-5.
  assert abs(privacy.epsilon(0.01, 4.0, 10_000, 1e-5, conversion="classic") - 1.26) < 0.005


@pytest.mark.parametrize(
  ("rate", "sigma", "steps", "delta", "expected"),
  [
    (0.01, 4.0, 10_000, 1e-5, 1.0354900660362436),
    (64 / 230, 0.6, 200, 1e-3, 160.2715847397501),
    (64 / 230, 3.0, 200, 1e-3, 5.282589268204342),
    (0.001, 1.0, 5000, 1e-6, 0.9185228422728005),
    (0.3, 10.0, 7, 1e-5, 0.30955419978803783),
  ],
)
def test_epsilon_equals_that_of_dp_accounting(rate, sigma, steps, delta, expected):
  # Recorded from dp-accounting 0.6.0 with the same orders.
  assert abs(privacy.epsilon(rate, sigma, steps, delta) - expected) < 1e-10


@pytest.mark.parametrize("side", ["opacus", "google"])
def test_accountant_equals_those_of_others_on_a_grid(golden_folder, side):
  # Recorded by the command in the file, with our orders.
  recorded = json.loads((golden_folder / "llm_safety_accountants.json").read_text())
  assert tuple(recorded["orders"]) == privacy.ORDERS
  ours = np.array([privacy.epsilon(*setting) for setting in recorded["grid"]])
  theirs = np.array(recorded[side]["epsilon"])
  assert len(ours) == 120
  assert ours.min() < 0.1 < 1000 < ours.max()
  # dp-accounting says 0 where delta alone covers the divergence (a bound by KL, which opacus lacks).
  by_kl = theirs == 0
  assert by_kl.sum() == (side == "google")
  assert (ours[by_kl] < 0.03).all()
  np.testing.assert_allclose(ours[~by_kl], theirs[~by_kl], rtol=0, atol=1e-6)


def test_noise_for_an_epsilon():
  sigma = privacy.noise_for(8.0, 0.05, 100, 1e-5)
  assert privacy.epsilon(0.05, sigma, 100, 1e-5) <= 8.0
  assert privacy.epsilon(0.05, sigma * 0.999, 100, 1e-5) > 8.0
  with pytest.raises(InputError, match="cannot be reached"):
    privacy.noise_for(0.01, 0.05, 100, 1e-5)


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: privacy.epsilon(0.1, 0.0, 10, 1e-5), "epsilon is infinite"),
    (lambda: privacy.epsilon(1.1, 1.0, 10, 1e-5), "rate"),
    (lambda: privacy.epsilon(0.1, 1.0, 0, 1e-5), "steps"),
    (lambda: privacy.epsilon(0.1, 1.0, 10, 1.0), "delta"),
    (lambda: private(microbatch=4), "microbatch"),
    (lambda: privacy.poisson_batch(KEY, 10, 0.5, 11), "capacity"),
    (lambda: privacy.empirical_epsilon(3, 2, 0, 2, 0.0), "impossible"),
  ],
)
def test_bad_privacy(call, match):
  with pytest.raises(InputError, match=match):
    call()


def test_empirical_epsilon():
  assert privacy.empirical_epsilon(50, 100, 50, 100, 1e-5) == 0
  found = privacy.empirical_epsilon(1000, 1000, 0, 1000, 0.0)
  ends = stats.beta.ppf(0.025, 1000, 1)
  close(found, np.log(ends / (1 - ends)))
  # Randomised response has epsilon log 3 exactly: the bound stays below and comes near.
  bound = privacy.empirical_epsilon(75_000, 100_000, 25_000, 100_000, 0.0)
  assert 0.97 * np.log(3) < bound < np.log(3)


# --- preferences ----------------------------------------------------------------------------------


def test_dpo_at_the_reference():
  h = jnp.zeros(4)
  close(preferences.dpo(h, beta=0.3), np.log(2) * np.ones(4))
  close(jax.vmap(jax.grad(lambda h: preferences.dpo(h, beta=0.3)))(h), -0.15 * np.ones(4))


def test_swapped_answers_negate_the_margin():
  w, l, rw, rl = (draw(5, seed=s) for s in range(4))
  h = preferences.margin(preferences.LogProbabilities(w, l, rw, rl))
  swapped = preferences.margin(preferences.LogProbabilities(l, w, rl, rw))
  close(preferences.dpo(swapped, beta=0.2), preferences.dpo(-h, beta=0.2))
  flips = lambda h, e: preferences.dpo(h, beta=0.2, smoothing=e)
  close(flips(h, 0.2), 0.8 * flips(h, 0) + 0.2 * flips(-h, 0))
  close(preferences.ipo(jnp.array(2.5), beta=0.2), 0)
  for call in (lambda: preferences.ipo(h, beta=0), lambda: flips(h, 0.5)):
    with pytest.raises(InputError):
      call()


def test_the_reference_gets_no_gradient():
  pairs = preferences.LogProbabilities(*(draw(3, seed=s) for s in range(4)))
  of = lambda p: preferences.dpo(preferences.margin(p), beta=0.1).sum()
  gradient = jax.grad(of)(pairs)
  assert not gradient.reference_chosen.any() and not gradient.reference_rejected.any()
  close(gradient.policy_chosen, -gradient.policy_rejected)
  with pytest.raises(ValueError, match="reference_chosen"):
    preferences.margin(pairs._replace(reference_chosen=jnp.zeros(2)))


# --- editing --------------------------------------------------------------------------------------


def test_rome_writes_one_key():
  keys, weight, bias = draw(60, 6), draw(6, 4, seed=1), draw(4, seed=2)
  key, bare, value = draw(6, seed=3), draw(6, seed=4), draw(4, seed=5)
  moment = editing.second_moment(keys, damping=1e-2)
  new = editing.edit(weight, bias, moment, key, value)
  close(key @ new + bias, value, 1e-4)
  close(bare @ editing.edit(weight, bias, moment, key, value, bare_key=bare) + bias, value, 1e-4)
  singular = jnp.linalg.svd(new - weight, compute_uv=False)
  assert singular[0] > 1e-2 and singular[1] < 1e-5
  u = editing.direction(moment, key)
  other = bare - (bare @ u) / (u @ u) * u
  close(other @ new, other @ weight, 1e-4)


def test_the_search_for_a_value():
  value, goal = jnp.array([1.0, 0, 0]), jnp.array([0.0, 3, 0])
  distance = lambda change: ((value + change - goal) ** 2).sum()
  near = editing.find_value(distance, value, steps=60, factor=10.0)
  assert distance(near - value) < 0.06
  held = editing.find_value(distance, value, steps=60, factor=1.0)
  close(jnp.linalg.norm(held - value), 1.0)
  np.testing.assert_array_equal(editing.find_value(distance, value, steps=1), value)
  np.testing.assert_array_equal(editing.find_value(distance, value, enough=99.0), value)


def test_value_objective_has_a_gradient_at_its_start():
  essence = jax.nn.log_softmax(draw(5))
  of = lambda d: editing.value_objective(jnp.array([-1.0, -3]), essence, essence, d, jnp.ones(3))
  loss, gradient = jax.value_and_grad(of)(jnp.zeros(3))
  close(loss, 2.0)
  close(gradient, jnp.zeros(3))
  close(of(jnp.array([3.0, 4, 0])), 2.0 + 0.5 * 5 / 3)


def test_edit_scores():
  share = editing.success(jnp.array([0.3, 0.1, 0.2]), jnp.array([0.1, 0.3, 0.2]))
  close(share, 1 / 3)
  close(editing.score(jnp.array(1.0), jnp.array(0.5), jnp.array(0.5)), 0.6)
  assert editing.score(jnp.array(1.0), jnp.array(0.0), jnp.array(1.0)) == 0


# --- unlearning -----------------------------------------------------------------------------------


def test_npo_at_the_reference_and_far_from_it():
  nll = jnp.array([3.0, 7, 5, 1])
  close(unlearning.npo(nll, nll, beta=0.4), 5 * np.log(2))
  gradient = jax.grad(lambda l, beta: unlearning.npo(l, nll, beta=beta))
  close(gradient(nll, 0.4), -np.ones(4) / 4)
  close(gradient(nll + draw(4), 1e-5), -np.ones(4) / 4, 1e-4)  # gradient ascent
  close(gradient(nll + 1e4, 0.4), np.zeros(4))
  assert unlearning.npo(nll + 1e4, nll, beta=0.4) == 0


def test_simnpo_is_npo_against_a_constant():
  nll, length = jnp.array([3.0, 8]), jnp.array([1, 4])
  expected = unlearning.npo(nll / length, jnp.full(2, 0.5), beta=2.0)
  close(unlearning.simnpo(nll, length, beta=2.0, delta=0.5), expected)


def test_kl_and_rmu():
  logits, other = draw(2, 3, 5), draw(2, 3, 5, seed=1)
  mask = jnp.array([[True, False, False], [True, True, False]])
  assert abs(unlearning.kl_to_reference(logits, logits)) < 1e-6
  changed = jnp.where(mask[..., None], other, 99 * other)
  kl = unlearning.kl_to_reference
  close(kl(logits, changed, mask), kl(logits, other, mask))
  vector = unlearning.control_vector(KEY, 5, steering=6.5)
  close(jnp.linalg.norm(vector), 6.5)
  assert (vector >= 0).all()
  padded = jnp.where(mask[..., None], vector, jnp.inf)
  assert unlearning.representation_distance(padded, vector, mask) == 0
  close(unlearning.representation_distance(vector + jnp.ones((2, 3, 5)), vector, mask), 1)
  close(unlearning.rmu(jnp.array(2.0), jnp.array(0.1), alpha=10), 3)


def test_forgetting_metrics():
  ratio = unlearning.truth_ratio(jnp.array([1.0, 2]), jnp.array([[1.0, 1], [0, 2]]))
  close(ratio, [1, np.exp(-1)])
  close(unlearning.forget_truth(ratio), (1 + np.exp(-1)) / 2)
  close(unlearning.forget_truth(1 / ratio), unlearning.forget_truth(ratio))
  close(unlearning.retain_truth(jnp.array([4.0, 0.5])), 0.375)
  close(unlearning.option_probability(jnp.array([0.2]), jnp.array([[0.1, 0.1]])), [0.5])
  same_model, other = np.linspace(0.1, 2, 30), np.linspace(5, 9, 30)
  assert unlearning.forget_quality(same_model, same_model).p_value == 1
  assert unlearning.forget_quality(same_model, other).p_value < 1e-10
  inverse = unlearning.forget_quality(1 / same_model, 1 / other)
  np.testing.assert_allclose(inverse.p_value, unlearning.forget_quality(same_model, other).p_value)
  assert unlearning.model_utility(jnp.array([0.9, 0.0])) == 0


def test_an_empty_forget_set_is_named():
  for call in (
    lambda: unlearning.npo(jnp.zeros(0), jnp.zeros(0)),
    lambda: unlearning.simnpo(jnp.zeros(0), jnp.zeros(0, int)),
    lambda: unlearning.forget_quality(np.zeros(0), np.ones(3)),
  ):
    with pytest.raises(InputError, match="forget set is empty"):
      call()


# --- attacks --------------------------------------------------------------------------------------

TABLE, MIX = draw(8, 5, seed=1), draw(3, 5, seed=2)
FORBIDDEN = jnp.array([0, 5])


def relaxed(onehot):
  return jnp.tanh((onehot @ TABLE * MIX).sum(0)).sum()


def one_loss(suffix):
  return relaxed(jax.nn.one_hot(suffix, 8))


def test_onehot_gradient_equals_finite_differences():
  suffix, h = jnp.array([1, 2, 3]), 1e-2
  gradient = attacks.onehot_gradient(relaxed, suffix, 8)
  onehot = jax.nn.one_hot(suffix, 8)
  for i, j in ((0, 4), (2, 3)):
    bump = jnp.zeros((3, 8)).at[i, j].set(h)
    close(gradient[i, j], (relaxed(onehot + bump) - relaxed(onehot - bump)) / (2 * h), 2e-3)


def test_gcg_changes_one_allowed_token_and_never_ends_worse():
  losses = jax.vmap(one_loss)
  search = attacks.start(jnp.array([1, 2, 3]), losses)
  first = float(search.best_loss)
  step = jax.jit(
    lambda search, key: attacks.gcg_step(
      search, key, relaxed, losses, FORBIDDEN, vocabulary=8, candidates=16, top=6
    )
  )
  for key in jax.random.split(KEY, 5):
    before, search = search, step(search, key)
    assert (before.suffix != search.suffix).sum() <= 1
    assert not jnp.isin(search.suffix, FORBIDDEN).any()
    assert search.best_loss <= before.best_loss
  assert search.best_loss < first
  close(one_loss(search.best), search.best_loss)
  close(losses(search.best[None])[0], one_loss(search.best))


def test_candidates():
  choices = attacks.promising(draw(3, 8), FORBIDDEN, 6)
  assert not jnp.isin(choices, FORBIDDEN).any()
  drawn = attacks.substituted(jnp.array([1, 2, 3]), choices, jnp.array([0, 2]), jnp.array([5, 0]))
  np.testing.assert_array_equal(drawn, [[choices[0, 5], 2, 3], [1, 2, choices[2, 0]]])
  with pytest.raises(InputError, match="top must be in 1"):
    attacks.promising(draw(3, 8), FORBIDDEN, 7)
  search = attacks.Search(jnp.zeros(3, int), jnp.zeros(3, int), jnp.array(1.0))
  worse = attacks.moved(search, drawn, jnp.array([jnp.nan, 2.0]))
  np.testing.assert_array_equal(worse.suffix, drawn[1])  # moves, NaN never wins
  np.testing.assert_array_equal(worse.best, search.best)
  random = attacks.random_search_step(
    search, KEY, jax.vmap(one_loss), jnp.array([2, 3]), candidates=4
  )
  assert jnp.isin(random.suffix, jnp.array([2, 3])).all()


def test_target_loss_is_shifted_by_one():
  logits, target = draw(6, 9), jnp.array([4, 7])
  log_p = jax.nn.log_softmax(logits)
  close(attacks.target_loss(logits, target), -(log_p[3, 4] + log_p[4, 7]) / 2)
  with pytest.raises(ValueError, match="target"):
    attacks.target_loss(logits, jnp.zeros(6, int))


# --- defences -------------------------------------------------------------------------------------


def test_spectral_filter_finds_a_direction():
  clean = draw(40, 6)
  poisoned = clean.at[jnp.array([3, 9])].add(20 * jnp.eye(6)[0])
  np.testing.assert_array_equal(defences.spectral_outliers(poisoned, 2), [3, 9])
  assert defences.spectral_outliers(clean, 0).size == 0
  with pytest.raises(InputError, match="remove"):
    defences.spectral_outliers(clean, 41)


def test_safelora():
  base, aligned, update = draw(5, 4), draw(5, 4, seed=1), draw(5, 4, seed=2)
  matrix = defences.alignment_matrix(base, aligned)
  close(matrix, matrix.T)
  np.testing.assert_array_equal(defences.safe_update(update, matrix, -1.0).update, update)
  close(defences.safe_update(update, matrix, 1.0).update, update @ matrix)
  nothing = defences.safe_update(update, defences.alignment_matrix(base, base), 0.5)
  assert nothing.cosine == 0 and not nothing.update.any()
  whole = defences.alignment_subspace(base, aligned, energy=1 - 1e-6)
  close(whole.projection, jnp.eye(4), 1e-4)
  single = defences.alignment_subspace(base, base + jnp.outer(draw(5), draw(4)))
  assert single.rank == 1
  close(single.projection @ single.projection, single.projection)
  assert defences.alignment_subspace(base, base).rank == 0
  cosines = jnp.array([0.9, 0.2, 0.5])
  close(defences.threshold_for(cosines, 2), 0.5)
  with pytest.raises(InputError, match="number"):
    defences.threshold_for(cosines, 4)


def test_lisa():
  params, anchor = {"w": draw(3)}, {"w": draw(3, seed=1)}
  assert defences.lisa_penalty(params, anchor, 0.0) == 0
  gradient = jax.grad(defences.lisa_penalty)(params, anchor, 2.0)
  close(gradient["w"], 2 * (params["w"] - anchor["w"]))
  steps = jnp.arange(6)
  np.testing.assert_array_equal(defences.lisa_aligns(steps, 1, 2), [1, 0, 0, 1, 0, 0])
  assert not defences.lisa_aligns(steps, 0, 2).any()
  with pytest.raises(InputError, match="rho"):
    defences.lisa_penalty(params, anchor, -1.0)


def test_perplexity_ignores_padding():
  nll = draw(2, 7) ** 2
  mask = jnp.arange(7) < jnp.array([[5], [7]])
  other = jnp.where(mask, nll, jnp.nan)
  close(defences.log_perplexity(other, mask), defences.log_perplexity(nll, mask))
  windowed = defences.windowed_log_perplexity(other, mask, 3)
  close(windowed[0], max(nll[0, :3].mean(), nll[0, 3:5].mean()))
  assert (windowed >= defences.log_perplexity(nll, mask) - 1e-6).all()
  close(defences.windowed_log_perplexity(nll, mask, 99), defences.log_perplexity(nll, mask))
  benign = jnp.linspace(0, 1, 101)
  np.testing.assert_array_equal(defences.blocked(jnp.array([0.98, 1.5]), benign), [False, True])
  with pytest.raises(InputError, match="window"):
    defences.windowed_log_perplexity(nll, mask, 0)


@pytest.mark.parametrize("kind", ["swap", "patch", "insert"])
def test_smoothllm_changes_as_much_as_it_says(kind):
  tokens, alphabet = jnp.arange(10), jnp.array([50, 60])
  same = defences.perturbed(KEY, tokens, alphabet, percent=0, kind=kind)
  np.testing.assert_array_equal(same, tokens)
  new = defences.perturbed(KEY, tokens, alphabet, percent=35, kind=kind)
  strange = np.asarray(jnp.isin(new, alphabet))
  assert strange.sum() == 3
  assert len(new) == (13 if kind == "insert" else 10)
  rest = new[~strange]
  np.testing.assert_array_equal(rest, tokens if kind == "insert" else tokens[~strange])
  if kind == "patch":
    assert np.ptp(np.flatnonzero(strange)) == 2


def test_votes():
  half = jnp.array([True, True, False, False])
  assert not defences.jailbroken(half)
  assert defences.jailbroken(jnp.array([True, True, False]))
  copies = {int(defences.answering_copy(key, half)) for key in jax.random.split(KEY, 20)}
  assert copies == {2, 3}
  with pytest.raises(InputError, match="percent"):
    defences.perturbed_count(10, 101)
  with pytest.raises(InputError, match="kind"):
    defences.perturbed(KEY, jnp.arange(10), half, kind="delete")


# --- watermark ------------------------------------------------------------------------------------


def test_green_rows():
  table = watermark.green_table(KEY, 21, 0.25)
  np.testing.assert_array_equal(table.sum(1), 5)
  np.testing.assert_array_equal(watermark.green_row(KEY, 7, 21, 0.25), table[7])
  assert (table != watermark.green_table(jax.random.key(1), 21, 0.25)).any()
  pairs = watermark.bigrams(jnp.array([[3, 4, 5], [7, 1, 3]]))
  np.testing.assert_array_equal(pairs.previous, [3, 4, 7, 1])  # no pair across two texts
  green = watermark.is_green(KEY, pairs, 21, 0.25)
  np.testing.assert_array_equal(green, table[pairs.previous, pairs.current])
  logits = draw(2, 21)
  np.testing.assert_array_equal(watermark.biased(logits, table[:2], 0.0), logits)


def test_detection_counts_each_pair_once():
  tokens = jnp.array([1, 2, 1, 2, 1, 9, 9])
  mask = jnp.arange(7) < 5
  pairs = watermark.bigrams(tokens, mask)
  green = jnp.ones(6, bool)
  assert watermark.detect(pairs, green, 0.5).scored == 2
  every = watermark.detect(pairs, green, 0.5, distinct=False)
  assert every.scored == 4 and every.green == 4
  close(every.z, 2.0)
  close(every.p_value, stats.norm.sf(2.0))


def test_a_watermark_is_found_and_fades_under_substitution():
  table = watermark.green_table(KEY, 30, 0.25)
  rng, text, greens = np.random.default_rng(0), [0], np.asarray(table)
  for _ in range(300):
    p = np.exp(2.0 * greens[text[-1]])
    text.append(int(rng.choice(30, p=p / p.sum())))
  plain = jnp.asarray(rng.integers(0, 30, 300))

  def z(tokens):
    pairs = watermark.bigrams(jnp.asarray(tokens))
    return float(watermark.detect(pairs, table[pairs.previous, pairs.current], 0.25).z)

  attacked = watermark.substituted(KEY, jnp.asarray(text), 0.5, jnp.arange(30))
  assert z(text) > 6 and abs(z(plain)) < 4
  assert z(attacked) < 0.6 * z(text)
  np.testing.assert_array_equal(watermark.substituted(KEY, plain, 0.0, jnp.arange(30)), plain)


def test_bad_watermarks():
  with pytest.raises(InputError, match="two tokens"):
    watermark.bigrams(jnp.array([4]))
  with pytest.raises(InputError, match="gamma"):
    watermark.green_table(KEY, 8, 1.0)
  with pytest.raises(InputError, match="share"):
    watermark.substituted(KEY, jnp.arange(3), 1.5, jnp.arange(3))
