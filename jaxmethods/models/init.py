"""Initialisers of the published PyTorch code."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class LinearInit(NamedTuple):
  """Initialisers for `nn.Dense(width, **torch_linear(fan_in)._asdict())`."""

  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer


def torch_linear(fan_in: int) -> LinearInit:
  """PyTorch's default for a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias.

  This is what `kaiming_uniform_(a=sqrt(5))` comes to.

  Args:
    fan_in: number of inputs (the bias has no other way to know it).
  """
  bound = 1.0 / math.sqrt(fan_in) if fan_in > 0 else 0.0

  def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return LinearInit(uniform, uniform)


class Linear(nn.Module):
  """`nn.Dense` with PyTorch's default initialisation.

  Attributes:
    features: width of the result.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = torch_linear(x.shape[-1])
    kernel = self.param("kernel", init.kernel_init, (x.shape[-1], self.features))
    bias = self.param("bias", init.bias_init, (self.features,))
    return x @ kernel + bias
