"""A small multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
  """Dense layers with ReLU between them; the last one, named "head", gives the logits.

  Attributes:
    widths: of the hidden layers.
    num_classes: number of logits.
    dtype: of the computation; parameters stay float32.

  >>> jm.models.MLP((16,), 2).init_with_output(key, jnp.ones((8, 4)))[0].shape
  (8, 2)
  """

  widths: Sequence[int]
  num_classes: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, ...) to logits (batch, num_classes); trailing axes are flattened."""
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.widths):
      x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
