"""Clients that hold graphs: dealt out like arrays, then packed into batches of one shape."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jraph
import numpy as np

from jaxmethods.data import sources
from jaxmethods.data.records import GraphData, describe
from jaxmethods.errors import InputError
from jaxmethods.experiments.federated import holdings, nets
from jaxmethods.experiments.federated.holdings import Arrays, Deal, Holdings, Pool
from jaxmethods.experiments.federated.nets import Task
from jaxmethods.federated.batching import Batches
from jaxmethods.graphs import batching
from jaxmethods.models.gin import GINBackbone
from jaxmethods.trees import PyTree

_ROW = "row"  # of a graph in its set: what is dealt out


class GraphClients(NamedTuple):
  """Clients in batches of one shape, which are the same in every epoch.

  Attributes:
    held: who holds which rows of the set.
    train: (K, steps, ...).
    test: (K, ...), one batch a client.
  """

  held: Holdings
  train: Batches
  test: PyTree


def load(name: str, deal: Deal, batch_size: int) -> tuple[GraphData, GraphClients]:
  """Reads a set of graphs and deals it out.

  Args:
    name: of one set.
    deal: how.
    batch_size: graphs of a batch.

  Raises:
    InputError: several sets, data that are missing, or a deal that they do not allow.
  """
  sets = sources.load_graphs(name)
  if len(sets) > 1:
    raise InputError(f"data: {name} has {len(sets)} sets of different features: name one")
  (data,) = sets
  batching.check_graphs(data)
  rows = np.arange(len(data.labels))
  pool = Pool(
    {_ROW: rows, "y": data.labels}, np.zeros(len(rows), int), ["all"], {}, data.num_classes,
    describe(sets),
  )  # fmt: skip
  held = holdings.deal_out(pool, deal, name)
  return data, GraphClients(held, _packed(data, held.train, batch_size), _tested(data, held.test))


def pooled(data: GraphData, clients: GraphClients, batch_size: int) -> Batches:
  """Packs all clients' graphs for one that has them all."""
  whole = {_ROW: np.concatenate([own[_ROW] for own in clients.held.train])}
  return _packed(data, [whole], batch_size)


def task(name: str, data: GraphData, clients: GraphClients, width: int, layers: int) -> Task:
  """Makes the task of classifying graphs.

  Args:
    name: "gin".
    data: the set.
    clients: of it.
    width: of the layers.
    layers: number of them.

  Raises:
    InputError: another model.
  """
  if name != "gin":
    raise InputError(f"model: graphs are classified by gin, got {name!r}")
  module: nn.Module = GINBackbone(data.num_classes, hidden=width, num_layers=layers)
  example = jax.tree.map(lambda x: x[0], clients.test)

  def run(params, model_state, batch, key):
    graphs, training = batch["graphs"], key is not None
    return nets.caught(module, params, model_state, (graphs,), key, train=training)

  def init(key):
    return nets.started(module, key, example["graphs"])

  form = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), example)
  return nets.class_task(name, init, run, form, data.num_classes, rows=len(example["mask"]))


def _packed(data: GraphData, clients: list[Arrays], size: int) -> Batches:
  """Batches of all clients, (K, steps, ...); a client with fewer ends in empty ones."""
  cut = [[own[_ROW][i : i + size] for i in range(0, len(own[_ROW]), size)] for own in clients]
  steps = max(map(len, cut))
  none = np.zeros(0, int)
  batch = _batch(
    batching.batch_alike(data, [b for own in cut for b in own + [none] * (steps - len(own))])
  )
  batch = jax.tree.map(lambda x: x.reshape(len(clients), steps, *x.shape[1:]), batch)
  return Batches(batch, batch["mask"].any(-1))


def _tested(data: GraphData, clients: list[Arrays]) -> PyTree:
  return _batch(batching.batch_alike(data, [own[_ROW] for own in clients]))


def _batch(graphs: jraph.GraphsTuple) -> PyTree:
  return {"graphs": graphs, "y": graphs.globals["label"], "mask": graphs.globals["mask"]}
