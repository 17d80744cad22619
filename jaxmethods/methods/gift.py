"""GIFT: continual learning of a vision-language model with synthetic pairs as surrogate data.

Wu, Shi, Wang, Ye, "Synthetic data is an elegant GIFT for continual vision-language models", CVPR 2025,
arXiv 2503.04229. While a new task is learnt, the model before it is distilled on images that a
text-to-image model makes of class names: the matrix of similarities of a batch of pairs (contrastive
distillation), the pairing itself (image-text alignment), and a pull to the previous weights that
follows the Fisher information of these two losses at every step (adaptive weight consolidation).

Source status: the published code was read and run, of the paper only the abstract; equations are (code)
unless marked.

S = tau f(X) g(S)^T are logits of a batch, rows are images, columns texts; R are the teacher's, with the
same tau, which is frozen. A batch may be ragged: `real` (B,) marks its pairs, the others count nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmethods.errors import InputError
from jaxmethods.trees import Params, Tree, flatten, is_stacked, unflatten

Divergence = Literal["cross_entropy", "kl", "reverse_kl"]

# Of parameters without a gradient (logit_scale), as in the code.
_FISHER_FLOOR = 1e-6
# A mean square below it is rounding noise (student = teacher): the code divides 0 by 0 there.
_NOTHING = 1e-30
_HIDDEN = -1e30  # logit of what does not count

FROZEN = ("logit_scale",)


# --- losses on logits ---------------------------------------------------------------------------


def cross_entropy(
  logits: Float[Array, "B K"], target: Float[Array, "B K"], real: Bool[Array, " B"] | None = None
) -> Float[Array, ""]:
  """Mean over the real rows of -sum(target log softmax(logits)).

  Args:
    logits: (B, K).
    target: probabilities, (B, K).
    real: (B,) rows that count; None: all.
  """
  chex.assert_equal_shape([logits, target])
  rows = -(target * jax.nn.log_softmax(logits, axis=-1)).sum(-1)
  if real is None:
    return rows.mean()
  return jnp.where(real, rows, 0).sum() / jnp.maximum(real.sum(), 1)


def smoothed(target: Float[Array, "B K"], smoothing: float, size: Array | int) -> Array:
  """(1 - eps) target + eps / size: probabilities with a share eps spread over all."""
  return (1 - smoothing) * target + smoothing / size


def task_loss(
  logits: Float[Array, "B K"],
  labels: Int[Array, " B"],
  smoothing: float = 0.2,
  classes: Bool[Array, " K"] | None = None,
) -> Float[Array, ""]:
  """L_CE, cross-entropy with label smoothing over the classes of the task.

  Args:
    logits: tau f(x) g(class texts)^T, (B, K).
    labels: (B,) in 0..K-1.
    smoothing: eps.
    classes: (K,) true where there is a class; None: everywhere.
  """
  chex.assert_rank([logits, labels], [2, 1])
  classes = jnp.ones(logits.shape[-1], bool) if classes is None else classes
  hard = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  target = jnp.where(classes, smoothed(hard, smoothing, classes.sum()), 0)
  return cross_entropy(jnp.where(classes, logits, _HIDDEN), target)


def distillation(
  student: Float[Array, "B K"],
  teacher: Float[Array, "B K"],
  temperature: float = 2.0,
  rows: Bool[Array, " B"] | None = None,
  columns: Bool[Array, " K"] | None = None,
  divergence: Divergence = "cross_entropy",
) -> Float[Array, ""]:
  """One direction of L_CD: T^2 CE(S / T, softmax(R / T)).

  Args:
    student: S, (B, K).
    teacher: R, the same shape; gets no gradient.
    temperature: T.
    rows: (B,) those that count; None: all.
    columns: (K,) those that count; None: all.
    divergence: `cross_entropy`, the method's; `kl`: less the teacher's entropy, of the same gradient;
      `reverse_kl`: KL(student || teacher), which the code's option of that name computes.
  """
  chex.assert_equal_shape([student, teacher])
  if columns is not None:
    student, teacher = (jnp.where(columns, x, _HIDDEN) for x in (student, teacher))
  student, teacher = student / temperature, jax.lax.stop_gradient(teacher) / temperature
  if divergence == "reverse_kl":
    target, compared = jax.nn.softmax(student), teacher
  else:
    target, compared = jax.nn.softmax(teacher), student
  loss = cross_entropy(compared, target, rows)
  if divergence != "cross_entropy":
    same = student if divergence == "reverse_kl" else teacher
    loss = loss - cross_entropy(same, target, rows)
  return temperature**2 * loss


def contrastive_distillation(
  student: Float[Array, "B K"],
  teacher: Float[Array, "B K"],
  temperature: float = 2.0,
  rows: Bool[Array, " B"] | None = None,
  columns: Bool[Array, " K"] | None = None,
  divergence: Divergence = "cross_entropy",
) -> Float[Array, ""]:
  """L_CD / a: both directions, summed. Arguments as in `distillation`."""
  there = distillation(student, teacher, temperature, rows, columns, divergence)
  return there + distillation(student.T, teacher.T, temperature, columns, rows, divergence)


def alignment_target(
  prompts: Int[Array, " B"], real: Bool[Array, " B"] | None = None
) -> Float[Array, "B B"]:
  """P_ij = [r_i = r_j] / sum_k [r_i = r_k]: equal prompts share the probability.

  Args:
    prompts: r, ids of the prompts (B,).
    real: (B,) pairs that count; None: all.
  """
  chex.assert_rank(prompts, 1)
  same = prompts[:, None] == prompts[None]
  if real is not None:
    same = same & real[:, None] & real[None]
  return same / jnp.maximum(same.sum(-1, keepdims=True), 1)


def image_text_alignment(
  student: Float[Array, "B B"],
  prompts: Int[Array, " B"],
  smoothing: float = 0.2,
  real: Bool[Array, " B"] | None = None,
) -> Float[Array, ""]:
  """L_ITA / b: CE(S, P') + CE(S^T, P') with the smoothed target P'.

  Args:
    student: S, (B, B).
    prompts: r, ids of the prompts (B,).
    smoothing: eps, spread over the pairs of the batch.
    real: (B,) pairs that count; None: all.
  """
  chex.assert_shape(student, (len(prompts), len(prompts)))
  real = jnp.ones(len(prompts), bool) if real is None else real
  target = smoothed(alignment_target(prompts, real), smoothing, jnp.maximum(real.sum(), 1))
  target = jnp.where(real, target, 0)
  sides = (jnp.where(real, side, _HIDDEN) for side in (student, student.T))
  return sum((cross_entropy(side, target, real) for side in sides), start=jnp.zeros(()))


def feature_distillation(
  student: tuple[Array, Array], teacher: tuple[Array, Array], real: Array | None = None
) -> Float[Array, ""]:
  """Ablation of L_CD: mean squared error of image and of text embeddings, weight 1 each.

  Args:
    student: image and text embeddings, (B, E) each.
    teacher: the same; gets no gradient.
    real: (B,) pairs that count; None: all.
  """
  real = jnp.ones(len(student[0]), bool) if real is None else real
  errors = (
    jnp.square(s - jax.lax.stop_gradient(t)).mean(-1) for s, t in zip(student, teacher, strict=True)
  )
  means = (jnp.where(real, error, 0).sum() / jnp.maximum(real.sum(), 1) for error in errors)
  return sum(means, start=jnp.zeros(()))


# --- adaptive weight consolidation ----------------------------------------------------------------


def joined_tensor(path: str) -> str:
  """Names the tensor that a parameter is a part of in the published layout: q, k and v are one."""
  return re.sub(r"attention/(query|key|value)/", "attention/in_proj/", path)


def fisher(gradients: Params, tensor_of: Callable[[str], str] = joined_tensor) -> Tree:
  """F = g^2 / mean(g^2) of each tensor, in float32.

  Args:
    gradients: g of L_CD + L_ITA.
    tensor_of: path -> name of the tensor whose mean normalises it; `joined_tensor`, or the identity
      (`per_tensor`), with which the bias of the keys, whose gradient is 0 in theory, is rounding noise
      brought to mean 1.

  Returns:
    A tree like the gradients, without gradient: mean 1 over each tensor; 1e-6 for `FROZEN` ones; 0 for
    a tensor whose gradient is 0. Scanned layers (a "layers" in the path) are normalised one by one.
  """
  flat = {path: jnp.square(g.astype(jnp.float32)) for path, g in flatten(gradients).items()}
  totals: dict[str, Array] = {}
  sizes: dict[str, int] = {}
  for path, square in flat.items():
    axes = tuple(range(int(is_stacked(path)), square.ndim))
    name = tensor_of(path)
    totals[name] = totals.get(name, jnp.zeros(())) + square.sum(axes)
    sizes[name] = sizes.get(name, 0) + int(np.prod([square.shape[a] for a in axes]))

  def normalised(path: str, square: Array) -> Array:
    if path.rpartition("/")[2] in FROZEN:
      return jnp.full_like(square, _FISHER_FLOOR)
    mean = totals[tensor_of(path)] / sizes[tensor_of(path)]
    mean = mean.reshape(*mean.shape, *(1,) * (square.ndim - mean.ndim))
    return jnp.where(mean > _NOTHING, square / jnp.where(mean > _NOTHING, mean, 1), 0)

  return jax.lax.stop_gradient(unflatten({path: normalised(path, x) for path, x in flat.items()}))


def consolidation(params: Params, anchor: Params, importance: Params) -> Float[Array, ""]:
  """L_AWC / l = sum F (theta - theta^{t-1})^2; with F = 1 the L2 penalty. No factor 1/2."""
  pull = lambda p, a, f: (f * jnp.square(p - a)).sum()
  return jax.tree.reduce(jnp.add, jax.tree.map(pull, params, anchor, importance))


def consolidation_gradient(params: Params, anchor: Params, importance: Params) -> Tree:
  """2 F (theta - theta^{t-1}), the gradient of `consolidation` with F constant."""
  return jax.tree.map(lambda p, a, f: 2 * f * (p - a), params, anchor, importance)


def running_fisher(mean: Params, new: Params, count: Array | int) -> Tree:
  """F <- t / (t + 1) F + 1 / (t + 1) F_new: the static ablation, before it is frozen.

  Args:
    mean: F so far, of `count` = t batches; ignored for t = 0.
    new: F of one more.
    count: t.
  """
  return jax.tree.map(lambda m, n: (count * m + n) / (count + 1), mean, new)


def without_frozen(gradients: Params) -> Tree:
  """Gradients with 0 for the parameters that are never trained, `FROZEN`."""
  frozen = lambda path: path.rpartition("/")[2] in FROZEN
  flat = flatten(gradients)
  return unflatten({p: jnp.zeros_like(g) if frozen(p) else g for p, g in flat.items()})


class Direction(NamedTuple):
  """What a step of GIFT follows.

  Attributes:
    gradients: of L_CE + L_CD + L_ITA + L_AWC, F constant.
    importance: F.
    losses: {"ce", "synthetic", "consolidation"} as numbers.
  """

  gradients: Tree
  importance: Tree
  losses: dict[str, Array]


def direction(
  task: Callable[[Params], Array],
  synthetic: Callable[[Params], Array],
  params: Params,
  anchor: Params,
  weight: float = 1.0,
  tensor_of: Callable[[str], str] = joined_tensor,
  importance: Callable[[Tree], Tree] | None = None,
) -> Direction:
  """One update of GIFT: two backward passes; the third gradient is known in closed form.

  Args:
    task: params -> L_CE.
    synthetic: params -> L_CD + L_ITA.
    params: theta.
    anchor: theta^{t-1}.
    weight: l of the consolidation.
    tensor_of: as in `fisher`.
    importance: F of this batch -> F that is used (static, ones); None: as it is.
  """
  ce, of_task = jax.value_and_grad(task)(params)
  kd, of_pairs = jax.value_and_grad(synthetic)(params)
  found = fisher(of_pairs, tensor_of)
  used = found if importance is None else importance(found)
  pull = consolidation_gradient(params, anchor, used)
  total = jax.tree.map(lambda a, b, c: a + b + weight * c, of_task, of_pairs, pull)
  losses = {"ce": ce, "synthetic": kd}
  losses["consolidation"] = weight * consolidation(params, anchor, used)
  return Direction(without_frozen(total), used, losses)


# --- weights of several models ----------------------------------------------------------------------


def interpolated(a: Params, b: Params, share: float) -> Tree:
  """Mixes weights, share * a + (1 - share) * b: the teacher `merge`, and WiSE-FT (0.8 of the tuned)."""
  if not 0 <= share <= 1:
    raise InputError(f"share: must be in [0, 1], got {share}")
  return jax.tree.map(lambda x, y: share * x + (1 - share) * y, a, b)


def running_mean(mean: Params, new: Params, count: Array | int) -> Tree:
  """The mean after one more term; `mean` is of `count` terms: ZSCL's weight ensemble."""
  return jax.tree.map(lambda m, n: (m * count + n) / (count + 1), mean, new)


# --- data -------------------------------------------------------------------------------------------


def prompt_pool(base: Sequence[str], earlier: Sequence[Sequence[str]]) -> list[str]:
  """Prompts that pairs of the next task are drawn from: the base names, then all tasks before it.

  Args:
    base: prompts that stand for pretraining.
    earlier: prompts of each task before, in its first template; duplicates stay.

  Raises:
    InputError: the pool is empty, or a task has no classes.
  """
  for number, prompts in enumerate(earlier):
    if not prompts:
      raise InputError(f"task {number}: has no classes, so no prompts")
  pool = [*base, *(prompt for prompts in earlier for prompt in prompts)]
  if not pool:
    raise InputError("prompts: the pool is empty")
  return pool


def drawn_prompts(pool: Sequence[str], count: int, random: np.random.Generator) -> list[str]:
  """`count` prompts of the pool, uniform, with replacement.

  Raises:
    InputError: an empty pool, or no prompts asked for.
  """
  if not pool:
    raise InputError("prompts: the pool is empty")
  if count < 1:
    raise InputError(f"synthetic images: must be at least 1 a task, got {count}")
  return [pool[i] for i in random.integers(0, len(pool), count)]


def herding(features: Float[Array, "n E"], count: int) -> Int[Array, " m"]:
  """Rows whose mean comes closest to the mean of all, picked greedily: iCaRL's exemplars.

  Args:
    features: unit-length embeddings of a task's images.
    count: m, how many to pick; at most n.
  """
  chex.assert_rank(features, 2)
  mean = features.mean(0)

  def pick(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Array]:
    total, free = carry
    distance = jnp.square((total + features) / (k + 1) - mean).sum(-1)
    best = jnp.argmin(jnp.where(free, distance, jnp.inf))
    return (total + features[best], free.at[best].set(False)), best

  start = jnp.zeros_like(mean), jnp.ones(len(features), bool)
  return jax.lax.scan(pick, start, jnp.arange(min(count, len(features))))[1]


def rate(step: Array | int, base: float, warmup: int, total: int) -> Array:
  """Learning rate: base (s + 1) / warmup while s < warmup, then a half cosine to 0 at `total`."""
  step = jnp.asarray(step)
  up = base * (step + 1) / max(warmup, 1)
  angle = jnp.pi * (step - warmup) / max(total - warmup, 1)
  return jnp.where(step < warmup, up, 0.5 * (1 + jnp.cos(angle)) * base)


# --- metrics ----------------------------------------------------------------------------------------


class Summary(NamedTuple):
  """Transfer, Avg and Last of an accuracy matrix; `forget` is negative where nothing was forgotten."""

  transfer: Array
  average: Array
  last: Array
  forget: Array


def summary(accuracy: Float[Array, "T T"]) -> Summary:
  """Summarises A[i, j], the accuracy on task j after task i.

  Transfer is the mean over j >= 1 of the mean of A[0:j, j], before task j was seen; NaN for one task,
  and so is `forget`, the published sum of (A[T-1, j] - A[j, j]) / (T - 1).
  """
  tasks = len(accuracy)
  chex.assert_shape(accuracy, (tasks, tasks))
  if tasks == 1:
    nan = jnp.full((), jnp.nan)
    return Summary(nan, accuracy.mean(), accuracy[-1].mean(), nan)
  before = jnp.triu(jnp.ones((tasks, tasks)), 1)
  means = jnp.where(before > 0, accuracy, 0).sum(0)[1:] / jnp.arange(1, tasks)
  forget = (accuracy[-1] - jnp.diagonal(accuracy)).sum() / (tasks - 1)
  return Summary(means.mean(), accuracy.mean(), accuracy[-1].mean(), forget)
