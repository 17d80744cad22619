"""Dropout of the encoder: where it is, how much, and only in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.models.bert import Bert, BertConfig
from jaxmethods.models.transformer import Encoder, EncoderConfig

SHAPE = {"width": 8, "num_layers": 2, "heads": 2, "hidden": 12}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300, 8)), jnp.float32)


@functools.partial(jax.jit, static_argnames=("train", "depth", "dropout", "attention_dropout"))
def encode(params, seed=0, train=True, depth=1, **rates):
  encoder = Encoder(EncoderConfig(**SHAPE, **rates))
  rngs = {"dropout": jax.random.key(seed)}
  return encoder.apply({"params": params}, X, depth=depth, train=train, rngs=rngs).hidden


@pytest.fixture(scope="module")
def params():
  """Blocks whose two branches each add 1 wherever nothing is dropped; attention looks everywhere."""
  shapes = jax.eval_shape(Encoder(EncoderConfig(**SHAPE)).init, jax.random.key(0), X)["params"]
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
  for i in range(2):
    layer = params[f"layers_{i}"]
    layer["attention"]["value"]["bias"] += 1
    layer["attention"]["out"]["kernel"] += jnp.eye(8)
    layer["mlp"]["fc_2"]["bias"] += 1
  return params


def test_embeddings_and_branches(params):
  rate = 0.25
  embedded = encode(params, depth=0, dropout=rate)
  kept = embedded != 0
  np.testing.assert_allclose(embedded[kept], X[kept] / (1 - rate), rtol=1e-6)
  assert abs(kept.mean() - (1 - rate)) < 0.03
  # The two branches of a block drop independently of each other and of the embeddings.
  added = (encode(params, dropout=rate) - embedded) * (1 - rate)
  shares = [(jnp.abs(added - count) < 1e-4).mean() for count in (0, 1, 2)]
  expected = [rate**2, 2 * rate * (1 - rate), (1 - rate) ** 2]
  np.testing.assert_allclose(shares, expected, atol=0.03)


def test_attention_weights(params):
  rate = 0.4
  added = encode(params, attention_dropout=rate) - X - 1
  # Every query's 300 equal weights, dropped anew: mean 1, and the variance of that many coins.
  np.testing.assert_allclose(added.mean(), 1.0, atol=0.01)
  np.testing.assert_allclose(added.var(), rate / (1 - rate) / 300, rtol=0.2)


def test_drawn_anew_by_key_and_layer_but_not_outside_training(params):
  rates = {"dropout": 0.3, "attention_dropout": 0.3}
  first, again, other = (encode(params, seed=seed, depth=2, **rates) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).mean() > 0.3
  plain = encode(params, train=False, depth=2)
  np.testing.assert_array_equal(encode(params, train=False, depth=2, **rates), plain)
  one = encode(params, depth=1, **rates) - encode(params, depth=0, **rates)
  two = first - encode(params, depth=1, **rates)
  assert (jnp.abs(one - two) > 1e-3).mean() > 0.3


def test_bert_trains_with_the_rates_of_its_config():
  published = {
    "model_type": "bert", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 11,
    "max_position_embeddings": 6, "type_vocab_size": 2, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
  }  # fmt: skip
  config = BertConfig.from_hugging_face(published, scan_layers=True)
  assert (config.encoder.dropout, config.encoder.attention_dropout) == (0.1, 0.2)
  bert, ids = Bert(config), jnp.arange(6)[None]
  variables = jax.jit(bert.init)(jax.random.key(0), ids)

  @jax.jit
  def hidden(key):
    return bert.apply(variables, ids, train=True, rngs={"dropout": key}).hidden

  first, second = hidden(jax.random.key(0)), hidden(jax.random.key(1))
  assert jnp.isfinite(first).all() and (first != second).mean() > 0.9


def test_rates_that_cannot_be():
  for name in ("dropout", "attention_dropout", "drop_path"):
    with pytest.raises(InputError, match=rf"{name}: must be in \[0, 1\), got 1\.0"):
      EncoderConfig(**SHAPE, **{name: 1.0})
