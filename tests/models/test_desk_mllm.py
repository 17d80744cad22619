"""The desk model: one look at an image for all its questions, and greedy answers in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.adapters import prompts
from jaxmethods.models.causal_lm import CausalLMConfig
from jaxmethods.models.desk_mllm import DeskConfig, DeskMLLM
from jaxmethods.models.generate import generate
from jaxmethods.models.probe import Probe
from jaxmethods.models.transformer import EncoderConfig

LANGUAGE = CausalLMConfig(
  vocab_size=20, width=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, mlp_width=12,
  init_std=0.5,
)  # fmt: skip
TOWER = EncoderConfig(width=8, num_layers=1, heads=2, hidden=8)
MODEL = DeskMLLM(DeskConfig(language=LANGUAGE, tower=TOWER, image_size=16, stem=4))


@pytest.fixture(scope="module")
def problem():
  """(params, pixels (3, 16, 16, 3), ids (3, 2, 5))."""
  rng = np.random.default_rng(0)
  pixels = jnp.asarray(rng.integers(0, 256, (3, 16, 16, 3)), jnp.uint8)
  ids = jnp.asarray(rng.integers(0, LANGUAGE.vocab_size, (3, 2, 5)), jnp.int32)
  params = jax.jit(lambda key: MODEL.init(key, ids, pixels=pixels))(jax.random.key(0))["params"]
  return params, pixels, ids


def apply(params, *args, **kwargs):
  return jax.jit(lambda p, a, k: MODEL.apply({"params": p}, *a, **k))(params, args, kwargs)


def test_one_look_serves_all_questions(problem):
  """Equal to the language model on the image tokens and one text after them, for every text."""
  params, pixels, ids = problem
  features = jax.jit(lambda p, x: MODEL.apply({"params": p}, x, method="encode"))(params, pixels)
  assert features.shape == (3, MODEL.config.num_tokens, TOWER.width)

  def whole(bound):
    image = bound.projector(features).repeat(ids.shape[1], axis=0)
    text = bound.language.embed_tokens(ids.reshape(-1, ids.shape[-1]))
    return bound.language(embeddings=jnp.concatenate([image, text], axis=1)).logits

  expected = jax.jit(lambda p: MODEL.apply({"params": p}, method=whole))(params)
  expected = expected[:, features.shape[1] :].reshape(*ids.shape, -1)
  np.testing.assert_allclose(
    apply(params, ids, pixels=pixels).logits, expected, rtol=2e-4, atol=2e-5
  )
  one = apply(params, ids[:, 1], features=features).logits
  np.testing.assert_allclose(one, expected[:, 1], rtol=2e-4, atol=2e-5)


def test_greedy_answers_are_what_one_pass_calls_right(problem):
  """Texts padded on the left are continued by the words that one pass on question and answer picks."""
  params, pixels, ids = problem
  ids, new = ids[:, 0], 3
  lengths = np.array([5, 4, 2])
  mask = np.arange(5) >= 5 - lengths[:, None]
  answer = jax.jit(
    lambda p: (
      generate(
        MODEL, {"params": p}, ids, jnp.asarray(mask), max_new_tokens=new, pixels=pixels
      ).tokens
    )
  )(params)
  # The same texts padded on the right, followed by the answer but for its last word.
  text = np.zeros((3, 5 + new - 1), np.int32)
  for row, length in enumerate(lengths):
    joined = np.concatenate([ids[row, 5 - length :], answer[row, :-1]])
    text[row, : len(joined)] = joined
  words = np.asarray(apply(params, jnp.asarray(text), pixels=pixels).logits.argmax(-1))
  for row, length in enumerate(lengths):
    np.testing.assert_array_equal(words[row, length - 1 : length - 1 + new], answer[row])


def test_prompt_and_prefix(problem):
  params, pixels, ids = problem
  plain = apply(params, ids, pixels=pixels).logits
  prompt = prompts.init_prompt(jax.random.key(1), params, 3)["prompt"]
  prompted = apply(params, ids, pixels=pixels, prompt=prompt).logits
  assert prompted.shape == plain.shape
  # A prompt is what words at its place would be.
  tokens = jnp.array([4, 7, 1])
  words = params["language"]["embed"]["embedding"][tokens]
  longer = jnp.concatenate([jnp.broadcast_to(tokens, (3, 2, 3)), ids], axis=-1)
  np.testing.assert_allclose(
    apply(params, ids, pixels=pixels, prompt=words).logits,
    apply(params, longer, pixels=pixels).logits[:, :, 3:],
    rtol=2e-4,
    atol=2e-5,
  )
  prefix = prompts.init_prefix(jax.random.key(2), LANGUAGE, 2)
  changed = apply(params, ids, pixels=pixels, prefix=prefix).logits
  assert float(jnp.abs(changed - plain).max()) > 1e-3


def test_attention_of_a_text_token_over_the_image(problem):
  params, pixels, ids = problem
  queries = jnp.full((6, 1), 4)
  run = jax.jit(
    lambda p: MODEL.apply({"params": p}, ids, pixels=pixels, probe=Probe(queries=queries)).attention
  )
  rows = run(params)
  assert rows.shape == (2, 6, 2, 1, MODEL.config.num_tokens + 5)
  np.testing.assert_allclose(rows.sum(-1), 1, rtol=1e-5)


def test_an_image_is_needed_once(problem):
  params, _, ids = problem
  with pytest.raises(ValueError, match="exactly one of features and pixels"):
    MODEL.apply({"params": params}, ids)
  with pytest.raises(ValueError, match="image_size: must be a multiple of 8"):
    DeskConfig(language=LANGUAGE, tower=TOWER, image_size=20)
