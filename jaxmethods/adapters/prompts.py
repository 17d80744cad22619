"""Learned vectors in front of the input (prompt tuning) or of every layer's keys and values (prefix)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def insert_prompt(
  prompt: jax.Array, embeddings: jax.Array, mask: jax.Array, labels: jax.Array, position: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Puts learned vectors into a batch of embedded tokens (prompt tuning, arXiv 2104.08691).

  Everything from `position` on moves right by the length of the prompt; behind the image tokens of a
  multimodal model is where it belongs.

  Args:
    prompt: (length, width).
    embeddings: (batch, tokens, width).
    mask: (batch, tokens) bool, real tokens.
    labels: (batch, tokens) int; those of the prompt are ignored (-100).
    position: where the prompt begins.

  Returns:
    The three with `length` more tokens.
  """
  batch, length = embeddings.shape[0], prompt.shape[0]

  def put(x: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([x[:, :position], new, x[:, position:]], axis=1)

  wide = jnp.broadcast_to(prompt.astype(embeddings.dtype), (batch, *prompt.shape))
  return (
    put(embeddings, wide),
    put(mask, jnp.ones((batch, length), mask.dtype)),
    put(labels, jnp.full((batch, length), IGNORED, labels.dtype)),
  )


IGNORED = -100  # the label that every loss of ours leaves out


def prefix_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, prefix_key: jax.Array, prefix_value: jax.Array
) -> jax.Array:
  """softmax(q [P_k; k]^T / sqrt(d)) [P_v; v]: attention that every query lets see a learned prefix.

  Li and Liang, arXiv 2101.00190. This is one head without a mask, the equation itself; a model with a
  key-value cache is given its prefix as the first entries of the cache.

  Args:
    query: (..., queries, d).
    key: (..., keys, d).
    value: (..., keys, d).
    prefix_key: (..., length, d), never rotated.
    prefix_value: (..., length, d).

  Returns:
    (..., queries, d).
  """
  keys = jnp.concatenate([prefix_key, key], axis=-2)
  values = jnp.concatenate([prefix_value, value], axis=-2)
  logits = jnp.einsum("...qd,...kd->...qk", query, keys) / math.sqrt(query.shape[-1])
  return jax.nn.softmax(logits) @ values
