"""A tiny LLaVA-style checkpoint in the published file formats, and questions about images."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxmethods.data.vision_sources import load_model
from jaxmethods.data.weights_files import save_checkpoint
from jaxmethods.models.mllm import table
from jaxmethods.models.weights import export_params
from jaxmethods.testbeds.multimodal.checkpoint import AFTER, BEFORE

WORDS = (BEFORE + AFTER + " what is it red green cup").split()
VOCABULARY = {word: i for i, word in enumerate(dict.fromkeys(("<unk>", "<s>", "</s>", *WORDS)))}
CONFIG = {
  "model_type": "llava",
  "image_token_index": len(VOCABULARY),
  "vision_config": {
    "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
  },
  "text_config": {
    "model_type": "llama", "vocab_size": len(VOCABULARY) + 1, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
  },
}  # fmt: skip


def write(path: Path) -> Path:
  """Writes checkpoint, tokenizer and {train,test,other}.jsonl about 12 images; returns `path`."""
  random = load_model(f"random:{json.dumps(CONFIG)}")
  save_checkpoint(path, export_params(random.params, table(random.model.config)), CONFIG)
  processor = {
    "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 8, "width": 8},
    "size": {"shortest_edge": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
  }  # fmt: skip
  (path / "preprocessor_config.json").write_text(json.dumps(processor))
  words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
  )
  tokenizer.save_pretrained(path)
  for part, start, count in (("train", 0, 8), ("test", 8, 2), ("other", 10, 2)):
    lines = []
    for i in range(start, start + count):
      colour = "red" if i % 2 else "green"
      image = Image.new("RGB", (10, 6), (200, 0, 0) if i % 2 else (0, 200, 0))
      image.save(path / f"{i}.png")
      if part == "test":  # LLaVA's own form
        turns = [{"value": "<image>\nwhat is it"}, {"value": f"{colour} cup"}]
        lines.append({"image": f"{i}.png", "conversations": turns})
      else:
        lines.append({"image": f"{i}.png", "question": "what is it", "answer": f"{colour} cup"})
    (path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return path
