"""Editing a tuned model after training: back to the pretrained weights where that costs little.

W_0 is a pretrained tensor, W_1 the tuned one, D = W_1 - W_0. All are taken in float32 or better. The
functions are for one tensor; `edited` maps them over a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmethods.errors import InputError
from jaxmethods.stats.selection import top_share

# (W_0, W_1, key) -> edited tensor.
Edit = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def edited(edit: Edit, before: Any, after: Any, key: jax.Array) -> Any:
  """Edits every tensor of a tree, with a key of its own."""
  leaves, structure = jax.tree.flatten(after)
  keys = jax.random.split(key, max(len(leaves), 1))
  pairs = zip(jax.tree.leaves(before), leaves, keys, strict=True)
  return jax.tree.unflatten(structure, [edit(*pair) for pair in pairs])


def dare(before: jax.Array, after: jax.Array, dropped: jax.Array, rate: float) -> jax.Array:
  """W_0 + (1 - z) D / (1 - p): drops entries of the update, rescales the rest (arXiv 2311.03099).

  Args:
    before: W_0, any shape.
    after: W_1.
    dropped: z, boolean, true with probability p.
    rate: p, in [0, 1).

  Raises:
    InputError: if `rate` is outside [0, 1).
  """
  if not 0.0 <= rate < 1.0:
    raise InputError(f"dare: the rate must be in [0, 1), got {rate}")
  return before + jnp.where(dropped, 0, (after - before) / (1 - rate))


def masked(before: jax.Array, after: jax.Array, mask: jax.Array) -> jax.Array:
  """W_0 + m D with a given mask m: entries where it is true keep what they learned."""
  return jnp.where(mask, after, before)


def grafting(before: jax.Array, after: jax.Array, share: float) -> jax.Array:
  """Keeps the `share` of entries that changed most.

  The original learns the mask (arXiv 2302.06600); this is its magnitude version: floor(share * size)
  entries, ties to the earlier position.

  Raises:
    InputError: if `share` is outside [0, 1].
  """
  if not 0.0 <= share <= 1.0:
    raise InputError(f"grafting: the share must be in [0, 1], got {share}")
  return masked(before, after, top_share(jnp.abs(after - before), share))


def interpolate(before: jax.Array, after: jax.Array, weight: float) -> jax.Array:
  """W_0 + a D: weight averaging (WiSE-FT, arXiv 2109.01903).

  Raises:
    InputError: if `weight` is outside [0, 1].
  """
  if not 0.0 <= weight <= 1.0:
    raise InputError(f"weight: must be in [0, 1], got {weight}")
  return before + weight * (after - before)


def ties(before: jax.Array, updates: jax.Array, share: float, scale: float = 1.0) -> jax.Array:
  """TIES merging of K updates: trim, elect a sign, average what agrees (arXiv 2306.01708).

  Args:
    before: W_0.
    updates: (K, *W_0's shape). With K = 1 and a scale of 1 this is `grafting`.
    share: of entries that every update keeps.
    scale: lambda, of the merged update.

  Raises:
    InputError: if `share` is outside (0, 1].
  """
  if not 0.0 < share <= 1.0:
    raise InputError(f"ties: the share must be in (0, 1], got {share}")
  trimmed = jax.vmap(lambda update: jnp.where(top_share(jnp.abs(update), share), update, 0))(
    updates
  )
  sign = jnp.sign(trimmed.sum(0))
  agrees = (trimmed != 0) & (jnp.sign(trimmed) == sign)
  mean = jnp.sum(trimmed, 0, where=agrees) / jnp.maximum(agrees.sum(0), 1)
  return before + scale * mean


def hessian(second_moment: jax.Array, samples: jax.Array | int) -> jax.Array:
  """2 / n sum_k X_k^T X_k over n calibration samples: what the published running mean comes to.

  Args:
    second_moment: sum of x x^T over all tokens of all samples, (in, in).
    samples: n.
  """
  return 2 * second_moment / samples


def tailor(
  before: jax.Array,
  after: jax.Array,
  hessian: jax.Array,
  sparsity: float = 0.9,
  *,
  block: int = 128,
  sign: Literal["plus", "minus"] = "plus",
) -> jax.Array:
  """Model Tailor: puts the least important entries back and lets the others make up for it.

  Zhu et al., arXiv 2402.12048. With U the upper Cholesky factor of H^-1, the score of an entry is
  z(|D|) / 2 + z(W^2 / diag(U)^2) / 2, z standardising the rows of a block of columns. Column by column,
  an entry that is put back leaves the error e = (w - w_0) / U_ii, and e U_i is added to the columns
  behind.

  Args:
    before: W_0, (out, in).
    after: W_1.
    hessian: H of the layer's inputs, (in, in), see `hessian`; damped in here.
    sparsity: share of entries that are put back, in [0, 1).
    block: columns that are scored together (code: 128); results depend on it.
    sign: "plus" is what the published code does; "minus" is the usual surgeon's step.

  Returns:
    (out, in).

  Raises:
    InputError: if `sparsity` is outside [0, 1).
  """
  if not 0.0 <= sparsity < 1.0:
    raise InputError(f"tailor: sparsity must be in [0, 1), got {sparsity}")
  diagonal = jnp.diag(hessian)
  hessian = hessian + jnp.diag(jnp.where(diagonal == 0, 1, 0))
  damping = 0.01 * jnp.mean(jnp.diag(hessian))
  inverse = jnp.linalg.inv(hessian + damping * jnp.eye(len(hessian), dtype=hessian.dtype))
  upper = jnp.linalg.cholesky(inverse).T
  step = 1 if sign == "plus" else -1
  inputs = before.shape[1]
  current, done = after, []
  for start in range(0, inputs, block):
    end = min(start + block, inputs)
    here = slice(start, end)
    factor = upper[here, here]
    cost = current[:, here] ** 2 / jnp.diag(factor) ** 2
    score = (_standardised(jnp.abs(after - before)[:, here]) + _standardised(cost)) / 2
    threshold = jnp.sort(score.ravel())[math.floor(sparsity * score.size)]
    kept, errors = _compensate(current[:, here], before[:, here], score <= threshold, factor, step)
    current = current.at[:, end:].add(step * errors @ upper[here, end:])
    done.append(kept)
  return jnp.concatenate(done, axis=1)


def _compensate(
  after: jax.Array, before: jax.Array, back: jax.Array, factor: jax.Array, step: int
) -> tuple[jax.Array, jax.Array]:
  """One block (out, columns): what is kept of it, and the errors of its columns."""

  def column(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    current, kept, errors = carry
    w = current[:, i]
    q = jnp.where(back[:, i], before[:, i], w)
    error = (w - q) / factor[i, i]
    # The row of the factor is zero left of the diagonal: columns that are done stay as they are.
    current = current + step * jnp.outer(error, factor[i])
    return current, kept.at[:, i].set(q), errors.at[:, i].set(error)

  zeros = jnp.zeros_like(after)
  _, kept, errors = jax.lax.fori_loop(0, after.shape[1], column, (after, zeros, zeros))
  return kept, errors


def _standardised(x: jax.Array) -> jax.Array:
  """Every row to mean 0 and sample deviation 1; a constant row to 0."""
  centred = x - x.mean(1, keepdims=True)
  deviation = jnp.sqrt(jnp.sum(centred**2, 1, keepdims=True) / max(x.shape[1] - 1, 1))
  return jnp.where(deviation > 0, centred / jnp.where(deviation > 0, deviation, 1), 0)
