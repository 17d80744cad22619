"""The two tunings: on everything, then on what the defence keeps; and the measures of both models."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.experiments.bye.config import ONCE, Criteria, Defence
from jaxmethods.experiments.bye.detection import Judgement, detection, examine, judge
from jaxmethods.experiments.bye.planting import Pair, mixed
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.stats import poisoning
from jaxmethods.testbeds.multimodal.questions import Split, accuracies
from jaxmethods.trees import Params
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TunerState, TuningState

_OUTCOMES = ("clean_accuracy", "attack_success")  # families 0 and 1 of the test


class State(NamedTuple):
  """Everything a checkpoint needs.

  Attributes:
    tuning: the tuning under way.
    poisoned: (N,) bool, drawn at the start.
    kept: (N,) bool, the examples that are tuned on.
    first: the model tuned on everything, as far as it has come; None where there is only one tuning.
    judgement: of `first`, when it was done; zeros until then; None likewise.
  """

  tuning: TuningState
  poisoned: jax.Array
  kept: jax.Array
  first: TunerState | None
  judgement: Judgement | None


class Work(NamedTuple):
  """The input of a step: its number over both tunings, the data, the pretrained model."""

  number: jax.Array
  train: Pair
  params: Params


class Parts(NamedTuple):
  """All that the functions of the experiment share; no arrays.

  Attributes:
    model, tuner, optimiser: of both tunings.
    clip: bound of the gradient norm.
    steps: of each tuning.
    batch_size: examples of a step.
    defence: that removes examples.
    drop_share: of the random one.
    criteria: of the detectors.
    restart: whether the second tuning starts from the pretrained model.
    share: of the examples that can be poisoned, those that are.
  """

  model: DeskMLLM
  tuner: Tuner
  optimiser: optax.GradientTransformation
  clip: float
  steps: int
  batch_size: int
  defence: Defence
  drop_share: float
  criteria: Criteria
  restart: bool
  share: float


def start(parts: Parts, key: jax.Array, params: Params, train: Pair, free: jax.Array) -> State:
  """The state before the first step.

  Args:
    parts: of the experiment.
    key: of the run.
    params: pretrained.
    train: N examples.
    free: (N,) bool, those that can be poisoned.
  """
  poison_key, drop_key, tune_key = jax.random.split(key, 3)
  count = len(free)
  poisoned = poisoning.highest(jax.random.uniform(poison_key, (count,)), parts.share, free)
  kept = jnp.ones(count, bool)
  if parts.defence == "random":
    kept = ~poisoning.random_drop(drop_key, count, parts.drop_share)
  elif parts.defence == "oracle":
    kept = ~poisoned
  tuning = _begin(parts, tune_key, params)
  if parts.defence in ONCE:
    return State(tuning, poisoned, kept, None, None)
  shapes = jax.eval_shape(lambda *args: look(parts, *args), tuning.tuner, train, poisoned)
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return State(tuning, poisoned, kept, tuning.tuner, nothing)


def _begin(parts: Parts, key: jax.Array, params: Params) -> TuningState:
  return tuners.init_state(parts.tuner, parts.optimiser, key, params, {})


def look(parts: Parts, tuned: TunerState, train: Pair, poisoned: jax.Array) -> Judgement:
  """Judges the training examples by a tuned model."""
  run = lambda *args, **kwargs: parts.tuner.apply(parts.model, *tuned, *args, **kwargs)
  tokens = parts.model.config.num_tokens
  return judge(examine(run, train, poisoned, tokens), parts.criteria, tokens)


def step(parts: Parts, state: State, work: Work) -> tuple[State, dict[str, jax.Array]]:
  """One step of either tuning; the defence removes examples before the first of the second."""
  once = parts.defence in ONCE
  if not once:
    # The step's number comes with the batch, so under a map over seeds this stays a branch.
    second = work.number == parts.steps
    defend = lambda state, work: _defend(parts, state, work)
    state = jax.lax.cond(second, defend, lambda state, work: state, state, work)
  update = tuners.tuning_step(
    parts.tuner, parts.model, parts.optimiser, tuners.answer_loss, clip=parts.clip
  )
  tuning, metrics = update(state.tuning, draw(state, work.train, parts.batch_size))
  first = state.first
  if not once:
    still = work.number < parts.steps
    first = jax.tree.map(lambda new, old: jnp.where(still, new, old), tuning.tuner, first)
  state = state._replace(tuning=tuning, first=first)
  return state, {"loss": metrics["loss"], "kept": state.kept.sum()}


def _defend(parts: Parts, state: State, work: Work) -> State:
  """Removes examples by the first model, and begins the second tuning."""
  judgement = look(parts, state.tuning.tuner, work.train, state.poisoned)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.tuning.key), parts.steps)
  tuning = _begin(parts, key, work.params)
  if not parts.restart:
    tuned = state.tuning.tuner
    tuning = tuning._replace(tuner=tuned, opt_state=parts.optimiser.init(tuned.trainable))
  kept = ~judgement.removed[parts.defence]
  return state._replace(tuning=tuning, kept=kept, judgement=judgement)


def draw(state: State, train: Pair, size: int) -> dict[str, jax.Array]:
  """A batch of what is kept, shuffled anew in every epoch; the rest of an epoch is left out.

  Where fewer examples are kept than a batch has, the others in it have no answer to learn.
  """
  step, kept = state.tuning.step, state.kept
  each = jnp.maximum(kept.sum() // size, 1)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.tuning.key), step // each)
  order = jnp.argsort(jnp.where(kept, jax.random.uniform(key, kept.shape), 2.0))
  rows = jax.lax.dynamic_slice_in_dim(order, (step % each) * size, size)
  batch = mixed(train, rows, state.poisoned)
  labels = jnp.where(kept[rows][:, None, None], batch.labels, IGNORED)
  return batch._replace(labels=labels)._asdict()


# --- measures -------------------------------------------------------------------------------------


def evaluate(parts: Parts, state: State, test: Split) -> dict[str, jax.Array]:
  """Accuracy and attack success, before and after the defence, and what every defence finds."""
  if state.first is None or state.judgement is None:
    metrics = _scores(parts, state.tuning.tuner, test)
    found = {} if parts.defence == "none" else detection(~state.kept, state.poisoned)
    return metrics | found
  # One program for both models.
  both = jax.tree.map(lambda *x: jnp.stack(x), state.first, state.tuning.tuner)
  reached = jax.lax.map(lambda tuned: _scores(parts, tuned, test), both)
  metrics = {name: reached[name][1] for name in _OUTCOMES}
  metrics |= detection(~state.kept, state.poisoned)
  metrics |= {f"{name}_before": reached[name][0] for name in _OUTCOMES}
  metrics["null_separation"] = jnp.float32(parts.criteria.null)
  return metrics | _verdicts(state.judgement, state.poisoned)


def _scores(parts: Parts, tuned: TunerState, test: Split) -> dict[str, jax.Array]:
  run = lambda *args, **kwargs: parts.tuner.apply(parts.model, *tuned, *args, **kwargs)
  return accuracies(run, test, _OUTCOMES)


def _verdicts(judgement: Judgement, poisoned: jax.Array) -> dict[str, jax.Array]:
  """Layers that BYE uses, and the examples that every defence finds."""
  profile = judgement.profile
  metrics = {
    "layers_used": profile.kept.sum(),
    "layers_reversed": profile.reversed.sum(),
    "saved_by_guard": judgement.verdict.guarded,
    "missing": judgement.missing,
  }
  for layer, separation in enumerate(profile.separation):
    metrics[f"separation/{layer}"] = separation
  for name, removed in judgement.removed.items():
    found = detection(removed, poisoned)
    metrics |= {f"{measure}/{name}": value for measure, value in found.items()}
  return metrics
