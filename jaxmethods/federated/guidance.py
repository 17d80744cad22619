"""FedAvg whose local loss is guided by the outputs of the global model.

moon    Li, He, Song 2021. Model-contrastive federated learning.
fedntd  Lee et al. 2022. Preservation of the global knowledge by not-true distillation.

Both are `algorithms.fedavg` with a penalty that sees the received parameters and the client's own of the
round before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxmethods.federated.algorithm import FederatedAlgorithm, Params
from jaxmethods.federated.algorithms import Loss, Options, fedavg
from jaxmethods.federated.batching import Batch
from jaxmethods.stats import shapes
from jaxmethods.stats.losses import mean_of_real

Outputs: TypeAlias = Callable[[Params, Batch], Float[Array, "B h"]]


def moon(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  features: Outputs,
  mu: float = 1.0,
  temperature: float = 0.5,
  **options: Unpack[Options],
) -> FederatedAlgorithm:
  """FedAvg with mu times the contrast of `features` (B, h) to the global and the previous model.

  With a linear head on frozen embeddings the only trainable output is the logits: pass those.
  `batch["mask"]` (B,) says which examples are real.

  >>> outputs = lambda params, batch: batch["x"] @ params["w"][:, None]
  >>> jm.federated.moon(loss, optax.sgd(0.1), outputs).init(linear, key)._fields
  ('params', 'opt_state')
  """

  def penalty(params, received, previous, batch):
    stop = jax.lax.stop_gradient
    losses = model_contrast(
      features(params, batch),
      stop(features(received, batch)),
      stop(features(previous, batch)),
      temperature,
    )
    return mu * mean_of_real(losses, batch["mask"])

  return fedavg(loss, optimizer, penalty=penalty, **options)


def model_contrast(
  z: Float[Array, "B h"],
  z_global: Float[Array, "B h"],
  z_previous: Float[Array, "B h"],
  temperature: float = 0.5,
) -> Float[Array, " B"]:
  """Computes -log of the share of e^(cos(z, z_global) / tau) beside e^(cos(z, z_previous) / tau).

  Args:
    z: features of the model in training, (B, h).
    z_global: features of the global model, (B, h), the positive.
    z_previous: features of the model of the round before, (B, h), the negative.
    temperature: tau.

  Returns:
    Loss of each example, (B,).

  Raises:
    ValueError: the shapes differ.
  """
  shapes.check(z=(z, "B h"), z_global=(z_global, "B h"), z_previous=(z_previous, "B h"))
  positive = optax.losses.cosine_similarity(z, z_global, epsilon=1e-12) / temperature
  negative = optax.losses.cosine_similarity(z, z_previous, epsilon=1e-12) / temperature
  return jax.nn.softplus(negative - positive)


def fedntd(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  logits: Outputs,
  temperature: float = 1.0,
  beta: float = 0.5,
  **options: Unpack[Options],
) -> FederatedAlgorithm:
  """FedAvg with beta times the divergence from the global model over the classes that are not true.

  `batch["mask"]` (B,) says which examples are real, `batch["y"]` (B,) are their labels.

  >>> logits = lambda params, batch: batch["x"] @ params["w"][:, None]
  >>> jm.federated.fedntd(loss, optax.sgd(0.1), logits).init(linear, key)._fields
  ('params', 'opt_state')
  """

  def penalty(params, received, previous, batch):
    del previous
    teacher = jax.lax.stop_gradient(logits(received, batch))
    losses = not_true_divergence(logits(params, batch), teacher, batch["y"], temperature)
    return beta * mean_of_real(losses, batch["mask"])

  return fedavg(loss, optimizer, penalty=penalty, **options)


def not_true_divergence(
  logits: Float[Array, "B C"],
  teacher: Float[Array, "B C"],
  labels: Int[Array, " B"],
  temperature: float = 1.0,
) -> Float[Array, " B"]:
  """Computes KL(teacher || student) of the softmaxes without the true class, times tau^2.

  Args:
    logits: logits of the student, (B, C).
    teacher: logits of the teacher, (B, C).
    labels: true classes, (B,).
    temperature: tau.

  Returns:
    Divergence of each example, (B,).

  Raises:
    ValueError: the shapes do not fit.
  """
  shapes.check(logits=(logits, "B C"), teacher=(teacher, "B C"), labels=(labels, "B"))
  true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  student = jax.nn.log_softmax(jnp.where(true, -jnp.inf, logits / temperature))
  teacher = jax.nn.log_softmax(jnp.where(true, -jnp.inf, teacher / temperature))
  # The true class has probability 0 on both sides: keep its -inf out of the product.
  student, teacher = (jnp.where(true, 0.0, x) for x in (student, teacher))
  share = jnp.where(true, 0.0, jnp.exp(teacher))
  return temperature**2 * (share * (teacher - student)).sum(-1)
