"""State, first state, round and evaluation of one row, as functions of the parts it is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.errors import InputError
from jaxmethods.experiments.ggeur import figures
from jaxmethods.experiments.ggeur.algorithms import MakeClient, logits_of
from jaxmethods.experiments.ggeur.config import Config
from jaxmethods.experiments.ggeur.data import Data
from jaxmethods.experiments.ggeur.generation import Enlarge, Holdings
from jaxmethods.federated import engine
from jaxmethods.federated.algorithm import FederatedAlgorithm, Params
from jaxmethods.runtime import compiler, pictures
from jaxmethods.testbeds.federated_images import clients
from jaxmethods.testbeds.federated_images.clients import Pool
from jaxmethods.testbeds.federated_images.figures import own_examples


class Parts(NamedTuple):
  """Everything that a row is made of.

  Attributes:
    config: of the row.
    data: pool and tests.
    names: of the clients.
    algorithm: that trains the head.
    make_client: parameters -> a client before its first round.
    enlarge: (key, holdings) -> holdings that clients train on.
    mesh: devices that the clients are spread over, if any.
  """

  config: Config
  data: Data
  names: list[str]
  algorithm: FederatedAlgorithm
  make_client: MakeClient
  enlarge: Enlarge
  mesh: Mesh | None


class State(NamedTuple):
  """Everything a checkpoint needs; `data`, `weights` and `own` are fixed once drawn.

  Attributes:
    server: of the algorithm.
    clients: of the algorithm, stacked.
    data: "x" (K, n, d), "y", "mask" (K, n); with generation, class by class, own embeddings first.
    weights: (K,) examples.
    own: (K, C) own examples of every class, before anything was generated.
    key: of the rounds.
    round: rounds completed.
  """

  server: Any  # these two as the algorithm has them
  clients: Any
  data: dict[str, Array]
  weights: Array
  own: Array
  key: Array
  round: Array


def init(parts: Parts, key: Array) -> State:
  """Draws the partition, enlarges the holdings, starts the head at zero.

  Raises:
    InputError: naming the client that is empty.
  """
  num_classes, pool = parts.data.num_classes, parts.data.train
  partition_key, enlarge_key, algorithm_key, round_key = jax.random.split(key, 4)
  deal = clients.draw_clients(partition_key, pool.y, num_classes, parts.config)
  if not isinstance(key, jax.core.Tracer):  # traced, there is no draw to look at
    _check_clients(np.asarray(deal.mask), parts.names)
  held = Holdings(pool.x[deal.domain], pool.y[deal.domain], deal.mask)
  own = clients.class_counts(held.y, held.mask, num_classes)
  x, y, mask = parts.enlarge(enlarge_key, held)
  if parts.config.algorithm == "centralised":
    x, y, mask = (a.reshape(1, -1, *a.shape[2:]) for a in (x, y, mask))
  head = {"kernel": jnp.zeros((x.shape[-1], num_classes)), "bias": jnp.zeros(num_classes)}
  client = parts.make_client({"head": head})
  states = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x), *a.shape)), client)
  data = {"x": x, "y": jnp.maximum(y, 0), "mask": mask}
  weights = mask.sum(1).astype(jnp.float32)
  server = parts.algorithm.init({"head": head}, algorithm_key)
  return State(server, states, data, weights, own, round_key, jnp.zeros((), jnp.int32))


def step(parts: Parts, state: State, batch: tuple[()]) -> tuple[State, dict[str, Array]]:
  """One round; the order of examples follows from the state's key and round, not from a batch."""
  del batch
  server, (states,), metrics = engine.federated_round(
    parts.algorithm, state.server, (state.clients,), (state.data,), (state.weights,),
    jax.random.fold_in(state.key, state.round),
    client_map="shard" if parts.mesh else None, mesh=parts.mesh, drop_nonfinite=True,
  )  # fmt: skip
  summed = ("bytes_up", "bytes_down", "rejected")
  means = {k: v.sum() if k in summed else v.mean() for k, v in metrics.items()}
  return state._replace(server=server, clients=states, round=state.round + 1), means


def evaluate(parts: Parts, state: State, test: Pool) -> dict[str, Array]:
  """Accuracy on every domain; where clients differ, their mean."""
  size = state.weights.shape[0]
  params = engine.client_params(parts.algorithm, state.server, (state.clients,), (size,))[0]
  # A method with one global head has the same one at every client.
  per_domain = jax.vmap(_accuracy, in_axes=(0, None))(params, test).mean(0)
  return {
    "test_accuracy": per_domain.mean(),
    "spread": per_domain.std(),  # over domains, as published
    **{f"test_accuracy/{name}": per_domain[i] for i, name in enumerate(parts.data.domains)},
  }


def draw_figures(parts: Parts, state: State) -> dict[str, Figure]:
  """Draws accuracies, own examples and, where there are any, generated embeddings."""
  program = compiler.jit(lambda state, test: evaluate(parts, state, test))
  metrics = jax.device_get(program(state, parts.data.test))
  accuracy = {name: float(metrics[f"test_accuracy/{name}"]) for name in parts.data.domains}
  label = f"test accuracy of the head (mean {np.mean(list(accuracy.values())):.3f})"
  own = np.asarray(state.own)
  drawn = {
    "accuracy": pictures.bars({"accuracy": accuracy}, label),
    "own_examples": own_examples(own, parts.names, "own examples"),
  }
  if parts.config.enlarge in ("own", "full") and parts.config.algorithm != "centralised":
    held = jax.device_get(state.data)
    unseen = np.asarray(parts.data.test.x), np.asarray(parts.data.test.y)
    drawn["generated_embeddings"] = figures.generated_embeddings(
      own, held["x"], held["y"], held["mask"], unseen, parts.names
    )
  return drawn


def _accuracy(params: Params, test: Pool) -> Array:
  """Share of the real examples of every domain that a head gets right, (D,)."""
  right = (logits_of(params, {"x": test.x}).argmax(-1) == test.y).sum(-1)
  return right / (test.y >= 0).sum(-1)


def _check_clients(mask: np.ndarray, names: list[str]) -> None:
  if (empty := np.flatnonzero(~mask.any(1))).size:
    k = int(empty[0])
    name = "" if names[k] == f"client {k}" else f" ({names[k]})"
    raise InputError(f"client {k}{name} is empty: raise alpha or min_per_class")
