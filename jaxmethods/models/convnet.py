"""A small convnet for images of few pixels."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmethods.models.conv import Conv


class ConvNet(nn.Module):
  """3x3 convolutions, each with ReLU and 2x2 max pooling, then one dense layer, "head".

  Attributes:
    features: output channels of the convolutions.
    num_classes: number of logits.
    patches: as in `Conv`.
    dtype: of the computation.

  >>> jm.models.ConvNet((4,), 2).init_with_output(key, jnp.ones((1, 8, 8, 1)))[0].shape
  (1, 2)
  """

  features: Sequence[int]
  num_classes: int
  patches: bool | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, embedding: bool = False) -> jax.Array:
    """Maps (batch, height, width, channels) to logits (batch, num_classes).

    With `embedding` to what the dense layer reads instead: (batch, values of the last feature map).
    """
    for i, features in enumerate(self.features):
      conv = Conv(features, padding=1, patches=self.patches, dtype=self.dtype, name=f"conv_{i}")
      x = conv(x)
      x = nn.relu(max_pool_2x2(x))  # the same as pooling after the ReLU, on a quarter of the values
    x = x.reshape(x.shape[0], -1)
    if embedding:
      return x
    return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def max_pool_2x2(x: jax.Array) -> jax.Array:
  """Maximum over 2x2 windows; an odd last row or column is dropped."""
  batch, height, width, channels = x.shape
  # Two maxima of two: the gradient of one `max` over four is a third slower on CPU.
  x = x[:, : height // 2 * 2].reshape(batch, height // 2, 2, width, channels)
  x = jnp.maximum(x[:, :, 0], x[:, :, 1])
  x = x[:, :, : width // 2 * 2].reshape(batch, height // 2, width // 2, 2, channels)
  return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
