"""Holding parts of a model near its pretrained weights while it is tuned: penalties and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any


def l2_sp(params: Params, anchor: Params, weight: float | jax.Array) -> jax.Array:
  """L2-SP: lambda / 2 ||theta - theta_0||^2 (Li et al., arXiv 1802.01483).

  Args:
    params: theta.
    anchor: theta_0, a tree like it.
    weight: lambda.
  """
  return 0.5 * weight * _sum(lambda p, a: jnp.square(p - a), params, anchor)


def ewc(params: Params, anchor: Params, fisher: Params, weight: float | jax.Array) -> jax.Array:
  """EWC: lambda / 2 sum_i F_i (theta_i - theta_0i)^2 (Kirkpatrick et al., arXiv 1612.00796).

  Args:
    params: theta.
    anchor: theta_0, a tree like it.
    fisher: F, a tree like it, see `squared_gradients`.
    weight: lambda.
  """
  return 0.5 * weight * _sum(lambda p, a, f: f * jnp.square(p - a), params, anchor, fisher)


def squared_gradients(
  loss: Callable[[Params, Any], jax.Array], params: Params, samples: Any
) -> Params:
  """Mean over samples of the squared gradient of each: the diagonal of the empirical Fisher matrix.

  Args:
    loss: (params, sample) -> scalar.
    params: theta.
    samples: tree of arrays with a leading axis of samples; worked off one after the other.
  """
  return _mean_of_gradients(jnp.square, loss, params, samples)


def absolute_gradients(
  loss: Callable[[Params, Any], jax.Array], params: Params, samples: Any
) -> Params:
  """Mean over samples of |gradient|; arguments as in `squared_gradients`."""
  return _mean_of_gradients(jnp.abs, loss, params, samples)


def _mean_of_gradients(of: Callable, loss: Callable, params: Params, samples: Any) -> Params:
  count = len(jax.tree.leaves(samples)[0])

  def add(total: Params, sample: Any) -> tuple[Params, None]:
    gradient = jax.grad(loss)(params, sample)
    return jax.tree.map(lambda t, g: t + of(g) / count, total, gradient), None

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), samples)[0]


def _sum(term: Callable[..., jax.Array], *trees: Params) -> jax.Array:
  return sum(map(jnp.sum, jax.tree.leaves(jax.tree.map(term, *trees))), start=jnp.zeros(()))
