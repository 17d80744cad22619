"""Examples as rows of tokens: loss on answers only, padded one by one or packed, truncation counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmethods.data.model_tokenizers import Tokenizer
from jaxmethods.data.text_examples import Example, Turn
from jaxmethods.errors import InputError
from jaxmethods.stats.losses import IGNORED

_ROUND = 16  # widths of arrays are multiples: a tail of tokens makes no other program


class Speech(NamedTuple):
  """How texts become tokens.

  Attributes:
    tokenizer: of transformers, or one with `encode` and `decode` that puts BOS first.
    ends: tokens that end a text.
    vocabulary: V of the model.
    template: whether a conversation takes the tokenizer's template.
  """

  tokenizer: Tokenizer
  ends: tuple[int, ...]
  vocabulary: int
  template: bool


class Row(NamedTuple):
  """Tokens of an example, and which of them count: answers and their ends."""

  ids: np.ndarray
  counts: np.ndarray


class Table(NamedTuple):
  """Rows as arrays.

  Attributes:
    arrays: ids, mask (n, T); places, labels (n, A): hidden states that foretell the tokens that count;
      of packed rows segments and positions (n, T) too.
    truncated: examples that lost the end of their answer.
    tokens: of all rows, without padding.
    counted: of them, tokens that count.
  """

  arrays: dict[str, np.ndarray]
  truncated: int
  tokens: int
  counted: int


def speech(
  name: str, tokenizer: Tokenizer, ends: tuple[int, ...], vocabulary: int, template: str
) -> Speech:
  """Prepares a tokenizer.

  Args:
    name: of the model, for errors.
    tokenizer: see `Speech`.
    ends: tokens that end a text.
    vocabulary: V of the model.
    template: "auto": the tokenizer's template where it has one; "off".

  Raises:
    InputError: the tokenizer has more tokens than the model.
  """
  size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
  if size > vocabulary:
    raise InputError(
      f"model: {name} has a vocabulary of {vocabulary}, its tokenizer one of {size}: they do not "
      "belong together"
    )
  has = bool(getattr(tokenizer, "chat_template", None))
  return Speech(tokenizer, ends, vocabulary, has and template == "auto")


def row(speech: Speech, example: Example) -> Row:
  """Tokenizes an example.

  Raises:
    InputError: a token that the model does not know, or a template that does not keep to what was
      said before.
  """
  parts = _parts(speech, example)
  ids = [token for tokens, _ in parts for token in tokens]
  if ids and max(ids) >= speech.vocabulary:
    raise InputError(
      f"{example.where}: the tokenizer makes token {max(ids)}, the model has {speech.vocabulary}"
    )
  counts = np.concatenate([np.full(len(tokens), counts) for tokens, counts in parts])
  return Row(np.array(ids, np.int32), counts.astype(bool))


def prompt(speech: Speech, example: Example) -> list[int]:
  """Returns the tokens before the last answer, as a generation begins."""
  return [token for tokens, _ in _parts(speech, example)[:-1] for token in tokens]


def table(rows: Sequence[Row], examples: Sequence[Example], limit: int, *, packing: bool) -> Table:
  """Arranges rows, one example or several in each.

  Args:
    rows: of the examples.
    examples: for errors.
    limit: most tokens of a row.
    packing: whether to fill rows of `limit` tokens with several examples.

  Raises:
    InputError: a prompt that leaves no room for an answer.
  """
  kept, truncated = [], 0
  for tokens, example in zip(rows, examples, strict=True):
    first = int(np.argmax(tokens.counts))
    if first >= limit:
      raise InputError(
        f"{example.where}: its prompt is {first} tokens, a row has {limit} (max_length, or the "
        "model's context)"
      )
    truncated += len(tokens.ids) > limit
    kept.append(Row(tokens.ids[:limit], tokens.counts[:limit]))
  bins = (
    _first_fit([len(x.ids) for x in kept], limit) if packing else [[i] for i in range(len(kept))]
  )
  width = limit if packing else min(limit, _rounded(max(len(x.ids) for x in kept)))
  arrays = _filled([[kept[i] for i in members] for members in bins], width, packing)
  counted = int((arrays["labels"] != IGNORED).sum())
  return Table(arrays, truncated, sum(len(x.ids) for x in kept), counted)


def _filled(bins: list[list[Row]], width: int, packing: bool) -> dict[str, np.ndarray]:
  """Writes rows into arrays."""
  shape = (len(bins), width)
  ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
  foretold: list[list[int]] = []
  for n, members in enumerate(bins):
    start, own = 0, []
    for number, member in enumerate(members, 1):
      end = start + len(member.ids)
      ids[n, start:end], segments[n, start:end] = member.ids, number
      positions[n, start:end] = np.arange(end - start)
      # The first token of a text is foretold by nothing.
      own += [start + int(i) - 1 for i in np.flatnonzero(member.counts) if i]
      start = end
    foretold.append(own)
  answers = min(width, _rounded(max(map(len, foretold)), 8))
  places = np.zeros((len(bins), answers), np.int32)
  labels = np.full((len(bins), answers), IGNORED, np.int32)
  for n, own in enumerate(foretold):
    places[n, : len(own)] = own
    labels[n, : len(own)] = ids[n, np.array(own, int) + 1]
  arrays: dict[str, np.ndarray] = {
    "ids": ids, "mask": segments > 0, "places": places, "labels": labels,
  }  # fmt: skip
  return arrays | ({"segments": segments, "positions": positions} if packing else {})


def _first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
  """Puts each length into the first row that has room, in the order given."""
  bins: list[list[int]] = []
  room: list[int] = []
  for i, length in enumerate(lengths):
    found = next((k for k, left in enumerate(room) if left >= length), None)
    if found is None:
      bins.append([])
      room.append(limit)
      found = len(bins) - 1
    bins[found].append(i)
    room[found] -= length
  return bins


def _rounded(count: int, multiple: int = _ROUND) -> int:
  return -(-count // multiple) * multiple


# --- texts ----------------------------------------------------------------------------------------


def _parts(speech: Speech, example: Example) -> list[tuple[list[int], bool]]:
  """Tokens of an example in parts, each with whether it counts; the last part is the answer."""
  if speech.template and example.turns:
    return _templated(speech, example)
  return _plain(speech, example)


def _plain(speech: Speech, example: Example) -> list[tuple[list[int], bool]]:
  """Tokens of a text, or of turns as lines, each part with whether it counts."""
  end = [token for token in (getattr(speech.tokenizer, "eos_token_id", None),) if token is not None]
  if not example.turns:
    return [(_encode(speech, example.text, first=True) + end, True)]
  parts: list[tuple[list[int], bool]] = []
  done = 0
  for i, turn in enumerate(example.turns):
    if turn.role == "assistant":
      asked = "".join(other.content + "\n" for other in example.turns[done:i])
      parts.append((_encode(speech, asked, first=not parts), False))
      parts.append((_encode(speech, turn.content, first=False) + end, True))
      done = i + 1
  return parts


def _templated(speech: Speech, example: Example) -> list[tuple[list[int], bool]]:
  """Tokens of a conversation; an answer counts up to the token that ends it."""
  parts: list[tuple[list[int], bool]] = []
  done = ""
  for i, turn in enumerate(example.turns):
    if turn.role != "assistant":
      continue
    asked = _apply(speech, example.turns[:i], asked=True)
    said = _apply(speech, example.turns[: i + 1], asked=False)
    if not (asked.startswith(done) and said.startswith(asked)):
      raise InputError(
        f"{example.where}: the tokenizer's template rewrites earlier turns: give template=off, or "
        "conversations of one answer"
      )
    parts.append((_encode(speech, asked[len(done) :], first=False), False))
    answer = _encode(speech, said[len(asked) :], first=False)
    last = max(
      (k for k, token in enumerate(answer) if token in speech.ends), default=len(answer) - 1
    )
    parts += [(answer[: last + 1], True), (answer[last + 1 :], False)]
    done = said
  # Nothing is to be learnt behind the last answer.
  return parts[:-1]


def _apply(speech: Speech, turns: Sequence[Turn], *, asked: bool) -> str:
  messages = [turn._asdict() for turn in turns]
  return speech.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)


def _encode(speech: Speech, text: str, *, first: bool) -> list[int]:
  """Tokens of a part of a text; with what the tokenizer puts before texts if it is the first."""
  if hasattr(speech.tokenizer, "chat_template"):  # a tokenizer of transformers
    return list(speech.tokenizer.encode(text, add_special_tokens=first))
  return list(speech.tokenizer.encode(text)[0 if first else 1 :])
