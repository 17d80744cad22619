"""What a method wants to know about the layers of a model, reduced where it arises."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmethods.trees import PyTree


class Probe(NamedTuple):
  """What to keep of the layers; computed inside the scan.

  Attributes:
    states: reduces a hidden state (B, T, D), e.g. `masked_mean(mask)`.
    queries: (B, R), positions among the T whose attention is wanted.
    attention: reduces the rows (B, heads, R, S) of those queries.
    fold: (what it gave for the layer before, None at the embedding; a hidden state) -> the same; for
      what two layers tell together. Causal language models only.
  """

  states: Callable[[jax.Array], PyTree] | None = None
  queries: jax.Array | None = None
  attention: Callable[[jax.Array], PyTree] = lambda rows: rows
  fold: Callable[[PyTree, jax.Array], PyTree] | None = None


def masked_mean(mask: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """A reducer for `Probe.states`: means over tokens, of one mask or several.

  Args:
    mask: (B, T) or (B, M, T), nonnegative weights; a mask without tokens gives zeros.

  Returns:
    (B, T, D) -> (B, D) or (B, M, D), in float32 at least; what is at tokens of weight zero, even NaN,
    does not matter.
  """
  weights = mask.astype(jnp.float32)
  weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
  used = (weights > 0).any(tuple(range(1, weights.ndim - 1)))[..., None]

  def mean(x: jax.Array) -> jax.Array:
    x = jnp.where(used, x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.einsum("b...t,btd->b...d", weights, x)

  return mean
