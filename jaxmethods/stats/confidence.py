"""What logits, repeated answers and the model's own words say about how sure a language model is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.stats import shapes

HIGHEST = 4  # the highest temperature of `statistics_at_scales`


class TokenStatistics(NamedTuple):
  """Of every token's distribution p = softmax(logits / tau), (...) each, natural logarithms.

  Attributes:
    max_log_prob: log max p.
    log_prob: log p of the token that was written.
    entropy: of p.
    energy: tau logsumexp(logits / tau), minus the free energy (Liu et al., NeurIPS 2020).
  """

  max_log_prob: Float[Array, " ..."]
  log_prob: Float[Array, " ..."]
  entropy: Float[Array, " ..."]
  energy: Float[Array, " ..."]


class DropoutStatistics(NamedTuple):
  """Of K passes with dropout, (B,) each.

  Attributes:
    max_mean_prob: largest probability of the mean distribution.
    predictive_entropy: entropy of the mean distribution, nats.
    mutual_information: that minus the mean entropy: what the passes disagree about.
  """

  max_mean_prob: Float[Array, " B"]
  predictive_entropy: Float[Array, " B"]
  mutual_information: Float[Array, " B"]


def token_statistics(
  logits: Float[Array, "... V"],
  tokens: Int[Array, " ..."],
  temperature: float | Float[Array, ""] = 1.0,
) -> TokenStatistics:
  """Statistics of next-token distributions.

  Args:
    logits: (..., V).
    tokens: (...) int, the written ones.
    temperature: tau.

  >>> found = jm.stats.token_statistics(jnp.zeros((1, 4)), jnp.array([2]))
  >>> round(float(found.entropy[0]), 4)  # log 4
  1.3863
  """
  _check(logits, tokens)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
  peak = logits.max(-1)
  shifted = logits - peak[..., None]
  weight = jnp.exp(shifted)
  total = weight.sum(-1)
  log_total = jnp.log(total)
  written = jnp.take_along_axis(shifted, tokens[..., None], -1)[..., 0]
  entropy = log_total - (weight * shifted).sum(-1) / total
  return TokenStatistics(-log_total, written - log_total, entropy, temperature * (peak + log_total))


def statistics_at_scales(
  logits: Float[Array, "... V"], tokens: Int[Array, " ..."], powers: tuple[int, ...]
) -> tuple[TokenStatistics, Float[Array, "... powers"]]:
  """`token_statistics`, and log max p at the temperatures `HIGHEST` / k, k of `powers`.

  One exponential for everything: the others are its powers.

  Args:
    logits: (..., V).
    tokens: (...) int, the written ones.
    powers: k, positive.

  Returns:
    The statistics, (...) each, and (..., len(powers)).
  """
  _check(logits, tokens)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  peak = logits.max(-1)
  shifted = logits - peak[..., None]
  weight = _once(lambda x: jnp.exp(x / HIGHEST), shifted)
  log_total = {k: jnp.log(jax.lax.integer_pow(weight, k).sum(-1)) for k in {*powers, HIGHEST}}
  moment = (jax.lax.integer_pow(weight, HIGHEST) * shifted).sum(-1)
  here = log_total[HIGHEST]
  written = jnp.take_along_axis(shifted, tokens[..., None], -1)[..., 0]
  plain = TokenStatistics(-here, written - here, here - moment / jnp.exp(here), peak + here)
  return plain, -jnp.stack([log_total[k] for k in powers], -1)


def _once(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """An elementwise function, evaluated once however many sums are taken of it.

  XLA's CPU compiler evaluates it anew for every sum; it does not look across the end of a loop.
  """
  if x.shape[-1] % 2 or jax.default_backend() != "cpu":
    return function(x)
  halves = jnp.moveaxis(x.reshape(*x.shape[:-1], 2, -1), -2, 0)
  return jnp.moveaxis(jax.lax.map(function, halves), 0, -2).reshape(x.shape)


def mean_over(values: Float[Array, "... T"], mask: Bool[Array, "... T"]) -> Float[Array, " ..."]:
  """Mean over the last axis where the mask is true; 0 where it never is."""
  return jnp.where(mask, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def length_normalised_entropy(
  log_prob: Float[Array, "B K T"], mask: Bool[Array, "B K T"]
) -> Float[Array, " B"]:
  """Minus the mean log probability per token of K samples: (B, K, T) and mask (B, K, T) to (B,)."""
  shapes.check(log_prob=(log_prob, "B K T"), mask=(mask, "B K T"))
  return -mean_over(log_prob, mask).mean(-1)


def self_consistency(
  answer: Int[Array, "B K"], given: Bool[Array, "B K"] | None = None
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """The answer that most samples give.

  Args:
    answer: (B, K) int ids of the answers.
    given: (B, K), False for a sample that came to no answer: it agrees with none.

  Returns:
    (B,) the majority's id, the smallest of equals; (B,) its share of all K samples, 0 if none answered.

  >>> winner, share = jm.stats.self_consistency(jnp.array([[7, 7, 9, 7]]))
  >>> winner.tolist(), share.tolist()
  ([7], [0.75])
  """
  shapes.check(answer=(answer, "B K"))
  given = jnp.ones(answer.shape, bool) if given is None else given
  same = (answer[:, :, None] == answer[:, None, :]) & given[:, None, :] & given[:, :, None]
  votes = same.sum(-1)
  most = votes.max(-1)
  largest = jnp.iinfo(answer.dtype).max
  winner = jnp.where(given & (votes == most[:, None]), answer, largest).min(-1)
  return winner, most / answer.shape[1]


def dropout_statistics(probs: Float[Array, "K B V"]) -> DropoutStatistics:
  """Statistics of the distributions (K, B, V) that K passes with dropout gave."""
  shapes.check(probs=(probs, "K B V"))
  mean = probs.mean(0)
  predictive = _entropy(mean)
  return DropoutStatistics(mean.max(-1), predictive, predictive - _entropy(probs).mean(0))


def verbalised(text: str) -> float | None:
  """Confidence that a model wrote down: the first number from 0 to 100, / 100; None if there is none."""
  numbers = (float(found) for found in re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", text))
  return next((number / 100 for number in numbers if 0 <= number <= 100), None)


def _check(logits: Array, tokens: Array) -> None:
  """Raises ValueError where there is no token for each distribution."""
  axes = " ".join("abcdefg"[: jnp.ndim(tokens)])
  shapes.check(tokens=(tokens, axes), logits=(logits, f"{axes} V"))


def _entropy(probs: jax.Array) -> jax.Array:
  return jax.scipy.special.entr(probs).sum(-1)
