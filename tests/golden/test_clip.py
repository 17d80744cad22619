"""Both towers of CLIP against the published implementations (`clip_tiny.npz`, `gift.npz`)."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.models.clip import CLIP, CLIP_TABLE, OPENAI_TABLE, CLIPConfig, contrastive_loss
from jaxmethods.models.hugging_face import join_in_proj, split_in_proj
from jaxmethods.models.transformer import normalise
from jaxmethods.models.weights import export_params, import_params
from tests.tensors import assert_same_bytes, below

EMBEDDINGS = {"rtol": 0, "atol": 3e-6}
LOGITS = {"rtol": 0, "atol": 5e-5}
HIDDEN = {"rtol": 0, "atol": 2e-5}
UNROLLED = pytest.mark.parametrize("case", [False], ids=["unrolled"], indirect=True)


def hf_config(golden):
  """The recorded config in the form of a config.json."""
  config = json.loads(str(golden["config/json"]))
  return {
    "model_type": "clip",
    "projection_dim": config["projection_dim"],
    "text_config": {"model_type": "clip_text_model", **config["text"]},
    "vision_config": {"model_type": "clip_vision_model", **config["vision"]},
  }


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def case(request, golden_file):
  """(golden arrays, model, params, pixels in our layout)."""
  golden = golden_file("clip_tiny")
  model = CLIP(CLIPConfig.from_hugging_face(hf_config(golden), scan_layers=request.param))
  pixels = golden["inputs/pixel_values"].transpose(0, 2, 3, 1)
  ids = golden["inputs/input_ids"]
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, ids)["params"]
  return golden, model, import_params(below(golden, "state_dict/"), CLIP_TABLE, shapes), pixels


def test_forward(case):
  golden, model, params, pixels = case
  ids = golden["inputs/input_ids"]

  @jax.jit
  def run(params):
    call = lambda method, *args: model.apply({"params": params}, *args, method=method)
    return {
      "vision_last_hidden_state": call("encode_image", call("embed_image", pixels)).hidden,
      "text_last_hidden_state": call("encode_text", call("embed_text", ids)).hidden,
      "image_features": call("image_features", pixels),
      "text_features": call("text_features", ids),
      "output": model.apply({"params": params}, pixels, ids),
    }

  seen = run(params)
  want = lambda name: golden[f"outputs/{name}"]
  for name in ("vision_last_hidden_state", "image_features", "text_features"):
    np.testing.assert_allclose(seen[name], want(name), **HIDDEN, err_msg=name)
  real = golden["inputs/attention_mask"].astype(bool)
  name = "text_last_hidden_state"
  np.testing.assert_allclose(np.asarray(seen[name])[real], want(name)[real], **HIDDEN)
  output = seen["output"]
  np.testing.assert_allclose(output.image_embeddings, want("image_embeds"), **EMBEDDINGS)
  np.testing.assert_allclose(output.text_embeddings, want("text_embeds"), **EMBEDDINGS)
  np.testing.assert_allclose(output.logits_per_image, want("logits_per_image"), **LOGITS)
  np.testing.assert_allclose(output.logits_per_image.T, want("logits_per_text"), **LOGITS)


@UNROLLED
@pytest.mark.parametrize("rule", ["first_eos", "legacy_argmax"])
def test_pooling(case, rule):
  golden, model, params, _ = case
  eos = 2 if rule == "legacy_argmax" else model.config.text.eos
  model = CLIP(replace(model.config, text=replace(model.config.text, eos=eos)))
  ids = golden["eos/input_ids"]
  features = jax.jit(lambda p: model.apply({"params": p}, ids, method="text_features"))(params)
  np.testing.assert_allclose(normalise(features), golden[f"eos/text_embeds_{rule}"], **EMBEDDINGS)


@UNROLLED
def test_activation_is_read_from_the_config(case):
  golden, _, params, pixels = case
  config = hf_config(golden)
  for tower in ("text_config", "vision_config"):
    config[tower]["hidden_act"] = "gelu"
  model = CLIP(CLIPConfig.from_hugging_face(config))
  ids = golden["inputs/input_ids"]
  output = jax.jit(lambda p: model.apply({"params": p}, pixels, ids))(params)
  np.testing.assert_allclose(output.image_embeddings, golden["gelu/image_embeds"], **EMBEDDINGS)
  np.testing.assert_allclose(output.text_embeddings, golden["gelu/text_embeds"], **EMBEDDINGS)


def test_contrastive_loss_and_gradients(case):
  golden, model, params, pixels = case
  n = int(golden["contrastive/n"])
  ids = golden["inputs/input_ids"][:n]
  loss_of = lambda p: contrastive_loss(model.apply({"params": p}, pixels[:n], ids).logits_per_image)
  loss, grads = jax.jit(jax.value_and_grad(loss_of))(jax.tree.map(jnp.asarray, params))
  np.testing.assert_allclose(loss, golden["contrastive/loss"], rtol=1e-5)
  grads = export_params(grads, CLIP_TABLE)  # gradients are laid out as the tensors are
  recorded = below(golden, "contrastive/grad/")
  assert recorded
  for name, want in recorded.items():
    atol = 2e-5 * np.abs(want).max()
    np.testing.assert_allclose(grads[name], want, rtol=0, atol=atol, err_msg=name)


def test_export_undoes_import(case):
  golden, _, params, _ = case
  assert_same_bytes(export_params(params, CLIP_TABLE), below(golden, "state_dict/"))


def test_layout_of_the_first_release(golden_file):
  recorded = below(golden_file("gift"), "step/")
  prefix = "teacher/"
  tensors = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
  heads = tuple(map(int, recorded["heads_text_vision"]))
  model = CLIP(CLIPConfig.from_openai(tensors, heads=heads))
  pixels = recorded["ref_images"][0].transpose(0, 2, 3, 1)
  ids = recorded["prompt_tokens"][recorded["ref_prompt_ids"][0]]
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, ids)["params"]
  params = import_params(split_in_proj(tensors), OPENAI_TABLE, shapes)
  # The recorded teacher borrows the student's temperature, which is the same.
  logits = jax.jit(lambda p: model.apply({"params": p}, pixels, ids).logits_per_image)(params)
  np.testing.assert_allclose(logits, recorded["out0/ref_logits_teacher"], rtol=1e-5, atol=5e-5)
  assert_same_bytes(join_in_proj(export_params(params, OPENAI_TABLE)), tensors)
