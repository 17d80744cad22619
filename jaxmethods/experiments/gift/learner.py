"""One step of every learner, and what happens before the first and after the last step of a task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxmethods.experiments.gift.config import Config
from jaxmethods.experiments.gift.material import Data
from jaxmethods.images.views import resized_crop
from jaxmethods.methods import gift
from jaxmethods.testbeds.vision_language import encoder
from jaxmethods.testbeds.vision_language.encoder import Stage
from jaxmethods.trees import Key, Params, PyTree, Tree

_HIDDEN = -1e30
_EWC_BATCHES = 4


class State(NamedTuple):
  """Everything a checkpoint needs; what a learner does not have is None.

  Attributes:
    params: theta.
    optimiser: of the task under way.
    anchor: theta^{t-1}; the teacher too, unless it is another one.
    teacher: of the task under way; None: the anchor, or theta^0.
    importance: F that outlives a batch (static, once).
    mean: running mean of the weights (ZSCL).
    exemplars: rows of the training images of every task, best first (T, m) (iCaRL).
    accuracy: A[i, j], (T, T); NaN where it is not known yet.
    key: of the run.
  """

  params: Tree
  optimiser: PyTree
  anchor: Tree | None
  teacher: Tree | None
  importance: Tree | None
  mean: Tree | None
  exemplars: Array | None
  accuracy: Array
  key: Key


class Batch(NamedTuple):
  """Where a run stands.

  Attributes:
    task: t, from 0.
    place: step of the task, from 0.
    data: everything there is; steps draw from it.
    last: whether it is the last step of the task.
  """

  task: Array
  place: Array
  data: Data
  last: Array


class Learning(NamedTuple):
  """What the functions below share: the row, the model, steps of a task, their optimiser."""

  config: Config
  stage: Stage
  steps: int
  optimiser: optax.GradientTransformation


class Images(NamedTuple):
  """A batch of pairs: images (B, h, w, 3), texts (B, L), prompts (B,), which are real (B,)."""

  x: Array
  texts: Array
  prompts: Array
  real: Array


Loss = Callable[[Params], Array]


def make(config: Config, stage: Stage) -> Learning:
  """Composes what a row learns with."""
  steps = config.steps // config.stages
  warmup = round(config.warmup * steps)
  schedule = functools.partial(gift.rate, base=config.learning_rate, warmup=warmup, total=steps)
  return Learning(config, stage, steps, optax.adamw(schedule, weight_decay=0.0))


def start(of: Learning, data: Data, key: Key) -> State:
  """The state before the first task."""
  config, params = of.config, data.pretrained
  stages, rows = data.train_y.shape
  none_yet = jax.tree.map(jnp.zeros_like, params)
  copy = lambda wanted: jax.tree.map(jnp.copy, params) if wanted else None
  return State(
    params=jax.tree.map(jnp.copy, params),
    optimiser=None if config.learner == "zero_shot" else of.optimiser.init(params),
    anchor=copy(config.learner not in ("zero_shot", "finetune")),
    teacher=copy(_merges(config)),
    importance=none_yet if _keeps_importance(config) else None,
    mean=copy(config.learner == "zscl"),
    exemplars=jnp.zeros((stages, min(config.memory, rows)), jnp.int32)
    if config.learner == "icarl"
    else None,
    accuracy=jnp.full((stages, stages), jnp.nan),
    key=key,
  )


def _merges(config: Config) -> bool:
  return config.learner == "gift" and config.teacher == "merge"


def _keeps_importance(config: Config) -> bool:
  return config.learner == "ewc" or (
    config.learner == "gift" and config.fisher in ("static", "once")
  )


def step(of: Learning, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
  """One step; the first of a task turns the page, the last one tests."""
  if of.config.learner == "zero_shot":
    losses = {"loss": jnp.zeros(())}
  else:
    turn = functools.partial(begin, of, batch)
    state = jax.lax.cond(batch.place == 0, turn, lambda state: state, state)
    state, losses = update(of, state, batch)
  # Nothing here depends on the seed, so that under a vmap over seeds these stay branches.
  close = functools.partial(finish, of, batch)
  return jax.lax.cond(batch.last, close, lambda state: state, state), losses


# --- the turns of a task ----------------------------------------------------------------------------


def begin(of: Learning, batch: Batch, state: State) -> State:
  """Takes teacher and anchor from the model so far; the optimiser is new."""
  config, params = of.config, state.params
  state = state._replace(optimiser=of.optimiser.init(params))
  if state.exemplars is not None:  # of the task before; of none before the first
    chosen = _exemplars(of, params, batch, state.exemplars.shape[1])
    kept = state.exemplars.at[jnp.maximum(batch.task - 1, 0)].set(chosen)
    state = state._replace(exemplars=jnp.where(batch.task > 0, kept, state.exemplars))
  if state.anchor is not None:
    state = state._replace(anchor=params)
  if state.teacher is not None:
    merged = gift.interpolated(batch.data.pretrained, params, config.teacher_share)
    state = state._replace(teacher=merged)
  if state.mean is not None:
    state = state._replace(mean=params)
  if state.importance is not None and (config.learner == "ewc" or config.fisher == "once"):
    state = state._replace(importance=_importance_before(of, state, batch))
  return state


def _exemplars(of: Learning, params: Params, batch: Batch, count: int) -> Array:
  """Rows of the last task that herding picks, best first."""
  before = jnp.maximum(batch.task - 1, 0)
  images, real = batch.data.train_x[before], batch.data.train_n[before]
  embed = lambda x: _image(of, params, x[None])[0]
  features = jax.lax.map(embed, images, batch_size=64)
  # Padding is far away, so that it is picked last; the mean is that of the real ones.
  mask = (jnp.arange(len(images)) < real)[:, None]
  mean = jnp.where(mask, features, 0).sum(0) / real
  return gift.herding(jnp.where(mask, features, mean + 100), count)


def _importance_before(of: Learning, state: State, batch: Batch) -> Tree:
  """F of EWC: the mean over a few batches of pairs, at the weights before the task."""

  def add(mean: Tree, number: Array) -> tuple[Tree, None]:
    pairs = draw_pairs(of, batch, number, state.key)
    gradients = jax.grad(lambda params: pair_loss(of, state, batch, pairs, params))(state.params)
    return gift.running_fisher(mean, gift.fisher(gradients, _grouping(of)), number), None

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  return jax.lax.scan(add, zeros, jnp.arange(_EWC_BATCHES))[0]


def finish(of: Learning, batch: Batch, state: State) -> State:
  """Keeps the weights that the learner keeps, and fills a row of the accuracy matrix."""
  config, params = of.config, state.params
  if config.learner == "wise_ft":
    assert state.anchor is not None
    params = gift.interpolated(params, state.anchor, config.wise_share)
  elif state.mean is not None:
    params = state.mean
  row = accuracies(of, params, batch)
  return state._replace(params=params, accuracy=state.accuracy.at[batch.task].set(row))


def accuracies(of: Learning, params: Params, batch: Batch) -> Array:
  """Top-1 on the tests of all tasks (T,), NaN for those not asked yet; all templates."""
  data = batch.data

  def one(part: tuple[Array, Array, Array, Array]) -> Array:
    images, labels, texts, asked = part
    logits = encoder.zero_shot(of.stage, params, images, texts)
    right = jnp.where(asked, logits, _HIDDEN).argmax(-1) == labels
    real = labels >= 0
    share = (right & real).sum() / jnp.maximum(real.sum(), 1)
    return jnp.where(asked.any(), share, jnp.nan)

  asked = data.asked[batch.task]
  return jax.lax.map(one, (data.test_x, data.test_y, data.test_texts, asked))


# --- one update -------------------------------------------------------------------------------------


def update(of: Learning, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
  """Draws the batches, follows the losses of the row."""
  config, params = of.config, state.params
  key = jax.random.fold_in(state.key, batch.task * of.steps + batch.place)
  draw_key, second_key = jax.random.split(key)
  images, labels = draw_task(of, batch, draw_key)
  task = functools.partial(task_loss, of, batch, images, labels)
  second = second_loss(of, state, batch, images, second_key)
  if second is None and not _pulls(config):
    loss, gradients = jax.value_and_grad(task)(params)
    losses = {"loss": loss, "ce": loss}
    gradients, importance = gift.without_frozen(gradients), None
  else:
    found = gift.direction(
      task,
      second or (lambda params: jnp.zeros(())),
      params,
      state.anchor or params,
      weight=_pulls(config),
      tensor_of=_grouping(of),
      importance=lambda new: _importance(of, state, batch, new),
    )
    gradients, importance = found.gradients, found.importance
    losses = {"loss": sum(found.losses.values(), start=jnp.zeros(())), **found.losses}
  updates, optimiser = of.optimiser.update(gradients, state.optimiser, params)
  state = state._replace(params=optax.apply_updates(params, updates), optimiser=optimiser)
  if state.importance is not None:
    state = state._replace(importance=importance)
  if state.mean is not None:
    due = batch.place % config.ensemble_every == 0
    mean = gift.running_mean(state.mean, state.params, batch.place // config.ensemble_every + 1)
    chosen = jax.tree.map(lambda new, old: jnp.where(due, new, old), mean, state.mean)
    state = state._replace(mean=chosen)
  return state, losses


def _pulls(config: Config) -> float:
  """The weight l of the pull to theta^{t-1}."""
  return {"gift": config.consolidation, "l2": 1.0, "ewc": 1.0, "zscl": 1.0}.get(config.learner, 0.0)


def _grouping(of: Learning) -> Callable[[str], str]:
  return (lambda path: path) if of.config.per_tensor else gift.joined_tensor


def _importance(of: Learning, state: State, batch: Batch, new: Tree) -> Tree:
  """F that is used, from that of the batch."""
  config = of.config
  kind = {"gift": config.fisher, "ewc": "once"}.get(config.learner, "ones")
  if kind == "adaptive":
    return new
  if kind == "ones":
    return jax.tree.map(jnp.ones_like, new)
  assert state.importance is not None
  if kind == "once":
    return state.importance
  mean = gift.running_fisher(state.importance, new, batch.place)
  moves = batch.place < config.static_steps
  return jax.tree.map(lambda a, b: jnp.where(moves, a, b), mean, state.importance)


def task_loss(of: Learning, batch: Batch, images: Array, labels: Array, params: Params) -> Array:
  """L_CE: the class texts are encoded anew, with gradient."""
  data, t = batch.data, batch.task
  logits = _scale(params) * _image(of, params, images) @ _text(of, params, data.texts[t]).T
  return gift.task_loss(logits, labels, of.config.smoothing, data.known[t])


def second_loss(of: Learning, state: State, batch: Batch, images: Array, key: Key) -> Loss | None:
  """The loss beside that of the task; None where there is none."""
  config, data = of.config, batch.data
  match config.learner:
    case "gift":
      if not (config.distillation or config.alignment):
        return None
      pairs = draw_pairs(of, batch, batch.place, state.key)
      return functools.partial(pair_loss, of, state, batch, pairs)
    case "lwf":
      texts, known = data.texts[batch.task], data.known[batch.task]
      return functools.partial(text_loss, of, _anchor(state), images, texts, known, jnp.ones(()))
    case "lwf_vr":
      texts = random_texts(of, key)
      every = jnp.ones(len(texts), bool)
      return functools.partial(text_loss, of, _anchor(state), images, texts, every, jnp.ones(()))
    case "zscl":
      rows = jax.random.choice(key, len(data.reference_x), (2, config.synthetic_batch))
      texts = data.reference_texts[rows[1]]
      every = jnp.ones(len(texts), bool)
      reference = data.reference_x[rows[0]]
      return functools.partial(
        text_loss, of, data.pretrained, reference, texts, every, jnp.ones(())
      )
    case "icarl":
      remembered, task = draw_exemplars(of, state, batch, key)
      texts, known = data.texts[task], data.known[task]
      there = (batch.task > 0).astype(jnp.float32)  # before the second task there is no memory
      return functools.partial(text_loss, of, _anchor(state), remembered, texts, known, there)
  return None


def text_loss(
  of: Learning,
  teacher: Params,
  images: Array,
  texts: Array,
  known: Array,
  weight: Array,
  params: Params,
) -> Array:
  """LwF on images and texts, the texts embedded by the teacher; `known` (K,) are the real texts."""
  by_teacher = _text(of, teacher, texts)
  logits = lambda p: _scale(p) * _image(of, p, images) @ by_teacher.T
  student, old = logits(params), jax.lax.stop_gradient(logits(teacher))
  temperature = of.config.temperature
  return weight * gift.contrastive_distillation(student, old, temperature, columns=known)


def pair_loss(of: Learning, state: State, batch: Batch, pairs: Images, params: Params) -> Array:
  """L_CD + L_ITA of a batch of synthetic pairs."""
  config = of.config
  teacher = _teacher(of, state, batch)
  old = jax.lax.stop_gradient((_image(of, teacher, pairs.x), _text(of, teacher, pairs.texts)))
  new = _image(of, params, pairs.x), _text(of, params, pairs.texts)
  scale = _scale(params)
  total = jnp.zeros(())
  if config.alignment:
    logits = scale * new[0] @ new[1].T
    aligned = gift.image_text_alignment(logits, pairs.prompts, config.smoothing, pairs.real)
    total += config.alignment * aligned
  if config.distillation and config.compared == "mse":
    total += config.distillation * gift.feature_distillation(new, old, pairs.real)
  elif config.distillation:
    image = old[0] if config.compared == "text" else new[0]
    text = old[1] if config.compared == "image" else new[1]
    distilled = gift.contrastive_distillation(
      scale * image @ text.T,
      scale * old[0] @ old[1].T,
      config.temperature,
      pairs.real,
      pairs.real,
      config.divergence,
    )
    total += config.distillation * distilled
  return total


def _teacher(of: Learning, state: State, batch: Batch) -> Params:
  if of.config.learner == "gift" and of.config.teacher == "pretrained":
    return batch.data.pretrained
  return state.teacher if state.teacher is not None else _anchor(state)


def _anchor(state: State) -> Params:
  assert state.anchor is not None  # of every learner that reads it
  return state.anchor


# --- batches ----------------------------------------------------------------------------------------


def draw_task(of: Learning, batch: Batch, key: Key) -> tuple[Array, Array]:
  """Images of the task, cropped at random, and their labels."""
  data, t = batch.data, batch.task
  order_key, crop_key = jax.random.split(key)
  size = of.config.batch_size
  absent = jnp.arange(data.train_y.shape[1]) >= data.train_n[t]
  rows = jnp.argsort(jax.random.uniform(order_key, absent.shape) + absent)[:size]
  images = data.train_x[t, rows]
  crop = lambda key, x: resized_crop(
    key, x.astype(jnp.float32), x.shape[0], of.config.smallest_crop
  )
  if of.config.smallest_crop < 1:
    images = jax.vmap(crop)(jax.random.split(crop_key, size), images)
  return images, data.train_y[t, rows]


def draw_pairs(of: Learning, batch: Batch, number: Array, key: Key) -> Images:
  """Batch `number` of the task's shuffled pairs; the last of a pass may have fewer real ones."""
  config, data, t = of.config, batch.data, batch.task
  count = data.pairs_ids.shape[1]
  size = min(config.synthetic_batch, count)
  each = count // size if config.synthetic_last == "drop" else -(-count // size)
  passed = jax.random.fold_in(jax.random.fold_in(key, -1 - t), number // each)
  order = jnp.pad(jax.random.permutation(passed, count), (0, max(each * size - count, 0)))
  start = number % each * size
  rows = jax.lax.dynamic_slice(order, (start,), (size,))
  real = start + jnp.arange(size) < count
  return Images(data.pairs_x[t, rows], data.pairs_texts[t, rows], data.pairs_ids[t, rows], real)


def draw_exemplars(of: Learning, state: State, batch: Batch, key: Key) -> tuple[Array, Array]:
  """Images out of the memory of one earlier task, and that task; M // t of each are kept."""
  assert state.exemplars is not None
  config, seen = of.config, jnp.maximum(batch.task, 1)
  task_key, row_key = jax.random.split(key)
  task = jax.random.randint(task_key, (), 0, seen)
  kept = jnp.minimum(config.memory // seen, batch.data.train_n[task])
  kept = jnp.clip(kept, 1, state.exemplars.shape[1])
  rows = state.exemplars[task, jax.random.randint(row_key, (config.batch_size,), 0, kept)]
  return batch.data.train_x[task, rows], task


def random_texts(of: Learning, key: Key) -> Array:
  """Random tokens between start and end, (random_texts, random_length + 2)."""
  tokens, config = of.stage.tokens, of.config
  length = min(config.random_length, tokens.context - 2)
  words = jax.random.randint(key, (config.random_texts, length), 1, min(tokens.start, tokens.end))
  edge = lambda token: jnp.full((config.random_texts, 1), token, words.dtype)
  return jnp.concatenate([edge(tokens.start), words, edge(tokens.end)], axis=1)


def _image(of: Learning, params: Params, images: Array) -> Array:
  return encoder.image_embeddings(of.stage.model, params, of.stage.pixels(images))


def _text(of: Learning, params: Params, ids: Array) -> Array:
  return encoder.text_embeddings(of.stage.model, params, ids)


def _scale(params: Params) -> Array:
  return jnp.exp(params["logit_scale"])
