"""The LLaVA-style model against the published implementation (`models.npz`)."""

import json

import jax
import numpy as np
import pytest

from jaxmethods.models.generate import generate
from jaxmethods.models.mllm import MLLM, MLLMConfig, check_images, table
from jaxmethods.models.weights import export_params, import_params
from tests.tensors import assert_same_bytes, below


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def case(request, golden_file):
  """(recorded arrays, model, params, pixels in our layout)."""
  recorded = below(golden_file("models"), "llava/")
  config = MLLMConfig.from_hugging_face(json.loads(str(recorded["config_json"])))
  model = MLLM(config, scan_layers=request.param)
  pixels = recorded["pixels_nchw"].transpose(0, 2, 3, 1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), recorded["input_ids"], pixels)["params"]
  return recorded, model, import_params(tensors_of(recorded), table(config), shapes), pixels


def tensors_of(recorded):
  prefix = "params/"
  return {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


def old_name(name: str) -> str:
  """As published LLaVA-1.5 checkpoints have it."""
  for new, old in (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
  ):
    if name.startswith(new):
      return old + name.removeprefix(new)
  raise KeyError(name)


def test_logits(case):
  recorded, model, params, pixels = case
  ids, mask = recorded["input_ids"], recorded["attention_mask"]
  check_images(ids, 1, model.config)
  run = jax.jit(lambda p: model.apply({"params": p}, ids, pixels, mask=mask).logits)
  real = mask.astype(bool)
  expected = recorded["expected_logits"]
  np.testing.assert_allclose(np.asarray(run(params))[real], expected[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [False], ids=["unrolled"], indirect=True)
def test_generation_reads_images_once(case):
  recorded, model, params, pixels = case
  # Generation wants its padding on the left; the second text has no image, and its own is not used.
  ids, mask = recorded["input_ids"].copy(), recorded["attention_mask"]
  ids, mask = (
    np.stack([np.roll(r, r.size - m.sum()) for r, m in zip(a, mask, strict=True)])
    for a in (ids, mask)
  )
  ids[-1][ids[-1] == model.config.image_token] = 3
  run = jax.jit(
    lambda p, pixels, use_cache: (
      generate(
        model, {"params": p}, ids, mask, max_new_tokens=4, use_cache=use_cache, pixels=pixels
      ).tokens
    ),
    static_argnums=2,
  )
  tokens = run(params, pixels, True)
  np.testing.assert_array_equal(run(params, pixels, False), tokens)
  np.testing.assert_array_equal(run(params, 1 - pixels, True)[-1], tokens[-1])


def test_old_and_new_names(case):
  recorded, model, params, _ = case
  tensors = tensors_of(recorded)
  assert_same_bytes(export_params(params, table(model.config)), tensors)
  old = {old_name(name): tensor for name, tensor in tensors.items()}
  again = import_params(old, table(model.config), params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
