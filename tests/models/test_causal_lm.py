"""Causal LMs: both forms, padding, windows, cache, attention's own backward pass, configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxmethods.models.attention import attention, attention_rows, masked_bias
from jaxmethods.models.causal_lm import CausalLM, table
from jaxmethods.models.causal_lm_config import CausalLMConfig, Rope
from jaxmethods.models.probe import Probe, masked_mean
from jaxmethods.models.weights import export_params, import_params

CONFIG = CausalLMConfig(
  vocab_size=23, width=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20,
  qkv_bias=True, qk_norm=True, tied=True, windows=(None, 3, None), init_std=0.5,
)  # fmt: skip
LENGTH, PADDING = 8, 3
LLAMA = {
  "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2,
  "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def apply(model):
  def run(params, ids, mask=None, cache=None, cache_size=None, queries=None):
    probe = None if mask is None else Probe(masked_mean(mask), queries)
    return model.apply(
      {"params": params}, ids, mask=mask, cache=cache, cache_size=cache_size, probe=probe
    )

  return jax.jit(run, static_argnames="cache_size")


@pytest.fixture(scope="module")
def problem():
  """Both forms with the same parameters, and a batch whose second row has padding on the left."""
  scanned, unrolled = (CausalLM(CONFIG, scan_layers=form) for form in (True, False))
  params = jax.jit(scanned.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
  rules = table(CONFIG)
  shapes = jax.eval_shape(unrolled.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
  numbered = import_params(export_params(params, rules), rules, shapes)
  ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, LENGTH))
  mask = np.ones((2, LENGTH), bool)
  mask[1, :PADDING] = False
  forms = {"scanned": (apply(scanned), params), "unrolled": (apply(unrolled), numbered)}
  queries = np.array([[LENGTH - 1, 5], [LENGTH - 1, 5]])
  outs = {name: run(p, ids, mask, queries=queries) for name, (run, p) in forms.items()}
  return forms, ids, mask, outs


def test_both_forms_agree(problem):
  _, _, mask, outs = problem
  np.testing.assert_allclose(
    outs["scanned"].logits[mask], outs["unrolled"].logits[mask], rtol=1e-5, atol=1e-5
  )
  for name in ("states", "final", "attention"):
    ours, theirs = (getattr(outs[form], name) for form in ("scanned", "unrolled"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_summaries_have_no_token_axis_and_padding_gets_no_attention(problem):
  _, _, mask, outs = problem
  out = outs["scanned"]
  assert out.states.shape == (CONFIG.num_layers + 1, 2, CONFIG.width)
  assert out.attention.shape == (CONFIG.num_layers, 2, CONFIG.num_heads, 2, LENGTH)
  np.testing.assert_allclose(out.attention.sum(-1), 1, rtol=1e-5)
  assert not out.attention[:, 1, :, :, :PADDING].any()
  assert not out.attention[:, :, :, 1, 6:].any()  # query 5 sees no later token
  slides = [window is not None for window in CONFIG.windows]
  np.testing.assert_array_equal(
    (out.attention[:, 0, :, 0, : LENGTH - 3] > 0).any((1, 2)), np.logical_not(slides)
  )
  for row in range(2):
    final = out.hidden[row][mask[row]].mean(0)
    np.testing.assert_allclose(out.final[row], final, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_padding_and_cache_change_nothing(problem, form):
  """The padded row alone, token by token after a prefill, with windows in one layer of three."""
  forms, ids, _, outs = problem
  run, params = forms[form]
  alone = ids[1:, PADDING:]
  out = run(params, alone[:, :3], cache_size=LENGTH)
  logits = [out.logits]
  for t in range(3, alone.shape[1]):
    out = run(params, alone[:, t : t + 1], cache=out.cache)
    logits.append(out.logits)
  np.testing.assert_allclose(
    np.concatenate(logits, 1)[0], outs[form].logits[1, PADDING:], rtol=1e-5, atol=1e-5
  )


def test_program_size_is_constant_in_depth():
  def size(layers):
    model = CausalLM(dataclasses.replace(CONFIG, num_layers=layers, windows=()), scan_layers=True)
    ids = jnp.zeros((1, 4), int)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    return len(jax.make_jaxpr(lambda v: model.apply(v, ids).logits)(variables).pretty_print())

  assert abs(size(4) - size(32)) < 200  # digits of the shapes


def test_attention_and_its_gradients_are_those_of_softmax():
  key = jax.random.split(jax.random.key(0), 4)
  query = jax.random.normal(key[0], (2, 3, 2, 5, 4))
  keys, value = (jax.random.normal(k, (2, 3, 7, 4)) for k in key[1:3])
  bias = masked_bias(jnp.arange(7) <= jnp.arange(5)[:, None] + 1)[None]

  def plain(query, keys, value):
    scores = jnp.einsum("bkgtd,bksd->bkgts", query, keys) + bias[:, None, None]
    return jnp.einsum("bkgts,bksd->bkgtd", jax.nn.softmax(scores), value)

  weight = jax.random.normal(key[3], query.shape)
  ours = lambda *x: (weight * attention(*x, bias)).sum()
  theirs = lambda *x: (weight * plain(*x)).sum()
  inputs = query, keys, value
  np.testing.assert_allclose(attention(*inputs, bias), plain(*inputs), rtol=1e-5, atol=1e-6)
  for a, b in zip(
    jax.grad(ours, (0, 1, 2))(*inputs), jax.grad(theirs, (0, 1, 2))(*inputs), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  rows = attention_rows(query, keys, bias, jnp.array([[4, 0], [2, 2]]))
  assert not rows[0, :, 1, 2:].any()  # query 0 sees keys 0 and 1
  unmasked = attention_rows(query, keys, jnp.zeros((1, 5, 7)), jnp.zeros((2, 1), int))
  scores = jnp.einsum("bkgtd,bksd->bkgts", query, keys)[:, :, :, :1].reshape(2, 6, 1, 7)
  np.testing.assert_allclose(unmasked, jax.nn.softmax(scores), rtol=1e-5)


def test_attention_gradients_keep_the_type_of_bfloat16():
  x = jnp.ones((1, 1, 2, 3, 4), jnp.bfloat16)
  loss = lambda *y: attention(*y, masked_bias(jnp.tri(3, dtype=bool))[None]).sum().astype(float)
  grads = jax.grad(loss, (0, 1, 2))(x, x[:, :, 0], x[:, :, 0])
  assert [g.dtype for g in grads] == [jnp.bfloat16] * 3


def test_embeddings_in_place_of_ids(problem):
  model, (forms, ids, mask, outs) = CausalLM(CONFIG), problem
  variables = {"params": forms["unrolled"][1]}

  @jax.jit
  def run(variables):
    embeddings = model.apply(variables, ids, method="embed_tokens")
    hidden = model.apply(variables, embeddings=embeddings, mask=mask, logits="none").hidden
    return model.apply(variables, hidden, method="logits")

  np.testing.assert_allclose(
    run(variables)[mask], outs["unrolled"].logits[mask], rtol=1e-5, atol=1e-5
  )
  with pytest.raises(ValueError, match="exactly one of ids and embeddings"):
    model.apply(variables)


def test_a_query_that_sees_nothing_is_zero_and_has_no_gradient():
  """Left padding of two: queries 0 and 1 see nothing; finite differences agree everywhere."""
  key = jax.random.split(jax.random.key(0), 3)
  query = jax.random.normal(key[0], (1, 2, 2, 4, 3))
  keys, value = (jax.random.normal(k, (1, 2, 4, 3)) for k in key[1:])
  bias = masked_bias(jnp.tri(4, dtype=bool) & (jnp.arange(4) >= 2))[None]
  run = lambda *x: attention(*x, bias)
  assert not run(query, keys, value)[..., :2, :].any()
  check_grads(run, (query, keys, value), 1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)
  blind = jax.grad(lambda *x: run(*x)[..., :2, :].sum(), (0, 1, 2))(query, keys, value)
  assert not any(x.any() for x in blind)
  rows = attention_rows(query, keys, bias, jnp.array([[0, 3]]))
  np.testing.assert_allclose(rows.sum(-1), [[[0, 1]] * 4], rtol=1e-6)


def test_llama3_rope_slows_only_long_wavelengths():
  positions = jnp.array([[1]])
  plain = Rope(10000.0)
  scaled = Rope(10000.0, "llama3", factor=8.0, low=1.0, high=4.0, context=512)
  angle = lambda rope: np.arctan2(*(np.asarray(x)[0, 0] for x in rope.angles(positions, 64)[::-1]))
  before, after = angle(plain), angle(scaled)
  wavelength = 2 * np.pi / before
  assert (wavelength < 512 / 4).any() and (wavelength > 512).any()
  np.testing.assert_allclose(after[wavelength < 128], before[wavelength < 128], rtol=1e-5)
  np.testing.assert_allclose(after[wavelength > 512], before[wavelength > 512] / 8, rtol=1e-4)
  between = (wavelength > 128) & (wavelength < 512)
  assert (after[between] < before[between]).all() and (after[between] > before[between] / 8).all()


def test_sequence_longer_than_the_cache(problem):
  model = CausalLM(CONFIG)
  params, ids = problem[0]["unrolled"][1], problem[1]
  with pytest.raises(ValueError, match="8 tokens is longer than the cache of 7"):
    model.apply({"params": params}, ids, cache_size=7)
  cache = problem[0]["unrolled"][0](params, ids, cache_size=9).cache
  with pytest.raises(ValueError, match="10 tokens is longer than the cache of 9"):
    model.apply({"params": params}, ids[:, :2], cache=cache)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "gpt2"}, r"model_type 'gpt2' .*\(llama, mistral, qwen2, qwen3\)"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"intermediate_size": None}, "intermediate_size: is missing .* llama"),
    ({"num_key_value_heads": 3}, "2 query heads cannot share 3 key heads"),
  ],
)
def test_configs_that_are_not_supported(change, message):
  config = {k: v for k, v in (LLAMA | change).items() if v is not None}
  with pytest.raises(ValueError, match=message):
    CausalLMConfig.from_hugging_face(config)


def test_configs_of_either_release_and_their_windows():
  read = CausalLMConfig.from_hugging_face
  new = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
  old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
  assert read(LLAMA | {"rope_parameters": new}) == read(LLAMA | old)
  assert read(LLAMA | old).rope == Rope(5e5, "linear", 2.0)
  mistral = LLAMA | {"model_type": "mistral", "sliding_window": 5}
  assert read(mistral).windows == (5, 5)
  assert read(mistral | {"sliding_window": None}).windows == ()
  qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
  assert read(qwen).windows == () and read(qwen).qkv_bias and not read(qwen).out_bias
  assert read(qwen | {"use_sliding_window": True}).windows == (None, 5)
