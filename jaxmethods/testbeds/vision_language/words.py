"""Texts as token ids: the vocabulary of our captions, CLIP's own, and prompts of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxmethods.data import scenes
from jaxmethods.errors import InputError, hint

PLACEHOLDER = "x"  # stands where a learnt prompt will
# Classes of the real tasks: no caption has them, so their embeddings start untrained.
REAL_WORDS = (
  "airplane", "automobile", "backpack", "bike", "bird", "calculator", "cat", "deer", "dog",
  "elephant", "frog", "giraffe", "guitar", "headphones", "horse", "house", "keyboard", "laptop",
  "monitor", "mouse", "mug", "person", "projector", "ship", "truck",
)  # fmt: skip
_GRAMMAR = (PLACEHOLDER, ".", "a", "at", "bad", "color", "digit", "drawing", "letter", "object",
            "objects", "of", "on", "painting", "photo", "picture", "sketch", "the")  # fmt: skip


class Tokens(NamedTuple):
  """How a model reads texts.

  Attributes:
    encode: text -> ids, without start and end.
    start, end, pad: ids.
    context: longest text, with start and end.
    size: number of ids.
  """

  encode: Callable[[str], list[int]]
  start: int
  end: int
  pad: int
  context: int
  size: int


def vocabulary() -> tuple[str, ...]:
  """All words, in the order of their ids, which start at 1."""
  nouns = [*scenes.SHAPES, *map(scenes.plural, scenes.SHAPES)]
  attributes = (
    *scenes.COLOURS, *scenes.BACKGROUNDS, *scenes.FILLS, *scenes.COUNTS, *scenes.PLACES,
    *scenes.EXTENTS, *scenes.GLYPHS,
  )  # fmt: skip
  return tuple(dict.fromkeys((*_GRAMMAR, *nouns, *attributes, *REAL_WORDS)))


def word_tokens(context: int) -> Tokens:
  """One id a word: 0 is padding, the two highest are start and end."""
  words = {word: i for i, word in enumerate(vocabulary(), start=1)}

  def encode(text: str) -> list[int]:
    spaced = text.lower().replace(".", " . ").split()
    for word in spaced:
      if word not in words:
        raise InputError(f"{text!r}: the word {word!r} is unknown; {hint(word, words, 'words')}")
    return [words[word] for word in spaced]

  return Tokens(encode, len(words) + 1, len(words) + 2, 0, context, len(words) + 3)


def clip_tokens(tokenizer: Callable, context: int) -> Tokens:
  """The byte pairs of a CLIP checkpoint, read by `transformers`."""
  encode = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)
  start, end = tokenizer("").input_ids[0], tokenizer("").input_ids[-1]
  return Tokens(encode, start, end, 0, context, end + 1)


def pack(texts: Sequence[str], tokens: Tokens) -> np.ndarray:
  """Packs texts into ids (N, T) with start and end; T is what the longest needs.

  Raises:
    InputError: a text without tokens, or one that is longer than the context; it is named.
  """
  rows = []
  for text in texts:
    ids = tokens.encode(text)
    if not ids:
      raise InputError(f"text {text!r}: has no tokens")
    if len(ids) + 2 > tokens.context:
      raise InputError(
        f"text {text!r}: needs {len(ids) + 2} tokens, the model reads {tokens.context}"
      )
    rows.append([tokens.start, *ids, tokens.end])
  if not rows:
    raise InputError("no texts: a task needs at least one class")
  packed = np.full((len(rows), max(map(len, rows))), tokens.pad, np.int32)
  for row, ids in zip(packed, rows, strict=True):
    row[: len(ids)] = ids
  return packed


def check_classes(classes: Sequence[str], tokens: Tokens) -> None:
  """Checks that every class has a name that the model can read.

  Raises:
    InputError: a name without tokens, or none at all.
  """
  if not classes:
    raise InputError("classes: there are none")
  for k, name in enumerate(classes):
    if not tokens.encode(name):
      raise InputError(f"class {k} ({name!r}): its name has no tokens")


def class_texts(classes: Sequence[str], templates: Sequence[str], tokens: Tokens) -> np.ndarray:
  """The prompts of all classes by all templates, ids (K, M, T).

  Args:
    classes: names, K of them.
    templates: M of them, with `{}` for the name.
    tokens: of the model.

  Raises:
    InputError: as `check_classes` and `pack`.
  """
  check_classes(classes, tokens)
  texts = [template.format(name) for name in classes for template in templates]
  return pack(texts, tokens).reshape(len(classes), len(templates), -1)
