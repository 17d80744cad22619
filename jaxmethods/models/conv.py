"""One convolution for every model: the same parameters, computed in the way that suits the backend.

On CPU a convolution inside a loop, or mapped over clients with their own weights, takes XLA's slow
path; gathering the neighbourhoods and multiplying by the kernel as a matrix is 4 to 7 times faster
there. Outside of a loop it depends: gradients of one block of `convnets` (32 images of 16 x 16 x 24, one
core of a busy machine, CPU ms, median of 12), patches against lax.conv: ResNet 40 and 21, MobileNetV2
142 and 384, ShuffleNet 11 and 42. A ResNet that is not mapped is better off with `patches=False`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike


class Conv(nn.Module):
  """Square convolution: `kernel` (size, size, channels / groups, features), and `bias`.

  Attributes:
    features: output channels.
    size: of the kernel.
    stride: between two outputs.
    padding: zeros on each side.
    groups: of channels that do not see each other; as many as channels: depthwise.
    use_bias: whether there is a bias.
    kernel_init: initialiser of the kernel.
    patches: multiply patches by the kernel (True) or call `lax.conv` (False); None: True on CPU,
      where the patches are few shifts of the image or, stride = size, a mere reshape of it.
    dtype: of the computation; None: that of input and parameters.
  """

  features: int
  size: int = 3
  stride: int = 1
  padding: int = 0
  groups: int = 1
  use_bias: bool = True
  kernel_init: Initializer = nn.initializers.he_normal()
  patches: bool | None = None
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, height, width, channels) to (batch, height', width', features)."""
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    patches = self.patches
    if patches is None:
      few = self.size <= 3 or (self.stride == self.size and not self.padding)
      patches = few and jax.default_backend() == "cpu"
    convolve = convolve_patches if patches else convolve_lax
    y = convolve(x, kernel, self.stride, self.padding, self.groups)
    return y if bias is None else y + bias


def convolve_lax(
  x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int
) -> jax.Array:
  """Convolves (batch, height, width, channels) by XLA's own operation; arguments as in `Conv`."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((padding, padding), (padding, padding)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def convolve_patches(
  x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int
) -> jax.Array:
  """The same as `convolve_lax` by products of matrices, without an operation called convolution."""
  size, _, inputs, features = kernel.shape
  if inputs == 1 and features == groups:  # depthwise: one multiply-add per shift
    shifts = shifted(x, size, stride, padding)
    return sum(s * k for s, k in zip(shifts, kernel.reshape(size * size, features), strict=True))
  if groups == 1:
    return patches(x, size, stride, padding) @ kernel.reshape(-1, features)
  split = jnp.stack(shifted(x, size, stride, padding), axis=-2)
  split = split.reshape(*split.shape[:-1], groups, inputs)
  kernel = kernel.reshape(size * size, inputs, groups, features // groups)
  y = jnp.einsum("bhwkgc,kcgf->bhwgf", split, kernel)
  return y.reshape(*y.shape[:-2], features)


def patches(x: jax.Array, size: int, stride: int = 1, padding: int = 0) -> jax.Array:
  """The neighbourhoods that a convolution multiplies by its kernel.

  Args:
    x: (batch, height, width, channels).
    size: of the neighbourhood.
    stride: between two of them.
    padding: zeros on each side.

  Returns:
    (batch, height', width', size * size * channels), row by row as in an HWIO kernel.
  """
  if stride == size and not padding:
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
  return jnp.concatenate(shifted(x, size, stride, padding), axis=-1)


def shifted(x: jax.Array, size: int, stride: int, padding: int) -> list[jax.Array]:
  """One (batch, height', width', channels) for each of the size * size places in a kernel."""
  x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
  return [
    x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
    for i in range(size)
    for j in range(size)
  ]
