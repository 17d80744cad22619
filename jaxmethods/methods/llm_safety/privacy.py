"""DP-SGD: per-example clipping, noise on the sum, Poisson sampling, and the accountant of its epsilon.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep learning with differential privacy",
arXiv 1607.00133 (known); accountant: Mironov, Talwar, Zhang, "Renyi differential privacy of the sampled
Gaussian mechanism", arXiv 1908.10530 (known).

What the guarantee rests on: every example is drawn independently with one rate (shuffled batches have
another accountant), the norm is over all leaves together (per layer is another mechanism), and the noisy
sum is divided by the expected batch size (the realised one is private itself). Any optimiser may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import special, stats

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes
from jaxmethods.trees import Key, PyTree

ORDERS = tuple(range(2, 65))

# (parameters, one example without a batch axis) -> its loss.
ExampleLoss = Callable[[PyTree, PyTree], Array]


class PrivateGradient(NamedTuple):
  """What a step of DP-SGD computes.

  Attributes:
    gradient: noisy mean, a tree like the parameters: the only part that is private.
    loss: mean over the real examples, for a log that stays with the data.
  """

  gradient: PyTree
  loss: Float[Array, ""]


class PoissonBatch(NamedTuple):
  """A batch of fixed shape that holds a Poisson sample.

  Attributes:
    rows: of the data set, (capacity,).
    real: which of them were drawn; the others fill the shape.
    dropped: drawn rows that found no place, (); beyond 0 the accountant does not describe the run.
  """

  rows: Int[Array, " capacity"]
  real: Bool[Array, " capacity"]
  dropped: Int[Array, ""]


# --- one step -----------------------------------------------------------------------------------


def poisson_capacity(size: int, rate: float, *, overflow: float = 1e-9) -> int:
  """Returns rows that hold a Poisson sample of `size` examples but for the chance `overflow`."""
  _check_rate(rate)
  return min(size, int(stats.binom.isf(overflow, size, rate)) + 1)


def poisson_batch(key: Key, size: int, rate: float, capacity: int) -> PoissonBatch:
  """Draws each of `size` examples with chance q = `rate`, into `capacity` rows."""
  _check_rate(rate)
  if not 1 <= capacity <= size:
    raise InputError(f"capacity must be in 1..{size}, got {capacity}")
  drawn = jax.random.bernoulli(key, rate, (size,))
  rows = jnp.argsort(~drawn, stable=True)[:capacity]
  return PoissonBatch(rows, drawn[rows], jnp.maximum(drawn.sum() - capacity, 0))


def per_example_gradients(
  loss: ExampleLoss, params: PyTree, batch: PyTree
) -> tuple[Float[Array, " B"], PyTree]:
  """Computes the loss and the gradient of every example.

  Args:
    loss: of one example.
    params: parameters.
    batch: tree with a leading axis of B examples.

  Returns:
    Losses (B,) and gradients, a tree like `params` with a leading axis of B.
  """
  return jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(params, batch)


def global_norms(gradients: PyTree) -> Float[Array, " B"]:
  """Computes the norm of every example over all leaves together, in float32 or better."""
  squares = [
    jnp.square(g.astype(jnp.promote_types(g.dtype, jnp.float32))).reshape(len(g), -1).sum(1)
    for g in jax.tree.leaves(gradients)
  ]
  return jnp.sqrt(sum(squares[1:], squares[0]))


def clipped_sum(gradients: PyTree, clip_norm: float | Array, real: Bool[Array, " B"]) -> PyTree:
  """Computes sum_b g_b min(1, C / ||g_b||) over the real examples.

  Args:
    gradients: tree with a leading axis of B examples.
    clip_norm: C > 0; infinite for no clipping.
    real: examples that count; the others add exactly nothing, whatever they hold.

  Returns:
    Tree without the leading axis.
  """
  shapes.check(real=(real, "B"))
  shapes.check_leading(len(real), gradients=gradients)
  norms = global_norms(gradients)
  scale = jnp.minimum(1, clip_norm / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
  return jax.tree.map(lambda g: _weighted_sum(g, scale, real), gradients)


def noisy_mean(
  total: PyTree,
  normal: PyTree,
  *,
  clip_norm: float | Array,
  noise_multiplier: float | Array,
  expected_batch_size: float | Array,
) -> PyTree:
  """Computes (sum + sigma C z) / (q n): the noise is added to the sum, then both are divided.

  Args:
    total: clipped sum.
    normal: z, standard normal, a tree like `total`.
    clip_norm: C, the most that one example can change the sum.
    noise_multiplier: sigma; 0 adds nothing.
    expected_batch_size: q n, whatever the number that was drawn.
  """
  # sigma = 0 with C infinite means no noise, not 0 times infinity.
  deviation = jnp.where(jnp.asarray(noise_multiplier) > 0, noise_multiplier * clip_norm, 0)
  mean = lambda s, z: ((s + deviation.astype(s.dtype) * z) / expected_batch_size).astype(s.dtype)
  return jax.tree.map(mean, total, normal)


def private_gradient(
  loss: ExampleLoss,
  params: PyTree,
  batch: PyTree,
  real: Bool[Array, " B"],
  key: Key,
  *,
  clip_norm: float,
  noise_multiplier: float,
  expected_batch_size: float,
  microbatch: int | None = None,
) -> PrivateGradient:
  """Computes the gradient of one step of DP-SGD.

  Args:
    loss: of one example.
    params: all that is trained; the norm is over all of it.
    batch: tree with a leading axis of B examples, as `poisson_batch` draws them.
    real: examples that were drawn.
    key: of the noise.
    clip_norm: C.
    noise_multiplier: sigma.
    expected_batch_size: q n.
    microbatch: examples whose gradients are in memory at once, a divisor of B; default all.
  """
  size = len(real)
  microbatch = size if microbatch is None else microbatch
  if microbatch < 1 or size % microbatch:
    raise InputError(f"microbatch must divide the batch of {size}, got {microbatch}")
  shapes.check_leading(size, batch=batch)

  def add(carry: tuple[PyTree, Array], part: tuple[PyTree, Array]) -> tuple[tuple, None]:
    total, loss_sum = carry
    examples, counts = part
    losses, gradients = per_example_gradients(loss, params, examples)
    total = jax.tree.map(jnp.add, total, clipped_sum(gradients, clip_norm, counts))
    return (total, loss_sum + jnp.where(counts, losses, 0).sum()), None

  parts = jax.tree.map(lambda x: x.reshape(-1, microbatch, *x.shape[1:]), (batch, real))
  zero = jax.tree.map(jnp.zeros_like, params)
  loss_type = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], batch)).dtype
  (total, loss_sum), _ = jax.lax.scan(add, (zero, jnp.zeros((), loss_type)), parts)
  gradient = noisy_mean(
    total,
    standard_normal(key, total),
    clip_norm=clip_norm,
    noise_multiplier=noise_multiplier,
    expected_batch_size=expected_batch_size,
  )
  return PrivateGradient(gradient, loss_sum / jnp.maximum(real.sum(), 1))


def standard_normal(key: Key, tree: PyTree) -> PyTree:
  """Draws z ~ N(0, I), a tree like `tree`."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(structure, drawn)


def _weighted_sum(g: Array, scale: Float[Array, " B"], real: Bool[Array, " B"]) -> Array:
  # Both are masked: padding may hold NaN, and 0 times NaN is NaN.
  kept = jnp.where(real.reshape(-1, *[1] * (g.ndim - 1)), g, 0)
  return jnp.tensordot(jnp.where(real, scale, 0).astype(g.dtype), kept, 1)


# --- accountant, on the host in float64: in float32 a step's divergence is lost in rounding -------


def rdp_per_step(
  rate: float, noise_multiplier: float, orders: Sequence[int] = ORDERS
) -> Float[np.ndarray, " orders"]:
  """Computes the Renyi divergence that one step spends, at whole orders a >= 2.

  RDP(a) = log(sum_k C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 sigma^2))) / (a - 1), and
  a / (2 sigma^2) at q = 1. Steps add.

  Raises:
    InputError: if q is outside (0, 1], sigma is not positive (epsilon would be infinite), or an order
      is below 2.
  """
  _check_rate(rate)
  if not noise_multiplier > 0:
    raise InputError(
      f"noise_multiplier must be positive, got {noise_multiplier}: epsilon is infinite"
    )
  if min(orders) < 2:
    raise InputError(f"orders must be whole numbers from 2, got {min(orders)}")
  if rate == 1:
    return np.asarray(orders) / (2 * noise_multiplier**2)
  return np.array([_log_moment(rate, noise_multiplier, a) / (a - 1) for a in orders])


def epsilon(
  rate: float,
  noise_multiplier: float,
  steps: int,
  delta: float,
  *,
  orders: Sequence[int] = ORDERS,
  conversion: Literal["improved", "classic"] = "improved",
) -> float:
  """Computes the epsilon of (epsilon, delta)-privacy after `steps` of DP-SGD.

  Args:
    rate: q, the chance of an example to be in a batch.
    noise_multiplier: sigma.
    steps: number of steps.
    delta: in (0, 1); below one over the number of examples to mean anything.
    orders: whole orders to choose from.
    conversion: "classic" min_a RDP(a) + log(1 / delta) / (a - 1), or "improved"
      min_a RDP(a) + log(1 - 1 / a) - (log delta + log a) / (a - 1).
  """
  if steps < 1:
    raise InputError(f"steps must be at least 1, got {steps}")
  return _converted(steps * rdp_per_step(rate, noise_multiplier, orders), delta, orders, conversion)


def noise_for(
  target: float, rate: float, steps: int, delta: float, *, orders: Sequence[int] = ORDERS
) -> float:
  """Finds the smallest sigma, to 1e-4 of its value, with epsilon at most `target`.

  Raises:
    InputError: if no noise reaches `target` with these orders and this delta.
  """
  lowest = _converted(np.zeros(len(orders)), delta, orders, "improved")
  if not target > lowest:
    raise InputError(
      f"epsilon {target} cannot be reached at delta {delta}: "
      f"orders up to {max(orders)} end at {lowest:.4f}"
    )
  spent = lambda sigma: epsilon(rate, sigma, steps, delta, orders=orders)
  low, high = 0.0, 1.0
  while spent(high) > target:
    low, high = high, 2 * high
    if high > 1e6:
      raise InputError(f"epsilon {target} cannot be reached in {steps} steps at rate {rate}")
  while high - low > 1e-4 * high:
    middle = (low + high) / 2
    low, high = (middle, high) if spent(middle) > target else (low, middle)
  return high


def empirical_epsilon(
  found: int,
  members: int,
  false_alarms: int,
  others: int,
  delta: float,
  *,
  confidence: float = 0.95,
) -> float:
  """Bounds epsilon from below by a membership test of canaries (known).

  (epsilon, delta)-privacy keeps TPR <= exp(epsilon) FPR + delta and the same for the error rates. Both
  are taken at the unlucky ends of their Clopper-Pearson intervals. Jagielski, Ullman, Oprea, "Auditing
  differentially private machine learning", arXiv 2006.07709.

  Args:
    found: members that the test calls so, at a threshold fixed beforehand.
    members: canaries trained on.
    false_alarms: others that the test calls members.
    others: canaries not trained on.
    delta: of the guarantee.
    confidence: of the bound.

  Returns:
    A number that the accountant must not fall below; 0 if the test shows nothing.
  """
  if not (0 <= found <= members and 0 <= false_alarms <= others and members and others):
    raise InputError(f"impossible counts: {found} of {members}, {false_alarms} of {others}")
  tail = (1 - confidence) / 2
  tpr, fpr = _at_least(found, members, tail), 1 - _at_least(others - false_alarms, others, tail)
  return max(
    [0.0, *(np.log((a - delta) / b) for a, b in ((tpr, fpr), (1 - fpr, 1 - tpr)) if a > delta)]
  )


def _log_moment(rate: float, sigma: float, order: int) -> float:
  """Computes log of the sum over k of `rdp_per_step`.

  The weights sum to 1 and the first two factors are 1: only the excess over 1 is summed, because a step
  spends little and log(1 + little) would lose it.
  """
  k = np.arange(2, order + 1)
  binomial = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
  weight = binomial + (order - k) * np.log1p(-rate) + k * np.log(rate)
  growth = (k**2 - k) / (2 * sigma**2)
  excess = special.logsumexp(weight + growth + np.log(-np.expm1(-growth)))
  return float(np.logaddexp(0, excess))


def _converted(rdp: np.ndarray, delta: float, orders: Sequence[int], conversion: str) -> float:
  if not 0 < delta < 1:
    raise InputError(f"delta must be in (0, 1), got {delta}")
  a = np.asarray(orders)
  if conversion == "classic":
    return float((rdp - np.log(delta) / (a - 1)).min())
  return max(0.0, float((rdp + np.log1p(-1 / a) - (np.log(delta) + np.log(a)) / (a - 1)).min()))


def _at_least(successes: int, trials: int, tail: float) -> float:
  """Returns the lower Clopper-Pearson end of a share."""
  return float(stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0


def _check_rate(rate: float) -> None:
  if not 0 < rate <= 1:
    raise InputError(f"rate must be in (0, 1], got {rate}")
