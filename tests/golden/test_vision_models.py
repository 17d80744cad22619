"""ViT and BERT against the published implementations (`models.npz`)."""

import json

import jax
import numpy as np
import pytest

from jaxmethods.models.bert import BERT_TABLE, Bert, BertConfig
from jaxmethods.models.probe import Probe
from jaxmethods.models.vit import VIT_TABLE, ViT, ViTConfig
from jaxmethods.models.weights import export_params, import_params
from tests.tensors import assert_same_bytes, below

ATOL = 2e-5


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def scan_layers(request):
  return request.param


@pytest.fixture
def vit(golden_file, scan_layers):
  """(golden arrays, model, params, pixels in our layout)."""
  golden = golden_file("models")
  config = ViTConfig.from_hugging_face(
    json.loads(str(golden["vit/config_json"])), scan_layers=scan_layers
  )
  model = ViT(config)
  pixels = golden["vit/pixels_nchw"].transpose(0, 2, 3, 1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]
  return golden, model, import_params(below(golden, "vit/params/"), VIT_TABLE, shapes), pixels


@pytest.fixture
def bert(golden_file, scan_layers):
  """(golden arrays, model, params)."""
  golden = golden_file("models")
  config = BertConfig.from_hugging_face(
    json.loads(str(golden["bert/config_json"])), scan_layers=scan_layers
  )
  model = Bert(config)
  shapes = jax.eval_shape(model.init, jax.random.key(0), golden["bert/input_ids"])["params"]
  return golden, model, import_params(below(golden, "bert/params/"), BERT_TABLE, shapes)


def test_vit(vit):
  golden, model, params, pixels = vit
  expected = golden["vit/expected_attention_last"]
  everyone = np.broadcast_to(np.arange(expected.shape[-1]), expected.shape[::3])
  probe = Probe(queries=everyone)
  out = jax.jit(lambda p, x: model.apply({"params": p}, x, probe=probe))(params, pixels)
  np.testing.assert_allclose(out.hidden, golden["vit/expected_last_hidden"], rtol=0, atol=ATOL)
  assert len(out.attention) == model.config.encoder.num_layers
  np.testing.assert_allclose(out.attention[-1], expected, rtol=0, atol=ATOL)


def test_probe_sees_what_a_shorter_run_returns(vit):
  golden, model, params, pixels = vit
  first = np.zeros((len(pixels), 1), int)
  mean = lambda hidden: hidden.mean(1)
  probe = Probe(mean, first, lambda rows: rows[:, :, 0])

  @jax.jit
  def run(params):
    call = lambda *args, **keys: model.apply({"params": params}, *args, **keys)
    tokens = call(pixels, method="embed")
    depths = range(model.config.encoder.num_layers + 1)
    return [call(tokens, depth=d, probe=probe, method="encode") for d in depths]

  runs = run(params)
  for depth, out in enumerate(runs):
    assert len(out.states) == depth + 1
    np.testing.assert_allclose(runs[-1].states[depth], mean(out.hidden), rtol=0, atol=1e-6)
    np.testing.assert_allclose(out.states, runs[-1].states[: depth + 1], rtol=0, atol=1e-6)
  expected = golden["vit/expected_attention_last"][:, :, 0]
  np.testing.assert_allclose(runs[-1].attention[-1], expected, rtol=0, atol=ATOL)


def test_bert(bert):
  golden, model, params = bert
  mask = golden["bert/attention_mask"]
  run = jax.jit(lambda p, ids, mask: model.apply({"params": p}, ids, mask))
  hidden = run(params, golden["bert/input_ids"], mask).hidden
  real = mask.astype(bool)
  expected = golden["bert/expected_last_hidden"]
  np.testing.assert_allclose(np.asarray(hidden)[real], expected[real], rtol=0, atol=ATOL)


def test_vit_export_undoes_import(vit):
  golden, _, params, _ = vit
  assert_same_bytes(export_params(params, VIT_TABLE), below(golden, "vit/params/"))


def test_bert_export_undoes_import(bert):
  golden, _, params = bert
  assert_same_bytes(export_params(params, BERT_TABLE), below(golden, "bert/params/"))
