"""Tokenizers that come with a model in another form than transformers writes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.trees import Json

# One of transformers, or a `TinyTokenizer`.
Tokenizer: TypeAlias = Any

# Token types that are found in a text before it is cut into words.
_CONTROL, _USER_DEFINED = 3, 4

# Words of Qwen2: contractions, letters, single digits, punctuation, line ends, spaces.
_QWEN2_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe_tokenizer(name: str, fields: Json) -> Any:
  """The byte-level BPE tokenizer in a GGUF file, as transformers knows it.

  Args:
    name: of the model, for errors.
    fields: metadata of the file.

  Raises:
    InputError: another kind of tokenizer than those of SmolLM2 and of Qwen2 and 3.
  """
  from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
  )
  from transformers import PreTrainedTokenizerFast

  kind, flavour = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
  splits: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "qwen2": [pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")],
  }
  if kind != "gpt2" or flavour not in splits:
    raise InputError(f"{name}: its tokenizer ({kind}, {flavour}) is not supported")
  words = fields["tokenizer.ggml.tokens"]
  merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
  tokenizer = Tokenizer(models.BPE({word: k for k, word in enumerate(words)}, merges))
  by_regex = flavour == "smollm"
  if flavour == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [*splits[flavour], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  for word, sort in zip(words, fields["tokenizer.ggml.token_type"], strict=True):
    if sort in (_CONTROL, _USER_DEFINED):
      tokenizer.add_tokens([AddedToken(word, special=sort == _CONTROL, normalized=False)])
  special = {
    role: words[fields[f"tokenizer.ggml.{key}_token_id"]]
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
    if f"tokenizer.ggml.{key}_token_id" in fields
  }
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, chat_template=fields.get("tokenizer.chat_template"), **special
  )


class TinyTokenizer:
  """The sentencepiece vocabulary of llama2.c: greedy merges by score, bytes as the last resort."""

  bos_token_id, eos_token_id = 1, 2
  _FIRST_BYTE = 3  # id of byte 0

  def __init__(self, binary: bytes) -> None:
    """Reads the records of a `tok*.bin`: float32 score, int32 length, bytes."""
    self._pieces: list[bytes] = []
    self._scores: list[float] = []
    start = 4
    while start < len(binary):
      self._scores.append(float(np.frombuffer(binary, "<f4", 1, start)[0]))
      length = int(np.frombuffer(binary, "<i4", 1, start + 4)[0])
      self._pieces.append(binary[start + 8 : start + 8 + length])
      start += 8 + length
    self._ids = {piece: k for k, piece in enumerate(self._pieces)}

  def encode(self, text: str) -> list[int]:
    """Ids of a text, BOS first."""
    ids = [self._ids[b" "]] if text else []
    for character in text:
      piece = character.encode()
      ids += [self._ids[piece]] if piece in self._ids else [b + self._FIRST_BYTE for b in piece]
    while True:
      pairs = [self._pieces[a] + self._pieces[b] for a, b in itertools.pairwise(ids)]
      known = [k for k, piece in enumerate(pairs) if piece in self._ids]
      if not known:
        return [self.bos_token_id, *ids]
      best = max(known, key=lambda k: self._scores[self._ids[pairs[k]]])  # the first of equals
      ids[best : best + 2] = [self._ids[pairs[best]]]

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of ids; the space that `encode` puts first is dropped."""
    text = b""
    for before, token in zip([0, *ids], ids, strict=False):
      if token in (0, self.bos_token_id, self.eos_token_id):
        text += b"" if skip_special_tokens else self._pieces[token]
      elif self._FIRST_BYTE <= token < self._FIRST_BYTE + 256:
        text += bytes([token - self._FIRST_BYTE])
      else:
        piece = self._pieces[token]
        text += piece.removeprefix(b" ") if before == self.bos_token_id else piece
    return text.decode(errors="replace")
