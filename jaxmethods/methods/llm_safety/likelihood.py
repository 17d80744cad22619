"""Log-probabilities of the tokens of a sequence, each predicted from the tokens before it.

Logits at position t speak of token t + 1: all functions shift by one, so a label at position 0 never
counts. The label IGNORED (-100) marks a token that is not predicted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxmethods.stats import shapes
from jaxmethods.stats.losses import IGNORED


def labels_of(ids: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
  """Marks the tokens outside `mask` as not predicted."""
  shapes.same(ids=ids, mask=mask)
  return jnp.where(mask, ids, IGNORED)


def token_log_probability(
  logits: Float[Array, "... S V"], labels: Int[Array, "... S"]
) -> Float[Array, "... S-1"]:
  """Computes log p(label t + 1 | tokens up to t); 0 where the label is IGNORED.

  Args:
    logits: of every position, shape (..., S, V).
    labels: token ids or IGNORED, shape (..., S).

  Returns:
    Nats, shape (..., S - 1), in float32 or better.
  """
  shapes.check(logits=(logits, "... S V"), labels=(labels, "... S"))
  logits = logits[..., :-1, :].astype(jnp.promote_types(logits.dtype, jnp.float32))
  target = labels[..., 1:]
  counts = target != IGNORED
  chosen = jnp.where(counts, target, 0)[..., None]
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, -1)[..., 0]
  return jnp.where(counts, log_p, 0)


def predicted_tokens(labels: Int[Array, "... S"]) -> Int[Array, ...]:
  """Counts the tokens of every sequence that are predicted."""
  return (labels[..., 1:] != IGNORED).sum(-1)


def sequence_log_probability(
  logits: Float[Array, "... S V"], labels: Int[Array, "... S"], *, average: bool = False
) -> Float[Array, ...]:
  """Sums log-probabilities over every sequence, or averages them over its predicted tokens.

  A sequence without a predicted token has 0.
  """
  total = token_log_probability(logits, labels).sum(-1)
  return total / jnp.maximum(predicted_tokens(labels), 1) if average else total


def mean_token_nll(logits: Float[Array, "B S V"], labels: Int[Array, "B S"]) -> Float[Array, ""]:
  """Averages -log p over all predicted tokens of a batch: the loss of a language model."""
  total = token_log_probability(logits, labels).sum()
  return -total / jnp.maximum(predicted_tokens(labels).sum(), 1)


def harmonic_mean(values: ArrayLike) -> Float[Array, ""]:
  """Computes the harmonic mean of metrics in [0, 1], any shape; 0 if one of them is 0."""
  values = jnp.asarray(values)
  if not values.size:
    raise ValueError("values: expected at least one metric, got none")
  return values.size / (1 / values).sum()
