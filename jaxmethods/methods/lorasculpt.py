"""LoRASculpt: sparse low-rank updates that keep out of the way of what was pretrained.

Liang, Huang, Wan, Yang, Ye, "LoRASculpt: Sculpting LoRA for harmonizing general and specialized
knowledge in multimodal large language models", CVPR 2025, arXiv 2503.16843. Early in training every
factor of every layer keeps its largest entries for good, so that their product is sparse; a
regulariser takes energy out of the update where the frozen weight is large.

Source status: the published code, the abstract and a figure were read, the running text was not.
Marks as in the specification: (paper), (code), (inferred).

Factors are laid out as in `adapters.low_rank`: "a" = A (rank, in), "b" = B^T (rank, out), beside
kernels W^T (in, out); below a scan all three have a leading axis of layers.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmethods import trees
from jaxmethods.adapters import low_rank
from jaxmethods.adapters.adapter import Factors, layers_of
from jaxmethods.errors import InputError
from jaxmethods.stats import shapes
from jaxmethods.stats.selection import top_share
from jaxmethods.trees import Params, Tree, below, flatten, owner
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner

Connector = Literal["full", "lora_cmr", "frozen"]

# Kernels in the penalty (code): q, k and v of the language model, never of the image tower.
REGULARISED = r"^language/.*\b(query|key|value)/kernel$"

# (code) Keeps the logarithm of a weight that is exactly zero finite.
_TINY = 1e-15


# --- sparse factors -----------------------------------------------------------------------------


def magnitude_mask(factor: Float[Array, ...], keep_ratio: float) -> Bool[Array, ...]:
  """Marks the entries of a factor that stay: the largest by |.|, ties to the earlier position (code).

  Args:
    factor: A or B of one layer, any shape.
    keep_ratio: rho, in (0, 1].

  Returns:
    Boolean mask, exactly floor(rho * size) true.

  Raises:
    InputError: rho outside (0, 1], or so small that nothing stays.
  """
  _check_ratio(keep_ratio, factor.size)
  return top_share(jnp.abs(factor), keep_ratio)


def magnitude_masks(tree: Tree, keep_ratio: float) -> Tree:
  """Marks the entries of every factor of a tree by itself; a stack of layers has one mask a layer."""
  one = functools.partial(magnitude_mask, keep_ratio=keep_ratio)
  return jax.tree.map(lambda leaf: _mapped(one, leaf.ndim - 2)(leaf), tree)


def dense_masks(tree: Tree) -> Tree:
  """Makes masks that keep everything: those before the pruning step."""
  return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), tree)


def masked(tree: Tree, masks: Tree) -> Tree:
  """Multiplies factors by their masks; entries that are not kept are exactly zero."""
  return jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf, 0), tree, masks)


def sculpt(
  updates: Array | int, tree: Tree, masks: Tree, *, prune_at: int = 100, keep_ratio: float = 0.1
) -> tuple[Tree, Tree]:
  """Prunes the factors before the forward pass of a step (code).

  After `prune_at` updates the masks are taken, once; from then on they undo what the optimiser wrote
  into entries that are gone. One program for all steps. The masks belong into the checkpoint: the
  published code prunes at one value of a counter, and a run that is resumed after it never prunes.

  Args:
    updates: number of optimiser updates so far.
    tree: factors.
    masks: of the last call; `dense_masks` at first.
    prune_at: t_p.
    keep_ratio: rho.

  Returns:
    (factors, masks).
  """
  # One branch for the whole tree: the sort runs in one step of the run, not in all.
  masks = jax.lax.cond(
    jnp.asarray(updates) == prune_at,
    lambda: magnitude_masks(tree, keep_ratio),
    lambda: masks,
  )
  return masked(tree, masks), masks


def free_entries(tree: Tree, keep_ratio: float) -> int:
  """Counts the entries that stay trainable after pruning; `tree` may be abstract."""
  return sum(
    math.prod(leaf.shape[:-2]) * math.floor(keep_ratio * math.prod(leaf.shape[-2:]))
    for leaf in jax.tree.leaves(tree)
  )


def product_density(density_a: float, density_b: float, rank: int) -> float:
  """Computes E[s_BA] = 1 - (1 - s_A s_B)^r, the density of BA under independent random masks (paper)."""
  return 1.0 - (1.0 - density_a * density_b) ** rank


def density_bound(deviation: float, rows: int, columns: int, rank: int) -> float:
  """Bounds P(|s_BA - E[s_BA]| >= deviation), for B (rows, rank), A (rank, columns) (paper)."""
  exponent = -2.0 * deviation**2 * rows * columns / (rank * (rows + columns))
  return min(1.0, 2.0 * math.exp(exponent))


def update_density(tree: Tree) -> Float[Array, ""]:
  """Measures the share of non-zeros in the products BA of all layers of a tree together."""
  nonzero, size = jnp.zeros(()), 0
  for f in layers_of(tree).values():
    product = jnp.einsum("...ri,...ro->...io", f["a"], f["b"])
    nonzero, size = nonzero + jnp.count_nonzero(product), size + product.size
  return nonzero / size


# --- conflict mitigation ------------------------------------------------------------------------


def importance(kernel: Float[Array, "in out"], omega: float = 1.0) -> Float[Array, "in out"]:
  """Computes M = tanh(omega |1 / ln(|W| / ||W||_F + 1e-15)|) in (0, 1], large where |W| is (code).

  Args:
    kernel: of one layer, any layout.
    omega: sharpness.

  Returns:
    The shape of the kernel, in float32 or better; no gradient. Zeros of the kernel, and all of a
    kernel of zeros, have tanh(omega / 34.54).
  """
  shapes.check(kernel=(kernel, "in out"))
  size = jnp.abs(_wide(kernel))
  norm = jnp.linalg.norm(size)
  relative = size / jnp.where(norm > 0, norm, 1)
  return jax.lax.stop_gradient(jnp.tanh(omega * jnp.abs(1 / jnp.log(relative + _TINY))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def conflict(
  kernel: Float[Array, "*layers in out"],
  a: Float[Array, "*layers rank in"],
  b: Float[Array, "*layers rank out"],
  omega: float = 1.0,
) -> Float[Array, "*layers"]:
  """Computes ||M * (BA)||_F, the energy of the update where the pretrained weight is large (code).

  The norm is not squared and the scale of the update is left out. The gradient is the closed one:
  with D = BA and n the norm, dB = (M*M*D) A^T / n and dA = B^T (M*M*D) / n, both zero where n is. The
  backward pass keeps the arguments, no array of the size of the kernel, and one layer of a stack is
  worked off after the other.

  Args:
    kernel: (in, out) or (layers, in, out).
    a: (rank, in) or (layers, rank, in).
    b: (rank, out) or (layers, rank, out).
    omega: of `importance`.

  Returns:
    () or (layers,).

  Raises:
    ValueError: shapes that do not fit.
  """
  shapes.check(kernel=(kernel, "... in out"), a=(a, "... rank in"), b=(b, "... rank out"))

  def one(kernel, a, b):
    return jnp.linalg.norm(importance(kernel, omega) * (_wide(a).T @ _wide(b)))

  return _each_layer(one, kernel, a, b)


def _conflict_forward(kernel, a, b, omega):
  norm = conflict(kernel, a, b, omega)
  return norm, (kernel, a, b, norm)


def _conflict_backward(omega, kept, cotangent):
  def one(kernel, a, b, norm, cotangent):
    direction = importance(kernel, omega) ** 2 * (_wide(a).T @ _wide(b))  # (in, out)
    factor = jnp.where(norm > 0, cotangent / jnp.where(norm > 0, norm, 1), 0)
    gradient_a = factor * jnp.einsum("io,ro->ri", direction, _wide(b))
    gradient_b = factor * (_wide(a) @ direction)
    return gradient_a.astype(a.dtype), gradient_b.astype(b.dtype)

  gradient_a, gradient_b = _each_layer(one, *kept, cotangent)
  return None, gradient_a, gradient_b  # None: no gradient through M


conflict.defvjp(_conflict_forward, _conflict_backward)


def conflict_penalty(
  kernels: Mapping[str, Array], factors: Mapping[str, Factors], omega: float = 1.0
) -> Float[Array, ""]:
  """Computes L_CMR, the mean of `conflict` over layers (code: over the q, k and v projections).

  Args:
    kernels: frozen, by the path of the layer.
    factors: "a" and "b" of the layers that count, by the same paths.
    omega: of `importance`.

  Returns:
    Scalar, to be weighted by lambda (of the language model) or beta (of the connector).

  Raises:
    ValueError: no layer counts.
  """
  if not factors:
    raise ValueError("no layer is in the conflict penalty")
  norms = [conflict(kernels[path], f["a"], f["b"], omega) for path, f in factors.items()]
  return jnp.concatenate([jnp.ravel(norm) for norm in norms]).mean()


# --- a rival -------------------------------------------------------------------------------------


def leading_inputs(kernel: Float[Array, "in out"], rank: int) -> Float[Array, "rank in"]:
  """Computes A_ref, the top right singular vectors of W: the main inputs of pretraining (inferred)."""
  shapes.check(kernel=(kernel, "in out"))
  return jnp.linalg.svd(_wide(kernel), full_matrices=False)[0][:, :rank].T


def orthogonality_penalty(
  a: Float[Array, "*layers rank in"], reference: Float[Array, "*layers rank in"]
) -> Float[Array, ""]:
  """Computes ||A A_ref^T||_F^2 (O-LoRA-like, inferred)."""
  shapes.check(a=(a, "... rank in"), reference=(reference, "... rank in"))
  return jnp.sum(jnp.einsum("...ri,...si->...rs", a, reference) ** 2)


# --- as ways of tuning --------------------------------------------------------------------------


def tuner(
  rank: int = 32,
  alpha: float = 64.0,
  dropout: float = 0.05,
  *,
  keep_ratio: float = 0.1,
  prune_at: int = 100,
  weight: float = 1e-3,
  omega: float = 1.0,
  regularised: str = REGULARISED,
  connector: Connector = "full",
  connector_weight: float = 1e-3,
  official_final: bool = False,
  targets: str = tuners.LINEARS,
) -> Tuner:
  """Makes LoRASculpt; the masks are in `extra`.

  Args:
    rank: of the update.
    alpha: numerator of its scale.
    dropout: on its input, while training.
    keep_ratio: rho; 1 prunes nothing.
    prune_at: t_p, optimiser updates before the pruning.
    weight: lambda; 0 leaves the penalty out.
    omega: sharpness of `importance`.
    regularised: regular expression on the kernel paths in the penalty (code: q, k, v).
    connector: way of the projector: "full", trained itself (code); "lora_cmr", an update of equal rank
      with its own penalty and without pruning (paper; separate K and the rank are inferred); "frozen".
    connector_weight: beta (inferred).
    official_final: True leaves what the last optimiser step wrote into pruned entries (code).
    targets: regular expression on the kernel paths that get an update.

  Raises:
    InputError: an impossible `keep_ratio` or `prune_at`.
  """
  if not 0.0 < keep_ratio <= 1.0:
    raise InputError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
  if prune_at < 1:
    raise InputError(f"prune_at must be at least 1, got {prune_at}")
  adapter = low_rank.lora(rank, alpha, dropout)
  if connector == "lora_cmr":
    targets = rf"(?:{targets})|{tuners.PROJECTOR}.*kernel$"
  base = tuners.adapted(adapter, targets, tuners.PROJECTOR if connector == "full" else None)
  pruned = functools.partial(trees.split, shared=lambda path: not re.search(tuners.PROJECTOR, path))
  at = functools.partial(sculpt, prune_at=prune_at, keep_ratio=keep_ratio)

  def init(key, params, probe):
    state = base.init(key, params, probe)
    factors, _ = pruned(state.trainable["adapter"])
    jax.eval_shape(lambda tree: magnitude_masks(tree, keep_ratio), factors)  # is anything kept?
    return state._replace(extra={"masks": dense_masks(factors)})

  def prune(updates, trainable, extra):
    factors, rest = pruned(trainable["adapter"])
    factors, masks = at(updates, factors, extra["masks"])
    return trainable | {"adapter": trees.merge(factors, rest)}, {"masks": masks}

  # Masking after an update is masking before the next forward pass, and after the last one as well.
  def pre_step(step, trainable, frozen, extra):
    del frozen
    return prune(step, trainable, extra)

  def post_step(step, gradients, before, trainable, frozen, extra):
    del gradients, before, frozen
    return prune(step + 1, trainable, extra)

  def penalty(trainable, frozen, extra):
    del extra
    kernels, factors = _kernels(frozen["params"]), layers_of(trainable["adapter"])
    language, inside = _regularised(factors, regularised)
    total = weight * conflict_penalty(kernels, language, omega)
    if connector == "lora_cmr":
      total += connector_weight * conflict_penalty(kernels, inside, omega)
    return total

  hooks: dict[str, Any] = {"pre_step": pre_step} if official_final else {"post_step": post_step}
  if weight:
    hooks["penalty"] = penalty
  return base._replace(init=init, **hooks)


def _regularised(
  factors: Mapping[str, Factors], targets: str
) -> tuple[dict[str, Factors], dict[str, Factors]]:
  """Returns the factors in the penalties of the language model and of the projector."""
  projector = lambda path: bool(re.search(tuners.PROJECTOR, below(path, "kernel")))
  language = {
    path: f
    for path, f in factors.items()
    if re.search(targets, below(path, "kernel")) and not projector(path)
  }
  if not language:
    raise InputError(f"regularised {targets!r} matches no kernel that is updated")
  return language, {path: f for path, f in factors.items() if projector(path)}


def post_pruned(
  rank: int = 32,
  alpha: float = 64.0,
  dropout: float = 0.05,
  *,
  keep_ratio: float = 0.1,
  targets: str = tuners.LINEARS,
) -> Tuner:
  """Makes LoRA whose factors are pruned once, after training."""
  base = tuners.adapted(low_rank.lora(rank, alpha, dropout), targets)

  def finalize(trainable, frozen, extra):
    factors = trainable["adapter"]
    factors = masked(factors, magnitude_masks(factors, keep_ratio))
    assert base.finalize is not None
    return base.finalize(trainable | {"adapter": factors}, frozen, extra)

  return base._replace(finalize=finalize)


def orthogonal(
  rank: int = 32,
  alpha: float = 64.0,
  dropout: float = 0.05,
  *,
  weight: float = 1e-3,
  targets: str = tuners.LINEARS,
) -> Tuner:
  """Makes LoRA that keeps away from the leading inputs of pretrained weights (Orth-Reg, inferred)."""
  base = tuners.adapted(low_rank.lora(rank, alpha, dropout), targets)

  def init(key, params, probe):
    state = base.init(key, params, probe)
    kernels = _kernels(state.frozen["params"])
    reference = {
      path: _mapped(functools.partial(leading_inputs, rank=rank), f["a"].ndim - 2)(kernels[path])
      for path, f in layers_of(state.trainable["adapter"]).items()
    }
    return state._replace(extra={"reference": reference})

  def penalty(trainable, frozen, extra):
    del frozen
    factors = layers_of(trainable["adapter"])
    return weight * sum(
      (orthogonality_penalty(f["a"], extra["reference"][path]) for path, f in factors.items()),
      start=jnp.zeros(()),
    )

  return base._replace(init=init, penalty=penalty)


def _kernels(params: Params) -> dict[str, Array]:
  """Returns kernels by the path of their layer."""
  flat = flatten(params)
  return {owner(path): x for path, x in flat.items() if path.split("/")[-1] == "kernel"}


def _check_ratio(keep_ratio: float, size: int) -> None:
  if not 0.0 < keep_ratio <= 1.0:
    raise InputError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
  if math.floor(keep_ratio * size) == 0:
    raise InputError(f"keep_ratio {keep_ratio} keeps none of {size} entries")


def _mapped(function: Callable, axes: int) -> Callable:
  for _ in range(axes):
    function = jax.vmap(function)
  return function


def _each_layer(function: Callable, *arrays: Array) -> Any:
  """`function` of one layer, or of every layer of a stack, one after the other."""
  if arrays[0].ndim == 2:
    return function(*arrays)
  return jax.lax.map(lambda one: function(*one), arrays)


def _wide(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
