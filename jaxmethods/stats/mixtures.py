"""Two groups in one dimension: the best split, and a mixture of two Gaussians, both without a seed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmethods.stats import shapes


class Mixture(NamedTuple):
  """Two Gaussians, the one with the lower mean first; every field is (..., 2)."""

  weight: Float[Array, "... 2"]
  mean: Float[Array, "... 2"]
  std: Float[Array, "... 2"]


def two_means(x: Float[Array, " N"]) -> Bool[Array, " N"]:
  """The best split in two by squared distances to the groups' means; exact, by prefix sums.

  Args:
    x: (N,).

  Returns:
    (N,) bool, true in the upper group; equal values are never parted, so it is empty if all are equal.
  """
  shapes.check(x=(x, "N"))
  x = x - x.mean()
  ordered = _sorted(x)
  below = jnp.cumsum(ordered)[:-1]
  count = jnp.arange(1, len(x))
  # What lies between the groups, up to a factor; the total is 0.
  between = below**2 / (count * (len(x) - count))
  split = jnp.argmax(jnp.where(ordered[1:] > ordered[:-1], between, -1))
  return x > jnp.where(ordered[-1] > ordered[0], ordered[split], ordered[-1])


def fit(
  x: Float[Array, " N"], *, iterations: int = 100, tolerance: float = 1e-5, floor: float = 1e-6
) -> Mixture:
  """Expectation maximisation from the best split in two.

  Where there are two groups it converges in tens of iterations. Where there is one it may never,
  and ends as the published code's does after 100.

  Args:
    x: (N,), finite.
    iterations: at most.
    tolerance: ends when no mean or standard deviation moves by more than this share of the spread of
      `x`.
    floor: added to the variances.

  Returns:
    The mixture, fields (2,). A component that nothing belongs to has weight 0 and the mean of `x`.
  """
  shapes.check(x=(x, "N"))
  centre, spread = x.mean(), x.std()
  x = x - centre  # float32 then keeps the digits that matter
  # Sums of 1, x and x^2 by two products: a third of the time of two passes over weighted deviations.
  powers = jnp.stack([jnp.ones_like(x), x, x * x])

  def maximise(upper: jax.Array) -> Mixture:
    total, first, second = jnp.stack([powers @ (1 - upper), powers @ upper], axis=1)
    total = jnp.maximum(total, jnp.finfo(x.dtype).tiny)
    mean = first / total
    variance = jnp.maximum(second / total - mean**2, 0)
    return Mixture(total / len(x), mean, jnp.sqrt(variance + floor))

  def improve(carry):
    old, _, i = carry
    new = maximise(upper_posterior(x, old))
    moved = jnp.maximum(jnp.abs(new.mean - old.mean), jnp.abs(new.std - old.std)).max()
    return new, moved, i + 1

  def unfinished(carry):
    _, moved, i = carry
    return (moved > tolerance * spread) & (i < iterations)

  start = maximise(two_means(x).astype(x.dtype))
  mixture, *_ = jax.lax.while_loop(unfinished, improve, (start, jnp.full_like(spread, jnp.inf), 0))
  order = jnp.argsort(mixture.mean)
  mixture = jax.tree.map(lambda part: part[order], mixture)
  return mixture._replace(mean=mixture.mean + centre)


def upper_posterior(x: Float[Array, " N"], mixture: Mixture) -> Float[Array, " N"]:
  """Probability (N,) that values (N,) belong to the second component of a mixture with fields (2,)."""
  shapes.check(x=(x, "N"), mean=(mixture.mean, "2"))
  # The logarithm of the densities' ratio is a parabola around the middle of the means.
  middle = mixture.mean.mean()
  mean, precision = mixture.mean - middle, mixture.std**-2
  constant = jnp.log(mixture.weight / mixture.std) - 0.5 * precision * mean**2
  c, b, a = (part[1] - part[0] for part in (constant, precision * mean, -0.5 * precision))
  x = x - middle
  return jax.nn.sigmoid(c + x * (b + x * a))


def _sorted(x: jax.Array) -> jax.Array:
  """`jnp.sort` of floats without NaN by their bits, as whole numbers: five times faster on a CPU."""
  bits = jnp.dtype(x.dtype).itemsize * 8
  whole = jnp.dtype(f"int{bits}")

  def swap(keys: jax.Array) -> jax.Array:  # its own inverse: negative numbers the other way round
    return jnp.where(keys < 0, keys ^ jnp.iinfo(whole).max, keys)

  keys = swap(jax.lax.bitcast_convert_type(x, whole))
  return jax.lax.bitcast_convert_type(swap(jnp.sort(keys)), x.dtype)
