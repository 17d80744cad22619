"""SPIDER: specialization via importance discrepancy evaluation for refinement.

Huang, Liang, Shi, Zhu, Wan, Li, Du, Tao, Ye, "Learn from downstream and be yourself in multimodal large
language models fine-tuning", ICML 2025, arXiv 2411.10928. Every parameter is scored by its pretrained
magnitude and by its accumulated gradient; after each optimiser step those whose second score is not the
larger one go back to their pretrained value, the others part of the way.

Source status: the published trainers and the abstract were read, the body was not; equations are (code)
unless marked.

Scores are per tensor: statistics run over one weight matrix, bias or norm vector. Parameters below a
scan ("layers" in the path) are stacks of such tensors. On a sharded mesh the reductions are over the
whole logical tensor, as always under jit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes
from jaxmethods.stats.selection import top_share
from jaxmethods.trees import Params, flatten, is_stacked, unflatten
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TunerState

# (pretrained value, its importance P, accumulated gradient S) of one tensor -> mask in [0, 1].
MaskRule = Callable[[Array, Array, Array], Array]


class State(NamedTuple):
  """Memory of the method, trees like the trained parameters; part of the checkpoint.

  Attributes:
    anchor: theta^0, the pretrained values; never changes.
    importance: P of every tensor, float32; None to compute it anew at every step.
    accumulated: S, the signed sum of the gradients so far, float32.
    mask: M of the last step that computed one; None if every step does.
  """

  anchor: Params
  importance: Params | None
  accumulated: Params
  mask: Params | None


# --- importance discrepancy ---------------------------------------------------------------------


def normalised_magnitude(x: Float[Array, ...], constant: float = 0.0) -> Float[Array, ...]:
  """Computes N(x) = sigmoid((|x| - mean|x|) / sd|x|), 0 everywhere if all of x is 0.

  Args:
    x: one tensor, any shape.
    constant: score of a tensor of one magnitude other than 0; the published code divides by sd = 0 and
      compares NaN. A tensor of one entry is such a tensor.

  Returns:
    The shape of `x`, in float32 or better: in bfloat16 large scores become equal.
  """
  size = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
  varies = size.max() > size.min()
  deviation = jnp.std(size, ddof=1) if size.size > 1 else jnp.ones((), size.dtype)
  score = jax.nn.sigmoid((size - size.mean()) / jnp.where(varies, deviation, 1))
  level = jnp.where(size.max() > 0, constant, 0).astype(size.dtype)
  # NaN in x compares false above and stays NaN here: it must not look like a tensor of one magnitude.
  return jnp.where(varies | jnp.isnan(size.max()), score, level)


def pretrained_importance(theta0: Float[Array, ...]) -> Float[Array, ...]:
  """Computes P = N(theta^0); 1 for constant tensors, so that nothing in them is ever selected."""
  return normalised_magnitude(theta0, constant=1.0)


def task_importance(accumulated: Float[Array, ...]) -> Float[Array, ...]:
  """Computes G = N(S); 0 for constant tensors, so that nothing in them is ever selected."""
  return normalised_magnitude(accumulated, constant=0.0)


# --- importance selection mask ------------------------------------------------------------------


def selected(pretrained: Float[Array, ...], task: Float[Array, ...]) -> Bool[Array, ...]:
  """Selects I = [P < G], parameters that the task needs more than pretraining did; strict."""
  shapes.same(pretrained=pretrained, task=task)
  return pretrained < task


def allocation(pretrained: Float[Array, ...], task: Float[Array, ...]) -> Float[Array, ...]:
  """Computes M = min(1, R / mean of R over the selected), R = G / (P + G) there and 0 elsewhere.

  Args:
    pretrained: P of one tensor.
    task: G, the same shape.

  Returns:
    M in [0, 1], the same shape; 0 everywhere if nothing is selected.
  """
  chosen = selected(pretrained, task)
  ratio = jnp.where(chosen, task / jnp.where(chosen, pretrained + task, 1), 0)
  mean = ratio.sum() / jnp.maximum(chosen.sum(), 1)
  return jnp.where(chosen, jnp.minimum(1, ratio / jnp.where(mean > 0, mean, 1)), 0)


def mix(
  theta0: Float[Array, ...], tuned: Float[Array, ...], mask: Float[Array, ...]
) -> Float[Array, ...]:
  """Mixes (1 - M) theta^0 + M theta_opt: the anchor is the pretrained value, not the previous iterate.

  Exact where M is 0 or 1. NaN in `tuned` shows wherever it stands, also under M = 0.
  """
  shapes.same(theta0=theta0, tuned=tuned, mask=mask)
  mask = mask.astype(jnp.promote_types(theta0.dtype, jnp.float32))
  return ((1 - mask) * theta0 + mask * tuned).astype(tuned.dtype)


def soft(theta0: Array, importance: Array, accumulated: Array) -> Array:
  """Computes the mask of the method."""
  del theta0
  return allocation(importance, task_importance(accumulated))


def hard(theta0: Array, importance: Array, accumulated: Array) -> Array:
  """Computes M = I, an ablation (inferred)."""
  del theta0
  chosen = selected(importance, task_importance(accumulated))
  return chosen.astype(importance.dtype)


def by_gradient(share: float) -> MaskRule:
  """Makes the rule of GradMask: the top `share` of |S| is updated and nothing else."""

  def rule(theta0, importance, accumulated):
    del theta0
    return top_share(jnp.abs(accumulated), share).astype(importance.dtype)

  return rule


def frozen_by_magnitude(theta0: Float[Array, ...], ratio: float = 0.5) -> Bool[Array, ...]:
  """Marks the floor(ratio * n) entries of largest |theta^0|, which do not move (MagnitudeMask)."""
  return top_share(jnp.abs(theta0), ratio)


# --- one step -----------------------------------------------------------------------------------


def start(params: Params, *, recompute_importance: bool = False, update_every: int = 1) -> State:
  """Makes the state before the first update.

  Args:
    params: trained parameters at their pretrained values. Leaves that are not floating are passed by.
    recompute_importance: keep no P: a third less memory, a little more time.
    update_every: of `update`; the mask is remembered if it is not 1.
  """
  floats = _floats(params)
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), floats)
  importance = None if recompute_importance else _per_tensor(pretrained_importance, floats)
  return State(floats, importance, zeros(), None if update_every == 1 else zeros())


def update(
  state: State,
  tuned: Params,
  gradients: Params,
  *,
  updates: Array | int = 0,
  rule: MaskRule = soft,
  update_every: int = 1,
) -> tuple[Params, State, Params]:
  """Mixes the parameters with their pretrained values after a step of the optimiser.

  Args:
    state: from `start` or the last call.
    tuned: parameters as the optimiser left them.
    gradients: gradients of the optimiser, or the same before clipping (the published code does not
      determine which of the two it adds up).
    updates: number of updates before this one.
    rule: `soft` (the method), `hard`, or another.
    update_every: the mask is made anew every so many updates (inferred); 1 is the method.

  Returns:
    (parameters, state, M).

  Raises:
    ValueError: the trees differ in structure.
  """
  floats, gradients = _floats(tuned), _floats(gradients)
  accumulated = jax.tree.map(lambda s, g: s + g.astype(s.dtype), state.accumulated, gradients)

  def masks():
    importance = state.importance
    if importance is None:
      importance = _per_tensor(pretrained_importance, state.anchor)
    return _per_tensor(rule, state.anchor, importance, accumulated)

  if state.mask is None:
    mask, kept = masks(), None
  else:
    mask = kept = jax.lax.cond(updates % update_every == 0, masks, lambda: state.mask)
  mixed = jax.tree.map(mix, state.anchor, floats, mask)
  new = unflatten(flatten(tuned) | flatten(mixed))
  return new, state._replace(accumulated=accumulated, mask=kept), mask


# --- as ways of tuning --------------------------------------------------------------------------


def tuner(
  targets: str,
  *,
  rule: MaskRule = soft,
  accumulate: Literal["pre_clip", "post_clip"] = "post_clip",
  update_every: int = 1,
  recompute_importance: bool = False,
) -> Tuner:
  """Makes SPIDER on the parameters in whose path `targets` is found; `extra` is the `State`, as a dict.

  Args:
    targets: regular expression (paper setting: projector and last two decoder layers).
    rule: of the mask.
    accumulate: which gradient S adds up, before or after clipping (inferred: after).
    update_every: of `update`.
    recompute_importance: of `start`.
  """
  if update_every < 1:
    raise InputError(f"update_every must be at least 1, got {update_every}")
  base = tuners.selected(targets)

  def init(key, params, probe) -> TunerState:
    trainable, frozen, _ = base.init(key, params, probe)
    state = start(trainable, recompute_importance=recompute_importance, update_every=update_every)
    return TunerState(trainable, frozen, state._asdict())

  def post_step(step, gradients, before, trainable, frozen, extra):
    del before, frozen
    added = gradients.raw if accumulate == "pre_clip" else gradients.clipped
    new, state, _ = update(
      State(**extra), trainable, added, updates=step, rule=rule, update_every=update_every
    )
    return new, state._asdict()

  return base._replace(init=init, post_step=post_step)


def half(targets: str, round_steps: int) -> Tuner:
  """Makes half fine-tuning: in each round a random half of the tensors does not move.

  Args:
    targets: regular expression on parameter paths.
    round_steps: optimiser steps of a round.
  """
  if round_steps < 1:
    raise InputError(f"round_steps must be at least 1, got {round_steps}")

  base = tuners.selected(targets)

  def init(key, params, probe) -> TunerState:
    return base.init(key, params, probe)._replace(extra={"key": jax.random.key_data(key)})

  def post_step(step, gradients, before, trainable, frozen, extra):
    del gradients, frozen
    old, new = flatten(before), flatten(trainable)
    key = jax.random.fold_in(jax.random.wrap_key_data(extra["key"]), step // round_steps)
    moves = jax.random.permutation(key, len(new)) >= len(new) // 2
    kept = {path: jnp.where(moves[i], new[path], old[path]) for i, path in enumerate(new)}
    return unflatten(kept), extra

  return base._replace(init=init, post_step=post_step)


def _per_tensor(function: Callable, *trees: Params) -> Any:
  """`function` of every tensor; of every layer where a leaf is a stack of them."""
  flat = [flatten(tree) for tree in trees]
  return unflatten({
    path: (jax.vmap(function) if is_stacked(path) else function)(*(tree[path] for tree in flat))
    for path in flat[0]
  })  # fmt: skip


def _floats(tree: Params) -> Params:
  flat = flatten(tree)
  return unflatten({k: x for k, x in flat.items() if jnp.issubdtype(x.dtype, jnp.floating)})


def _wide(x: Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)
