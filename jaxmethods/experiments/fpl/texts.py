"""Class names as texts with places for prompts."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.methods.fpl import ClassTexts, Position, arrange
from jaxmethods.testbeds.vision_language.words import PLACEHOLDER, Tokens, check_classes


def prompt_texts(
  classes: Sequence[str], num_prompts: int, position: Position, tokens: Tokens
) -> ClassTexts:
  """Makes [start, m placeholders, name, ".", end] of every class, as short as the longest needs.

  Args:
    classes: names, K of them.
    num_prompts: m.
    position: of the name.
    tokens: of the model.

  Raises:
    InputError: a name without tokens, or one for which the context is too short; it is named.
  """
  check_classes(classes, tokens)
  (placeholder,), stop = tokens.encode(PLACEHOLDER), tokens.encode(".")
  names, rows = [tokens.encode(name) for name in classes], []
  for k, (name, ids) in enumerate(zip(classes, names, strict=True)):
    row = [tokens.start, *[placeholder] * num_prompts, *ids, *stop, tokens.end]
    if len(row) > tokens.context:
      raise InputError(
        f"text_prompts: {num_prompts} prompts and class {k} ({name!r}) need {len(row)} tokens, the "
        f"model reads {tokens.context}"
      )
    rows.append(row)
  packed = np.full((len(rows), max(map(len, rows))), tokens.pad, np.int32)
  for place, row in zip(packed, rows, strict=True):
    place[: len(row)] = row
  lengths = jnp.array([len(ids) for ids in names])
  order = arrange(num_prompts, lengths, packed.shape[1], position)
  return ClassTexts(
    jnp.asarray(packed), order, jnp.array([len(row) - 1 for row in rows], jnp.int32)
  )


def phrase_ids(phrase: str, num_prompts: int, tokens: Tokens) -> list[int]:
  """Ids of the first words of a phrase, one for each prompt.

  Raises:
    InputError: the phrase is shorter.
  """
  ids = tokens.encode(phrase)
  if len(ids) < num_prompts:
    raise InputError(
      f"initial_phrase: {phrase!r} has {len(ids)} tokens, text_prompts is {num_prompts}"
    )
  return ids[:num_prompts]
