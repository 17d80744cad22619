"""The federated algorithms that train the head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax import Array

from jaxmethods import trees
from jaxmethods.experiments.ggeur.config import Config
from jaxmethods.federated import algorithms, corrections, guidance
from jaxmethods.federated.algorithm import FederatedAlgorithm, Params
from jaxmethods.federated.batching import shuffled
from jaxmethods.methods import ggeur as method

Batch = Mapping[str, Array]  # "x" (B, d), "y", "mask" (B,)
MakeClient = Callable[[Params], tuple]  # parameters -> state of a client before its first round


def logits_of(params: Params, batch: Batch) -> Array:
  """Linear head: (B, d) -> (B, C)."""
  return batch["x"] @ params["head"]["kernel"] + params["head"]["bias"]


def make_loss(double_softmax: bool) -> algorithms.Loss:
  """Returns the cross-entropy of the head over the real examples of a batch."""

  def loss(params, model_state, batch, key):
    del key
    value = method.cross_entropy(
      logits_of(params, batch), batch["y"], batch["mask"], double_softmax
    )
    return value, (model_state, {})

  return loss


def make_algorithm(config: Config) -> tuple[FederatedAlgorithm, MakeClient]:
  """Returns the algorithm, and the function that makes a client from its parameters."""
  loss, adam = make_loss(config.double_softmax), optax.adam(config.learning_rate)
  batches, epochs = shuffled(config.batch_size), config.local_epochs
  average: dict[str, Any] = {
    "weighted": config.weighted,
    "local_epochs": epochs,
    "batches": batches,
  }
  plain = algorithms.init_client
  guided = functools.partial(plain, keep_previous=True)
  match config.algorithm:
    case "fedavg" | "centralised":
      return algorithms.fedavg(loss, adam, **average), plain
    case "fedprox":
      return algorithms.fedprox(loss, adam, config.fedprox_mu, **average), plain
    case "fedadam":
      return algorithms.fedadam(loss, adam, config.server_rate, **average), plain
    case "local":
      alone = functools.partial(plain, shared=trees.nothing, optimizer=adam)
      return algorithms.local_only(loss, adam, **average), alone
    case "moon":
      options = config.moon_mu, config.moon_temperature
      return guidance.moon(loss, adam, logits_of, *options, **average), guided
    case "fedntd":
      options = config.fedntd_temperature, config.fedntd_beta
      return guidance.fedntd(loss, adam, logits_of, *options, **average), guided
    case "scaffold":
      algorithm = corrections.scaffold(loss, config.sgd_rate, local_epochs=epochs, batches=batches)
    case "feddyn":
      algorithm = corrections.feddyn(
        loss, adam, config.feddyn_alpha, local_epochs=epochs, batches=batches
      )
  return algorithm, corrections.init_client
