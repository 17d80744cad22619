"""Private training on a set of examples: its guarantee, and the batches that the guarantee is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import privacy
from jaxmethods.methods.llm_safety.private_tuning import private
from jaxmethods.testbeds.language.settings import PrivacySettings
from jaxmethods.tuning.tuner import Tuner


class Guarantee(NamedTuple):
  """What a run of DP-SGD promises, and by which settings.

  Attributes:
    epsilon, delta: of the whole run; epsilon is infinite without noise.
    noise_multiplier: sigma.
    clip_norm: C.
    rate: q, the chance of an example to be in a batch.
    expected_batch_size: q n.
    steps: of the run.
    capacity: rows of a batch, a multiple of `microbatch`.
    microbatch: examples whose gradients are in memory at once.
    accountant: "rdp" or "pld".
  """

  epsilon: float
  delta: float
  noise_multiplier: float
  clip_norm: float
  rate: float
  expected_batch_size: float
  steps: int
  capacity: int
  microbatch: int
  accountant: str

  def __str__(self) -> str:
    return (
      f"({self.epsilon:.4g}, {self.delta:.3g})-DP for one example added or removed: sigma "
      f"{self.noise_multiplier:.4g}, C {self.clip_norm:g}, q {self.rate:.4g}, {self.steps} steps, "
      f"{self.accountant.upper()} accountant"
    )


def plan(settings: PrivacySettings, size: int, batch_size: int, steps: int) -> Guarantee:
  """Solves for the noise that `dp_epsilon` needs, or states the epsilon of `dp_noise`.

  Args:
    settings: epsilon or noise, and how they are counted.
    size: examples, n.
    batch_size: examples of a batch in the mean, q n.
    steps: of the run.

  Raises:
    InputError: an epsilon that cannot be reached, or an accountant that is not installed.
  """
  if batch_size > size:
    raise InputError(f"batch_size: {batch_size} is more than the {size} training examples")
  rate, delta = batch_size / size, settings.dp_delta or size**-1.1
  if delta >= 1 / size:
    raise InputError(f"dp_delta: {delta:g} promises nothing: it must be below 1 / {size} examples")
  account = {"rdp": _rdp, "pld": _pld}[settings.dp_accountant]
  try:
    epsilon, sigma = account(settings, rate, steps, delta)
  except InputError as error:
    key = "dp_noise" if settings.dp_noise else "dp_epsilon"
    raise InputError(f"{key}: {error}") from None
  needed = privacy.poisson_capacity(size, rate)
  microbatch = min(settings.dp_microbatch or needed, needed)
  capacity = -(-needed // microbatch) * microbatch
  return Guarantee(
    epsilon, delta, sigma, settings.dp_clip, rate, batch_size, steps, capacity, microbatch,
    settings.dp_accountant,
  )  # fmt: skip


def private_tuner(tuner: Tuner, guarantee: Guarantee) -> Tuner:
  """Makes a way of tuning as private as the guarantee says."""
  return private(
    tuner,
    clip_norm=guarantee.clip_norm,
    noise_multiplier=guarantee.noise_multiplier,
    expected_batch_size=guarantee.expected_batch_size,
    microbatch=guarantee.microbatch,
  )


def poisson_rows(
  guarantee: Guarantee, size: int, seed: int, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (rows, real), both (capacity,), of step `first`, the next one, ...

  Raises:
    InputError: a step drew more examples than a batch holds, which has a chance of 1e-9.
  """
  held = min(guarantee.capacity, size)
  while True:
    key = jax.random.fold_in(jax.random.key(seed), first)
    drawn = privacy.poisson_batch(key, size, guarantee.rate, held)
    if dropped := int(drawn.dropped):
      raise InputError(
        f"step {first}: drew {dropped} examples more than the {held} rows of a batch; "
        "its guarantee would not hold: take another seed"
      )
    pad = (0, guarantee.capacity - held)
    yield np.pad(np.asarray(drawn.rows), pad), np.pad(np.asarray(drawn.real), pad)
    first += 1


def _rdp(settings: PrivacySettings, rate: float, steps: int, delta: float) -> tuple[float, float]:
  """Returns (epsilon, sigma) by our own accountant."""
  sigma = settings.dp_noise or privacy.noise_for(settings.dp_epsilon, rate, steps, delta)
  return privacy.epsilon(rate, sigma, steps, delta), sigma


def _pld(settings: PrivacySettings, rate: float, steps: int, delta: float) -> tuple[float, float]:
  """Returns (epsilon, sigma) by the privacy loss distribution of dp-accounting, which is tighter."""
  try:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
  except ImportError:
    raise InputError(
      "the PLD accountant is dp-accounting's: pip install 'jaxmethods[privacy]', or dp_accountant=rdp"
    ) from None

  def event(sigma: float) -> dp_accounting.DpEvent:
    one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    return dp_accounting.SelfComposedDpEvent(one, steps)

  spent = lambda sigma: float(PLDAccountant().compose(event(sigma)).get_epsilon(delta))
  if settings.dp_noise:
    return spent(settings.dp_noise), settings.dp_noise
  # The Renyi bound is looser, so that its noise is enough: the search ends there.
  high = privacy.noise_for(settings.dp_epsilon, rate, steps, delta)
  low = high / 4
  while high - low > 1e-3 * high:
    middle = (low + high) / 2
    low, high = (middle, high) if spent(middle) > settings.dp_epsilon else (low, middle)
  return spent(high), high
