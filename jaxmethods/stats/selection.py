"""Choosing the largest entries of an array, exactly as many as asked for."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def top_share(scores: Float[Array, " ..."], share: float) -> Bool[Array, " ..."]:
  """Mask of the floor(share * size) highest scores, ties to the earlier position.

  Args:
    scores: any shape.
    share: in [0, 1].

  Returns:
    Boolean, the shape of `scores`.

  >>> jm.stats.top_share(jnp.array([3, 1, 2, 0]), 0.5).tolist()
  [True, False, True, False]
  """
  count = math.floor(share * scores.size)
  order = jnp.argsort(-scores.ravel(), stable=True)
  mask = jnp.zeros(scores.size, bool).at[order[:count]].set(True)
  return mask.reshape(scores.shape)
