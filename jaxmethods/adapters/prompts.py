"""Learned vectors in front of the input (prompt tuning) or of every layer's keys and values (prefix)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxmethods.adapters.adapter import Params, Tree
from jaxmethods.adapters.targets import matching
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import CausalLMConfig
from jaxmethods.stats.losses import IGNORED
from jaxmethods.trees import flatten


def init_prompt(key: jax.Array, params: Params, length: int = 20) -> Tree:
  """{"prompt": (length, D)}: embeddings of tokens drawn from the model's vocabulary.

  Neither this nor a prefix leaves the model's function as it was, and neither can be merged.

  Args:
    key: of the draw.
    params: of a causal LM, alone or inside a larger model; must have one "embed/embedding".
    length: number of learned vectors.
  """
  _check_length("prompt", length)
  flat = flatten(params)
  (path,) = matching(flat, r"\bembed/embedding$")
  tokens = jax.random.randint(key, (length,), 0, flat[path].shape[0])
  return {"prompt": jnp.asarray(flat[path])[tokens].astype(jnp.float32)}


def init_prefix(key: jax.Array, config: CausalLMConfig, length: int = 20) -> Tree:
  """{"keys", "values"}: (L, K, length, d) each, normal with the model's own deviation."""
  _check_length("prefix", length)
  shape = (config.num_layers, config.num_kv_heads, length, config.head_dim)
  keys, values = jax.random.split(key)
  return {
    "keys": config.init_std * jax.random.normal(keys, shape),
    "values": config.init_std * jax.random.normal(values, shape),
  }


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


def _check_length(kind: str, length: int) -> None:
  if length < 1:
    raise InputError(f"{kind}: length must be at least 1, got {length}")
