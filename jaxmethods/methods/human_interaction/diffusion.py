"""Diffusion of motions with a network that predicts the clean motion (InterGen and MDM, code).

Cosine schedule, posterior, DDPM and DDIM steps, respacing, classifier-free guidance, sampling. A
network is a function; it sees the step numbers of training also when few of them are visited. Clean
predictions are not clipped: motions are z-scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.stats import shapes
from jaxmethods.trees import Key, PyTree

# (x_t (B, ...), step of training (B,)) -> clean motion (B, ...).
Network: TypeAlias = Callable[[Array, Array], Array]
# The same with a condition behind, leaves (B, ...).
Conditional: TypeAlias = Callable[[Array, Array, PyTree], Array]
# (clean motion (B, ...), place in the schedule (), posterior variance ()) -> clean motion.
Guidance: TypeAlias = Callable[[Array, Array, Array], Array]
Sampler = Literal["ddim", "ddpm"]


class Schedule(NamedTuple):
  """Noise of the steps that are visited, (S,) each.

  All are computed in float64: 1 - abar would cancel in float32.

  Attributes:
    steps: their numbers in training.
    abar: product of 1 - beta up to and with the step.
    noise: 1 - abar.
    abar_before: abar without the step; 1 at the first.
    noise_before: 1 - abar_before.
    of_clean: factor of the clean motion in the posterior mean.
    of_noisy: factor of x_t in the posterior mean.
    variance: of the posterior.
    log_variance: its logarithm, at the first step that of the second, where it is finite.
  """

  steps: Array
  abar: Array
  noise: Array
  abar_before: Array
  noise_before: Array
  of_clean: Array
  of_noisy: Array
  variance: Array
  log_variance: Array


# --- schedules ------------------------------------------------------------------------------------


def cosine_betas(num_steps: int) -> np.ndarray:
  """Betas of the cosine schedule: min(1 - abar((i + 1) / N) / abar(i / N), 0.999).

  abar(s) = cos^2((s + 0.008) / 1.008 pi / 2).

  Returns:
    float64, (N,).

  Raises:
    ValueError: without a step.
  """
  if num_steps < 1:
    raise ValueError(f"num_steps: must be at least 1, got {num_steps}")
  bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def ddim_steps(num_steps: int, count: int) -> np.ndarray:
  """`count` steps with a whole stride, from 0: respacing "ddimCOUNT".

  Raises:
    ValueError: if no stride visits exactly `count` of `num_steps`.
  """
  for stride in range(1, num_steps + 1):
    if len(range(0, num_steps, stride)) == count:
      return np.arange(0, num_steps, stride)
  raise ValueError(f"count: no whole stride visits {count} of {num_steps} steps")


def even_steps(num_steps: int, count: int) -> np.ndarray:
  """`count` steps from the first to the last, rounded to whole ones.

  Raises:
    ValueError: if `count` is outside [1, num_steps].
  """
  if not 1 <= count <= num_steps:
    raise ValueError(f"count: must be in [1, {num_steps}], got {count}")
  stride = (num_steps - 1) / max(count - 1, 1)
  return np.array([round(i * stride) for i in range(count)])


def make_schedule(
  num_steps: int, steps: np.ndarray | None = None, betas: np.ndarray | None = None
) -> Schedule:
  """Builds a schedule on all steps of training or on some, with betas rebuilt from the kept abar.

  Args:
    num_steps: N, steps of training.
    steps: those that are visited, ascending; None: all.
    betas: of training, (N,); None: `cosine_betas`.

  Raises:
    ValueError: if `steps` are not ascending numbers of training steps.
  """
  betas = cosine_betas(num_steps) if betas is None else np.asarray(betas, np.float64)
  steps = np.arange(num_steps) if steps is None else np.asarray(steps)
  if len(steps) < 1 or steps[0] < 0 or steps[-1] >= num_steps or (np.diff(steps) < 1).any():
    raise ValueError(f"steps: must ascend within 0 .. {num_steps - 1}, got {steps.tolist()}")
  abar = np.cumprod(1 - betas)[steps]
  before = np.concatenate([[1.0], abar[:-1]])
  betas = 1 - abar / before
  variance = betas * (1 - before) / (1 - abar)
  positive = np.concatenate([variance[1:2], variance[1:]]) if len(steps) > 1 else np.ones(1)
  real = {
    "abar": abar,
    "noise": 1 - abar,
    "abar_before": before,
    "noise_before": 1 - before,
    "of_clean": betas * np.sqrt(before) / (1 - abar),
    "of_noisy": (1 - before) * np.sqrt(1 - betas) / (1 - abar),
    "variance": variance,
    "log_variance": np.log(positive),
  }
  made = {name: jnp.asarray(x, jnp.result_type(float)) for name, x in real.items()}
  return Schedule(steps=jnp.asarray(steps, jnp.int32), **made)


def _at(values: Array, place: Array, like: Array) -> Array:
  """values[place] with the axes of `like`."""
  picked = values[place].astype(like.dtype)
  return picked.reshape(*picked.shape, *(1,) * (like.ndim - picked.ndim))


# --- steps ----------------------------------------------------------------------------------------


def noised(
  schedule: Schedule,
  x0: Float[Array, "B ..."],
  place: Int[Array, " B"],
  noise: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
  """q: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

  Args:
    schedule: S steps.
    x0: clean motions.
    place: of each in the schedule, 0 .. S - 1.
    noise: standard normal.
  """
  shapes.same(x0=x0, noise=noise)
  shapes.check(place=(place, "B"))
  shapes.check_leading(len(x0), place=place)
  at = lambda values: _at(values, place, x0)
  return jnp.sqrt(at(schedule.abar)) * x0 + jnp.sqrt(at(schedule.noise)) * noise


def posterior_mean(
  schedule: Schedule, clean: Float[Array, "B ..."], x: Float[Array, "B ..."], place: Array
) -> Float[Array, "B ..."]:
  """Mean of x_{t-1} given the clean motion and x_t; `place` (B,) or (). Its variance is in Schedule."""
  shapes.same(x=x, clean=clean)
  return _at(schedule.of_clean, place, x) * clean + _at(schedule.of_noisy, place, x) * x


def ddpm_step(
  schedule: Schedule,
  clean: Float[Array, "B ..."],
  x: Float[Array, "B ..."],
  place: Array,
  noise: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
  """Draws x_{t-1} from the posterior; no noise at place 0.

  Args:
    schedule: S steps.
    clean: prediction of the network.
    x: x_t.
    place: of the step in the schedule, (B,) or ().
    noise: standard normal.
  """
  scale = jnp.exp(_at(schedule.log_variance, place, x) / 2)
  scale = jnp.where(_at(jnp.arange(len(schedule.steps)), place, x) > 0, scale, 0)
  return posterior_mean(schedule, clean, x, place) + scale * noise


def ddim_step(
  schedule: Schedule,
  clean: Float[Array, "B ..."],
  x: Float[Array, "B ..."],
  place: Array,
  noise: Float[Array, "B ..."] | None = None,
  eta: float = 0.0,
) -> Float[Array, "B ..."]:
  """Steps along the deterministic path (eta 0) or beside it.

  Args:
    schedule: S steps.
    clean: prediction of the network.
    x: x_t.
    place: of the step in the schedule, (B,) or ().
    noise: standard normal; needed with eta > 0.
    eta: share of the posterior's noise.

  Raises:
    ValueError: if eta is positive and there is no noise.
  """
  shapes.same(x=x, clean=clean)
  at = lambda values: _at(values, place, x)
  abar, before = at(schedule.abar), at(schedule.abar_before)
  rest, rest_before = at(schedule.noise), at(schedule.noise_before)
  guess = (x - jnp.sqrt(abar) * clean) / jnp.sqrt(rest)
  if not eta:
    return jnp.sqrt(before) * clean + jnp.sqrt(rest_before) * guess
  if noise is None:
    raise ValueError(f"noise: is needed with eta {eta}")
  sigma = eta * jnp.sqrt(at(schedule.variance))
  mean = jnp.sqrt(before) * clean + jnp.sqrt(jnp.maximum(rest_before - sigma**2, 0)) * guess
  return mean + jnp.where(at(jnp.arange(len(schedule.steps))) > 0, sigma, 0) * noise


# --- networks -------------------------------------------------------------------------------------


def guided(
  with_condition: Float[Array, "*n"], without: Float[Array, "*n"], scale: float
) -> Float[Array, "*n"]:
  """Classifier-free guidance: s with + (1 - s) without."""
  return scale * with_condition + (1 - scale) * without


def classifier_free(
  network: Conditional, condition: PyTree, dropped: PyTree, scale: float
) -> Network:
  """Runs a network with its condition and with a dropped one, as one batch twice as large.

  Args:
    network: (x, t, condition) -> clean motion.
    condition: of each sample, leaves (B, ...).
    dropped: the same with zeros for what is dropped.
    scale: s; with 1 the network is run once.
  """
  if scale == 1:
    return lambda x, t: network(x, t, condition)
  double = lambda a, b: jnp.concatenate([a, b])
  both = jax.tree.map(double, condition, dropped)

  def run(x: Array, t: Array) -> Array:
    with_condition, without = jnp.split(network(double(x, x), double(t, t), both), 2)
    return guided(with_condition, without, scale)

  return run


def kept_conditions(key: Key, batch: int, drop: float = 0.1) -> Bool[Array, " B"]:
  """Draws which samples of a training batch keep their condition; the others get zeros."""
  return ~jax.random.bernoulli(key, drop, (batch,))


def with_first(x: Float[Array, "B T 2 F"], first: Float[Array, "B T F"]) -> Float[Array, "B T 2 F"]:
  """Gives person 0 clean, whatever its noise: `reaction` mode, in training and at every step."""
  shapes.check(x=(x, "B T 2 F"), first=(first, "B T F"))
  return x.at[:, :, 0].set(first)


def sample(
  network: Network,
  schedule: Schedule,
  key: Key,
  shape: tuple[int, ...],
  *,
  sampler: Sampler = "ddim",
  eta: float = 0.0,
  guidance: Guidance | None = None,
  start: Float[Array, "B ..."] | None = None,
) -> Float[Array, "B ..."]:
  """Draws clean motions, from the last step of the schedule to its first, in one scan.

  Args:
    network: predicts the clean motion; the steps it sees are those of training.
    schedule: steps that are visited.
    key: of all noise.
    shape: of the result, (B, ...).
    sampler: "ddim" or "ddpm".
    eta: of "ddim".
    guidance: changes the clean prediction before each step, see `guidance.py`.
    start: noise to start from; None: drawn.

  Raises:
    ValueError: for another sampler.
  """
  if sampler not in ("ddim", "ddpm"):
    raise ValueError(f"sampler: must be 'ddim' or 'ddpm', got {sampler!r}")
  first, later = jax.random.split(key)
  x = jax.random.normal(first, shape) if start is None else start
  shapes.check(start=(x, " ".join(map(str, shape))))

  def step(x: Array, at: tuple[Array, Key]) -> tuple[Array, None]:
    place, own = at
    clean = network(x, jnp.full(shape[0], schedule.steps[place]))
    if guidance is not None:
      clean = guidance(clean, place, schedule.variance[place])
    if sampler == "ddim":
      noise = jax.random.normal(own, shape, x.dtype) if eta else None
      return ddim_step(schedule, clean, x, place, noise, eta), None
    return ddpm_step(schedule, clean, x, place, jax.random.normal(own, shape, x.dtype)), None

  total = len(schedule.steps)
  return jax.lax.scan(step, x, (jnp.arange(total)[::-1], jax.random.split(later, total)))[0]
