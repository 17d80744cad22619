"""Penalties that hold a model near its pretrained weights, and statistics of its gradients."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods.stats import shapes
from jaxmethods.trees import Params, PyTree


def l2_sp(params: Params, anchor: Params, weight: float | Array) -> Float[Array, ""]:
  """Computes lambda / 2 ||theta - theta_0||^2 (L2-SP, Li et al., arXiv 1802.01483).

  Args:
    params: theta.
    anchor: theta_0, a tree like it.
    weight: lambda.
  """
  return 0.5 * weight * _sum(lambda p, a: jnp.square(p - a), params=params, anchor=anchor)


def ewc(params: Params, anchor: Params, fisher: Params, weight: float | Array) -> Float[Array, ""]:
  """Computes lambda / 2 sum_i F_i (theta_i - theta_0i)^2 (EWC, Kirkpatrick et al., arXiv 1612.00796).

  Args:
    params: theta.
    anchor: theta_0, a tree like it.
    fisher: F, a tree like it, see `squared_gradients`.
    weight: lambda.
  """
  return (
    0.5
    * weight
    * _sum(lambda p, a, f: f * jnp.square(p - a), params=params, anchor=anchor, fisher=fisher)
  )


def squared_gradients(
  loss: Callable[[Params, PyTree], Float[Array, ""]], params: Params, samples: PyTree
) -> Params:
  """Averages the squared gradients of samples: the diagonal of the empirical Fisher matrix.

  Args:
    loss: (params, sample) -> scalar.
    params: theta.
    samples: tree of arrays with a leading axis of samples; worked off one after the other.
  """
  return _mean_of_gradients(jnp.square, loss, params, samples)


def absolute_gradients(
  loss: Callable[[Params, PyTree], Float[Array, ""]], params: Params, samples: PyTree
) -> Params:
  """Averages |gradient| over samples; arguments as in `squared_gradients`."""
  return _mean_of_gradients(jnp.abs, loss, params, samples)


def _mean_of_gradients(
  of: Callable[[Array], Array],
  loss: Callable[[Params, PyTree], Array],
  params: Params,
  samples: PyTree,
) -> Params:
  count = len(jax.tree.leaves(samples)[0])

  def add(total: Params, sample: PyTree) -> tuple[Params, None]:
    gradient = jax.grad(loss)(params, sample)
    return jax.tree.map(lambda t, g: t + of(g) / count, total, gradient), None

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), samples)[0]


def _sum(term: Callable[..., Array], **trees: Params) -> Array:
  """Sums a term over all entries of trees of one form; their names are for the error."""

  def of_leaf(*leaves: Array) -> Array:
    shapes.same(**dict(zip(trees, leaves, strict=True)))
    return term(*leaves).sum()

  return sum(jax.tree.leaves(jax.tree.map(of_leaf, *trees.values())), start=jnp.zeros(()))
