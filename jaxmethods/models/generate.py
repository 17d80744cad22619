"""Text from a causal LM: prefill, then one `lax.while_loop` over a preallocated cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.models.mllm import MLLM
from jaxmethods.trees import Params, PyTree


class Generated(NamedTuple):
  """New tokens of a batch.

  Attributes:
    tokens: (B n, N), padded after the end; n is the number of samples, 1 by default.
    lengths: (B n,), how many are real, the end token included.
    log_probs: (B n, N), of the tokens under the model itself: whatever the sampling, temperature 1.
  """

  tokens: jax.Array
  lengths: jax.Array
  log_probs: jax.Array


def generate(
  model: CausalLM | MLLM,
  variables: Params,
  ids: jax.Array,
  mask: jax.Array | None = None,
  *,
  max_new_tokens: int,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  eos: Sequence[int] = (),
  pad: int = 0,
  num_samples: int = 1,
  cache_size: int | None = None,
  use_cache: bool = True,
  **prompt: PyTree,
) -> Generated:
  """Continues prompts until each has said `eos` or has N = `max_new_tokens` new tokens.

  Args:
    model: the model.
    variables: its collections, e.g. {"params": ..., "adapter": ...}.
    ids: (B, T), padded on the left.
    mask: (B, T), 0 at padding; default: no padding.
    max_new_tokens: N.
    key: of the draws; not needed for greedy decoding.
    temperature: divides the logits; 0 is greedy.
    top_k: draw among the k likeliest.
    top_p: draw among the likeliest that together reach this probability.
    eos: tokens that end a text.
    pad: what follows the end.
    num_samples: n, continuations of every prompt, which is read once: rows b n to b n + n - 1 of the
      result are those of prompt b.
    cache_size: slots of the cache; default: what is needed.
    use_cache: False recomputes the whole text for every token (slow; the reference).
    **prompt: what else the model reads with the prompt, such as the `pixels` of an `MLLM`.

  Returns:
    See `Generated`.

  Raises:
    ValueError: prompt and new tokens are longer than the cache, or an impossible setting.
  """
  batch, length = ids.shape
  size = length + max_new_tokens if cache_size is None else cache_size
  _check(max_new_tokens, num_samples, length, size)
  _check_sampling(temperature, top_k, top_p, key)
  mask = jnp.ones((batch, length), bool) if mask is None else jnp.asarray(mask, bool)
  ids = jnp.asarray(ids, jnp.int32)
  apply: Any = model.apply  # linen's own type allows for mutable collections, which are not used

  slots = size if use_cache else None
  read = apply(variables, ids, mask=mask, cache_size=slots, logits="last", **prompt)
  first, cache = read.logits[:, 0], read.cache
  if num_samples > 1:
    each = lambda x: jnp.repeat(x, num_samples, axis=0)
    first, ids, mask, prompt = jax.tree.map(each, (first, ids, mask, prompt))
    cache = cache and cache.repeated(num_samples)
  draw = functools.partial(_draw, key, temperature, top_k, top_p)
  write = functools.partial(_write, draw, jnp.asarray(list(eos), jnp.int32))
  if use_cache:
    following = functools.partial(_by_cache, apply, variables)
  else:
    following = functools.partial(_by_text, apply, variables, ids, mask, prompt)

  def body(carry: tuple[jax.Array, _Text, PyTree]) -> tuple[jax.Array, _Text, PyTree]:
    step, text, cache = carry
    logits, cache = following(step, text.tokens, cache)
    return step + 1, write(text, logits, step), cache

  def unfinished(carry: tuple[jax.Array, _Text, PyTree]) -> jax.Array:
    step, text, _ = carry
    return (step < max_new_tokens) & ~text.done.all()

  begun = write(_Text.empty(len(ids), max_new_tokens, pad), first, 0)
  _, text, _ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), begun, cache))
  return _ended(text, eos)


class _Text(NamedTuple):
  """What has been written: tokens and log-probabilities (B, N), and which texts are done (B,)."""

  tokens: jax.Array
  done: jax.Array
  log_probs: jax.Array

  @classmethod
  def empty(cls, batch: int, length: int, pad: int) -> _Text:
    tokens = jnp.full((batch, length), pad, jnp.int32)
    return cls(tokens, jnp.zeros(batch, bool), jnp.zeros((batch, length)))


def _check(max_new_tokens: int, num_samples: int, length: int, size: int) -> None:
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
  if num_samples < 1:
    raise ValueError(f"num_samples: must be at least 1, got {num_samples}")
  if length + max_new_tokens > size:
    raise ValueError(
      f"a prompt of {length} tokens and {max_new_tokens} new ones are longer than the cache of {size}"
    )


def _check_sampling(
  temperature: float, top_k: int | None, top_p: float | None, key: jax.Array | None
) -> None:
  impossible_k = top_k is not None and top_k < 1
  impossible_p = top_p is not None and not 0 < top_p <= 1
  if temperature < 0 or impossible_k or impossible_p:
    raise ValueError(f"impossible sampling: {temperature=}, {top_k=}, {top_p=}")
  if temperature > 0 and key is None:
    raise ValueError("sampling at a temperature above 0 needs a key")


def _draw(
  key: jax.Array | None,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
  logits: jax.Array,
  step: jax.Array | int,
) -> jax.Array:
  """Chooses the next tokens (B,) by logits (B, V)."""
  if temperature == 0:
    return logits.argmax(-1).astype(jnp.int32)
  assert key is not None
  logits = restrict(logits.astype(jnp.float32) / temperature, top_k, top_p)
  return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)


def _by_cache(
  apply: Callable, variables: Params, step: jax.Array, tokens: jax.Array, cache: PyTree
) -> tuple[jax.Array, PyTree]:
  """Logits (B, V) of the token at `step` from the one before and the cache, and the next cache."""
  newest = jax.lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
  out = apply(variables, newest, cache=cache, logits="last")
  return out.logits[:, 0], out.cache


def _by_text(
  apply: Callable,
  variables: Params,
  ids: jax.Array,
  mask: jax.Array,
  prompt: PyTree,
  step: jax.Array,
  tokens: jax.Array,
  cache: PyTree,
) -> tuple[jax.Array, PyTree]:
  """Logits (B, V) of the token at `step` from the whole text so far; there is no cache."""
  text = jnp.concatenate([ids, tokens], axis=1)
  written = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < step, tokens.shape)
  there = jnp.concatenate([mask, written], axis=1)
  hidden = apply(variables, text, mask=there, logits="none", **prompt).hidden
  newest = jax.lax.dynamic_index_in_dim(hidden, ids.shape[1] + step - 1, axis=1, keepdims=False)
  return apply(variables, newest, method="logits"), cache


def _write(
  draw: Callable, ends: jax.Array, text: _Text, logits: jax.Array, step: jax.Array | int
) -> _Text:
  """Puts the tokens chosen by logits (B, V) into the texts that go on at `step`."""
  new = draw(logits, step)
  logits = logits.astype(jnp.float32)
  log_prob = jnp.take_along_axis(logits, new[:, None], 1) - jax.nn.logsumexp(
    logits, axis=-1, keepdims=True
  )
  old = jax.lax.dynamic_slice_in_dim(text.tokens, step, 1, axis=1)
  column = jnp.where(text.done[:, None], old, new[:, None])
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
  return _Text(
    put(text.tokens, column), text.done | jnp.isin(new, ends), put(text.log_probs, log_prob)
  )


def _ended(text: _Text, eos: Sequence[int]) -> Generated:
  """Measures texts; what follows an end has log-probability 0."""
  ended = jnp.isin(text.tokens, jnp.asarray(list(eos), jnp.int32))
  length = text.tokens.shape[1]
  lengths = jnp.where(ended.any(1), ended.argmax(1) + 1, length)
  real = jnp.arange(length) < lengths[:, None]
  return Generated(text.tokens, lengths, jnp.where(real, text.log_probs, 0))


def restrict(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
  """Sets the logits (B, V) of what must not be drawn to -inf: `top_k` first, then `top_p`."""
  if top_k is not None and top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None and top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    likely = jax.nn.softmax(ranked)
    # Kept while what is before it does not reach top_p: never empty.
    kept = jnp.cumsum(likely, axis=-1) - likely < top_p
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def left_pad(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Token ids (B, T) and mask (B, T) of prompts of different lengths."""
  length = max(map(len, prompts))
  ids = np.full((len(prompts), length), pad, np.int32)
  mask = np.zeros((len(prompts), length), bool)
  for row, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f"prompt {row} is empty")
    ids[row, length - len(prompt) :] = prompt
    mask[row, length - len(prompt) :] = True
  return ids, mask
