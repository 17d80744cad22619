"""Generation: what the loop writes is what the model says, one text at a time or in a padded batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.models.generate import generate, left_pad, restrict

CONFIG = CausalLMConfig(
  vocab_size=29, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24,
  init_std=0.6,
)  # fmt: skip
MODEL = CausalLM(CONFIG)
PROMPTS = [[3, 5, 7, 2, 11], [13, 4], [1, 8, 6]]
NEW = 6


@pytest.fixture(scope="module")
def variables():
  return jax.jit(MODEL.init)(jax.random.key(2), jnp.zeros((1, 1), int))


@pytest.fixture(scope="module")
def greedy(variables):
  return np.asarray(run(variables).tokens)


def run(variables, prompts=PROMPTS, **options):
  ids, mask = left_pad(prompts)
  options = {"max_new_tokens": NEW} | options
  return jax.jit(lambda v: generate(MODEL, v, ids, mask, **options))(variables)


def test_greedy_is_the_argmax_of_the_whole_text(variables, greedy):
  """One forward pass over each finished text says the same token at every step."""
  forward = jax.jit(lambda ids, mask: MODEL.apply(variables, ids, mask=mask).logits)
  ids, mask = left_pad([p + row.tolist() for p, row in zip(PROMPTS, greedy, strict=True)])
  said = np.asarray(forward(ids, mask)).argmax(-1)[:, -NEW - 1 : -1]
  np.testing.assert_array_equal(said, greedy)
  assert len(np.unique(greedy)) > 3  # not one token over and over


def test_cache_on_and_off_and_a_larger_one(variables, greedy):
  np.testing.assert_array_equal(run(variables, use_cache=False).tokens, greedy)
  np.testing.assert_array_equal(run(variables, cache_size=32).tokens, greedy)


def test_a_text_ends_at_eos_and_the_others_go_on(variables, greedy):
  eos = int(greedy[0, 2])
  out = run(variables, eos=(eos,), pad=28)
  for row, tokens in enumerate(greedy):
    ends = np.flatnonzero(tokens == eos)
    length = ends[0] + 1 if len(ends) else NEW
    assert out.lengths[row] == length
    np.testing.assert_array_equal(out.tokens[row, :length], tokens[:length])
    assert (out.tokens[row, length:] == 28).all()
  assert int(out.lengths[0]) <= 3


def test_sampling(variables, greedy):
  key = jax.random.key(0)
  cold = run(variables, key=key, temperature=3.0, top_k=1)
  np.testing.assert_array_equal(cold.tokens, greedy)  # one candidate is no choice
  free = run(variables, key=key, temperature=3.0, top_p=0.9)
  assert (np.asarray(free.tokens) != greedy).any()
  assert (
    np.asarray(run(variables, key=key, temperature=3.0, top_p=0.9).tokens) == free.tokens
  ).all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_several_samples_of_a_prompt(variables, greedy, use_cache):
  """They are read once, and each is what the model would say: drawn apart, or greedily the same."""
  options = {"num_samples": 3, "use_cache": use_cache}
  np.testing.assert_array_equal(run(variables, **options).tokens, greedy.repeat(3, 0))
  drawn = run(variables, key=jax.random.key(1), temperature=3.0, **options)
  tokens = np.asarray(drawn.tokens).reshape(len(PROMPTS), 3, NEW)
  assert (tokens[:, 0] != tokens[:, 1]).any(1).all()
  # Their log-probabilities are those of a forward pass over prompt and continuation.
  ids, mask = left_pad(
    [p + row.tolist() for p, rows in zip(PROMPTS, tokens, strict=True) for row in rows]
  )
  logits = MODEL.apply(variables, ids, mask=mask).logits[:, -NEW - 1 : -1]
  expected = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, -NEW:, None], -1)[..., 0]
  np.testing.assert_allclose(drawn.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_restrict():
  logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
  kept = lambda **k: np.isfinite(restrict(logits, k.get("top_k"), k.get("top_p")))[0].tolist()
  assert kept() == [True] * 4
  assert kept(top_k=2) == [False, True, False, True]
  assert kept(top_p=0.69) == [False, True, False, True]
  assert kept(top_p=0.71) == [False, True, True, True]
  assert kept(top_p=0.01) == [False, True, False, False]
  # Of the two that top_k leaves, 0.4 / 0.7 is already more than a half.
  assert kept(top_k=2, top_p=0.5) == [False, True, False, False]
  assert kept(top_k=9) == [True] * 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"cache_size": 10}, "prompt of 5 tokens and 6 new ones are longer than the cache of 10"),
    ({"num_samples": 0}, "num_samples: must be at least 1"),
    ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
    ({"temperature": 1.0}, "needs a key"),
    ({"temperature": -1.0}, "impossible sampling: temperature=-1.0"),
    ({"top_p": 0.0}, "impossible sampling"),
    ({"top_k": 0}, "impossible sampling"),
  ],
)
def test_impossible_requests(variables, options, message):
  with pytest.raises(ValueError, match=message):
    run(variables, **options)


def test_left_pad_refuses_an_empty_prompt():
  with pytest.raises(ValueError, match="prompt 1 is empty"):
    left_pad([[1], []])
