"""Ways of tuning a model behind one interface (`Tuner`), and the training step that all share.

A tuner is a few pure functions over three trees: the trained part, the frozen part, and further parts of
a checkpoint (masks, importances, the pretrained values). The plain ones are here: some of the
model's own parameters (`selected`), and an adapter beside them (`adapted`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxmethods import trees
from jaxmethods.adapters import adapter as adapters
from jaxmethods.adapters.adapter import Adapter, Params, Tree
from jaxmethods.adapters.targets import ATTENTION, BLOCK, matching
from jaxmethods.adapters.training import mean_of_parts, token_cross_entropy
from jaxmethods.errors import InputError
from jaxmethods.trees import PyTree, flatten, unflatten

Batch = Mapping[str, jax.Array]

# Parameters by what they belong to, as regular expressions on their paths.
PROJECTOR = r"^projector/"
LANGUAGE = r"^language/"
EVERYTHING = r"^(projector|language)/"
LINEARS = rf"^language/.*{BLOCK}"
ATTENTION_LINEARS = rf"^language/.*{ATTENTION}"


class TunerState(NamedTuple):
  """Everything a tuner needs besides the optimiser.

  Attributes:
    trainable: gradients are taken for this, and for nothing else.
    frozen: the rest of what the model is run with.
    extra: masks, importances, pretrained values; {} if there are none.
  """

  trainable: Tree
  frozen: Tree
  extra: Tree


class Gradients(NamedTuple):
  """Of one step, before and after clipping by their global norm."""

  raw: Tree
  clipped: Tree


class Run(Protocol):
  """The tuned model: called like `model.apply` without its variables."""

  def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree: ...


# (the tuned model, batch, key of dropout or None) -> (sum over what counts, how much counts).
Loss = Callable[[Run, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]


# (trained part, batch, key) -> (sum over what counts, how much counts); the frozen part is bound.
TaskLoss = Callable[[Tree, Batch, jax.Array], tuple[jax.Array, jax.Array]]
# (loss, trained part, batch, key) -> (mean loss, gradient like the trained part).
GradientRule = Callable[[TaskLoss, Tree, Batch, jax.Array], tuple[jax.Array, Tree]]


def no_penalty(trainable: Tree, frozen: Tree, extra: Tree) -> jax.Array:
  del trainable, frozen, extra
  return jnp.zeros(())


def nothing_before(step, trainable, frozen, extra):
  del step, frozen
  return trainable, extra


def nothing_after(step, gradients, before, trainable, frozen, extra):
  del step, gradients, before, frozen
  return trainable, extra


class Tuner(NamedTuple):
  """One way of tuning.

  Attributes:
    init: (key, params, probe) -> state. `params` is the whole pretrained model; `probe` a batch of the
      target's training data for what needs statistics (others ignore it).
    apply: (model, trainable, frozen, extra, *args, **kwargs) -> output of the tuned model.
    finalize: (trainable, frozen, extra) -> parameters of the plain model that is kept in the end:
      the merged one, or an edited one (posterior methods); None where there is none.
    rates: trainable -> tree of labels like it, "decoder", "projector", "adapter", "prompt", ...:
      groups that have learning rates of their own.
    penalty: (trainable, frozen, extra) -> scalar added to the loss.
    pre_step: (step, trainable, frozen, extra) -> (trainable, extra), before the forward pass.
    post_step: (step, gradients, before, trainable, frozen, extra) -> (trainable, extra), after the
      optimiser; `before` is the trainable part that the gradients were taken at.
    gradient: how the gradient of the task is computed, e.g. in parts (`accumulated`) or privately;
      the penalty's own gradient is added to it. None: of the mean over the batch, in one piece.
  """

  init: Callable[[jax.Array, Params, Batch], TunerState]
  apply: Callable[..., PyTree]
  finalize: Callable[[Tree, Tree, Tree], Tree] | None
  rates: Callable[[Tree], Tree]
  penalty: Callable[[Tree, Tree, Tree], jax.Array] = no_penalty
  pre_step: Callable[..., tuple[Tree, Tree]] = nothing_before
  post_step: Callable[..., tuple[Tree, Tree]] = nothing_after
  gradient: GradientRule | None = None


class TuningState(NamedTuple):
  """One pytree: all that a checkpoint needs.

  Attributes:
    step: steps done.
    key: of the data order and dropout; key data, not a typed key.
    tuner: see `TunerState`.
    opt_state: of the optimiser, for `tuner.trainable`.
  """

  step: jax.Array
  key: jax.Array
  tuner: TunerState
  opt_state: PyTree


Update = Callable[[TuningState, Batch], tuple[TuningState, dict[str, jax.Array]]]


def tuning_step(
  tuner: Tuner,
  model: nn.Module,
  optimiser: optax.GradientTransformation,
  loss: Loss,
  *,
  clip: float = 1.0,
) -> Update:
  """Makes the pure step (state, batch) -> (state, metrics) of every way of tuning; the caller jits it.

  Order: `pre_step`, forward and backward, clipping, optimiser, `post_step`.

  Args:
    tuner: what is trained and how.
    model: the module that `tuner.apply` runs.
    optimiser: for the trained part, without clipping; see `adamw`.
    loss: mean = sum / count; the tuner's penalty is added to the mean.
    clip: bound of the global gradient norm.

  >>> tuner = jm.tuning.adapted(lora, "kernel", also=None)
  >>> def loss(run, batch, key):
  ...   error = (run(batch["x"]) - 1) ** 2
  ...   return error.sum(), error.size
  >>> step = jax.jit(jm.tuning.tuning_step(tuner, net, optax.sgd(0.1), loss))
  >>> state = jm.tuning.init_state(tuner, optax.sgd(0.1), key, params, {})
  >>> state, metrics = step(state, {"x": x})
  >>> sorted(metrics)
  ['grad_norm', 'loss', 'task_loss']
  """

  def step(state: TuningState, batch: Batch):
    trainable, frozen, extra = state.tuner
    trainable, extra = tuner.pre_step(state.step, trainable, frozen, extra)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    differentiate = _in_one_piece if tuner.gradient is None else _by_rule
    (whole, task), raw = differentiate(
      tuner, model, loss, batch, key, state.tuner._replace(trainable=trainable, extra=extra)
    )
    norm = optax.tree.norm(raw)
    clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12)), raw)
    updates, opt_state = optimiser.update(clipped, state.opt_state, trainable)
    new = optax.apply_updates(trainable, updates)
    new, extra = tuner.post_step(state.step, Gradients(raw, clipped), trainable, new, frozen, extra)
    metrics = {"loss": whole, "task_loss": task, "grad_norm": norm}
    return TuningState(
      state.step + 1, state.key, TunerState(new, frozen, extra), opt_state
    ), metrics

  return step


def accumulated(tuner: Tuner, count: int) -> Tuner:
  """Works a batch off in `count` parts, one after the other; the sum is that of the whole batch.

  Only one part's activations are in memory at a time.

  Raises:
    InputError: fewer than one part.
  """
  if count < 1:
    raise InputError(f"accumulate: must be at least 1, got {count}")
  if count == 1:
    return tuner

  def gradient(loss: TaskLoss, trainable: Tree, batch: Batch, key: jax.Array):
    of_part = jax.value_and_grad(loss, has_aux=True)
    return mean_of_parts(of_part, trainable, batch, key, count)

  return tuner._replace(gradient=gradient)


def _in_one_piece(tuner, model, loss, batch, key, state: TunerState):
  """Differentiates loss and penalty together."""
  objective = functools.partial(_objective, tuner, model, loss, batch, key)
  return jax.value_and_grad(objective, has_aux=True)(*state)


def _by_rule(tuner, model, loss, batch, key, state: TunerState):
  """Takes the gradient of the task as the tuner does, and adds that of the penalty."""
  trainable, frozen, extra = state

  def task_loss(trainable: Tree, batch: Batch, key: jax.Array):
    run = lambda *args, **kwargs: tuner.apply(model, trainable, frozen, extra, *args, **kwargs)
    return loss(run, batch, key)

  task, gradient = tuner.gradient(task_loss, trainable, batch, key)
  penalty, pull = jax.value_and_grad(tuner.penalty)(trainable, frozen, extra)
  return (task + penalty, task), jax.tree.map(jnp.add, gradient, pull)


def _objective(
  tuner: Tuner,
  model: nn.Module,
  loss: Loss,
  batch: Batch,
  key: jax.Array,
  trainable: Tree,
  frozen: Tree,
  extra: Tree,
) -> tuple[jax.Array, jax.Array]:
  """Computes the loss with its penalty, and the loss alone."""
  run = lambda *args, **kwargs: tuner.apply(model, trainable, frozen, extra, *args, **kwargs)
  total, count = loss(run, batch, key)
  task = total / jnp.maximum(count, 1)
  return task + tuner.penalty(trainable, frozen, extra), task


def init_state(
  tuner: Tuner,
  optimiser: optax.GradientTransformation,
  key: jax.Array,
  params: Params,
  probe: Batch,
) -> TuningState:
  """Makes the state before the first step; `key` also gives the data order.

  >>> tuner = jm.tuning.adapted(lora, "kernel", also=None)
  >>> state = jm.tuning.init_state(tuner, optax.sgd(0.1), key, params, {})
  >>> int(state.step), sorted(state.tuner.trainable)
  (0, ['adapter', 'params'])
  """
  order, start = jax.random.split(key)
  state = tuner.init(start, params, probe)
  # A donated state must not hold a buffer twice, nor one that belongs to the caller.
  state = jax.tree.map(jnp.copy, state)
  return TuningState(
    jnp.zeros((), jnp.int32), jax.random.key_data(order), state, optimiser.init(state.trainable)
  )


class RateState(NamedTuple):
  """Steps done, and the peak rate of every group: data, so that one program serves all rates."""

  steps: jax.Array
  rates: dict[str, jax.Array]


def adamw(
  rates: Mapping[str, float],
  labels: Callable[[Tree], Tree],
  steps: int,
  *,
  warmup: float = 0.03,
) -> optax.GradientTransformation:
  """Makes Adam without weight decay; every group has its own rate, warmed up and then a cosine to 0.

  Args:
    rates: peak learning rate by label.
    labels: `Tuner.rates`.
    steps: of the whole run.
    warmup: share of the steps over which the rate rises in a straight line.

  >>> labels = lambda tree: jax.tree.map(lambda _: "adapter", tree)
  >>> optimiser = jm.tuning.adamw({"adapter": 1e-3}, labels, steps=100)
  >>> state = optimiser.init({"a": jnp.zeros(3)})
  """
  rise = round(warmup * steps)
  shape = optax.warmup_cosine_decay_schedule(0.0 if rise else 1.0, 1.0, rise, steps)

  def init(trainable: Tree) -> RateState:
    used = set(jax.tree.leaves(labels(trainable)))
    if unknown := used - set(rates):
      raise ValueError(f"no learning rate for the group {min(unknown)!r}")
    return RateState(
      jnp.zeros((), jnp.int32), {label: jnp.float32(rates[label]) for label in sorted(used)}
    )

  def update(updates: Tree, state: RateState, trainable: Tree | None = None):
    del trainable
    scale = lambda update, label: -shape(state.steps) * state.rates[label] * update
    updates = jax.tree.map(scale, updates, labels(updates))
    return updates, state._replace(steps=state.steps + 1)

  return optax.chain(optax.scale_by_adam(), optax.GradientTransformation(init, update))


def answer_loss(run: Run, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Computes the cross-entropy of the words of the answer.

  Args:
    run: tuned model with the interface of `models.desk_mllm.DeskMLLM`.
    batch: features (B, N, F), ids (B, K, T), labels (B, K, T): the next token where it belongs to the
      answer, else `IGNORED`.
    key: of dropout.
  """
  rngs = None if key is None else {"dropout": key}
  output = run(batch["ids"], features=batch["features"], rngs=rngs)
  return token_cross_entropy(output.logits, batch["labels"])


def text_loss(run: Run, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Computes the cross-entropy of the tokens that count, and makes no logits for the others.

  Args:
    run: tuned `models.causal_lm.CausalLM`.
    batch: ids, mask (B, T); places, labels (B, A): where the hidden state is that foretells a label, and
      the label, `IGNORED` where there is none; of packed texts segments and positions (B, T) too.
    key: of dropout.
  """
  rngs = None if key is None else {"dropout": key}
  given = {name: batch[name] for name in ("mask", "segments", "positions") if name in batch}
  hidden = run(batch["ids"], logits="none", rngs=rngs, **given).hidden
  chosen = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
  return token_cross_entropy(run(chosen, method="logits"), batch["labels"])


def selected(
  targets: str,
  *,
  finalize: Callable[[Tree, Tree, Tree], Tree] | None = None,
  **hooks: PyTree,
) -> Tuner:
  """Trains those of the model's own parameters in whose path `targets` is found.

  Args:
    targets: regular expression, e.g. `EVERYTHING`, `PROJECTOR`; must match something.
    finalize: default: the parameters as they are.
    **hooks: penalty, pre_step, post_step of `Tuner`.
  """

  def init(key, params, probe) -> TunerState:
    del key, probe
    return TunerState(*split_params(params, targets), {})

  def apply(model, trainable, frozen, extra, *args, **kwargs):
    del extra
    return model.apply({"params": trees.merge(trainable, frozen)}, *args, **kwargs)

  return Tuner(init, apply, finalize or together, own_rates, **hooks)


def adapted(adapter: Adapter, targets: str = LINEARS, also: str | None = PROJECTOR) -> Tuner:
  """Trains an adapter on the linear layers `targets`, and the parameters `also` themselves.

  The trainable part is {"adapter": ..., "params": ...}, and so is the frozen one.

  Args:
    adapter: of `jaxmethods.adapters`.
    targets: what it acts on.
    also: regular expression; None: nothing else is trained.

  >>> tuner = jm.tuning.adapted(lora, "kernel", also=None)
  >>> state = tuner.init(key, params, {})
  >>> sorted(state.trainable["adapter"])
  ['dense_0', 'head']
  """

  def init(key, params, probe) -> TunerState:
    del probe
    tree = adapter.init(key, params, targets)
    trained, fixed = adapters.split(adapter, tree)
    own, rest = split_params(params, also) if also else ({}, dict(params))
    return TunerState({"adapter": trained, "params": own}, {"adapter": fixed, "params": rest}, {})

  def whole(trainable, frozen):
    join = lambda name: trees.merge(trainable[name], frozen[name])
    return join("params"), join("adapter")

  def apply(model, trainable, frozen, extra, *args, **kwargs):
    del extra
    return adapters.apply(adapter, model, *whole(trainable, frozen), *args, **kwargs)

  def merge(trainable, frozen, extra):
    del extra
    assert adapter.merge is not None
    return adapter.merge(*whole(trainable, frozen))

  def rates(trainable):
    return {
      "adapter": jax.tree.map(lambda _: "adapter", trainable["adapter"]),
      "params": own_rates(trainable["params"]),
    }

  return Tuner(init, apply, merge if adapter.merge else None, rates)


def split_params(params: Params, targets: str) -> tuple[Tree, Tree]:
  """Splits parameters into those in whose path `targets` is found, and the others."""
  found = set(matching(flatten(params), targets))
  return trees.split(params, lambda path: path in found)


def together(trainable: Tree, frozen: Tree, extra: Tree) -> Tree:
  """Joins the trained and the frozen parameters of a model."""
  del extra
  return trees.merge(trainable, frozen)


def own_rates(trainable: Tree) -> Tree:
  """Labels the own parameters of a model: "projector" or "decoder"."""
  label = lambda path: "projector" if re.search(PROJECTOR, path) else "decoder"
  return unflatten({path: label(path) for path in flatten(trainable)})
