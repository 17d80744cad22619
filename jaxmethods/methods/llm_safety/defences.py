"""Defences: spectral filter of training data, SafeLoRA, LISA, perplexity filter, SmoothLLM."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.errors import InputError
from jaxmethods.stats import poisoning, shapes
from jaxmethods.trees import Key, PyTree, check_alike

Perturbation = Literal["swap", "patch", "insert"]


class Subspace(NamedTuple):
  """A projection (D, D) on the directions that carry most of a change, and their number."""

  projection: Float[Array, "D D"]
  rank: Int[Array, ""]


class Projected(NamedTuple):
  """An update after SafeLoRA, and the cosine of it before and after the projection."""

  update: Float[Array, "K D"]
  cosine: Float[Array, ""]


# --- poisoned data ------------------------------------------------------------------------------


def spectral_outliers(representations: Float[Array, "N D"], remove: int) -> Int[Array, " remove"]:
  """Returns the examples with the largest spectral signatures, in order of their position (known).

  Tran, Li, Madry, "Spectral signatures in backdoor attacks", arXiv 1811.00636.

  Args:
    representations: hidden states of the examples of one answer class; over all classes at once the
      first axis is the one that tells the classes apart.
    remove: how many; the paper takes 1.5 times the expected number of poisons.
  """
  shapes.check(representations=(representations, "N D"))
  if not 0 <= remove <= len(representations):
    raise InputError(f"remove must be in 0..{len(representations)}, got {remove}")
  scores = poisoning.spectral_scores(representations)
  return jnp.sort(jax.lax.top_k(scores, remove)[1])


# --- harmful fine-tuning: SafeLoRA ----------------------------------------------------------------


def alignment_matrix(
  base: Float[Array, "K D"], aligned: Float[Array, "K D"]
) -> Float[Array, "D D"]:
  """Computes C = V^T V / ||V||_F, V = aligned - base, for kernels that map x to x W (code).

  Hsu, Tsai, Lin, Chen, Yu, Huang, "Safe LoRA", arXiv 2405.16833. In torch's layout it is V V^T. C is no
  projection: its largest eigenvalue is sigma_1^2 / ||V||_F. It is 0 where alignment changed nothing.
  """
  shapes.same(base=base, aligned=aligned)
  v = aligned - base
  size = jnp.linalg.norm(v)
  return v.T @ v / jnp.where(size > 0, size, 1)


def alignment_subspace(
  base: Float[Array, "K D"], aligned: Float[Array, "K D"], *, energy: float = 0.9
) -> Subspace:
  """Projects on the fewest right singular vectors of V that hold a share of its energy (inferred).

  Args:
    base: kernel before alignment.
    aligned: kernel after it.
    energy: share of the squared singular values.
  """
  shapes.check(base=(base, "K D"), aligned=(aligned, "K D"))
  _, singular, axes = jnp.linalg.svd(aligned - base, full_matrices=False)
  held = jnp.cumsum(singular**2)
  kept = (held - singular**2 < energy * held[-1]) & (singular > 0)
  return Subspace((axes.T * kept) @ axes, kept.sum())


def safe_update(
  update: Float[Array, "K D"], matrix: Float[Array, "D D"], threshold: float | Array
) -> Projected:
  """Replaces an update by its product with C if the cosine of the two is at most tau (code).

  Args:
    update: A B of a low-rank adapter, or the whole change of a kernel (inferred).
    matrix: C, or a projection.
    threshold: tau; the code's default is .5, or `threshold_for`.
  """
  shapes.check(update=(update, "K D"), matrix=(matrix, "D D"))
  projected = update @ matrix
  size = jnp.linalg.norm(projected) * jnp.linalg.norm(update)
  cosine = (projected * update).sum() / jnp.where(size > 0, size, 1)
  return Projected(jnp.where(cosine <= threshold, projected, update), cosine)


def threshold_for(cosines: Float[Array, " L"], number: int) -> Float[Array, ""]:
  """Returns the tau at which `number` of the matrices are projected, more if cosines tie (code)."""
  shapes.check(cosines=(cosines, "L"))
  if not 1 <= number <= len(cosines):
    raise InputError(f"number must be in 1..{len(cosines)}, the matrices, got {number}")
  return jnp.sort(cosines)[number - 1]


# --- harmful fine-tuning: LISA --------------------------------------------------------------------


def lisa_penalty(params: PyTree, anchor: PyTree, rho: float) -> Float[Array, ""]:
  """Computes rho / 2 ||w - w_other||^2 over all trained tensors (code).

  Huang, Hu, Ilhan, Tekin, Liu, "Lisa: lazy safety alignment", arXiv 2405.18641.

  Args:
    params: w, all that is trained.
    anchor: w_other, the last weights of the other phase; gets no gradient.
    rho: >= 0; 0 is plain alternation.
  """
  check_alike(params=params, anchor=anchor)
  if rho < 0:
    raise InputError(f"rho must not be negative, got {rho}")
  square = lambda w, a: jnp.square(w - jax.lax.stop_gradient(a)).sum()
  squares = jax.tree.leaves(jax.tree.map(square, params, anchor))
  return rho / 2 * jnp.stack(squares).sum()


def lisa_aligns(step: Int[Array, ...], alignment_steps: int, user_steps: int) -> Bool[Array, ...]:
  """Tells whether a step trains on alignment data: K1 such steps, then K2 on the user's, in turn."""
  if alignment_steps < 0 or user_steps < 1:
    raise InputError(f"expected K1 >= 0 and K2 >= 1, got {alignment_steps} and {user_steps}")
  return step % (alignment_steps + user_steps) < alignment_steps


# --- jailbreaks: perplexity filter ----------------------------------------------------------------


def log_perplexity(nll: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
  """Averages the NLL of the real tokens of every prompt (known).

  Alon, Kamfonas, arXiv 2308.14132; Jain et al., "Baseline defenses", arXiv 2309.00614. 0 without tokens.
  """
  shapes.same(nll=nll, mask=mask)
  return jnp.where(mask, nll, 0).sum(1) / jnp.maximum(mask.sum(1), 1)


def windowed_log_perplexity(
  nll: Float[Array, "B T"], mask: Bool[Array, "B T"], window: int
) -> Float[Array, " B"]:
  """Returns the largest mean NLL of consecutive blocks; a short attack cannot hide in a long prompt.

  Args:
    nll: of every token.
    mask: real tokens; blocks without any do not count.
    window: tokens of a block; blocks start at 0, w, 2 w, ..., the last may be shorter.
  """
  shapes.same(nll=nll, mask=mask)
  if window < 1:
    raise InputError(f"window must be at least 1, got {window}")
  missing = ((0, 0), (0, -nll.shape[1] % window))
  blocks, real = (jnp.pad(x, missing).reshape(len(nll), -1, window) for x in (nll, mask))
  count = real.sum(2)
  mean = jnp.where(real, blocks, 0).sum(2) / jnp.maximum(count, 1)
  return jnp.where(count > 0, mean, 0).max(1)


def blocked(
  score: Float[Array, " N"], benign: Float[Array, " M"], *, false_positives: float = 0.01
) -> Bool[Array, " N"]:
  """Blocks prompts whose score lies above a quantile of other, benign prompts."""
  shapes.check(score=(score, "N"), benign=(benign, "M"))
  return score > jnp.quantile(benign, 1 - false_positives)


# --- jailbreaks: SmoothLLM ------------------------------------------------------------------------
# Robey, Wong, Hassani, Pappas, arXiv 2310.03684 (code). Symbols are characters there, tokens here.


def perturbed_count(length: int, percent: float) -> int:
  """Returns m = floor(length q / 100)."""
  if not 0 <= percent <= 100:
    raise InputError(f"percent must be in 0..100, got {percent}")
  return math.floor(length * percent / 100)


def swap(
  tokens: Int[Array, " T"], position: Int[Array, " m"], replacement: Int[Array, " m"]
) -> Int[Array, " T"]:
  """Replaces the tokens at m distinct positions."""
  shapes.check(tokens=(tokens, "T"), position=(position, "m"), replacement=(replacement, "m"))
  return tokens.at[position].set(replacement)


def patch(
  tokens: Int[Array, " T"], first: Int[Array, ""], replacement: Int[Array, " m"]
) -> Int[Array, " T"]:
  """Replaces a block of m tokens from `first`, which must be at most T - m."""
  shapes.check(tokens=(tokens, "T"), first=(first, ""), replacement=(replacement, "m"))
  return jax.lax.dynamic_update_slice(tokens, replacement.astype(tokens.dtype), (first,))


def insert(
  tokens: Int[Array, " T"], position: Int[Array, " m"], replacement: Int[Array, " m"]
) -> Int[Array, " T+m"]:
  """Inserts m tokens one after the other, each shifting those behind it before the next."""
  shapes.check(tokens=(tokens, "T"), position=(position, "m"), replacement=(replacement, "m"))
  place = jnp.arange(len(tokens) + len(position))

  def one(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
    at, token = pair
    return jnp.where(place < at, x, jnp.where(place == at, token, jnp.roll(x, 1))), None

  padded = jnp.pad(tokens, (0, len(position)))
  return jax.lax.scan(one, padded, (position, replacement.astype(tokens.dtype)))[0]


def perturbed(
  key: Key,
  tokens: Int[Array, " T"],
  alphabet: Int[Array, " A"],
  *,
  percent: float = 10.0,
  kind: Perturbation = "swap",
) -> Int[Array, " T or T+m"]:
  """Perturbs one copy of a prompt; `vmap` over keys gives the N copies.

  Args:
    key: of positions and replacements.
    tokens: the prompt without its frame, all real.
    alphabet: tokens to draw from, uniformly.
    percent: q; 0 changes nothing.
    kind: "swap", "patch" (one block) or "insert" (longer by m).
  """
  shapes.check(tokens=(tokens, "T"), alphabet=(alphabet, "A"))
  where, which = jax.random.split(key)
  count = perturbed_count(len(tokens), percent)
  replacement = jax.random.choice(which, alphabet, (count,))
  if kind == "patch":
    return patch(tokens, jax.random.randint(where, (), 0, len(tokens) - count + 1), replacement)
  position = jax.random.permutation(where, len(tokens))[:count]
  if kind == "swap":
    return swap(tokens, position, replacement)
  if kind == "insert":
    return insert(tokens, position, replacement)
  raise InputError(f"kind must be swap, patch or insert, got {kind}")


def jailbroken(flags: Bool[Array, "... N"]) -> Bool[Array, ...]:
  """Votes over the N copies: more than half; exactly half counts as safe."""
  return 2 * flags.sum(-1) > flags.shape[-1]


def answering_copy(key: Key, flags: Bool[Array, " N"]) -> Int[Array, ""]:
  """Draws a copy that agrees with the vote; its response is the answer."""
  shapes.check(flags=(flags, "N"))
  agrees = flags == jailbroken(flags)
  return jax.random.categorical(key, jnp.where(agrees, 0.0, -jnp.inf))
