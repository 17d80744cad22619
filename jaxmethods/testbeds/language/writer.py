"""What a given language model writes: in batches of one shape, every batch kept on disk once written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmethods.data.array_cache import cached
from jaxmethods.data.model_sources import LoadedLM
from jaxmethods.models.generate import generate, left_pad

FORMAT = b"generations 1"


class Written(NamedTuple):
  """Continuations of prompts, n in all; those of one prompt stand together.

  Attributes:
    ids, mask: (n, T + N), prompts padded on the left, continuations on the right.
    lengths: (n,), tokens written, the end token included.
    mean_log_prob: (n,), per token, whatever the sampling, at temperature 1.
    finished: (n,), whether the text came to its end.
    texts: of the continuations.
  """

  ids: np.ndarray
  mask: np.ndarray
  lengths: np.ndarray
  mean_log_prob: np.ndarray
  finished: np.ndarray
  texts: list[str]


class Writer:
  """A model and its tokenizer, ready to answer."""

  def __init__(self, loaded: LoadedLM, batch_size: int) -> None:
    """Takes a loaded model; `batch_size` prompts are answered together."""
    self.model, self.batch_size = loaded.model, batch_size
    self.tokenizer = loaded.files.tokenizer()
    self.params = jax.device_put(loaded.params)
    self.eos = _ends(self.tokenizer)
    shown = [np.ravel(x)[:: max(1, x.size // 64)] for x in jax.tree.leaves(loaded.params)]
    config = json.dumps(loaded.files.config, sort_keys=True, default=str).encode()
    self._identity: list[bytes | np.ndarray] = [FORMAT, config, *map(np.asarray, shown)]

  def prompt(self, *turns: str) -> list[int]:
    """Token ids of a conversation (user, assistant, user, ...); plain lines without a chat template."""
    if getattr(self.tokenizer, "chat_template", None):
      roles = ("user", "assistant")
      messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
      text = self.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
      )
      return self.tokenizer.encode(text, add_special_tokens=False)
    return list(self.tokenizer.encode("\n".join(turns) + "\n"))

  def write(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    num_samples: int = 1,
    report: Callable[[str], None] = lambda line: None,
  ) -> Written:
    """Continues prompts.

    Args:
      prompts: token ids.
      max_new_tokens: N.
      temperature: 0 is greedy.
      num_samples: continuations of every prompt.
      report: called with a line from time to time.
    """
    ids, mask = left_pad(prompts)
    extra = -ids.shape[1] % 16
    ids, mask = np.pad(ids, ((0, 0), (extra, 0))), np.pad(mask, ((0, 0), (extra, 0)))

    # XLA's default: with few rows its products are up to twice as fast as those of `runtime.compiler`.
    @jax.jit
    def program(params, ids, mask, key):
      return generate(
        self.model, {"params": params}, ids, mask, max_new_tokens=max_new_tokens, key=key,
        temperature=temperature, eos=self.eos, num_samples=num_samples,
      )  # fmt: skip

    settings = np.array([max_new_tokens, temperature, num_samples - 1, *self.eos], np.float64)
    parts, said = [], time.monotonic()
    for start in range(0, len(ids), self.batch_size):
      # The last batch is filled with repeats, so that one program serves all.
      rows = np.arange(start, start + self.batch_size) % len(ids)
      key = jax.random.fold_in(jax.random.key(0), start)
      prompt: list[np.ndarray] = [ids[rows], mask[rows]]

      def compute(prompt=prompt, key=key) -> dict[str, np.ndarray]:
        out = program(self.params, *prompt, key)
        return {name: np.asarray(value) for name, value in out._asdict().items()}

      depends = [*self._identity, settings, np.array(ids[rows].shape), *prompt]
      parts.append(cached("generations", depends, compute))
      if time.monotonic() - said > 20:
        said = time.monotonic()
        report(f"{min(start + self.batch_size, len(ids))} of {len(ids)} prompts answered")
    ids, mask = (np.repeat(x, num_samples, axis=0) for x in (ids, mask))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    written, length, log_probs = (
      joined[name][: len(ids)] for name in ("tokens", "lengths", "log_probs")
    )
    there = np.arange(written.shape[1]) < length[:, None]
    finished = np.isin(written[np.arange(len(ids)), length - 1], self.eos)
    decode = lambda row, n: self.tokenizer.decode(row[:n], skip_special_tokens=True)
    return Written(
      np.concatenate([ids, written], 1),
      np.concatenate([mask, there], 1),
      length,
      log_probs.sum(1) / length,
      finished,
      [decode(row, n) for row, n in zip(written, length, strict=True)],
    )

  def token_ends(self, tokens: np.ndarray) -> list[int]:
    """Characters of the text after each of its first tokens: (n,) ids to n lengths."""
    decode = lambda part: self.tokenizer.decode(part, skip_special_tokens=True)
    return [len(decode(tokens[: i + 1])) for i in range(len(tokens))]


def _ends(tokenizer: Any) -> tuple[int, ...]:
  """Tokens that end a text."""
  end = tokenizer.eos_token_id
  return () if end is None else (int(end),)
