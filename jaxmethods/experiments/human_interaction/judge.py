"""The frozen evaluator: a classifier of training clips, whose last hidden layer is the embedding."""

from __future__ import annotations

import functools

import jax
import optax
from jax import Array

from jaxmethods.data.array_cache import cached_tree
from jaxmethods.experiments.human_interaction.clips import Clips
from jaxmethods.experiments.human_interaction.config import JudgeSettings
from jaxmethods.models.interaction import MotionEvaluator
from jaxmethods.trees import Key, Params

_FORMAT = b"motion-evaluator-1"
_BATCH, _RATE, _NOISE = 64, 1e-3, 0.1  # noise: of z-scores, in training
_SEED = 17  # one evaluator for all rows and seeds of a fold


def readable(features: Array, joints: int) -> Array:
  """Positions and displacements (..., 6J) of features: contacts are not for the evaluator."""
  return features[..., : 6 * joints]


def train(settings: JudgeSettings, clips: Clips) -> tuple[MotionEvaluator, Params]:
  """Trains the evaluator on the training clips, once per machine."""
  net = MotionEvaluator(
    len(clips.label_names), settings.evaluator_width, hidden=2 * settings.evaluator_width,
    embedding=settings.embedding,
  )  # fmt: skip
  x = readable(clips.train.features, clips.skeleton.num_joints)
  run = functools.partial(_fit, net, settings.evaluator_steps)
  form = jax.eval_shape(run, jax.random.key(_SEED), x, clips.train.label)
  chosen = (settings.evaluator_steps, settings.evaluator_width, settings.embedding, _BATCH, _RATE,
            _NOISE, _SEED)  # fmt: skip
  depends = [_FORMAT, repr(chosen).encode(), jax.device_get(x), jax.device_get(clips.train.label)]
  fit = lambda: jax.jit(run)(jax.random.key(_SEED), x, clips.train.label)
  return net, cached_tree("motion_evaluator", depends, jax.tree.structure(form), fit)


def _fit(net: MotionEvaluator, steps: int, key: Key, x: Array, label: Array) -> Params:
  init_key, run_key = jax.random.split(key)
  params = net.init(init_key, x[:1])["params"]
  optimizer = optax.adamw(optax.cosine_decay_schedule(_RATE, steps), weight_decay=1e-2)

  def loss(params: Params, key: Key) -> Array:
    keys = jax.random.split(key, 3)
    chosen = jax.random.randint(keys[0], (_BATCH,), 0, len(x))
    noisy = x[chosen] + _NOISE * jax.random.normal(keys[1], (_BATCH, *x.shape[1:]))
    logits, _ = net.apply({"params": params}, noisy, None, True, rngs={"dropout": keys[2]})
    return optax.softmax_cross_entropy_with_integer_labels(logits, label[chosen]).mean()

  def one(carry: tuple, key: Key) -> tuple[tuple, None]:
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
    return (optax.apply_updates(params, updates), state), None

  start = (params, optimizer.init(params))
  return jax.lax.scan(one, start, jax.random.split(run_key, steps))[0][0]
