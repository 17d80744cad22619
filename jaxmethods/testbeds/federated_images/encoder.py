"""A frozen image encoder where no pretrained one is at hand: a small convnet, trained here, once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.typing import VariableDict
from jax import Array

from jaxmethods.data.array_cache import cached
from jaxmethods.models.convnet import ConvNet
from jaxmethods.runtime import compiler
from jaxmethods.runtime.waiting import waiting

FORMAT = b"encoder 1"  # changes when the network or its training changes
FEATURES = (16, 32, 64)
BATCH, LEARNING_RATE = 64, 1e-3


def resized(images: np.ndarray, size: int) -> np.ndarray:
  """Images (n, h, w, c), uint8 or float in [0, 1], as float32 (n, size, size, c) in [0, 1]."""
  x = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
  shape = (len(x), size, size, x.shape[-1])
  return np.asarray(jax.image.resize(x, shape, "linear"))


def embed(
  images: np.ndarray, fit: tuple[np.ndarray, np.ndarray], num_classes: int, epochs: int
) -> np.ndarray:
  """Embeddings of `images` by a convnet trained on the pair `fit` and on nothing else.

  They are kept on disk under the hash of all that they depend on.

  Args:
    images: (n, s, s, c) float32.
    fit: images (m, s, s, c) and labels (m,) to train on.
    num_classes: of the labels.
    epochs: passes over `fit`.

  Returns:
    (n, (s // 8) ** 2 * 64) float32.
  """
  arguments = np.array([num_classes, epochs])
  shapes = np.array([images.shape, fit[0].shape])
  stored = cached(
    "embeddings",
    [FORMAT, arguments, shapes, images, *fit],
    lambda: {"x": _embed(images, fit, num_classes, epochs)},
  )
  return stored["x"]


def _embed(
  images: np.ndarray, fit: tuple[np.ndarray, np.ndarray], num_classes: int, epochs: int
) -> np.ndarray:
  model = ConvNet(FEATURES, num_classes)
  x, y = map(jnp.asarray, fit)
  keys = jax.random.split(jax.random.key(1), epochs)
  train = compiler.jit(functools.partial(_train, model))
  with waiting("training the encoder"):
    params = jax.block_until_ready(train(model.init(jax.random.key(0), x[:1]), x, y, keys))
  embedding = compiler.jit(lambda params, x: model.apply(params, x, embedding=True))
  parts = np.array_split(images, -(-len(images) // 1024))
  return np.concatenate([np.asarray(embedding(params, part)) for part in parts])


def _train(model: ConvNet, params: VariableDict, x: Array, y: Array, keys: Array) -> VariableDict:
  """Trains by Adam, one epoch a key, on batches of a fresh permutation."""
  optimizer = optax.adam(LEARNING_RATE)
  steps = max(1, len(x) // BATCH)

  def loss(params: VariableDict, rows: Array) -> Array:
    logits = model.apply(params, x[rows])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

  def step(state, rows):
    params, opt_state = state
    updates, opt_state = optimizer.update(jax.grad(loss)(params, rows), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  def epoch(state, key):
    order = jax.random.permutation(key, len(x))[: steps * BATCH]
    return jax.lax.scan(step, state, order.reshape(steps, -1))[0], None

  return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)[0][0]
