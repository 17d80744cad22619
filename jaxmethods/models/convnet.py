"""A small convnet whose 3x3 convolutions suit both a CPU and an accelerator.

On CPU a convolution inside a loop, or mapped over clients with their own weights, takes XLA's slow path;
gathering the 3x3 patches and multiplying by the kernel as a matrix is 4 to 7 times faster there. Same
parameters either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class Conv3x3(nn.Module):
  """3x3 convolution, stride 1, zero padding.

  Attributes:
    features: output channels.
    patches: multiply patches by the kernel (True) or call `lax.conv` (False); None: True on CPU.
    dtype: of the computation.
  """

  features: int
  patches: bool | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, height, width, channels) to (batch, height, width, features)."""
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
    x = x.astype(self.dtype)
    patches = jax.default_backend() == "cpu" if self.patches is None else self.patches
    if patches:
      return patches_3x3(x) @ kernel.reshape(-1, self.features) + bias
    return bias + jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class ConvNet(nn.Module):
  """3x3 convolutions, each with ReLU and 2x2 max pooling, then one dense layer, "head".

  Attributes:
    features: output channels of the convolutions.
    num_classes: number of logits.
    patches: as in `Conv3x3`.
    dtype: of the computation.
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
      x = Conv3x3(features, self.patches, self.dtype, name=f"conv_{i}")(x)
      x = nn.relu(max_pool_2x2(x))  # the same as pooling after the ReLU, on a quarter of the values
    x = x.reshape(x.shape[0], -1)
    if embedding:
      return x
    return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def patches_3x3(x: jax.Array) -> jax.Array:
  """The zero-padded 3x3 neighbourhood of every pixel.

  Args:
    x: (batch, height, width, channels).

  Returns:
    (batch, height, width, 9 * channels), row by row as in an HWIO kernel.
  """
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
  return jnp.concatenate(shifts, axis=-1)


def max_pool_2x2(x: jax.Array) -> jax.Array:
  """Maximum over 2x2 windows; an odd last row or column is dropped."""
  batch, height, width, channels = x.shape
  # Two maxima of two: the gradient of one `max` over four is a third slower on CPU.
  x = x[:, : height // 2 * 2].reshape(batch, height // 2, 2, width, channels)
  x = jnp.maximum(x[:, :, 0], x[:, :, 1])
  x = x[:, :, : width // 2 * 2].reshape(batch, height // 2, width // 2, 2, channels)
  return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
