"""Clients that exchange class prototypes and keep their models.

fedproto  Tan et al. 2022. FedProto: federated prototype learning across heterogeneous clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.federated.algorithm import ClientData, FederatedAlgorithm, Params
from jaxmethods.federated.algorithms import ClientState, Loss, local_sgd
from jaxmethods.federated.batching import Batch, Batching, prebatched
from jaxmethods.stats import shapes
from jaxmethods.stats.losses import mean_of_real
from jaxmethods.trees import Key

Features: TypeAlias = Callable[[Params, Batch], Float[Array, "B h"]]


class Prototypes(NamedTuple):
  """Features of every class.

  Attributes:
    means: (C, h), zero where nothing is known.
    counts: (C,) float32, examples that they are means of.
  """

  means: Float[Array, "C h"]
  counts: Float[Array, " C"]


def fedproto(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  features: Features,
  num_classes: int,
  width: int,
  weight: float = 1.0,
  *,
  local_epochs: int = 1,
  keep_optimizer: bool = True,
  batches: Batching = prebatched,
) -> FederatedAlgorithm:
  """FedProto: local loss + weight * mean squared distance to the prototype of the class.

  A client uploads the means of its features by class, after training, and how many examples they are
  of; nothing of its model. The server averages them by these numbers (paper, eq. 6, without its further
  1 / |N_j|, which would shrink them; so does the published code). A class that nobody of a round holds
  keeps its prototype. Clients are made by `init_client(shared=trees.nothing, optimizer=...)`.

  Args:
    loss: as in `algorithms.fedavg`.
    optimizer: of the clients.
    features: (parameters, batch) -> (B, h), of one width at all clients.
    num_classes: C.
    width: h.
    weight: lambda of the paper.
    local_epochs: passes over a client's batches per round.
    keep_optimizer: as in `algorithms.fedavg`.
    batches: as in `algorithms.fedavg`; a batch has "y" (B,) and "mask" (B,).

  >>> features = lambda params, batch: batch["x"] * params["w"]
  >>> algorithm = jm.federated.fedproto(loss, optax.sgd(0.1), features, num_classes=2, width=3)
  >>> algorithm.init(linear, key).means.shape
  (2, 3)
  """

  def init(params: Params, key: Key) -> Prototypes:
    del params, key
    return Prototypes(jnp.zeros((num_classes, width)), jnp.zeros(num_classes))

  def local(message: Prototypes, client: ClientState, data, key):
    def objective(params, model_state, batch, key):
      value, aux = loss(params, model_state, batch, key)
      far = prototype_distance(
        features(params, batch), batch["y"], message.means, message.counts > 0
      )
      return value + weight * mean_of_real(far, batch["mask"]), aux

    opt_state = client.opt_state if keep_optimizer else optimizer.init(client.params)
    start = (client.params, client.model_state, opt_state)
    (params, model_state, opt_state), metrics = local_sgd(
      objective, optimizer, start, data, key, epochs=local_epochs, batches=batches
    )
    upload = _client_prototypes(features, params, batches, data, key, num_classes, width)
    kept = ClientState(params, model_state, opt_state if keep_optimizer else ())
    return kept, upload, metrics

  return FederatedAlgorithm(
    init,
    lambda state, index: state,
    local,
    lambda state, uploads, weights: merged_prototypes(state, uploads, weights > 0),
    lambda message, client: client.params,
  )


def prototype_distance(
  features: Float[Array, "B h"],
  labels: Int[Array, " B"],
  means: Float[Array, "C h"],
  known: Bool[Array, " C"],
) -> Float[Array, " B"]:
  """Computes ||f - prototype||^2 / h of each example, 0 where its class has no prototype.

  Args:
    features: f, (B, h).
    labels: classes, (B,).
    means: prototypes, (C, h).
    known: classes that have one, (C,).

  Raises:
    ValueError: the shapes do not fit.
  """
  shapes.check(
    features=(features, "B h"), labels=(labels, "B"), means=(means, "C h"), known=(known, "C")
  )
  return jnp.where(known[labels], jnp.square(features - means[labels]).mean(-1), 0.0)


def merged_prototypes(
  before: Prototypes, uploads: Prototypes, present: Bool[Array, " clients"]
) -> Prototypes:
  """Averages the prototypes of clients by their examples; a class without any keeps the one before.

  Args:
    before: of the server, (C, h) and (C,).
    uploads: stacked, (clients, C, h) and (clients, C).
    present: clients that count, (clients,).

  Raises:
    ValueError: the shapes do not fit.
  """
  shapes.check(
    before=(before.means, "C h"), means=(uploads.means, "clients C h"), present=(present, "clients")
  )
  counts = jnp.where(present[:, None], uploads.counts, 0)
  total = counts.sum(0)
  sums = jnp.einsum("kc,kch->ch", counts, uploads.means)
  means = jnp.where(total[:, None] > 0, sums / jnp.maximum(total, 1)[:, None], before.means)
  return Prototypes(means, jnp.where(total > 0, total, before.counts))


def _client_prototypes(
  features: Features,
  params: Params,
  batches: Batching,
  data: ClientData,
  key: Key,
  num_classes: int,
  width: int,
) -> Prototypes:
  """Passes once over a client's batches."""
  steps = batches(data, key)

  def add(total: tuple[jax.Array, jax.Array], xs: tuple[Batch, jax.Array]):
    batch, real = xs
    member = jax.nn.one_hot(batch["y"], num_classes) * (batch["mask"] & real)[:, None]
    sums, counts = total
    return (sums + member.T @ features(params, batch), counts + member.sum(0)), None

  start = (jnp.zeros((num_classes, width)), jnp.zeros(num_classes))
  (sums, counts), _ = jax.lax.scan(add, start, (steps.batch, steps.real))
  return Prototypes(sums / jnp.maximum(counts, 1)[:, None], counts)
