"""Small networks put behind or beside a layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmethods.adapters.adapter import Adapter, Factors, Rule, on_linears
from jaxmethods.errors import InputError
from jaxmethods.models.init import torch_linear


def serial(width: int = 64, activation: Callable = jax.nn.relu) -> Adapter:
  """Houlsby's adapter: h + relu(h W_d^T + b_d) W_u^T + b_u on the output h of a layer.

  Put it behind the last linear layers of attention and MLP, e.g. r"(out|down)/kernel" (Houlsby et al.,
  arXiv 1902.00751). W_u and b_u start at zero. It cannot be merged.

  Args:
    width: of the bottleneck.
    activation: between its two layers.
  """
  _check_width("serial", width)

  def init(key, linear, path):
    return _bottleneck(key, linear.kernel.shape[1], width, linear.kernel.shape[1])

  def forward(f: Factors, x, linear, dense, drop):
    h = dense(x)
    return h + _branch(f, drop(h), activation)

  return on_linears(Rule(init, forward, None), kind="serial", width=width)


def parallel(width: int = 64, scale: float = 1.0, activation: Callable = jax.nn.relu) -> Adapter:
  """Parallel adapter: y + scale relu(x W_d^T + b_d) W_u^T + b_u beside a linear layer y of x.

  He et al., arXiv 2110.04366, put it beside a whole MLP; here it stands beside one linear layer
  (inferred: the layer is what every model shares). It cannot be merged.
  """
  _check_width("parallel", width)

  def init(key, linear, path):
    inputs, outputs = linear.kernel.shape
    return _bottleneck(key, inputs, width, outputs)

  def forward(f: Factors, x, linear, dense, drop):
    return dense(x) + scale * _branch(f, drop(x), activation)

  return on_linears(Rule(init, forward, None), kind="parallel", width=width, scale=scale)


def _bottleneck(key: jax.Array, inputs: int, width: int, outputs: int) -> dict[str, jax.Array]:
  return {
    "down": torch_linear(inputs)["kernel_init"](key, (inputs, width), jnp.float32),
    "down_bias": jnp.zeros(width),
    "up": jnp.zeros((width, outputs)),
    "up_bias": jnp.zeros(outputs),
  }


def _branch(f: Factors, x: jax.Array, activation: Callable) -> jax.Array:
  down, down_bias, up, up_bias = (
    f[name].astype(x.dtype) for name in ("down", "down_bias", "up", "up_bias")
  )
  return activation(x @ down + down_bias) @ up + up_bias


def _check_width(kind: str, width: int) -> None:
  if width < 1:
    raise InputError(f"{kind}: width must be at least 1, got {width}")
