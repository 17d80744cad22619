"""ThanoRA-style: one low-rank update for several tasks, split into blocks by their heterogeneity.

Liang, Huang, Guo, Wan, Du, Ye, "ThanoRA: Task heterogeneity-aware multi-task low-rank adaptation", arXiv
2505.18640. A preview of each task gives, per layer, its rank and the start of its block; a cooperative
block is shared; a regulariser keeps the blocks of different tasks apart. All blocks are one LoRA: no
router, no task id, and it merges.

Source status: no code was published and the body could not be read. Components, the cooperative rank and
the names of the hyper-parameters are known from public reviews (reviews), the entropy from a figure
(figure), the covariance-oriented decomposition from CorDA's code (corda); everything else is (inferred)
and an option.

Layout as in `adapters.low_rank`: kernel = W^T (in, out), a = A (rank, in), b = B^T (rank, out). Blocks
are rows of one pair of factors; `owner` (rank,) says whose a row is: the index of a task, or
`COOPERATIVE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmethods.adapters import low_rank
from jaxmethods.adapters.adapter import Factors, key_of, layers_of
from jaxmethods.errors import InputError
from jaxmethods.models.init import torch_linear
from jaxmethods.trees import below, flatten, unflatten
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TunerState

COOPERATIVE = -1
Spectrum = Literal["sv", "sv2"]
OrthogonalOn = Literal["both", "A", "B"]


class Moment(NamedTuple):
  """Running second moment of the inputs of a layer.

  Attributes:
    total: sum of x x^T, (in, in), float32 or better.
    inputs: how many were seen, ().
  """

  total: Array
  inputs: Array


class Decomposition(NamedTuple):
  """W C = U S V^T, everything that starting and ranking a block needs.

  Attributes:
    left: U^T, (n, out) with n = min(in, out).
    values: S, descending, (n,).
    right: V^T C^{-1}, (n, in).
  """

  left: Array
  values: Array
  right: Array


class Layer(NamedTuple):
  """The start of one layer.

  Attributes:
    a, b: factors of all blocks, tasks in order, the cooperative one last.
    owner: (rank,) int32.
    kernel: what stays frozen: the residual, or the kernel itself.
  """

  a: Array
  b: Array
  owner: Array
  kernel: Array


# --- preview ------------------------------------------------------------------------------------


def no_inputs(width: int) -> Moment:
  """The moment before anything was seen."""
  return Moment(jnp.zeros((width, width)), jnp.zeros(()))


def add_inputs(moment: Moment, x: Array, mask: Array | None = None) -> Moment:
  """Adds the inputs of a batch; nothing of it is kept but the sum.

  Args:
    moment: so far.
    x: (..., in).
    mask: (...) bool, what counts (no padding); default all.
  """
  x = x.astype(moment.total.dtype)
  mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
  x = jnp.where(mask[..., None], x, 0).reshape(-1, x.shape[-1])
  return Moment(moment.total + x.T @ x, moment.inputs + mask.sum())


def second_moment(moment: Moment) -> Array:
  """C = X X^T / M, (in, in); zeros if nothing was seen."""
  return moment.total / jnp.maximum(moment.inputs, 1)


def damped(moment: Array, share: float = 0.01, tolerance: float = 0.05) -> Array:
  """C + share * mean(diag C) * I, the share doubled until ||C C^-1 - I||_F < tolerance (corda).

  A moment of zeros becomes a multiple of the identity.
  """
  identity = jnp.eye(len(moment), dtype=moment.dtype)
  level = jnp.trace(moment) / len(moment)
  level = jnp.where(level > 0, level, 1)
  at = lambda share: moment + share * level * identity

  def singular(share):
    # ~(<) and not (>=): an inverse that is not even finite needs more damping too.
    error = jnp.linalg.norm(at(share) @ jnp.linalg.inv(at(share)) - identity)
    return ~(error < tolerance) & (share < 1)

  first = jnp.asarray(share, moment.dtype)
  return at(jax.lax.while_loop(singular, lambda share: 2 * share, first))


def decompose(kernel: Array, moment: Array) -> Decomposition:
  """The singular value decomposition of W C (corda; in float32 or better).

  Args:
    kernel: W^T, (in, out).
    moment: C, damped, (in, in).
  """
  wide = jnp.promote_types(jnp.result_type(kernel, moment), jnp.float32)
  kernel, moment = kernel.astype(wide), moment.astype(wide)
  # C is symmetric: C W^T = V S U^T.
  v, values, ut = jnp.linalg.svd(moment @ kernel, full_matrices=False)
  return Decomposition(ut, values, jnp.linalg.solve(moment, v).T)


def spectral_entropy(values: Array, spectrum: Spectrum = "sv") -> Array:
  """H = - sum p ln p / ln n of normalised singular values, in [0, 1] (figure).

  Args:
    values: all n singular values.
    spectrum: p from the values or from their squares.

  Returns:
    Scalar; 0 for a matrix of zeros, and for n = 1.
  """
  values = values**2 if spectrum == "sv2" else values
  total = values.sum()
  share = values / jnp.where(total > 0, total, 1)
  terms = jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0)
  return -terms.sum() / (np.log(len(values)) if len(values) > 1 else 1.0)


# --- ranks --------------------------------------------------------------------------------------


def task_weights(entropies: Sequence[float], temperature: float) -> np.ndarray:
  """Softmax of H / tau over tasks (reviews name a softmax and a temperature, the form is inferred)."""
  scaled = np.asarray(entropies, np.float64) / temperature
  weights = np.exp(scaled - scaled.max())
  return weights / weights.sum()


def allocate(
  entropies: Sequence[float], rank: int, temperature: float = 0.1, *, cooperative: bool = True
) -> tuple[np.ndarray, int]:
  """Ranks of one layer: floor(rank / (T + 1)) for the cooperative block (reviews), the rest by weight.

  What rounding down leaves goes to the largest fractions, ties to the earlier task; then tasks without
  any take one each from the largest (inferred).

  Args:
    entropies: H of every task.
    rank: r_total.
    temperature: tau; large: uniform ranks.
    cooperative: False leaves that block out, an ablation.

  Returns:
    (rank of every task (T,), rank of the cooperative block); together `rank`.

  Raises:
    ValueError: `rank` is too small for T blocks and the cooperative one, or tau is not positive.
  """
  tasks = len(entropies)
  if rank < tasks + 1:
    raise ValueError(f"rank {rank} is too small for {tasks} tasks and a cooperative block")
  if not temperature > 0:
    raise ValueError(f"temperature must be positive, got {temperature}")
  shared = rank // (tasks + 1) if cooperative else 0
  quota = task_weights(entropies, temperature) * (rank - shared)
  ranks = np.floor(quota).astype(int)
  left = rank - shared - ranks.sum()
  ranks[np.argsort(ranks - quota, kind="stable")[:left]] += 1
  while ranks.min() < 1:
    ranks[ranks.argmax()] -= 1
    ranks[ranks.argmin()] += 1
  return ranks, shared


def owners(ranks: Sequence[int] | np.ndarray, shared: int) -> np.ndarray:
  """Whose each row of the factors is, (rank,)."""
  tasks = np.repeat(np.arange(len(ranks)), ranks)
  return np.concatenate([tasks, np.full(shared, COOPERATIVE)]).astype(np.int32)


# --- blocks -------------------------------------------------------------------------------------


def oriented_block(
  parts: Decomposition, rank: int, gain: float = 1.0, which: Literal["first", "last"] = "first"
) -> tuple[Array, Array]:
  """B = U sqrt(gain S), A = sqrt(gain S) V^T C^-1, truncated (corda; where gamma stands is inferred).

  Args:
    parts: of the layer.
    rank: components that are taken.
    gain: gamma; at full rank B A = gain W.
    which: "first" the largest (CorDA: adapt to the data of C), "last" the smallest (keep them).

  Returns:
    a (rank, in), b (rank, out).

  Raises:
    ValueError: there are fewer components than `rank`.
  """
  if rank > len(parts.values):
    raise ValueError(f"a block of rank {rank} of a matrix with {len(parts.values)} components")
  part = slice(None, rank) if which == "first" else slice(len(parts.values) - rank, None)
  root = jnp.sqrt(gain * parts.values[part])[:, None]
  return root * parts.right[part], root * parts.left[part]


def start_layer(
  key: Array,
  kernel: Array,
  parts: Sequence[Decomposition],
  ranks: Sequence[int] | np.ndarray,
  shared: int,
  *,
  scale: float,
  gain: float,
  compensate: bool = True,
) -> Layer:
  """All blocks of one layer (HASI), and what stays frozen.

  Args:
    key: of the cooperative block.
    kernel: W^T (in, out).
    parts: decomposition of every task.
    ranks: of every task.
    shared: rank of the cooperative block, which starts random with B_c = 0 (reviews).
    scale: s = alpha / r_total.
    gain: gamma.
    compensate: True: the frozen weight is W - s sum_t B_t A_t, so that nothing changes at step 0
      (corda). False: W stays, and the B_t start at zero.

  Returns:
    The layer, factors and residual in float32 or better.
  """
  blocks = [oriented_block(p, int(rank), gain) for p, rank in zip(parts, ranks, strict=True)]
  a, b = (jnp.concatenate(part) for part in zip(*blocks, strict=True))
  residual = kernel.astype(a.dtype)
  if compensate:
    residual = residual - scale * a.T @ b
  else:
    b = jnp.zeros_like(b)
  inputs, outputs = kernel.shape
  common = torch_linear(inputs)["kernel_init"](key, (shared, inputs), a.dtype)
  return Layer(
    jnp.concatenate([a, common]),
    jnp.concatenate([b, jnp.zeros((shared, outputs), b.dtype)]),
    jnp.asarray(owners(ranks, shared)),
    residual,
  )


# --- subspace-preserving regularisation ---------------------------------------------------------


def cross_talk(a: Array, b: Array, owner: Array, on: OrthogonalOn = "both") -> Array:
  """sum_{i<j} ||A_i A_j^T||_F^2 + ||B_i^T B_j||_F^2 over the blocks of tasks (reviews: both vanish).

  As one Gram matrix of each factor: half of what stands between rows of different tasks.

  Args:
    a: factors (..., rank, in).
    b: factors (..., rank, out).
    owner: (..., rank).
    on: which of the two terms (inferred: both, squared).

  Returns:
    (...): one number for each layer.
  """
  task = owner != COOPERATIVE
  apart = (owner[..., :, None] != owner[..., None, :]) & task[..., :, None] & task[..., None, :]

  def between(rows):
    gram = jnp.einsum("...ri,...si->...rs", rows, rows)
    return 0.5 * jnp.sum(jnp.where(apart, gram**2, 0), axis=(-2, -1))

  return sum(
    (between(x) for x, name in ((a, "A"), (b, "B")) if on in ("both", name)),
    start=jnp.zeros(owner.shape[:-1], a.dtype),
  )


def subspace_penalty(
  factors: Mapping[str, Factors], owner: Mapping[str, Array], on: OrthogonalOn = "both"
) -> Array:
  """L_SPR: the mean of `cross_talk` over layers (that it is the mean is inferred).

  Args:
    factors: "a" and "b" by the path of the layer; stacks count as their layers.
    owner: of the rows, by the same paths.
    on: of `cross_talk`.

  Returns:
    Scalar, to be weighted by lambda.
  """
  each = [jnp.ravel(cross_talk(f["a"], f["b"], owner[path], on)) for path, f in factors.items()]
  return jnp.concatenate(each).mean()


# --- as ways of tuning --------------------------------------------------------------------------


def tuner(
  rank: int = 32,
  alpha: float = 64.0,
  dropout: float = 0.05,
  *,
  tasks: int,
  temperature: float = 0.1,
  gain: float | None = None,
  weight: float = 1e-3,
  spectrum: Spectrum = "sv",
  orth_on: OrthogonalOn = "both",
  damping: float = 0.01,
  start: Literal["preview", "random"] = "preview",
  compensate: bool = True,
  cooperative: bool = True,
  targets: str = tuners.LINEARS,
  also: str | None = tuners.PROJECTOR,
) -> Tuner:
  """ThanoRA-style tuning on a mixture of tasks: a LoRA of rank `rank` beside residual weights.

  `init` must not be under jit, since ranks are chosen by what the preview shows. Its probe is the
  preview: {path of a layer: second moments of its inputs, (tasks, in, in)}. `extra` holds "owner", of
  the rows of every layer (layers, rank), and "entropy" (layers, tasks).

  Args:
    rank: of the update.
    alpha: numerator of its scale.
    dropout: on its input, while training.
    tasks: T.
    temperature: tau; infinite: uniform ranks.
    gain: gamma; default 1 / T (inferred: all task blocks approximate the same W).
    weight: lambda; 0 leaves the regulariser out.
    spectrum: of the entropy.
    orth_on: of the regulariser.
    damping: of the moments.
    start: "random": blocks start as LoRA does, without a preview.
    compensate: of `start_layer`.
    cooperative: whether there is a cooperative block.
    targets: regular expression on the kernel paths that get an update.
    also: what is trained itself.
  """
  base = tuners.adapted(low_rank.lora(rank, alpha, dropout), targets, also)
  gain = 1 / tasks if gain is None else gain

  def init(key, params, probe) -> TunerState:
    state = base.init(key, params, {})
    flat, layers = flatten(params), layers_of(state.trainable["adapter"])
    factors: dict[str, Array] = {}
    owner, entropy = [], []
    for path, f in layers.items():
      kernel = flat[below(path, "kernel")]
      if kernel.ndim != 2:
        raise InputError(f"{path}: ThanoRA needs layers that are not scanned")
      parts = []
      if start == "preview":
        if path not in probe:
          raise InputError(f"{path}: the preview does not have this layer")
        parts = [decompose(kernel, damped(moment, damping)) for moment in probe[path]]
      heights = [float(spectral_entropy(p.values, spectrum)) for p in parts] or [0.0] * tasks
      ranks, shared = allocate(heights, rank, temperature, cooperative=cooperative)
      if parts:
        a, b, _, flat[below(path, "kernel")] = start_layer(
          key_of(key, path), kernel, parts, ranks, shared, scale=alpha / rank, gain=gain,
          compensate=compensate,
        )  # fmt: skip
        f = {"a": a, "b": b}
      factors |= {below(path, name): x for name, x in f.items()}
      owner.append(owners(ranks, shared))
      entropy.append(heights)
    trainable = state.trainable | {"adapter": unflatten(factors)}
    fixed = {path: flat[path] for path in flatten(state.frozen["params"])}
    extra = {"owner": jnp.asarray(np.stack(owner)), "entropy": jnp.asarray(entropy)}
    return TunerState(trainable, state.frozen | {"params": unflatten(fixed)}, extra)

  def penalty(trainable, frozen, extra):
    del frozen
    factors = layers_of(trainable["adapter"])
    owner = dict(zip(factors, extra["owner"], strict=True))
    return weight * subspace_penalty(factors, owner, orth_on)

  hooks: dict[str, Any] = {"penalty": penalty} if weight and tasks > 1 else {}
  return base._replace(init=init, **hooks)


def corda(rank: int = 32, alpha: float = 64.0, dropout: float = 0.05, **options: Any) -> Tuner:
  """CorDA, knowledge-adaptive: one block from one covariance of all the data (arXiv 2406.05223).

  The gain is 1 / s, so that the scaled product is the truncated decomposition itself.

  Args:
    rank: of the update.
    alpha: numerator of its scale.
    dropout: on its input, while training.
    **options: targets, also, damping of `tuner`.
  """
  return tuner(
    rank, alpha, dropout, tasks=1, gain=rank / alpha, weight=0.0, cooperative=False, **options
  )
