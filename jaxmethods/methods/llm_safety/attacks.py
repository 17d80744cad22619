"""GCG: a suffix of tokens that makes a model answer as wanted, by greedy coordinate gradient.

Zou, Wang, Carlini, Nasr, Kolter, Fredrikson, "Universal and transferable adversarial attacks on aligned
language models", arXiv 2307.15043; conventions of nanoGCG (code).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import likelihood
from jaxmethods.stats import shapes
from jaxmethods.trees import Key

# One-hot suffix (n, V), whose product with the embeddings enters the model -> loss.
RelaxedLoss = Callable[[Float[Array, "n V"]], Float[Array, ""]]
# Suffixes (B, n) -> their losses (B,), in one batch or in parts, as memory allows.
SuffixLosses = Callable[[Int[Array, "B n"]], Float[Array, " B"]]


class Search(NamedTuple):
  """State of a search.

  Attributes:
    suffix: where the next step starts.
    best: suffix with the smallest loss so far, the start included: the answer.
    best_loss: its loss.
  """

  suffix: Int[Array, " n"]
  best: Int[Array, " n"]
  best_loss: Float[Array, ""]


def target_loss(logits: Float[Array, "... S V"], target: Int[Array, " m"]) -> Float[Array, ...]:
  """Averages -log p(y_j | all before), for a prompt that ends with the wanted answer y.

  Args:
    logits: of prompt and answer, shape (..., S, V).
    target: y, the last m of the S tokens.
  """
  shapes.check(logits=(logits, "... S V"), target=(target, "m"))
  if not 0 < len(target) < logits.shape[-2]:
    raise ValueError(f"target: expected 1 to {logits.shape[-2] - 1} tokens, got {len(target)}")
  last = logits[..., -len(target) - 1 :, :]
  # The label of the first position does not count: it only holds the place of the prompt.
  labels = jnp.broadcast_to(jnp.concatenate([target[:1], target]), last.shape[:-1])
  return -likelihood.sequence_log_probability(last, labels, average=True)


def onehot_gradient(
  loss: RelaxedLoss, suffix: Int[Array, " n"], vocabulary: int
) -> Float[Array, "n V"]:
  """Computes the gradient of the loss with respect to the one-hot suffix."""
  shapes.check(suffix=(suffix, "n"))
  return jax.grad(loss)(jax.nn.one_hot(suffix, vocabulary))


def promising(
  gradient: Float[Array, "n V"], forbidden: Int[Array, " F"], top: int
) -> Int[Array, "n top"]:
  """Returns the ids of smallest gradient at every position, best first; ties to the smaller id.

  Args:
    gradient: of the one-hot suffix.
    forbidden: distinct ids that are never chosen.
    top: k, how many.
  """
  shapes.check(gradient=(gradient, "n V"), forbidden=(forbidden, "F"))
  allowed = gradient.shape[1] - len(forbidden)
  if not 1 <= top <= allowed:
    raise InputError(f"top must be in 1..{allowed}, the allowed tokens, got {top}")
  blocked = gradient.at[:, forbidden].set(jnp.inf)
  return jax.lax.top_k(-blocked, top)[1]


def substituted(
  suffix: Int[Array, " n"],
  choices: Int[Array, "n top"],
  position: Int[Array, " B"],
  choice: Int[Array, " B"],
) -> Int[Array, "B n"]:
  """Makes one candidate of every pair: `choices[position, choice]` put at `position`."""
  shapes.check(
    suffix=(suffix, "n"), choices=(choices, "n top"), position=(position, "B"), choice=(choice, "B")
  )
  candidates = jnp.tile(suffix, (len(position), 1))
  return candidates.at[jnp.arange(len(position)), position].set(choices[position, choice])


def moved(search: Search, candidates: Int[Array, "B n"], losses: Float[Array, " B"]) -> Search:
  """Moves to the best candidate, even if it is worse than the suffix before; keeps the best ever."""
  shapes.check(candidates=(candidates, "B n"), losses=(losses, "B"), best=(search.best, "n"))
  # NaN losses never win: argmin would choose them.
  losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
  first = jnp.argmin(losses)
  suffix, loss = candidates[first], losses[first].astype(search.best_loss.dtype)
  better = loss < search.best_loss
  return Search(
    suffix, jnp.where(better, suffix, search.best), jnp.where(better, loss, search.best_loss)
  )


def start(suffix: Int[Array, " n"], losses: SuffixLosses) -> Search:
  """Starts a search at a suffix."""
  shapes.check(suffix=(suffix, "n"))
  return Search(suffix, suffix, losses(suffix[None])[0])


def gcg_step(
  search: Search,
  key: Key,
  relaxed: RelaxedLoss,
  losses: SuffixLosses,
  forbidden: Int[Array, " F"],
  *,
  vocabulary: int,
  candidates: int = 512,
  top: int = 256,
) -> Search:
  """Does one step of GCG.

  Args:
    search: state before.
    key: of the candidates.
    relaxed: loss of a one-hot suffix; gives the gradient.
    losses: of whole candidates.
    forbidden: distinct ids never put in; a start that holds some may keep them.
    vocabulary: V.
    candidates: B, each with one token replaced, position and replacement drawn uniformly.
    top: k, replacements to draw from at every position.
  """
  choices = promising(onehot_gradient(relaxed, search.suffix, vocabulary), forbidden, top)
  where, which = jax.random.split(key)
  position = jax.random.randint(where, (candidates,), 0, len(search.suffix))
  choice = jax.random.randint(which, (candidates,), 0, top)
  drawn = substituted(search.suffix, choices, position, choice)
  return moved(search, drawn, losses(drawn))


def random_search_step(
  search: Search,
  key: Key,
  losses: SuffixLosses,
  allowed: Int[Array, " A"],
  *,
  candidates: int = 512,
) -> Search:
  """Does one step of the baseline: candidates drawn anew from the allowed tokens."""
  shapes.check(allowed=(allowed, "A"))
  drawn = jax.random.choice(key, allowed, (candidates, len(search.suffix)))
  return moved(search, drawn.astype(search.suffix.dtype), losses(drawn))
