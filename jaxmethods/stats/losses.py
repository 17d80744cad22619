"""Losses of padded batches: what is not real does not count."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.stats import shapes

IGNORED = -100  # the label of a token that no loss counts


def mean_of_real(
  values: Float[Array, " B"], mask: Bool[Array, " B"] | None = None
) -> Float[Array, ""]:
  """Mean of (B,) values over the true entries of the mask (B,), default all; 0 if there are none.

  >>> float(jm.stats.mean_of_real(jnp.array([1.0, 5.0]), jnp.array([True, False])))
  1.0
  """
  shapes.check(values=(values, "B"))
  if mask is None:
    return values.mean()
  return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def cross_entropy(
  logits: Float[Array, "B C"], labels: Int[Array, " B"], mask: Bool[Array, " B"] | None = None
) -> Float[Array, ""]:
  """Mean cross-entropy over the real examples: logits (B, C), labels (B,) int, mask (B,) bool.

  >>> round(float(jm.stats.cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 1, 1]))), 4)  # log 2
  0.6931
  """
  shapes.check(logits=(logits, "B C"), labels=(labels, "B"))
  return mean_of_real(optax.softmax_cross_entropy_with_integer_labels(logits, labels), mask)
