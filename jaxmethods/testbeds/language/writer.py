"""Texts of a given language model: in batches of one shape, every batch kept on disk once written."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxmethods.data.array_cache import cached
from jaxmethods.data.model_sources import LoadedLM, ModelFiles
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.models.generate import Generated, generate, left_pad
from jaxmethods.trees import Params, PyTree

FORMAT = b"generations 2"
_ROUND = 16  # lengths of prompts are rounded up to a multiple, so that fewer programs are compiled
_SILENCE = 20.0  # seconds between two reports


class Sampling(NamedTuple):
  """How texts are drawn.

  Attributes:
    max_new_tokens: N.
    temperature: 0 is greedy.
    num_samples: continuations of every prompt.
  """

  max_new_tokens: int
  temperature: float = 0.0
  num_samples: int = 1


class Written(NamedTuple):
  """Continuations of prompts, n in all; those of one prompt stand together.

  Attributes:
    ids, mask: (n, T + N), prompts padded on the left, continuations on the right.
    lengths: (n,), tokens written, the end token included.
    mean_log_prob: (n,), per token, whatever the sampling, at temperature 1.
    finished: (n,), whether the text came to its end.
    texts: of the continuations, without the end token.
  """

  ids: np.ndarray
  mask: np.ndarray
  lengths: np.ndarray
  mean_log_prob: np.ndarray
  finished: np.ndarray
  texts: list[str]


class Writer:
  """A model and its tokenizer, ready to answer.

  Attributes:
    model, params: the model; its parameters are on the device.
    tokenizer: of its files.
    eos: tokens that end a text.
    batch_size: prompts that are answered together.
  """

  def __init__(self, loaded: LoadedLM, batch_size: int) -> None:
    """Takes a loaded model.

    Raises:
      InputError: it has no tokenizer, or end tokens that are no numbers.
    """
    self.model, self.batch_size = loaded.model, batch_size
    self.tokenizer = loaded.files.tokenizer()
    self.params = jax.device_put(loaded.params)
    self.eos = end_tokens(loaded.files, self.tokenizer)
    self._identity = identity(loaded)

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
    extra = -ids.shape[1] % _ROUND
    ids, mask = (np.pad(x, ((0, 0), (extra, 0))) for x in (ids, mask))
    parts = self._batches(ids, mask, Sampling(max_new_tokens, temperature, num_samples), report)
    ids, mask = (np.repeat(x, num_samples, axis=0) for x in (ids, mask))
    tokens, lengths, log_probs = (
      np.concatenate([part[name] for part in parts])[: len(ids)] for name in Generated._fields
    )
    there = np.arange(tokens.shape[1]) < lengths[:, None]
    finished = np.isin(tokens[np.arange(len(ids)), lengths - 1], self.eos)
    return Written(
      np.concatenate([ids, tokens], 1),
      np.concatenate([mask, there], 1),
      lengths,
      log_probs.sum(1) / lengths,
      finished,
      # The tokenizer may not know that a token ends texts, and would spell it out.
      [self._decode(row[:n]) for row, n in zip(tokens, lengths - finished, strict=True)],
    )

  def _batches(
    self,
    ids: np.ndarray,
    mask: np.ndarray,
    sampling: Sampling,
    report: Callable[[str], None],
  ) -> list[dict[str, np.ndarray]]:
    """Fields of `Generated` for every batch, from the cache where they are."""
    # XLA's default: with few rows its products are up to twice as fast as those of `runtime.compiler`.
    program = jax.jit(functools.partial(_continue, self.model, sampling, self.eos))
    settings = np.array([*sampling[:2], sampling.num_samples - 1, *self.eos], np.float64)
    parts, said = [], time.monotonic()
    for start in range(0, len(ids), self.batch_size):
      # The last batch is filled with repeats, so that one program serves all.
      rows = np.arange(start, start + self.batch_size) % len(ids)
      key = jax.random.fold_in(jax.random.key(0), start)
      arguments = (self.params, ids[rows], mask[rows], key)
      shape = np.array(ids[rows].shape)
      depends: list[bytes | np.ndarray] = [*self._identity, settings, shape, ids[rows], mask[rows]]
      parts.append(cached("generations", depends, functools.partial(_on_host, program, arguments)))
      if time.monotonic() - said > _SILENCE:
        said = time.monotonic()
        report(f"{min(start + self.batch_size, len(ids))} of {len(ids)} prompts answered")
    return parts

  def token_ends(self, tokens: np.ndarray) -> list[int]:
    """Characters of the text after each of its first tokens: (n,) ids to n lengths."""
    return [len(self._decode(tokens[: i + 1])) for i in range(len(tokens))]

  def _decode(self, tokens: np.ndarray) -> str:
    return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _continue(
  model: CausalLM,
  sampling: Sampling,
  eos: tuple[int, ...],
  params: Params,
  ids: jax.Array,
  mask: jax.Array,
  key: jax.Array,
) -> Generated:
  """Continues one batch of prompts; the weights are an argument."""
  return generate(
    model, {"params": params}, ids, mask, key=key, eos=eos, **sampling._asdict()
  )  # fmt: skip


def _on_host(
  program: Callable[..., Generated], arguments: tuple[PyTree, ...]
) -> dict[str, np.ndarray]:
  """Runs a program and fetches the fields of its result."""
  return {name: np.asarray(value) for name, value in program(*arguments)._asdict().items()}


def end_tokens(files: ModelFiles, tokenizer: object) -> tuple[int, ...]:
  """Returns the tokens that end a text, of generation config, config and tokenizer together.

  Chat models end a turn with another token than a document, and often one of the three knows it only.

  Raises:
    InputError: an end token is no whole number.
  """
  found: set[int] = set()
  for where, stated in (
    ("generation_config.json", files.generation.get("eos_token_id")),
    ("config.json", files.config.get("eos_token_id")),
    ("tokenizer", getattr(tokenizer, "eos_token_id", None)),
  ):
    for token in stated if isinstance(stated, list | tuple) else [stated]:
      if token is None:
        continue
      if isinstance(token, bool) or not isinstance(token, int | np.integer):
        raise InputError(f"{files.source.name}: eos_token_id of {where}: {token!r} is no token")
      found.add(int(token))
  return tuple(sorted(found))


def identity(loaded: LoadedLM) -> list[bytes]:
  """Returns all of a model that its texts depend on, as parts of a cache key.

  Tokenizer and chat template are not among it: all they do is in the token ids of the prompts and in the
  end tokens, which belong to the key; texts are decoded anew from kept tokens.
  """
  config = json.dumps(loaded.files.config, sort_keys=True, default=str).encode()
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params):
    tensor = np.ascontiguousarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {tensor.dtype} {tensor.shape}".encode())
    digest.update(tensor.reshape(-1).view(np.uint8).data)
  return [FORMAT, config, np.dtype(loaded.model.dtype).name.encode(), digest.digest()]
