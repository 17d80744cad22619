"""Memorisation of single training sequences: exposure of canaries, membership inference, Min-K%."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.errors import InputError
from jaxmethods.stats import ranking, shapes


class Membership(NamedTuple):
  """How well a score tells members of the training set from others.

  Attributes:
    auc: P(member > other) + P(equal) / 2; 0.5 says nothing leaks.
    tpr: share of the members found at the allowed share of false alarms.
  """

  auc: Float[Array, ""]
  tpr: Float[Array, ""]


def exposure_rank(candidate_nll: Float[Array, " R"], secret: Int[Array, ...]) -> Int[Array, ...]:
  """Ranks secrets among all candidates, rank = 1 + #{r : NLL(r) < NLL(secret)} (known).

  Carlini, Liu, Erlingsson, Kos, Song, "The secret sharer", arXiv 1802.08232.

  Args:
    candidate_nll: of every candidate of the secret space, the secrets among them.
    secret: positions of the secrets in `candidate_nll`, any shape; none may lie outside.

  Returns:
    The shape of `secret`; equal candidates share the better rank. Rank 1 = extracted.
  """
  shapes.check(candidate_nll=(candidate_nll, "R"))
  # A sorted search: (secrets, candidates) would not fit for 10^4 candidates and many secrets.
  return 1 + jnp.searchsorted(jnp.sort(candidate_nll), candidate_nll[secret], side="left")


def exposure(rank: Int[Array, ...], candidates: int) -> Float[Array, ...]:
  """Computes log2 |R| - log2 rank, in bits: log2 |R| for the best candidate, 0 for the worst (known)."""
  if candidates < 1:
    raise InputError(f"candidates must be at least 1, got {candidates}")
  return jnp.log2(candidates / rank.astype(float))


def membership(
  member: Float[Array, " M"], other: Float[Array, " N"], *, fpr: float = 0.05
) -> Membership:
  """Measures membership inference by a score, higher for members (known).

  Args:
    member: scores of training sequences, e.g. their negative mean NLL.
    other: scores of sequences of the same kind that were not trained on.
    fpr: allowed share of false alarms, over thresholds `score >= t`.
  """
  shapes.check(member=(member, "M"), other=(other, "N"))
  if not (member.size and other.size):
    raise InputError(
      f"membership needs both classes, got {member.size} members, {other.size} others"
    )
  positive = jnp.arange(member.size + other.size) < member.size
  curve = ranking.roc_curve(jnp.concatenate([member, other]), positive)
  allowed = curve.false / other.size <= fpr
  return Membership(ranking.auroc(curve), jnp.where(allowed, curve.true, 0).max() / member.size)


def min_k_score(
  log_probability: Float[Array, "B T"], mask: Bool[Array, "B T"], *, fraction: float = 0.2
) -> Float[Array, " B"]:
  """Averages the max(1, floor(K n)) least likely of the n real tokens of a sequence (known).

  Shi, Ajith, Xia, Huang, Liu, Blevins, Chen, Zettlemoyer, "Detecting pretraining data from large
  language models", arXiv 2310.16789.

  Args:
    log_probability: of every token given those before it.
    mask: real tokens; every sequence has one at least.
    fraction: K, in (0, 1].
  """
  shapes.same(log_probability=log_probability, mask=mask)
  if not 0 < fraction <= 1:
    raise InputError(f"fraction must be in (0, 1], got {fraction}")
  length = log_probability.shape[1]
  # From a table in float64: in float32 the product may fall on the other side of a whole number.
  quota = np.maximum(1, np.floor(fraction * np.arange(length + 1))).astype(int)
  count = jnp.asarray(quota)[mask.sum(1)][:, None]
  ranked = jnp.sort(jnp.where(mask, log_probability, jnp.inf), axis=1)
  return jnp.where(jnp.arange(length) < count, ranked, 0).sum(1) / count[:, 0]
