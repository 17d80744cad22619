"""ROME: one fact written into one MLP output matrix by a change of rank one.

Meng, Bau, Andonian, Belinkov, "Locating and editing factual associations in GPT", arXiv 2202.05262
(code). The matrix W (F, D) maps the key k, its input at the lookup token, to the value k W + b, its
output there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety.likelihood import harmonic_mean
from jaxmethods.stats import shapes


def second_moment(keys: Float[Array, "N F"], *, damping: float = 0.0) -> Float[Array, "F F"]:
  """Computes C = E[k k^T], not centred.

  Args:
    keys: of tokens of a corpus.
    damping: share of the mean of the diagonal of C that is added to it (inferred); with fewer keys than
      their width C has no inverse without it.
  """
  shapes.check(keys=(keys, "N F"))
  c = keys.T @ keys / len(keys)
  return c + damping * jnp.diagonal(c).mean() * jnp.eye(len(c), dtype=c.dtype)


def direction(moment: Float[Array, "F F"], key: Float[Array, " F"]) -> Float[Array, " F"]:
  """Computes C^-1 k*: what the change reacts to; k* itself for C = I."""
  shapes.check(moment=(moment, "F F"), key=(key, "F"))
  return jnp.linalg.solve(moment, key)


def right_vector(
  weight: Float[Array, "F D"],
  bias: Float[Array, " D"],
  left: Float[Array, " F"],
  key: Float[Array, " F"],
  value: Float[Array, " D"],
) -> Float[Array, " D"]:
  """Computes Lambda = (v* - (k W + b)) / (k . u), so that k maps to v* exactly afterwards.

  Args:
    weight: W.
    bias: b.
    left: u; its length does not matter.
    key: k: that of the bare prompt in the code, the mean over contexts in the paper.
    value: v*.
  """
  shapes.check(
    weight=(weight, "F D"), bias=(bias, "D"), left=(left, "F"), key=(key, "F"), value=(value, "D")
  )
  return (value - (key @ weight + bias)) / (key @ left)


def edit(
  weight: Float[Array, "F D"],
  bias: Float[Array, " D"],
  moment: Float[Array, "F F"],
  key: Float[Array, " F"],
  value: Float[Array, " D"],
  *,
  bare_key: Float[Array, " F"] | None = None,
) -> Float[Array, "F D"]:
  """Writes k* -> v*: W' = W + u Lambda^T with u = C^-1 k* / ||C^-1 k*||.

  Args:
    weight: W.
    bias: b.
    moment: C, the second moment of the keys.
    key: k*, the mean key over contexts.
    value: v*.
    bare_key: key of the bare prompt. Given (code), it maps to v* exactly and repeated edits drift; left
      out, k* does, as in the closed form of the paper.
  """
  u = direction(moment, key)
  u /= jnp.linalg.norm(u)
  return weight + jnp.outer(
    u, right_vector(weight, bias, u, key if bare_key is None else bare_key, value)
  )


# --- the value v* -------------------------------------------------------------------------------


def value_objective(
  target_log_probability: Float[Array, " J"],
  essence_before: Float[Array, " V"],
  essence_now: Float[Array, " V"],
  change: Float[Array, " D"],
  value: Float[Array, " D"],
  *,
  kl_weight: float = 0.0625,
  decay: float = 0.5,
) -> Float[Array, ""]:
  """Computes mean -log p(o*) + kl KL(p0 || p_d) + wd ||d|| / ||v0||^2; the first norm is not squared.

  Args:
    target_log_probability: log p(o* | context j + prompt) with the value changed by d.
    essence_before: log-probabilities of the next token of the essence prompt, unchanged.
    essence_now: the same with the value changed by d.
    change: d.
    value: v0, the value in the bare prompt.
    kl_weight: kl.
    decay: wd.
  """
  shapes.check(
    target_log_probability=(target_log_probability, "J"),
    essence_before=(essence_before, "V"),
    essence_now=(essence_now, "V"),
    change=(change, "D"),
    value=(value, "D"),
  )
  kl = (jnp.exp(essence_before) * (essence_before - essence_now)).sum()
  # The gradient of a plain norm is NaN at d = 0, where the search starts.
  size = optax.safe_norm(change, 0.0) / (value @ value)
  return -target_log_probability.mean() + kl_weight * kl + decay * size


def within(
  change: Float[Array, " D"], value: Float[Array, " D"], factor: float = 4.0
) -> Float[Array, " D"]:
  """Rescales d to ||d|| <= c ||v0||."""
  shapes.same(change=change, value=value)
  most = factor * jnp.linalg.norm(value)
  size = jnp.linalg.norm(change)
  return jnp.where(size > most, change * (most / jnp.where(size > 0, size, 1)), change)


def find_value(
  objective: Callable[[Float[Array, " D"]], Float[Array, ""]],
  value: Float[Array, " D"],
  *,
  learning_rate: float = 0.5,
  steps: int = 20,
  factor: float = 4.0,
  enough: float = 0.05,
) -> Float[Array, " D"]:
  """Finds v* = v0 + d by Adam from d = 0, inside ||d|| <= c ||v0||.

  Args:
    objective: loss of d, such as `value_objective` of a model with its value changed.
    value: v0.
    learning_rate: of Adam.
    steps: losses computed; the last one is not followed by an update (code).
    factor: c.
    enough: a loss below it ends the search.
  """
  if steps < 1:
    raise InputError(f"steps must be at least 1, got {steps}")
  adam = optax.adam(learning_rate)

  def update(carry: tuple, _: None) -> tuple[tuple, None]:
    change, state = carry
    loss, gradient = jax.value_and_grad(objective)(change)
    step, moved = adam.update(gradient, state)
    new = within(optax.apply_updates(change, step), value, factor), moved
    # A finished search stands still: its state too, so nothing moves later.
    kept = jax.tree.map(lambda a, b: jnp.where(loss < enough, a, b), carry, new)
    return kept, None

  start = jnp.zeros_like(value)
  (change, _), _ = jax.lax.scan(update, (start, adam.init(start)), None, steps - 1)
  return value + change


# --- metrics ------------------------------------------------------------------------------------


def success(
  wanted: Float[Array, " N"], other: Float[Array, " N"], real: Bool[Array, " N"] | None = None
) -> Float[Array, ""]:
  """Computes the share of prompts with p(wanted) > p(other) (code).

  Efficacy and paraphrases want o* over o, neighbours want o over o*.

  Args:
    wanted: probabilities, or their logarithms.
    other: the same.
    real: prompts that count; default all.
  """
  shapes.same(wanted=wanted, other=other)
  real = jnp.ones(wanted.shape, bool) if real is None else real
  return ((wanted > other) & real).sum() / jnp.maximum(real.sum(), 1)


def score(
  efficacy: Float[Array, ""], paraphrase: Float[Array, ""], neighbourhood: Float[Array, ""]
) -> Float[Array, ""]:
  """Computes the harmonic mean of ES, PS and NS (code)."""
  return harmonic_mean(jnp.stack([efficacy, paraphrase, neighbourhood]))
