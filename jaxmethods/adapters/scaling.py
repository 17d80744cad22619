"""Adapters that scale or rotate what a linear layer reads or writes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxmethods.adapters.adapter import Adapter, Factors, Linear, Rule, on_linears
from jaxmethods.errors import InputError


def ia3(feedforward: str = r"\b(down|fc_2)$") -> Adapter:
  """(IA)^3: the output of a layer, bias included, times a trained vector (arXiv 2205.05638).

  The vectors start at one. Usual targets are the keys, the values and the last layer of the MLP.

  Args:
    feedforward: regular expression on the path of the layer; where it is found the input is scaled
      instead. "$^" for none.

  >>> adapter = jm.adapters.ia3()
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))  # a vector a layer
  18
  """

  def init(key, linear, path):
    inputs, outputs = linear.kernel.shape
    if re.search(feedforward, path):
      return {"scale_in": jnp.ones(inputs)}
    return {"scale_out": jnp.ones(outputs)}

  def forward(f: Factors, x, linear, dense, drop):
    if "scale_in" in f:
      return dense(x * f["scale_in"].astype(x.dtype))
    return dense(x) * f["scale_out"].astype(x.dtype)

  def merge(f: Factors, linear: Linear) -> Linear:
    if "scale_in" in f:
      return linear._replace(kernel=linear.kernel * f["scale_in"][:, None])
    return jax.tree.map(lambda p: p * f["scale_out"], linear)

  return on_linears(Rule(init, forward, merge), kind="ia3", feedforward=feedforward)


def oft(block_size: int = 32) -> Adapter:
  """OFT: W blockdiag(R), R = (I + K)(I - K)^-1 orthogonal (Qiu et al., arXiv 2306.07280).

  One skew-symmetric K per block of inputs, zero at the start; stored is what lies above its diagonal,
  row by row.

  Args:
    block_size: inputs per block; must divide the inputs of every target.

  >>> adapter = jm.adapters.oft(block_size=4)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "dense_0/kernel"))  # 4 x 3 / 2
  6
  """
  if block_size < 2:
    raise InputError(f"oft: block_size must be at least 2, got {block_size}")

  def init(key, linear, path):
    inputs = linear.kernel.shape[0]
    if inputs % block_size:
      raise InputError(
        f"oft: block_size {block_size} does not divide the {inputs} inputs of {path}"
      )
    return {"skew": jnp.zeros((inputs // block_size, block_size * (block_size - 1) // 2))}

  def forward(f: Factors, x, linear, dense, drop):
    blocks = x.reshape(*x.shape[:-1], -1, block_size)
    rotation = orthogonal(skew_symmetric(f["skew"], block_size)).astype(x.dtype)
    return dense(jnp.einsum("...kc,krc->...kr", blocks, rotation).reshape(x.shape))

  def merge(f: Factors, linear: Linear) -> Linear:
    blocks = linear.kernel.reshape(-1, block_size, linear.kernel.shape[1])
    rotation = orthogonal(skew_symmetric(f["skew"], block_size))
    rotated = jnp.einsum("kro,krc->kco", blocks, rotation)
    return linear._replace(kernel=rotated.reshape(linear.kernel.shape))

  return on_linears(Rule(init, forward, merge), kind="oft", block_size=block_size)


def skew_symmetric(upper: jax.Array, size: int) -> jax.Array:
  """(..., size, size) from the (..., size (size - 1) / 2) entries above the diagonal."""
  rows, columns = jnp.triu_indices(size, 1)
  matrix = jnp.zeros((*upper.shape[:-1], size, size), upper.dtype)
  matrix = matrix.at[..., rows, columns].set(upper)
  return matrix - matrix.swapaxes(-1, -2)


def orthogonal(skew: jax.Array) -> jax.Array:
  """Cayley transform (I + K)(I - K)^-1 of (..., n, n), never in less than float32."""
  skew = skew.astype(jnp.promote_types(skew.dtype, jnp.float32))
  identity = jnp.eye(skew.shape[-1], dtype=skew.dtype)
  # The two factors commute.
  return jnp.linalg.solve(identity - skew, identity + skew)
