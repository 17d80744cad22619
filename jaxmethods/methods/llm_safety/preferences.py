"""Losses on pairs of answers: DPO, conservative DPO, IPO.

Rafailov, Sharma, Mitchell, Ermon, Manning, Finn, "Direct preference optimization", arXiv 2305.18290
(code); IPO: Azar, Rowland, Piot, Guo, Calandriello, Valko, Munos, arXiv 2310.12036 (same code).

Log-probabilities are sums over the tokens of the answer, not means. The reference gets no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes


class LogProbabilities(NamedTuple):
  """log p(answer | prompt) of preferred (w) and other (l) answers, (B,) each."""

  policy_chosen: Float[Array, " B"]
  policy_rejected: Float[Array, " B"]
  reference_chosen: Float[Array, " B"]
  reference_rejected: Float[Array, " B"]


class Rewards(NamedTuple):
  """Implicit rewards beta (log p - log p_ref), (B,) each, without gradient."""

  chosen: Float[Array, " B"]
  rejected: Float[Array, " B"]


def margin(pairs: LogProbabilities, *, reference_free: bool = False) -> Float[Array, " B"]:
  """Computes h = (log p_w - log p_l) - (log p_ref,w - log p_ref,l).

  Args:
    pairs: log-probabilities.
    reference_free: leaves the second difference out.
  """
  shapes.same(**pairs._asdict())
  policy = pairs.policy_chosen - pairs.policy_rejected
  reference = jax.lax.stop_gradient(pairs.reference_chosen - pairs.reference_rejected)
  return policy if reference_free else policy - reference


def dpo(h: Float[Array, " B"], *, beta: float, smoothing: float = 0.0) -> Float[Array, " B"]:
  """Computes -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

  Args:
    h: margin.
    beta: > 0; no default in the code, .1 to .5 advised.
    smoothing: e, the share of labels taken to be flipped, in [0, .5); 0 is DPO, above it conservative.

  Returns:
    Loss of every pair; the batch takes the mean.
  """
  _check_beta(beta)
  if not 0 <= smoothing < 0.5:
    raise InputError(f"smoothing must be in [0, 0.5), got {smoothing}")
  log_sigmoid = jax.nn.log_sigmoid
  return -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)


def ipo(h: Float[Array, " B"], *, beta: float) -> Float[Array, " B"]:
  """Computes (h - 1 / (2 beta))^2, which does not push margins without end."""
  _check_beta(beta)
  return (h - 1 / (2 * beta)) ** 2


def rewards(pairs: LogProbabilities, *, beta: float) -> Rewards:
  """Computes the implicit rewards; the share with chosen > rejected is the accuracy."""
  shapes.same(**pairs._asdict())
  chosen = beta * (pairs.policy_chosen - pairs.reference_chosen)
  rejected = beta * (pairs.policy_rejected - pairs.reference_rejected)
  return Rewards(jax.lax.stop_gradient(chosen), jax.lax.stop_gradient(rejected))


def accuracy(given: Rewards) -> Float[Array, ""]:
  """Computes the share of pairs whose preferred answer has the larger reward."""
  return jnp.mean(given.chosen > given.rejected)


def _check_beta(beta: float) -> None:
  if not beta > 0:
    raise InputError(f"beta must be positive, got {beta}")
