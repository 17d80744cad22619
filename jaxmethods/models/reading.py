"""A finished text read once more by the model that wrote it: its states, its logits, its doubts.

The state that belongs to a written token is the one that predicts it, a column earlier. One pass gives
what generation gave token by token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.models.probe import Probe, masked_mean
from jaxmethods.stats.dropout import dropout
from jaxmethods.trees import Params, PyTree

# Dense layers whose outputs are added to the residual stream.
_BRANCHES = ("out", "down")


class Text(NamedTuple):
  """A batch of prompts and what was written after them: N columns, after T - N of prompts.

  Attributes:
    ids: (B, T), prompts padded on the left, outputs on the right.
    mask: (B, T), 0 at padding.
    segments: (B, S, N), parts of the output.
  """

  ids: jax.Array
  mask: jax.Array
  segments: jax.Array


class Reading(NamedTuple):
  """What one pass tells.

  Attributes:
    states: (B, S, L + 1, D), mean residual state of every segment after every layer.
    final: (B, S, D), the last of them after the final norm.
    folded: of the `fold` that was asked for, which has seen the states of `predicting`.
    tokens: what `per_token` gave, (B, N, ...).
  """

  states: jax.Array
  final: jax.Array
  folded: PyTree
  tokens: PyTree


def predicting(text: Text, states: jax.Array, official_first_token: bool = False) -> jax.Array:
  """The states that predict the written tokens: (B, T, D) to (B, N, D).

  Args:
    text: the texts.
    states: of all their columns.
    official_first_token: for the first token, take the state of the first prompt token instead of the
      last one (CoE code).
  """
  size = text.segments.shape[-1]
  before = states[:, -size - 1 : -1]
  if official_first_token:
    first = jnp.take_along_axis(states, text.mask.argmax(1)[:, None, None], 1)
    before = before.at[:, :1].set(first)
  return before


def read(
  model: CausalLM,
  variables: Params,
  text: Text,
  per_token: Callable[[jax.Array, jax.Array], PyTree],
  *,
  fold: Callable[[PyTree, jax.Array], PyTree] | None = None,
  official_first_token: bool = False,
  at_once: int = 512,
) -> Reading:
  """Reads texts.

  Args:
    model: the model.
    variables: its collections.
    text: the texts.
    per_token: (logits (..., V), tokens (...)) -> what to keep of them, (..., more) each.
    fold: of the `Probe`.
    official_first_token: see `predicting`.
    at_once: logits of about so many tokens exist at a time; with fewer, reading the output weights again
      and again costs more than the logits.

  Returns:
    See `Reading`.
  """
  apply: Any = model.apply
  # Prompts may be far longer than what is written after them: only the written part is reduced.
  written = functools.partial(predicting, text, official_first_token=official_first_token)
  mean = masked_mean(text.segments)
  follow = None if fold is None else lambda folded, x: fold(folded, written(x))
  probe = Probe(states=lambda x: mean(written(x)), fold=follow)
  out = apply(variables, text.ids, mask=text.mask, probe=probe, logits="none")
  size = text.segments.shape[-1]
  chunk = min(max(at_once // len(text.ids), 1), size)
  pad = -size % chunk
  split = lambda x: jnp.moveaxis(
    jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)]).reshape(
      len(x), -1, chunk, *x.shape[2:]
    ),
    1,
    0,
  )
  parts = split(out.hidden[:, -size - 1 : -1]), split(text.ids[:, -size:])

  def of_part(part):
    hidden, tokens = part
    logits = apply(variables, hidden, method="logits")
    if jax.default_backend() != "cpu":
      return per_token(logits, tokens)
    # Token by token: its logits stay in the cache while everything is computed of them.
    each = (x.reshape(-1, *x.shape[2:]) for x in (logits, tokens))
    found = jax.lax.map(lambda one: per_token(*one), tuple(each))
    return jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[1:]), found)

  kept = jax.lax.map(of_part, parts)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :size]
  states = jnp.moveaxis(out.states, 0, 2)
  return Reading(states, out.final, out.folded, jax.tree.map(join, kept))


def with_final_norm(reading: Reading) -> jax.Array:
  """`Reading.states` with the last one after the final norm, as generation APIs return it."""
  return reading.states.at[:, :, -1].set(reading.final.astype(reading.states.dtype))


def dropout_probs(
  model: CausalLM,
  variables: Params,
  text: Text,
  column: jax.Array,
  keys: jax.Array,
  *,
  rate: float,
) -> jax.Array:
  """Next-token distributions in one column of every text, dropout on: (K, B, V) of K keys.

  Args:
    model: the model; its parameters were not trained with dropout, necessarily.
    variables: its collections.
    text: the texts.
    column: (B,), the column that predicts the token in question.
    keys: (K,).
    rate: share of what attention and MLP add to the residual stream that is dropped.
  """
  apply: Any = model.apply

  def one(key: jax.Array) -> jax.Array:
    with _residual_dropout(rate):
      hidden = apply(
        variables, text.ids, mask=text.mask, logits="none", rngs={"dropout": key}
      ).hidden
    chosen = jnp.take_along_axis(hidden, column[:, None, None], 1)[:, 0]
    logits = apply(variables, chosen, method="logits")
    return jax.nn.softmax(logits.astype(jnp.float32))

  return jax.lax.map(one, keys)


@contextlib.contextmanager
def _residual_dropout(rate: float) -> Iterator[None]:
  """Within this context, what is added to the residual stream is dropped at a rate."""

  def intercept(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    module = context.module
    if isinstance(module, nn.Dense) and module.name in _BRANCHES:
      return dropout(y, rate, module.make_rng("dropout"))
    return y

  with nn.intercept_methods(intercept):
    yield
