"""Confidences of logits, samples, dropout passes and words: ranges and limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.stats import confidence

V = 7
STATISTICS = jax.jit(confidence.token_statistics)


@pytest.fixture
def logits():
  return (3 * np.random.default_rng(0).normal(size=(4, 5, V))).astype("f4")


def test_ranges_and_shifts(logits):
  tokens = logits.argmax(-1)
  plain = STATISTICS(logits, tokens)
  assert ((np.exp(plain.max_log_prob) >= 1 / V) & (plain.max_log_prob <= 0)).all()
  assert ((plain.entropy >= 0) & (plain.entropy <= np.log(V))).all()
  np.testing.assert_allclose(plain.log_prob, plain.max_log_prob, rtol=1e-5)
  moved = STATISTICS(logits + 3, tokens)
  np.testing.assert_allclose(moved.energy, plain.energy + 3, rtol=1e-5)
  np.testing.assert_allclose(moved.entropy, plain.entropy, atol=1e-4)
  flat, sharp = STATISTICS(logits, tokens, 50.0), STATISTICS(logits, tokens, 0.02)
  np.testing.assert_allclose(np.exp(flat.max_log_prob), 1 / V, atol=0.05)
  np.testing.assert_allclose(flat.entropy, np.log(V), atol=0.05)
  assert np.exp(sharp.max_log_prob).mean() > 0.95
  np.testing.assert_allclose(flat.log_prob, flat.max_log_prob, rtol=1e-5)  # the same arg-max


def test_masked_tokens_do_not_matter(logits):
  mask = np.arange(5) < np.array([5, 3, 1, 0])[:, None]
  values = np.where(mask, logits[..., 0], np.nan)
  means = confidence.mean_over(jnp.asarray(values), jnp.asarray(mask))
  np.testing.assert_allclose(means[1], logits[1, :3, 0].mean(), rtol=1e-5)
  assert means[3] == 0


@pytest.mark.parametrize("vocabulary", [V, V - 1])  # an even one is worked out in halves on CPU
def test_many_temperatures_are_each_alone(logits, vocabulary):
  logits = logits[..., :vocabulary]
  tokens = jnp.zeros(logits.shape[:-1], int)
  plain, every = confidence.statistics_at_scales(logits, tokens, (8, 3, 1))
  chex.assert_trees_all_close(
    plain, confidence.token_statistics(logits, tokens), rtol=1e-5, atol=1e-6
  )
  assert every.shape == (*logits.shape[:-1], 3)
  for column, power in enumerate((8, 3, 1)):
    alone = confidence.token_statistics(logits, tokens, 4.0 / power).max_log_prob
    np.testing.assert_allclose(every[..., column], alone, rtol=1e-5, atol=1e-6)


def test_self_consistency():
  answers = jnp.array([[4, 4, 2, 1], [3, 2, 1, 0], [5, 5, 5, 5], [2, 1, 1, 2]])
  majority, share = confidence.self_consistency(answers)
  np.testing.assert_array_equal(majority, [4, 0, 5, 1])
  np.testing.assert_allclose(share, [0.5, 0.25, 1, 0.5])
  given = jnp.array([[False, False, True, True], [False] * 4, [True] * 4, [True] * 4])
  majority, share = confidence.self_consistency(answers, given)
  np.testing.assert_array_equal(majority[:1], [1])
  np.testing.assert_allclose(share[:2], [0.25, 0])


def test_dropout_statistics():
  rng = np.random.default_rng(0)
  probs = jnp.asarray(rng.dirichlet(np.ones(V), (6, 4)), jnp.float32)
  found = confidence.dropout_statistics(probs)
  assert (found.mutual_information >= 0).all()
  assert (found.max_mean_prob >= 1 / V).all()
  same = confidence.dropout_statistics(jnp.broadcast_to(probs[:1], probs.shape))
  np.testing.assert_allclose(same.mutual_information, 0, atol=1e-6)


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("85", 0.85), ("I am 90% sure.", 0.9), ("Between 120 and 70", 0.7), ("-5, no: 60", 0.6),
    ("99.5", 0.995), ("very sure", None), ("", None), ("250", None), ("0", 0.0), ("100.", 1.0),
  ],
)  # fmt: skip
def test_verbalised(text, value):
  assert confidence.verbalised(text) == value
