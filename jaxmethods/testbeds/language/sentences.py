"""Sentence vectors by a BERT (`wheel:all-minilm-l6-v2`, `hf:PATH`), each text embedded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np

from jaxmethods.data.vision_sources import load_model
from jaxmethods.errors import InputError
from jaxmethods.models.bert import Bert, sentence_embedding

Embedder: TypeAlias = Callable[[Sequence[str]], np.ndarray]  # n texts -> (n, d) float32
_LONGEST, _BATCH = 64, 32


def bert(name: str) -> Embedder:
  """Loads an encoder.

  Raises:
    InputError: there is no such model, it has no tokenizer, or it is no BERT.
  """
  model, params, files = load_model(name)
  if not isinstance(model, Bert):
    raise InputError(f"embedding: {name} is no BERT")
  tokenizer = files.tokenizer()
  length = min(_LONGEST, model.config.context)
  params = jax.device_put(params)

  @jax.jit
  def program(params, ids, mask):
    return sentence_embedding(model.apply({"params": params}, ids, mask).hidden, mask)  # type: ignore[union-attr]

  def embed(texts: Sequence[str]) -> np.ndarray:
    rows = []
    for start in range(0, len(texts), _BATCH):
      part = list(texts[start : start + _BATCH])
      filled = part + [""] * (_BATCH - len(part))  # one program serves all
      tokens = tokenizer(
        filled, padding="max_length", truncation=True, max_length=length, return_tensors="np"
      )
      vectors = program(params, tokens["input_ids"], tokens["attention_mask"])
      rows.append(np.asarray(vectors)[: len(part)])
    return np.concatenate(rows) if rows else np.zeros((0, model.config.encoder.width), np.float32)

  return embed


def remembered(embed: Embedder) -> Embedder:
  """Embeds every text once."""
  known: dict[str, np.ndarray] = {}

  def look(texts: Sequence[str]) -> np.ndarray:
    if new := list(dict.fromkeys(text for text in texts if text not in known)):
      known.update(zip(new, embed(new), strict=True))
    return np.stack([known[text] for text in texts])

  return look
