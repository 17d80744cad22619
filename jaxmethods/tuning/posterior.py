"""Edits of a tuned model after training: back to the pretrained weights where that costs little.

W_0 is a pretrained tensor, W_1 the tuned one, D = W_1 - W_0. All are taken in float32 or better. The
functions are for one tensor; `edited` maps them over a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes
from jaxmethods.stats.selection import top_share
from jaxmethods.trees import Key, PyTree

# (W_0, W_1, key) -> edited tensor.
Edit = Callable[[Array, Array, Key], Array]


def edited(edit: Edit, before: PyTree, after: PyTree, key: Key) -> PyTree:
  """Edits every tensor of a tree, with a key of its own."""
  leaves, structure = jax.tree.flatten(after)
  keys = jax.random.split(key, max(len(leaves), 1))
  pairs = zip(jax.tree.leaves(before), leaves, keys, strict=True)
  return jax.tree.unflatten(structure, [edit(*pair) for pair in pairs])


def dare(
  before: Float[Array, ...],
  after: Float[Array, ...],
  dropped: Bool[Array, ...],
  rate: float,
) -> Float[Array, ...]:
  """Drops entries of the update and rescales the rest: W_0 + (1 - z) D / (1 - p) (arXiv 2311.03099).

  Args:
    before: W_0, any shape.
    after: W_1; may have axes of models before those of W_0.
    dropped: z, true with probability p; may have axes of draws before those of W_1.
    rate: p, in [0, 1).

  Raises:
    InputError: if `rate` is outside [0, 1).
  """
  behind = lambda x: " ".join(("...", *map(str, x.shape)))
  shapes.check(after=(after, behind(before)), dropped=(dropped, behind(after)))
  if not 0.0 <= rate < 1.0:
    raise InputError(f"dare: the rate must be in [0, 1), got {rate}")
  return before + jnp.where(dropped, 0, (after - before) / (1 - rate))


def masked(
  before: Float[Array, ...], after: Float[Array, ...], mask: Bool[Array, ...]
) -> Float[Array, ...]:
  """Keeps the update where the mask m is true: W_0 + m D."""
  shapes.same(before=before, after=after, mask=mask)
  return jnp.where(mask, after, before)


def grafting(
  before: Float[Array, ...], after: Float[Array, ...], share: float
) -> Float[Array, ...]:
  """Keeps the `share` of entries that changed most.

  The original learns the mask (arXiv 2302.06600); this is its magnitude version: floor(share * size)
  entries, ties to the earlier position.

  Raises:
    InputError: if `share` is outside [0, 1].
  """
  shapes.same(before=before, after=after)
  if not 0.0 <= share <= 1.0:
    raise InputError(f"grafting: the share must be in [0, 1], got {share}")
  return masked(before, after, top_share(jnp.abs(after - before), share))


def interpolate(
  before: Float[Array, ...], after: Float[Array, ...], weight: float
) -> Float[Array, ...]:
  """Averages weights: W_0 + a D (WiSE-FT, arXiv 2109.01903).

  Raises:
    InputError: if `weight` is outside [0, 1].
  """
  shapes.same(before=before, after=after)
  if not 0.0 <= weight <= 1.0:
    raise InputError(f"weight: must be in [0, 1], got {weight}")
  return before + weight * (after - before)


def ties(
  before: Float[Array, ...],
  updates: Float[Array, "K ..."],
  share: float,
  scale: float = 1.0,
) -> Float[Array, ...]:
  """Merges K updates: trims, elects a sign, averages what agrees (TIES, arXiv 2306.01708).

  Args:
    before: W_0.
    updates: (K, *W_0's shape). With K = 1 and a scale of 1 this is `grafting`.
    share: of entries that every update keeps.
    scale: lambda, of the merged update.

  Raises:
    InputError: if `share` is outside (0, 1].
  """
  shapes.same(before=before, update=updates[0])
  if not 0.0 < share <= 1.0:
    raise InputError(f"ties: the share must be in (0, 1], got {share}")
  trimmed = jax.vmap(lambda update: jnp.where(top_share(jnp.abs(update), share), update, 0))(
    updates
  )
  sign = jnp.sign(trimmed.sum(0))
  agrees = (trimmed != 0) & (jnp.sign(trimmed) == sign)
  mean = jnp.sum(trimmed, 0, where=agrees) / jnp.maximum(agrees.sum(0), 1)
  return before + scale * mean


def hessian(second_moment: Float[Array, "in in"], samples: Array | int) -> Float[Array, "in in"]:
  """Computes 2 / n sum_k X_k^T X_k over n calibration samples, the value of the published running mean.

  Args:
    second_moment: sum of x x^T over all tokens of all samples, (in, in).
    samples: n.
  """
  shapes.check(second_moment=(second_moment, "in in"))
  return 2 * second_moment / samples


def tailor(
  before: Float[Array, "out in"],
  after: Float[Array, "out in"],
  hessian: Float[Array, "in in"],
  sparsity: float = 0.9,
  *,
  block: int = 128,
  sign: Literal["plus", "minus"] = "plus",
) -> Float[Array, "out in"]:
  """Puts the least important entries back and lets the others make up for it (Model Tailor).

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
  shapes.check(before=(before, "out in"), after=(after, "out in"), hessian=(hessian, "in in"))
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
  after: Array, before: Array, back: Array, factor: Array, step: int
) -> tuple[Array, Array]:
  """Works off one block (out, columns): returns the edited block and the errors of its columns."""

  def column(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
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


def _standardised(x: Array) -> Array:
  """Standardises every row to mean 0 and sample deviation 1; a constant row to 0."""
  centred = x - x.mean(1, keepdims=True)
  deviation = jnp.sqrt(jnp.sum(centred**2, 1, keepdims=True) / max(x.shape[1] - 1, 1))
  return jnp.where(deviation > 0, centred / jnp.where(deviation > 0, deviation, 1), 0)
