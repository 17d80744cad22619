"""Attention of grouped queries, with a backward pass that keeps one square matrix instead of three."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmethods.stats.dropout import dropout

MASKED = -1e30  # finite: the scores of a query that sees nothing are no NaN


def masked_bias(visible: jax.Array) -> jax.Array:
  """The additive form of a boolean mask."""
  return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)


@jax.custom_vjp
def attention(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
  """Mixes values by softmax attention; the G queries of a group share keys and values.

  A query that sees nothing gets zeros, and no gradient passes through it.

  Args:
    query: (B, K, G, T, d), already scaled.
    key: (B, K, S, d).
    value: (B, K, S, d).
    bias: (B or 1, T, S), added to the scores; a constant (gets no gradient).

  Returns:
    (B, K, G, T, d).
  """
  return _attention(query, key, value, bias)[0]


def _attention(query, key, value, bias):
  weights = jnp.exp(_shifted_scores(query, key, bias))
  total = _total(weights)
  weights = weights.astype(value.dtype)
  # Divided after the product: (T, d) instead of (T, S) quotients.
  mixed = jnp.einsum("bkgts,bksd->bkgtd", weights, value) / total.astype(value.dtype)
  return mixed, (query, key, value, weights, total, mixed)


def _attention_backward(residuals, d_mixed):
  query, key, value, weights, total, mixed = residuals
  d_mixed = (d_mixed / total).astype(value.dtype)
  # The narrow factor first in both sums over t: XLA on a CPU transposes the first one.
  d_value = _positions_first(jnp.einsum("bkgtd,bkgts->bkds", d_mixed, weights))
  d_weights = jnp.einsum("bkgtd,bksd->bkgts", d_mixed, value)
  d_scores = weights * (d_weights - (d_mixed * mixed).sum(-1, keepdims=True))
  d_query = jnp.einsum("bkgts,bksd->bkgtd", d_scores, key)
  d_key = _positions_first(jnp.einsum("bkgtd,bkgts->bkds", query, d_scores))
  return d_query, d_key, d_value, None


def _positions_first(x: jax.Array) -> jax.Array:
  """(B, K, d, S) to (B, K, S, d), by way of (B, S, K d).

  Models want the latter next. XLA would fold a plain swap into the product before it, which then is
  none of its fast ones on a CPU.
  """
  batch, heads, width, length = x.shape
  x = x.reshape(batch, heads * width, length).swapaxes(1, 2)
  return x.reshape(batch, length, heads, width).swapaxes(1, 2)


attention.defvjp(_attention, _attention_backward)


def attention_with_dropout(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, rate: float, rng: jax.Array
) -> jax.Array:
  """`attention` of which a `rate` share of the weights is dropped, the rest scaled up."""
  weights = jnp.exp(_shifted_scores(query, key, bias))
  weights = dropout(weights / _total(weights), rate, rng)
  return jnp.einsum("bkgts,bksd->bkgtd", weights.astype(value.dtype), value)


def attention_rows(
  query: jax.Array, key: jax.Array, bias: jax.Array, chosen: jax.Array
) -> jax.Array:
  """Attention probabilities of a few queries; the full map is never formed.

  Args:
    query: (B, K, G, T, d), already scaled.
    key: (B, K, S, d).
    bias: (B or 1, T, S).
    chosen: (B, R) positions among the T.

  Returns:
    (B, K * G, R, S) float32, heads in the order of the model.
  """
  query = jnp.take_along_axis(query, chosen[:, None, None, :, None], axis=3)
  bias = jnp.broadcast_to(bias, (len(chosen), *bias.shape[1:]))
  bias = jnp.take_along_axis(bias, chosen[:, :, None], axis=1)
  weights = jnp.exp(_shifted_scores(query, key, bias))
  rows = weights / _total(weights)
  return rows.reshape(rows.shape[0], -1, *rows.shape[3:])


def _shifted_scores(query, key, bias):
  """Returns scores in float32 with the maximum of every row at 0; those of a blind row stay `MASKED`."""
  scores = jnp.einsum("bkgtd,bksd->bkgts", query, key, preferred_element_type=jnp.float32)
  scores = scores + bias[:, None, None]
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  return scores - jnp.where(top > MASKED / 2, top, 0)


def _total(weights: jax.Array) -> jax.Array:
  """Sums the weights of every query; 1 where it sees nothing."""
  total = weights.sum(-1, keepdims=True)
  return jnp.where(total > 0, total, 1)
