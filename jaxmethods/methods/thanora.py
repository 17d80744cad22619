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
`COOPERATIVE`, or `NOBODY` where a task has more rows than the matrix has components (inferred).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.adapters import low_rank
from jaxmethods.adapters.adapter import Factors, key_of, layers_of
from jaxmethods.errors import InputError
from jaxmethods.models.init import torch_linear
from jaxmethods.stats import shapes
from jaxmethods.trees import Key, Params, below, flatten, unflatten
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TunerState

COOPERATIVE = -1
NOBODY = -2  # rows of zeros, which get no gradient
Spectrum = Literal["sv", "sv2"]
OrthogonalOn = Literal["both", "A", "B"]
Weights = Literal["softmax", "share"]


class Moment(NamedTuple):
  """Running second moment of the inputs of a layer.

  Attributes:
    total: sum of x x^T, (in, in), float32 or better.
    inputs: how many were seen, ().
    sums: sum of x, (in,), where the moment is to be centred; else None.
  """

  total: Float[Array, "in in"]
  inputs: Float[Array, ""]
  sums: Float[Array, " in"] | None = None


class Decomposition(NamedTuple):
  """W C = U S V^T: the parts that ranks and starts are made of.

  Attributes:
    left: U^T, (n, out) with n = min(in, out).
    values: S, descending, (n,).
    right: V^T C^{-1}, (n, in).
  """

  left: Float[Array, "n out"]
  values: Float[Array, " n"]
  right: Float[Array, "n in"]


class Blocks(NamedTuple):
  """Task blocks of one layer at their start, tasks in order.

  Attributes:
    a: factors (rows, in).
    b: factors (rows, out).
    owner: task of every row, (rows,) int32.
    entropy: H of every task, (T,) float32.
  """

  a: Float[Array, "rows in"]
  b: Float[Array, "rows out"]
  owner: Int[Array, " rows"]
  entropy: Float[Array, " tasks"]


class Layer(NamedTuple):
  """The start of one layer.

  Attributes:
    a, b: factors of all blocks, tasks in order, the cooperative one last.
    owner: (rank,) int32.
    kernel: frozen part: the residual, or the kernel itself.
  """

  a: Float[Array, "rank in"]
  b: Float[Array, "rank out"]
  owner: Int[Array, " rank"]
  kernel: Float[Array, "in out"]


# --- preview ------------------------------------------------------------------------------------


def no_inputs(width: int, *, centred: bool = False) -> Moment:
  """Makes the moment before any input.

  Args:
    width: of the inputs.
    centred: whether the mean is taken out, which tasks share as a leading direction (ours);
      False: the plain second moment (corda).
  """
  zeros = jnp.zeros((width, width))
  return Moment(zeros, jnp.zeros(()), zeros[0] if centred else None)


def add_inputs(
  moment: Moment, x: Float[Array, "*batch in"], mask: Bool[Array, "*batch"] | None = None
) -> Moment:
  """Adds the inputs of a batch; nothing of it is kept but the sum.

  Args:
    moment: moment so far.
    x: (..., in).
    mask: (...) bool, inputs that count (no padding); default all.
  """
  shapes.check(total=(moment.total, "in in"), x=(x, "... in"))
  x = x.astype(moment.total.dtype)
  mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
  shapes.same(tokens=x[..., 0], mask=mask)
  x = jnp.where(mask[..., None], x, 0).reshape(-1, x.shape[-1])
  sums = None if moment.sums is None else moment.sums + x.sum(0)
  return Moment(moment.total + x.T @ x, moment.inputs + mask.sum(), sums)


def second_moment(moment: Moment) -> Float[Array, "in in"]:
  """Computes C = X X^T / M, less the mean's share where it is centred; zeros without any input."""
  shapes.check(total=(moment.total, "in in"), inputs=(moment.inputs, ""))
  count = jnp.maximum(moment.inputs, 1)
  whole = moment.total / count
  if moment.sums is None:
    return whole
  mean = moment.sums / count
  return whole - jnp.outer(mean, mean)


def damped(
  moment: Float[Array, "in in"], share: float = 0.01, tolerance: float = 0.05
) -> Float[Array, "in in"]:
  """Computes C + share mean(diag C) I, the share doubled until ||C C^-1 - I||_F < tolerance (corda).

  A moment of zeros becomes a multiple of the identity.
  """
  shapes.check(moment=(moment, "in in"))
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


def decompose(kernel: Float[Array, "in out"], moment: Float[Array, "in in"]) -> Decomposition:
  """Computes the singular value decomposition of W C (corda; in float32 or better).

  Args:
    kernel: W^T, (in, out).
    moment: C, damped, (in, in).
  """
  shapes.check(kernel=(kernel, "in out"), moment=(moment, "in in"))
  wide = jnp.promote_types(jnp.result_type(kernel, moment), jnp.float32)
  kernel, moment = kernel.astype(wide), moment.astype(wide)
  # C is symmetric: C W^T = V S U^T.
  v, values, ut = jnp.linalg.svd(moment @ kernel, full_matrices=False)
  return Decomposition(ut, values, jnp.linalg.solve(moment, v).T)


def spectral_entropy(values: Float[Array, " n"], spectrum: Spectrum = "sv") -> Float[Array, ""]:
  """Computes H = - sum p ln p / ln n of normalised singular values, in [0, 1] (figure).

  Args:
    values: all n singular values.
    spectrum: p from the values or from their squares.

  Returns:
    Scalar; 0 for a matrix of zeros, and for n = 1.
  """
  shapes.check(values=(values, "n"))
  values = values**2 if spectrum == "sv2" else values
  total = values.sum()
  share = values / jnp.where(total > 0, total, 1)
  terms = jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0)
  return -terms.sum() / (np.log(len(values)) if len(values) > 1 else 1.0)


# --- ranks --------------------------------------------------------------------------------------


def task_weights(
  entropies: Sequence[float], temperature: float, form: Weights = "softmax"
) -> np.ndarray:
  """Computes the softmax of H / tau over tasks (reviews name both, the form is inferred).

  Args:
    entropies: H of every task.
    temperature: tau.
    form: "share": H / sum H, without tau; the published figure fits both. Equal where all H are 0.

  Returns:
    (T,), sum 1.
  """
  if form == "share":
    total = float(np.sum(entropies))
    equal = np.full(len(entropies), 1 / len(entropies))
    return np.asarray(entropies, np.float64) / total if total > 0 else equal
  scaled = np.asarray(entropies, np.float64) / temperature
  weights = np.exp(scaled - scaled.max())
  return weights / weights.sum()


def allocate(
  entropies: Sequence[float],
  rank: int,
  temperature: float = 0.1,
  *,
  cooperative: bool = True,
  weights: Weights = "softmax",
) -> tuple[np.ndarray, int]:
  """Divides the rank: floor(rank / (T + 1)) for the cooperative block (reviews), the rest by weight.

  The rest of rounding down goes to the largest fractions, ties to the earlier task; then tasks without
  any take one each from the largest (inferred).

  Args:
    entropies: H of every task.
    rank: r_total.
    temperature: tau; large: uniform ranks.
    cooperative: False leaves that block out, an ablation.
    weights: see `task_weights`.

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
  quota = task_weights(entropies, temperature, weights) * (rank - shared)
  ranks = np.floor(quota).astype(int)
  left = rank - shared - ranks.sum()
  ranks[np.argsort(ranks - quota, kind="stable")[:left]] += 1
  while ranks.min() < 1:
    ranks[ranks.argmax()] -= 1
    ranks[ranks.argmin()] += 1
  return ranks, shared


def owners(
  ranks: Sequence[int] | np.ndarray, shared: int, components: int | None = None
) -> np.ndarray:
  """Names the owner of every row of the factors, (rank,).

  Args:
    ranks: rank of every task, (T,).
    shared: rank of the cooperative block.
    components: min(in, out): rows of a task beyond them are nobody's. None: no limit.
  """
  tasks = np.repeat(np.arange(len(ranks)), ranks)
  if components is not None:
    place = np.concatenate([np.arange(rank) for rank in ranks])
    tasks = np.where(place < components, tasks, NOBODY)
  return np.concatenate([tasks, np.full(shared, COOPERATIVE)]).astype(np.int32)


# --- blocks -------------------------------------------------------------------------------------


def oriented_block(
  parts: Decomposition, rank: int, gain: float = 1.0, which: Literal["first", "last"] = "first"
) -> tuple[Float[Array, "rank in"], Float[Array, "rank out"]]:
  """Computes B = U sqrt(gain S), A = sqrt(gain S) V^T C^-1, truncated (corda; place of gamma inferred).

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
  shapes.check(left=(parts.left, "n out"), values=(parts.values, "n"), right=(parts.right, "n in"))
  if rank > len(parts.values):
    raise ValueError(f"a block of rank {rank} of a matrix with {len(parts.values)} components")
  part = slice(None, rank) if which == "first" else slice(len(parts.values) - rank, None)
  root = jnp.sqrt(gain * parts.values[part])[:, None]
  return root * parts.right[part], root * parts.left[part]


def task_blocks(
  parts: Sequence[Decomposition],
  ranks: Sequence[int] | np.ndarray,
  gain: float,
  spectrum: Spectrum = "sv",
) -> Blocks:
  """Starts the blocks of all tasks in one layer (HASI).

  Args:
    parts: decomposition of every task.
    ranks: rank of every task, (T,); rows beyond the components of W are zeros and nobody's.
    gain: gamma.
    spectrum: spectrum of the entropy, kept for reports.

  Returns:
    The blocks, in float32 or better.
  """
  blocks = [_padded_block(p, int(rank), gain) for p, rank in zip(parts, ranks, strict=True)]
  a, b = (jnp.concatenate(part) for part in zip(*blocks, strict=True))
  entropy = jnp.stack([spectral_entropy(p.values, spectrum) for p in parts])
  owner = jnp.asarray(owners(ranks, 0, len(parts[0].values)))
  return Blocks(a, b, owner, entropy.astype(jnp.float32))


def _padded_block(
  parts: Decomposition, rank: int, gain: float
) -> tuple[Float[Array, "rank in"], Float[Array, "rank out"]]:
  """Takes the components there are (`oriented_block`), and zeros for the rest of the rank."""
  there = min(rank, len(parts.values))
  a, b = oriented_block(parts, there, gain)
  rest = ((0, rank - there), (0, 0))
  return jnp.pad(a, rest), jnp.pad(b, rest)


def start_layer(
  key: Key,
  kernel: Float[Array, "in out"],
  blocks: Blocks,
  rank: int,
  *,
  scale: float,
  compensate: bool = True,
) -> Layer:
  """Adds the cooperative block to the task blocks of a layer, and takes them out of its kernel.

  Args:
    key: random key of the cooperative block, which starts with B_c = 0 (reviews).
    kernel: W^T (in, out).
    blocks: start of the task blocks.
    rank: r_total; the cooperative block has the rows that the tasks leave.
    scale: s = alpha / r_total.
    compensate: True: the frozen weight is W - s sum_t B_t A_t, so that nothing changes at step 0
      (corda). False: W stays, and the B_t start at zero.

  Returns:
    The layer, factors and residual in float32 or better.
  """
  a, b = blocks.a, blocks.b
  shapes.check(
    kernel=(kernel, "in out"), a=(a, "rows in"), b=(b, "rows out"), owner=(blocks.owner, "rows")
  )
  residual = kernel.astype(a.dtype)
  if compensate:
    residual = residual - scale * a.T @ b
  else:
    b = jnp.zeros_like(b)
  (inputs, outputs), shared = kernel.shape, rank - len(blocks.owner)
  common = torch_linear(inputs)["kernel_init"](key, (shared, inputs), a.dtype)
  return Layer(
    jnp.concatenate([a, common]),
    jnp.concatenate([b, jnp.zeros((shared, outputs), b.dtype)]),
    jnp.concatenate([blocks.owner, jnp.full(shared, COOPERATIVE, jnp.int32)]),
    residual,
  )


def plan(
  params: Params,
  moments: Mapping[str, Array | np.ndarray],
  rank: int,
  *,
  gain: float | None = None,
  temperature: float = 0.1,
  spectrum: Spectrum = "sv",
  damping: float = 0.01,
  cooperative: bool = True,
  weights: Weights = "softmax",
) -> dict[str, Blocks]:
  """Chooses the ranks of all layers and starts their task blocks, by the preview.

  Not to be jitted: the ranks are shapes.

  Args:
    params: pretrained model.
    moments: second moments of the inputs, (T, in, in), by the path of the layer.
    rank: r_total.
    gain: gamma; default 1 / T (inferred: all task blocks approximate the same W). The scale s multiplies
      it: together the blocks take s W out of W; 1 / (T s) takes W out once, as CorDA does.
    temperature: tau; infinite: uniform ranks.
    spectrum: spectrum of the entropy.
    damping: share of the mean variance that is added to the moments, see `damped`.
    cooperative: whether rows are left for a cooperative block.
    weights: see `task_weights`.

  Raises:
    InputError: a layer is scanned.
  """
  flat, result = flatten(params), {}
  for path, of_tasks in moments.items():
    kernel = _kernel(flat, path)
    parts = [decompose(kernel, damped(moment, damping)) for moment in of_tasks]
    heights = [float(spectral_entropy(p.values, spectrum)) for p in parts]
    ranks, _ = allocate(heights, rank, temperature, cooperative=cooperative, weights=weights)
    result[path] = task_blocks(parts, ranks, 1 / len(parts) if gain is None else gain, spectrum)
  return result


def corda_plan(
  params: Params,
  moments: Mapping[str, Array | np.ndarray],
  rank: int,
  alpha: float,
  damping: float = 0.01,
) -> dict[str, Blocks]:
  """Starts one block a layer from one moment of all the data (CorDA).

  The gain is 1 / s, so that the scaled product is the truncated decomposition itself.

  Args:
    params: pretrained model.
    moments: second moments of the inputs, (1, in, in), by the path of the layer.
    rank: rank of the update.
    alpha: numerator of its scale.
    damping: see `plan`.
  """
  return plan(params, moments, rank, gain=rank / alpha, damping=damping, cooperative=False)


def _kernel(flat: Mapping[str, Array], path: str) -> Array:
  """Returns the kernel of a layer that is not scanned."""
  kernel = flat[below(path, "kernel")]
  if kernel.ndim != 2:
    raise InputError(f"{path}: ThanoRA needs layers that are not scanned")
  return kernel


# --- subspace-preserving regularisation ---------------------------------------------------------


def cross_talk(
  a: Float[Array, "*layers rank in"],
  b: Float[Array, "*layers rank out"],
  owner: Int[Array, "*layers rank"],
  on: OrthogonalOn = "both",
) -> Float[Array, "*layers"]:
  """Computes sum_{i<j} ||A_i A_j^T||_F^2 + ||B_i^T B_j||_F^2 over task blocks (reviews: both vanish).

  From one Gram matrix of each factor: half of its squares between rows of different tasks.

  Args:
    a: factors (..., rank, in).
    b: factors (..., rank, out).
    owner: (..., rank).
    on: which of the two terms (inferred: both, squared).

  Returns:
    (...): one number for each layer.
  """
  shapes.check(a=(a, "... rank in"), b=(b, "... rank out"), owner=(owner, "... rank"))
  task = owner >= 0
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
) -> Float[Array, ""]:
  """Computes L_SPR, the mean of `cross_talk` over layers (that it is the mean is inferred).

  Args:
    factors: "a" and "b" by the path of the layer; stacks count as their layers.
    owner: owners of the rows, by the same paths.
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
  weight: float = 1e-3,
  orth_on: OrthogonalOn = "both",
  start: Literal["preview", "random"] = "preview",
  compensate: bool = True,
  cooperative: bool = True,
  targets: str = tuners.LINEARS,
  also: str | None = tuners.PROJECTOR,
) -> Tuner:
  """Makes ThanoRA-style tuning on a mixture of tasks: a LoRA of rank `rank` beside residual weights.

  The probe of `init` is the result of `plan`. `extra` holds "owner", of the rows of every layer (layers,
  rank), and "entropy" (layers, tasks).

  Args:
    rank: rank of the update.
    alpha: numerator of its scale.
    dropout: rate on its input, while training.
    tasks: T.
    weight: lambda; 0 leaves the regulariser out.
    orth_on: factors in the regulariser.
    start: "random": blocks of equal rank start as LoRA does, without a plan.
    compensate: see `start_layer`.
    cooperative: whether there is a cooperative block, where the start is random.
    targets: regular expression on the kernel paths that get an update.
    also: regular expression on the parameters that are trained themselves.
  """
  base = tuners.adapted(low_rank.lora(rank, alpha, dropout), targets, also)

  def init(key, params, probe) -> TunerState:
    state = base.init(key, params, {})
    if start == "random":
      return _random_start(state, rank, tasks, cooperative)
    return _planned_start(
      key, params, state, probe, rank, scale=alpha / rank, compensate=compensate
    )

  def penalty(trainable, frozen, extra):
    del frozen
    factors = layers_of(trainable["adapter"])
    owner = dict(zip(factors, extra["owner"], strict=True))
    return weight * subspace_penalty(factors, owner, orth_on)

  hooks: dict[str, Any] = {"penalty": penalty} if weight and tasks > 1 else {}
  return base._replace(init=init, **hooks)


def corda(
  rank: int = 32,
  alpha: float = 64.0,
  dropout: float = 0.05,
  *,
  targets: str = tuners.LINEARS,
  also: str | None = tuners.PROJECTOR,
) -> Tuner:
  """Makes CorDA, knowledge-adaptive: one block from one covariance of all the data (arXiv 2406.05223).

  The probe of `init` is the result of `corda_plan`.

  Args:
    rank: rank of the update.
    alpha: numerator of its scale.
    dropout: rate on its input, while training.
    targets: regular expression on the kernel paths that get an update.
    also: regular expression on the parameters that are trained themselves.
  """
  return tuner(rank, alpha, dropout, tasks=1, weight=0.0, targets=targets, also=also)


def _random_start(state: TunerState, rank: int, tasks: int, cooperative: bool) -> TunerState:
  """Divides the rows of a LoRA equally among tasks and the cooperative block."""
  ranks, shared = allocate([0.0] * tasks, rank, cooperative=cooperative)
  layers = layers_of(state.trainable["adapter"])
  for path, f in layers.items():
    if f["a"].ndim != 2:
      raise InputError(f"{path}: ThanoRA needs layers that are not scanned")
  owner = jnp.asarray(np.tile(owners(ranks, shared), (len(layers), 1)))
  return state._replace(extra={"owner": owner, "entropy": jnp.zeros((len(layers), tasks))})


def _planned_start(
  key: Array,
  params: Params,
  state: TunerState,
  planned: Mapping[str, Blocks],
  rank: int,
  *,
  scale: float,
  compensate: bool,
) -> TunerState:
  """Puts the planned blocks in place of the factors, and the residuals in place of the kernels."""
  flat, layers = flatten(params), layers_of(state.trainable["adapter"])
  factors: dict[str, Array] = {}
  owner, entropy = [], []
  for path in layers:
    kernel = _kernel(flat, path)
    if path not in planned:
      raise InputError(f"{path}: the preview does not have this layer")
    layer = start_layer(
      key_of(key, path), kernel, planned[path], rank, scale=scale, compensate=compensate
    )
    factors |= {below(path, "a"): layer.a, below(path, "b"): layer.b}
    flat[below(path, "kernel")] = layer.kernel
    owner.append(layer.owner)
    entropy.append(planned[path].entropy)
  fixed = {path: flat[path] for path in flatten(state.frozen["params"])}
  return TunerState(
    state.trainable | {"adapter": unflatten(factors)},
    state.frozen | {"params": unflatten(fixed)},
    {"owner": jnp.stack(owner), "entropy": jnp.stack(entropy)},
  )
