"""Initialisers of the published PyTorch code."""

from __future__ import annotations

import math
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer


class LinearInit(TypedDict):
  """The two initialisers of a linear layer, as keywords of `nn.Dense`."""

  kernel_init: Initializer
  bias_init: Initializer


def torch_linear(fan_in: int) -> LinearInit:
  """PyTorch's default for a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias.

  This is what `kaiming_uniform_(a=sqrt(5))` comes to.

  Args:
    fan_in: number of inputs (the bias has no other way to know it).

  Returns:
    Keywords for `nn.Dense(width, **torch_linear(x.shape[-1]))`.
  """
  bound = 1.0 / math.sqrt(fan_in) if fan_in > 0 else 0.0

  def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return {"kernel_init": uniform, "bias_init": uniform}
