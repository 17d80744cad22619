"""Detectors and filters of the safety suite on texts of the user: watermark, perplexity.

A file is one text (`.txt`, UTF-8 or UTF-16 with a byte order mark) or one text a line (`.jsonl`: a
string, {"text": ...}, or {"ids": [...]} of a tokenizer that is not at hand).
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data import json_lines
from jaxmethods.data.model_sources import LoadedLM
from jaxmethods.data.model_tokenizers import Tokenizer
from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import defences, likelihood, watermark
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.trees import Params

_TABLE = 1024  # a vocabulary up to this has the table of all its green tokens
_ROUND = 64  # widths of arrays are multiples: few programs
_KEYS = 2**32  # jax would take the last 32 bits of a longer key, which other keys share
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Text(NamedTuple):
  """A text of the user's, or the tokens of one; `where` it stands, for reports and errors."""

  where: str
  text: str
  ids: tuple[int, ...] | None = None


class Perplexity(NamedTuple):
  """Mean -log p of the tokens of every text, and the largest of its windows, (n,) each."""

  mean: np.ndarray
  window: np.ndarray


def read_texts(file: Path, *, name: str = "text") -> list[Text]:
  """Reads the texts of a file.

  Args:
    file: `.jsonl` has a text on each line; any other is one text.
    name: setting that named it, for errors.

  Raises:
    InputError: the file cannot be read, is in an encoding that cannot be told, or holds no text.
  """
  if file.suffix == ".jsonl":
    found = [_entry(*line) for line in json_lines.read(file, name=name)]
  else:
    found = [Text(str(file), _decoded(file, name))]
  for text in found:
    if text.ids is None and not text.text.strip():
      raise InputError(f"{name}: {text.where}: there is no text")
  if not found:
    raise InputError(f"{name}: {file}: there is no text")
  return found


def tokens_of(
  texts: Sequence[Text], tokenizer: Tokenizer | None, vocabulary: int
) -> list[np.ndarray]:
  """Tokenizes texts, without tokens of the tokenizer's own before or after them.

  Args:
    texts: as `read_texts` gives them.
    tokenizer: None where all texts are token ids.
    vocabulary: V.

  Raises:
    InputError: a text without a tokenizer, or a token outside the vocabulary.
  """
  found = []
  for text in texts:
    if text.ids is None and tokenizer is None:
      raise InputError(f"model: {text.where} is text: name the model whose tokenizer wrote it")
    ids = text.ids if text.ids is not None else _encode(tokenizer, text.text)
    if wrong := [i for i in ids if not 0 <= i < vocabulary]:
      raise InputError(
        f"text: {text.where}: token {wrong[0]} is outside the vocabulary of {vocabulary}"
      )
    found.append(np.array(ids, np.int32))
  return found


def watermarks(
  texts: Sequence[Text], tokens: Sequence[np.ndarray], *, key: int, vocabulary: int, gamma: float
) -> watermark.Detection:
  """Tests every text for the watermark of a key, each distinct pair of tokens once.

  Args:
    texts: where the tokens are from, for errors.
    tokens: of every text.
    key: secret, a number of 32 bits.
    vocabulary: V.
    gamma: green share of the vocabulary.

  Returns:
    Arrays (n,) in the fields.

  Raises:
    InputError: a key of more than 32 bits, or a text without a pair of tokens.
  """
  if not 0 <= key < _KEYS:
    raise InputError(f"watermark.key: must be a number of 32 bits, 0 to {_KEYS - 1}, got {key}")
  for text, ids in zip(texts, tokens, strict=True):
    if len(ids) < 2:
      raise InputError(f"text: {text.where}: {len(ids)} token, a watermark needs a pair at least")
  ids, real = _padded(tokens)
  pairs = watermark.Bigrams(*map(jnp.asarray, (ids[:, :-1], ids[:, 1:], real[:, 1:])))
  return jax.device_get(_tested(jax.random.key(key), pairs, vocabulary, gamma))


def perplexities(
  texts: Sequence[Text], tokens: Sequence[np.ndarray], loaded: LoadedLM, *, window: int, chunk: int
) -> Perplexity:
  """Measures texts under a model; the first token of a text is predicted by nothing and does not count.

  Args:
    texts: where the tokens are from, for errors.
    tokens: of every text.
    loaded: the model.
    window: tokens of a block of the windowed filter.
    chunk: texts that are read at once.

  Raises:
    InputError: a text shorter than the window, or longer than the model's context.
  """
  context = int(loaded.files.config.get("max_position_embeddings", 0)) or None
  for text, ids in zip(texts, tokens, strict=True):
    if len(ids) <= window:
      raise InputError(
        f"text: {text.where}: {len(ids)} tokens, a window of {window} needs {window + 1} at least"
      )
    if context and len(ids) > context:
      raise InputError(f"text: {text.where}: {len(ids)} tokens, the model's context has {context}")
  ids, real = _padded(tokens)
  read = jax.jit(functools.partial(_read, loaded.model, window))
  params, parts = jax.device_put(loaded.params), []
  for start in range(0, len(ids), chunk):
    # The last part is filled with repeats, so that one program serves all.
    rows = np.arange(start, start + chunk) % len(ids)
    parts.append(jax.device_get(read(params, ids[rows], real[rows])))
  return Perplexity(*(np.concatenate(x)[: len(ids)] for x in zip(*parts, strict=True)))


def _entry(where: str, entry: object) -> Text:
  """Reads a line of a file."""
  if isinstance(entry, str):
    return Text(where, entry)
  if isinstance(entry, dict) and isinstance(entry.get("text"), str):
    return Text(where, entry["text"])
  ids = entry.get("ids") if isinstance(entry, dict) else None
  if isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    return Text(where, "", tuple(ids))
  raise InputError(f'text: {where}: expected a string, {{"text": ...}} or {{"ids": [numbers]}}')


def _decoded(file: Path, name: str) -> str:
  """Reads a text file whose encoding its first bytes tell, or that is UTF-8."""
  try:
    raw = file.read_bytes()
    return raw.decode("utf-16" if raw.startswith(_UTF16) else "utf-8-sig")
  except OSError as error:
    raise InputError(f"{name}: {file}: cannot be read: {error.strerror}") from None
  except UnicodeDecodeError as error:
    raise InputError(
      f"{name}: {file}: byte {error.start} is no {error.encoding}: expected UTF-8, or UTF-16 with a "
      "byte order mark"
    ) from None


def _encode(tokenizer: Tokenizer | None, text: str) -> list[int]:
  assert tokenizer is not None
  special = set(getattr(tokenizer, "all_special_ids", ()))
  ids = [int(i) for i in tokenizer.encode(text)]
  while ids and ids[0] in special:
    ids = ids[1:]
  while ids and ids[-1] in special:
    ids = ids[:-1]
  return ids


def _padded(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Fills texts up on the right: ids and which of them are real, (n, T) each."""
  width = -(-max(map(len, tokens)) // _ROUND) * _ROUND
  ids, real = np.zeros((len(tokens), width), np.int32), np.zeros((len(tokens), width), bool)
  for row, own in enumerate(tokens):
    ids[row, : len(own)], real[row, : len(own)] = own, True
  return ids, real


@functools.partial(jax.jit, static_argnums=(2, 3))
def _tested(
  key: jax.Array, pairs: watermark.Bigrams, vocabulary: int, gamma: float
) -> watermark.Detection:
  """Tests texts (n, T); rows of green tokens are drawn for the table, or pair by pair."""
  if vocabulary <= _TABLE:
    green = watermark.green_table(key, vocabulary, gamma)[pairs.previous, pairs.current]
  else:
    flat = watermark.Bigrams(*(x.reshape(-1) for x in pairs))
    green = watermark.is_green(key, flat, vocabulary, gamma).reshape(pairs.real.shape)
  one = functools.partial(watermark.detect, gamma=gamma)
  return jax.vmap(lambda own, hits: one(own, hits))(pairs, green)


def _read(
  model: CausalLM, window: int, params: Params, ids: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Measures a part of the texts, on the whole and by window."""
  logits = model.apply({"params": params}, ids, mask=real).logits  # type: ignore[union-attr]
  labels = likelihood.labels_of(ids, real)
  nll, counts = -likelihood.token_log_probability(logits, labels), real[:, 1:]
  windowed = defences.windowed_log_perplexity(nll, counts, window)
  return defences.log_perplexity(nll, counts), windowed
