"""Configs, checkpoints and inputs that cannot be used are refused by one line that names them."""

import copy
import re

import jax
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.models import mllm
from jaxmethods.models.bert import BERT_IGNORED, BERT_TABLE, Bert, BertConfig
from jaxmethods.models.clip import (
  CLIP,
  CLIP_IGNORED,
  CLIP_TABLE,
  VISION_TABLE,
  CLIPConfig,
  check_texts,
)
from jaxmethods.models.probe import Probe
from jaxmethods.models.transformer import Encoder, EncoderConfig
from jaxmethods.models.vit import VIT_TABLE, ViT, ViTConfig
from jaxmethods.models.weights import export_params, import_params

ENCODER = {
  "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
  "hidden_act": "gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
VIT = {**ENCODER, "model_type": "vit", "image_size": 8, "patch_size": 4}
BERT = {
  **ENCODER, "model_type": "bert", "vocab_size": 11, "max_position_embeddings": 6,
  "type_vocab_size": 2,
}  # fmt: skip
TOWER = {**VIT, "model_type": "clip_vision_model"}
CLIP_CONFIG = {
  "model_type": "clip",
  "projection_dim": 4,
  "vision_config": TOWER,
  "text_config": {
    **ENCODER, "model_type": "clip_text_model", "vocab_size": 11, "max_position_embeddings": 6,
    "eos_token_id": 9,
  },
}  # fmt: skip
LLAVA = {
  "model_type": "llava",
  "image_token_index": 10,
  "vision_config": TOWER,
  "text_config": {
    "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2,
  },
}  # fmt: skip
READERS = {
  "vit": (ViTConfig, VIT),
  "bert": (BertConfig, BERT),
  "clip": (CLIPConfig, CLIP_CONFIG),
  "llava": (mllm.MLLMConfig, LLAVA),
}


def changed(config, path, value):
  """A copy with one key, at a dotted path, set to a value or, for None, left out."""
  config = copy.deepcopy(config)
  *parents, key = path.split(".")
  inner = config
  for parent in parents:
    inner = inner[parent]
  if value is None:
    del inner[key]
  else:
    inner[key] = value
  return config


@pytest.mark.parametrize(
  ("family", "path", "value", "message"),
  [
    ("vit", "model_type", "swin", "model_type: expected vit or clip_vision_model, got 'swin'"),
    ("vit", "patch_size", None, "config of a vit: has no 'patch_size'"),
    ("vit", "patch_size", 9, "image_size: (8, 8) is smaller than a patch of 9"),
    ("vit", "hidden_act", "geluu", "activation: 'geluu' is not known; the nearest is gelu"),
    ("vit", "num_attention_heads", 3, "width: must be a multiple of 3 heads, got 8"),
    ("vit", "num_hidden_layers", 0, "num_layers: must be at least 1, got 0"),
    ("bert", "position_embedding_type", "relative_key", "position_embedding_type: only 'absolute'"),
    ("bert", "model_type", "roberta", "model_type: expected bert, got 'roberta'"),
    ("clip", "model_type", "siglip", "model_type: expected clip, got 'siglip'"),
    ("clip", "text_config.model_type", "bert", "model_type: expected clip_text_model"),
    ("clip", "text_config.eos_token_id", None, "has no 'eos_token_id'"),
    ("llava", "model_type", "llava_next", "model_type: expected llava, got 'llava_next'"),
    ("llava", "vision_feature_layer", [-2, -5], "vision_feature_layer: only one layer"),
    ("llava", "vision_feature_layer", -4, "feature_layer: -4 is not in a tower of 2 blocks"),
    ("llava", "vision_feature_select_strategy", "cls", "select: must be 'default' or 'full'"),
    ("llava", "image_token_index", 11, "image_token: 11 is outside the vocabulary of 11"),
    ("llava", "image_token_index", None, "config of a llava: has no 'image_token_index'"),
    ("llava", "multimodal_projector_bias", False, "a projector without bias is not supported"),
    ("llava", "text_config.model_type", "mamba", "mamba"),
  ],
)
def test_configs(family, path, value, message):
  reader, config = READERS[family]
  reader.from_hugging_face(config)  # which is right before the change
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    reader.from_hugging_face(changed(config, path, value))
  assert "\n" not in str(caught.value)


def shapes_of(model, *inputs):
  return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def zeros(shapes):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


PIXELS, IDS = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 6), int)
MODELS = {
  "vit": (ViT(ViTConfig.from_hugging_face(VIT)), VIT_TABLE, (PIXELS,)),
  "bert": (Bert(BertConfig.from_hugging_face(BERT, pooler=True)), BERT_TABLE, (IDS,)),
  "clip": (CLIP(CLIPConfig.from_hugging_face(CLIP_CONFIG)), CLIP_TABLE, (PIXELS, IDS)),
  "llava": (
    mllm.MLLM(mllm.MLLMConfig.from_hugging_face(LLAVA)),
    mllm.table(mllm.MLLMConfig.from_hugging_face(LLAVA)),
    (IDS, PIXELS),
  ),
}


@pytest.fixture(params=MODELS)
def checkpoint(request):
  """(tensors, table, shapes) of a small model."""
  model, table, inputs = MODELS[request.param]
  shapes = shapes_of(model, *inputs)
  return export_params(zeros(shapes), table), table, shapes


def test_every_missing_tensor_is_named(checkpoint):
  tensors, table, shapes = checkpoint
  for name in tensors:
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    with pytest.raises(ValueError, match=re.escape(f"{name}: the checkpoint has no such tensor")):
      import_params(rest, table, shapes)


def test_every_wrong_shape_is_named(checkpoint):
  tensors, table, shapes = checkpoint
  for name, tensor in tensors.items():
    wrong = {**tensors, name: np.zeros((*tensor.shape, 2), np.float32)}
    with pytest.raises(ValueError, match=re.escape(f"{name}: has shape")):
      import_params(wrong, table, shapes)


def test_a_tensor_too_many_is_named(checkpoint):
  tensors, table, shapes = checkpoint
  with pytest.raises(ValueError, match=r"classifier\.weight: the model has no place"):
    import_params({**tensors, "classifier.weight": np.zeros(3)}, table, shapes)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_wrong_number_of_layers_is_named(layers):
  model, table, inputs = MODELS["vit"]
  tensors = export_params(zeros(shapes_of(model, *inputs)), table)
  other = ViT(ViTConfig.from_hugging_face({**VIT, "num_hidden_layers": layers}))
  with pytest.raises(ValueError, match=rf"^layers\.{min(layers, 2)}\."):
    import_params(tensors, table, shapes_of(other, *inputs))


@pytest.mark.parametrize(
  ("family", "prefix", "ignored"), [("bert", "bert.", BERT_IGNORED), ("clip", "", CLIP_IGNORED)]
)
def test_old_files_hold_buffers_and_prefixes(family, prefix, ignored):
  model, table, inputs = MODELS[family]
  shapes = shapes_of(model, *inputs)
  tensors = {prefix + k: v for k, v in export_params(zeros(shapes), table).items()}
  buffer = "text_model.embeddings.position_ids" if family == "clip" else "embeddings.position_ids"
  tensors[prefix + buffer] = np.arange(6)[None]
  import_params(tensors, table, shapes, ignore=ignored)
  with pytest.raises(ValueError, match="position_ids: the model has no place"):
    import_params(tensors, table, shapes)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_tower_alone_is_read_with_and_without_its_prefix(prefix):
  tower = ViT(ViTConfig.from_hugging_face(TOWER))
  shapes = shapes_of(tower, PIXELS)
  tensors = export_params(zeros(shapes), VISION_TABLE)
  import_params({prefix + k: v for k, v in tensors.items()}, VISION_TABLE, shapes)


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    (np.full((1, 7), 9), "texts of 7 tokens: the model reads at most 6"),
    (np.array([[1, 9], [11, 9]]), r"text 1: has a token id outside \[0, 11\)"),
    (np.array([[9, 0], [1, 10]]), r"text 1: has no end token \(id 9\)"),
  ],
)
def test_texts(ids, message):
  config = CLIPConfig.from_hugging_face(CLIP_CONFIG).text
  check_texts(np.array([[1, 9, 0]]), config)
  with pytest.raises(InputError, match=message):
    check_texts(ids, config)


def test_image_tokens():
  config = mllm.MLLMConfig.from_hugging_face(LLAVA)
  assert config.tokens_per_image == 4
  ids = np.array([[1, 10, 10, 10, 10, 2], [1, 2, 3, 4, 5, 6]])
  mllm.check_images(ids, 1, config)
  ids[1, 0] = 10
  with pytest.raises(InputError, match=r"text 1: has 1 image tokens, 1 image\(s\) have 4 each"):
    mllm.check_images(ids, 1, config)
  with pytest.raises(InputError, match=r"text 0: has 4 image tokens, 0 image\(s\)"):
    mllm.check_images(ids[:1], 0, config)


def test_inputs_of_the_wrong_size():
  vit, bert = MODELS["vit"][0], MODELS["bert"][0]
  with pytest.raises(AssertionError, match="8, 8, 3"):
    shapes_of(vit, np.zeros((1, 9, 8, 3)))
  with pytest.raises(ValueError, match="text of 7 tokens: the model reads at most 6"):
    shapes_of(bert, np.zeros((1, 7), int))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_encoder_forms(scan_layers):
  config = EncoderConfig(width=4, num_layers=3, heads=2, hidden=4, scan_layers=scan_layers)
  encoder, x = Encoder(config), np.zeros((2, 5, 4), np.float32)
  shapes = shapes_of(encoder, x)
  assert list(shapes) == (["layers"] if scan_layers else ["layers_0", "layers_1", "layers_2"])
  with pytest.raises(ValueError, match=r"depth: must be in \[0, 3\], got 4"):
    jax.eval_shape(lambda: encoder.apply({"params": zeros(shapes)}, x, depth=4))
  probe = Probe(lambda hidden: hidden.mean(1))
  out = jax.eval_shape(lambda: encoder.apply({"params": zeros(shapes)}, x, depth=0, probe=probe))
  assert out.states.shape == (1, 2, 4)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_prompts_of_each_layer(scan_layers):
  config = EncoderConfig(width=4, num_layers=2, heads=2, hidden=4, scan_layers=scan_layers)
  encoder, rng = Encoder(config), np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, prompts = draw(2, 5, 4), draw(2, 1, 4)
  params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes_of(encoder, x))
  edit = lambda hidden, prompt: hidden.at[:, -1:].set(prompt)
  run = jax.jit(
    lambda x, prompts: encoder.apply({"params": params}, x, edit=edit, inputs=prompts).hidden
  )
  out = run(x, prompts)
  ignored = x.copy()
  ignored[:, -1] = 7.0  # replaced before the first block
  np.testing.assert_allclose(run(ignored, prompts), out, rtol=0, atol=1e-6)
  for layer in range(2):
    other = prompts.copy()
    other[layer, :, 0] += 1  # not all channels: a norm takes that out
    assert np.abs(run(x, other) - out).max() > 1e-3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropped_paths(scan_layers):
  config = EncoderConfig(
    width=4, num_layers=2, heads=2, hidden=4, drop_path=0.5, scan_layers=scan_layers
  )
  encoder, rng = Encoder(config), np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x = np.repeat(draw(1, 3, 4), 64, axis=0)
  params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes_of(encoder, x))

  @jax.jit
  def run(key):
    call = lambda **how: encoder.apply({"params": params}, x, **how).hidden
    return call(train=True, rngs={"dropout": key}), call(depth=1), call()

  trained, first, whole = run(jax.random.key(0))
  # The first block never drops; of the last both branches, one, the other or none.
  distinct = np.unique(np.round(trained, 4), axis=0)
  assert len(distinct) == 4
  assert np.abs(distinct - first[0]).max((1, 2)).min() < 1e-3  # both dropped
  assert np.abs(distinct - whole[0]).max((1, 2)).min() > 1e-3  # a branch that stays is scaled up
