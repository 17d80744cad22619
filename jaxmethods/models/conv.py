"""One convolution for every model: the same parameters, computed in the way that suits the backend.

On CPU a convolution inside a loop, or mapped over clients with their own weights, takes XLA's slow
path; gathering the neighbourhoods and multiplying by the kernel as a matrix is 4 to 7 times faster
there. Outside of a loop it depends: gradients of one block of `convnets` (64 images, one core, CPU ms,
best of 5; machine with other work), patches against lax.conv:

| block | patches | lax.conv |
| --- | --- | --- |
| ShuffleNet 16 x 16 x 200 | 183 | 892 |
| ShuffleNet 4 x 4 x 800 | 50 | 240 |
| MobileNetV2 16 x 16 x 24 | 203 | 1238 |
| ResNet 16 x 16 x 64 | 233 | 222 |
| ResNet 4 x 4 x 256 | 164 | 103 |

A whole ResNet that is not mapped is better off with `patches=False`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike

_FEW_GROUPS = 4  # up to so many, one product with zeros in it is faster than one for each group
_CHUNK = 1 << 20  # bytes of patches


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
    patches: multiply patches by the kernel (True; no forward-mode derivatives) or call `lax.conv`
      (False); None: True on CPU, where the patches are few shifts of the image or, stride = size, a
      mere reshape.
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
  if inputs == 1 and features == groups:
    convolve = _depthwise
  elif groups > _FEW_GROUPS:
    convolve = functools.partial(_grouped, groups=groups)
  else:
    convolve, kernel = _dense, block_diagonal(kernel, groups) if groups > 1 else kernel
  # The patches of a chunk stay in the cache, and the sums of the kernel's gradient cost less than they.
  fitting = max(_CHUNK, 4 * kernel.nbytes) * len(x) // max(size**2 * x.nbytes, 1)
  if stride >= size or fitting >= len(x):  # no neighbourhoods that overlap, or few
    return convolve(x, kernel, stride, padding)
  chunk = max((n for n in range(1, fitting + 1) if len(x) % n == 0), default=1)
  return _in_chunks(functools.partial(convolve, stride=stride, padding=padding), chunk, x, kernel)


def _dense(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
  return product(patches(x, len(kernel), stride, padding), kernel.reshape(-1, kernel.shape[-1]))


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
  shifts = shifted(x, len(kernel), stride, padding)  # one multiply-add for each
  return sum(s * k for s, k in zip(shifts, kernel.reshape(len(shifts), -1), strict=True))


def _grouped(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
  size, _, inputs, features = kernel.shape
  split = jnp.stack(shifted(x, size, stride, padding), axis=-2)
  split = split.reshape(*split.shape[:-1], groups, inputs)
  kernel = kernel.reshape(size * size, inputs, groups, features // groups)
  y = jnp.einsum("bhwkgc,kcgf->bhwgf", split, kernel)
  return y.reshape(*y.shape[:-2], features)


def block_diagonal(kernel: jax.Array, groups: int) -> jax.Array:
  """A grouped kernel (size, size, channels / groups, features) over all channels, with zeros."""
  size, _, inputs, features = kernel.shape
  blocks = kernel.reshape(size, size, inputs, groups, features // groups)
  full = jnp.einsum("abigf,gh->abhigf", blocks, jnp.eye(groups, dtype=kernel.dtype))
  return full.reshape(size, size, groups * inputs, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
  convolve: Callable[[jax.Array, jax.Array], jax.Array], chunk: int, x: jax.Array, kernel: jax.Array
) -> jax.Array:
  """Computes `convolve(x, kernel)` for `chunk` images at a time, forward and backward.

  Patches are made again for the backward pass rather than kept, and what they are made from is
  computed once: XLA would otherwise repeat it inside of each shift.
  """
  y = jax.lax.map(lambda part: convolve(part, kernel), _chunks(x, chunk))
  return y.reshape(-1, *y.shape[2:])


def _in_chunks_backward(convolve, chunk, residuals, dy):
  x, kernel = residuals

  def few(total, part):
    x, dy = part
    dx, dkernel = jax.vjp(convolve, x, kernel)[1](dy)
    return total + dkernel, dx

  parts = _chunks(x, chunk), _chunks(dy, chunk)
  dkernel, dx = jax.lax.scan(few, jnp.zeros_like(kernel), parts)
  return dx.reshape(x.shape), dkernel


_in_chunks.defvjp(
  lambda convolve, chunk, x, kernel: (_in_chunks(convolve, chunk, x, kernel), (x, kernel)),
  _in_chunks_backward,
)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
  return x.reshape(-1, chunk, *x.shape[1:])


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Product of x (..., n) and kernel (n, m), with a gradient that is cheap on CPU."""
  return x @ kernel


def _product_backward(residuals, dy):
  # The factor that comes first is transposed, and what it is computed from is computed again column
  # by column: the narrow one goes first. Autodiff has `dy` there always.
  x, kernel = residuals
  x_rows, dy_rows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
  over_rows = (((0,), (0,)), ((), ()))
  if x_rows.shape[1] <= dy_rows.shape[1]:
    gradient = jax.lax.dot_general(x_rows, dy_rows, over_rows)
  else:
    gradient = jax.lax.dot_general(dy_rows, x_rows, over_rows).T
  return dy @ kernel.T, gradient


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


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
