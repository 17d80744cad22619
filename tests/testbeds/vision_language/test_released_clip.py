"""A CLIP out of a folder in the published form, with its byte pairs, as the stage of a task."""

import json
import string

import jax
import numpy as np
import pytest

from jaxmethods.data.vision_sources import load_model
from jaxmethods.data.weights_files import save_checkpoint
from jaxmethods.errors import InputError
from jaxmethods.models.clip import CLIP_TABLE
from jaxmethods.models.weights import export_params
from jaxmethods.testbeds.vision_language import encoder, tasks, words
from jaxmethods.testbeds.vision_language.settings import SmallClip, TaskSize

TOWER = {
  "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny checkpoint whose vocabulary is the letters, alone and at the end of a word."""
  folder = tmp_path_factory.mktemp("clip")
  letters = [*string.ascii_lowercase, "."]
  pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
  config = {
    "model_type": "clip",
    "projection_dim": 4,
    "text_config": {
      "model_type": "clip_text_model", "vocab_size": len(pieces), "max_position_embeddings": 40,
      "eos_token_id": len(pieces) - 1, **TOWER,
    },
    "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **TOWER},
  }  # fmt: skip
  random = load_model(f"random:{json.dumps(config)}", key=jax.random.key(3))
  save_checkpoint(folder, export_params(random.params, CLIP_TABLE), config)
  (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
  return folder


def test_zero_shot_of_a_released_clip(folder):
  stage = encoder.load(f"hf:{folder}", SmallClip())
  task = tasks.load_task("digits", TaskSize(train=4, test=6))
  ids = words.class_texts(task.classes, task.templates[:1], stage.tokens)
  assert (ids[:, 0, 0] == stage.tokens.start).all()
  assert ((ids == stage.tokens.end).sum(-1) == 1).all()
  logits = encoder.zero_shot(stage, stage.params, task.test[0], ids)
  assert logits.shape == (6, 10) and np.isfinite(logits).all()
  assert "layers" in stage.params["vision"]["encoder"]  # scanned: it is deep


def test_a_prompt_longer_than_the_context_is_named(folder):
  stage = encoder.load(f"hf:{folder}", SmallClip())
  with pytest.raises(InputError, match=r"quitelong.* tokens, the model reads 40"):
    words.class_texts(["quitelong" * 6], ["a {}."], stage.tokens)


def test_another_model_is_refused():
  bert = {
    "model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8,
  }  # fmt: skip
  with pytest.raises(InputError, match="is no CLIP"):
    encoder.load(f"random:{json.dumps(bert)}", SmallClip())
