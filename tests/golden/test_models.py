"""Causal LMs against outputs recorded from the published implementations (float32, eager attention)."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig, table
from jaxmethods.models.probe import Probe, masked_mean
from jaxmethods.models.weights import export_params, import_params

TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def recorded(request, golden_folder):
  """Everything recorded of one family, without its prefix."""
  prefix = request.param + "/"
  with np.load(golden_folder / "models.npz") as golden:
    return {k.removeprefix(prefix): golden[k] for k in golden.files if k.startswith(prefix)}


@pytest.fixture(scope="module")
def tensors(recorded):
  return {k.removeprefix("params/"): v for k, v in recorded.items() if k.startswith("params/")}


@pytest.fixture(scope="module", params=["unrolled", "scanned"])
def model(request, recorded):
  config = CausalLMConfig.from_hugging_face(json.loads(str(recorded["config_json"])))
  return CausalLM(config, scan_layers=request.param == "scanned")


@pytest.fixture(scope="module")
def params(model, tensors):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
  return import_params(tensors, table(model.config), shapes)


def everything(batch, length):
  """A probe that loses nothing: the mean over each single token, the attention of each query."""
  eye = jnp.broadcast_to(jnp.eye(length), (batch, length, length))
  return Probe(masked_mean(eye), jnp.broadcast_to(jnp.arange(length), (batch, length)))


@pytest.fixture(scope="module")
def apply(model):
  """The compiled model; with everything in it seen where `probed`."""

  def run(params, ids, mask, positions, cache, cache_size=None, probed=False):
    return model.apply(
      {"params": params}, ids, mask=mask, positions=positions, cache=cache, cache_size=cache_size,
      probe=everything(*ids.shape) if probed else None,
    )  # fmt: skip

  return jax.jit(run, static_argnames=("cache_size", "probed"))


def test_logits_hidden_states_and_attention(apply, params, recorded):
  ids, mask = recorded["input_ids"], recorded["attention_mask"]
  assert not mask.all()  # or the padding would not be tested
  out = apply(params, ids, mask, recorded["position_ids"], None, probed=True)
  real = mask.astype(bool)
  np.testing.assert_allclose(
    np.asarray(out.logits)[real], recorded["expected_logits"][real], **TOLERANCE
  )
  states = np.concatenate([out.states[:-1], out.final[None]])
  for layer, (ours, theirs) in enumerate(
    zip(states, recorded["expected_hidden_states"], strict=True)
  ):
    np.testing.assert_allclose(ours[real], theirs[real], **TOLERANCE, err_msg=f"state {layer}")
  rows = np.asarray(out.attention[-1]).swapaxes(1, 2)
  theirs = recorded["expected_attention_last"].swapaxes(1, 2)
  np.testing.assert_allclose(rows[real], theirs[real], **TOLERANCE)


def test_cache_gives_the_same_logits(apply, params, recorded):
  """Prefill of a half, then several tokens at once, then one at a time."""
  ids, mask, positions = (recorded[k] for k in ("input_ids", "attention_mask", "position_ids"))
  real, length = mask.astype(bool), ids.shape[1]
  stops = sorted({0, length // 2, length - 2, length - 1, length})
  cache, parts = None, []
  for a, b in itertools.pairwise(stops):
    size = length + 3 if cache is None else None
    out = apply(params, ids[:, a:b], mask[:, a:b], positions[:, a:b], cache, cache_size=size)
    cache = out.cache
    parts.append(out.logits)
  assert int(cache.length) == length
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1)[real], recorded["expected_logits"][real], **TOLERANCE
  )


def test_import_then_export_is_byte_identical(model, params, tensors):
  exported = export_params(params, table(model.config))
  if model.config.tied:  # the second name of the embedding is not written again
    tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
  assert exported.keys() == tensors.keys()
  for name, value in tensors.items():
    assert exported[name].dtype == value.dtype
    assert exported[name].tobytes() == value.tobytes(), name
