"""Clients of federated graph classification: data sets split, batched and packed into few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jraph
import numpy as np

from jaxmethods.data import spectra_cache, splits
from jaxmethods.data.records import GraphData
from jaxmethods.errors import InputError
from jaxmethods.experiments.fedssp.backbones import Batch, graphs_of
from jaxmethods.federated import padding, partition
from jaxmethods.graphs import packing
from jaxmethods.graphs.packing import SpectralBatch
from jaxmethods.graphs.spectral import Spectra
from jaxmethods.graphs.structure import structure_features
from jaxmethods.trees import PyTree

VALIDATION, TEST = 1, 2  # of `globals["split"]`; 0 is padding


class Share(NamedTuple):
  """A data set shared out among its clients; graphs are named by their index in it.

  Attributes:
    data: the data set.
    names: one per client.
    train: per client, its batches of training graphs.
    held_out: per client, its batches of validation and test graphs.
    split: (graphs,) int32, VALIDATION or TEST, 0 elsewhere.
    dropped: graphs without edges, which nobody holds.
    majority: share of the most frequent class.
  """

  data: GraphData
  names: list[str]
  train: list[list[np.ndarray]]
  held_out: list[list[np.ndarray]]
  split: np.ndarray
  dropped: int
  majority: float


class Clients(NamedTuple):
  """A group of clients in batches of one shape; they hold one data set or several similar ones.

  Attributes:
    names: one per client.
    ids: (clients,) int32, positions of the clients when counted through the data sets as given.
    widths: number of features of each client's own data; wider batches end in zeros.
    sets: one per client, the data set that it holds a part of.
    num_classes: of all these data sets.
    train: batches, (clients, steps, ...); a client with fewer batches ends in empty ones.
    held_out: validation and test graphs likewise; `globals["split"]` tells which is which.
    counts: (clients,) number of training graphs.
    example: shapes and types of a small batch, for what depends on widths alone.
  """

  names: list[str]
  ids: np.ndarray
  widths: list[int]
  sets: list[int]
  num_classes: int
  train: Batch
  held_out: Batch
  counts: np.ndarray | jax.Array
  example: PyTree


def share_out(data: GraphData, *, count: int, batch_size: int, seed: int) -> Share:
  """Splits one data set among its clients.

  Args:
    data: data set.
    count: clients.
    batch_size: graphs of a batch.
    seed: of the splits, and of the clients where there are several.

  Raises:
    InputError: a client without training or test graphs, with one class only, or with features that
      are not finite; the message names it.
  """
  name = data.source.name.split(":")[-1].split("/")[-1]
  if not np.isfinite(data.graphs.nodes).all():
    graph = np.repeat(np.arange(len(data.labels)), data.graphs.n_node)
    bad = graph[~np.isfinite(data.graphs.nodes).all(1)][0]
    raise InputError(f"{name}: graph {bad} has features that are not finite")
  parts = _partition(len(data.labels), count, seed, name)
  names = [name if len(parts) == 1 else f"{name}.{i}" for i in range(len(parts))]
  usable = np.asarray(data.graphs.n_edge) > 0
  train, held_out = [], []
  split = np.zeros(len(data.labels), np.int32)
  for client, part in zip(names, parts, strict=True):
    fit, validation, test = _split(client, part, data.labels, usable, seed)
    split[validation], split[test] = VALIDATION, TEST
    train.append(_chunks(fit, batch_size))
    held_out.append(_chunks(np.concatenate([validation, test]), batch_size))
  majority = np.bincount(data.labels).max() / len(data.labels)
  return Share(data, names, train, held_out, split, int((~usable).sum()), float(majority))


def _partition(graphs: int, clients: int, seed: int, name: str) -> list[np.ndarray]:
  """Deals the graphs of a domain to clients; a single client keeps the published order."""
  if clients > graphs:
    raise InputError(f"clients_per_domain: {clients} clients, but {name} has {graphs} graphs")
  if clients == 1:
    return [np.arange(graphs)]
  return partition.iid(graphs, clients, seed)


def _split(
  client: str, part: np.ndarray, labels: np.ndarray, usable: np.ndarray, seed: int
) -> list[np.ndarray]:
  """Splits the graphs of a client: training, validation and test, without those without edges.

  Such graphs have no spectrum to speak of: the published code trains and tests without.
  """
  try:
    pieces = splits.stratified_split(labels[part], (0.8, 0.1, 0.1), seed=seed)
  except InputError as error:
    raise InputError(f"client {client}: {error}") from None
  fit, validation, test = (part[i][usable[part[i]]] for i in pieces)
  for what, ids in (("training", fit), ("test", test)):
    if not len(ids):
      raise InputError(f"client {client}: no {what} graphs with edges among its {len(part)} graphs")
  if len(np.unique(labels[fit])) < 2:
    raise InputError(f"client {client}: its training graphs all have class {labels[fit][0]}")
  return [fit, validation, test]


def _chunks(ids: np.ndarray, size: int) -> list[np.ndarray]:
  """Cuts into batches."""
  return [ids[i : i + size] for i in range(0, len(ids), size)]


def similar_sets(shares: Sequence[Share], slack: float) -> list[tuple[int, ...]]:
  """Groups data sets whose batches can share one shape, which is one program to compile.

  Args:
    shares: data sets.
    slack: share by which a pass over all training batches may cost more than in a shape per data set,
      in work and, a tenth of it, in memory (where empty batches count as well).

  Returns:
    Positions in `shares`, a tuple per group; the data sets of a group agree in their number of classes.
  """
  return padding.merge_shapes(
    len(shares), lambda members: _shape_cost([shares[i] for i in members]), slack
  )


def _shape_cost(shares: Sequence[Share]) -> float:
  """Estimates a pass over all training batches in one shape; infinite for different classes."""
  if len({share.data.num_classes for share in shares}) > 1:
    return np.inf
  counts = shares[0].data.graphs._replace(
    n_node=np.concatenate([share.data.graphs.n_node for share in shares]),
    n_edge=np.concatenate([share.data.graphs.n_edge for share in shares]),
  )
  clients = _joined(shares, "train")
  work, kept = packing.shared_cost(counts, [ids for client in clients for ids in client])
  steps = [len(client) for client in clients]
  # Measured on NCI1, about a kilobyte is kept for the work of a node slot.
  return work * sum(steps) + kept / 2500 * len(steps) * max(steps)


def pack_clients(
  shares: Sequence[Share],
  members: tuple[int, ...],
  view: Callable[[SpectralBatch], Batch],
  *,
  hidden: int,
  structure: bool = False,
) -> Clients:
  """Packs the batches of all clients of some data sets into one shape.

  Args:
    shares: all data sets.
    members: positions of the data sets to pack.
    view: (packed batch) -> the part of it to keep.
    hidden: H, width of the sine encoding.
    structure: whether the nodes get FedStar's structure features.
  """
  some = [shares[i] for i in members]
  sizes = [len(share.names) for share in shares]
  ids = np.split(np.arange(sum(sizes), dtype=np.int32), np.cumsum(sizes)[:-1])
  each = lambda values: [v for v, share in zip(values, some, strict=True) for _ in share.names]
  graphs, spectra = _join_graphs(some, structure)
  labels = np.concatenate([share.data.labels for share in some])
  split = np.concatenate([share.split for share in some])
  train, held_out, small = (
    _pack(graphs, labels, spectra, batches, hidden)
    for batches in (_joined(some, "train"), _joined(some, "held_out"), [[some[0].train[0][0][:1]]])
  )
  graph = held_out.graphs.globals["id"]
  held_out.graphs.globals["split"] = np.where(graph >= 0, split[graph], 0)
  return Clients(
    names=[name for share in some for name in share.names],
    ids=np.concatenate([ids[i] for i in members]),
    widths=each([share.data.graphs.nodes.shape[1] for share in some]),
    sets=each(members),
    num_classes=some[0].data.num_classes,
    train=view(train),
    held_out=view(held_out),
    counts=np.array([sum(map(len, c)) for share in some for c in share.train], np.float32),
    example=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), view(small)),
  )


def to_device(clients: Clients, sharding: jax.sharding.Sharding | None) -> Clients:
  """Moves the arrays of a group to the device, or to all devices of a sharding."""
  train, held_out, counts = jax.device_put(
    (clients.train, clients.held_out, clients.counts), sharding
  )
  return clients._replace(train=train, held_out=held_out, counts=counts)


def example_of(clients: Clients, width: int) -> PyTree:
  """Returns the shapes of a small batch whose nodes have `width` features."""
  batch = jax.tree.map(lambda x: x, clients.example)
  nodes = graphs_of(batch).nodes
  nodes["features"] = jax.ShapeDtypeStruct((len(nodes["mask"]), width), np.float32)
  return batch


def _joined(shares: Sequence[Share], part: str) -> list[list[np.ndarray]]:
  """Lists the batches of all clients, with graphs counted through the data sets."""
  starts = np.cumsum([0, *(len(share.data.labels) for share in shares)])
  return [
    [ids + start for ids in batches]
    for start, share in zip(starts, shares, strict=False)
    for batches in getattr(share, part)
  ]


def _join_graphs(shares: Sequence[Share], structure: bool) -> tuple[jraph.GraphsTuple, Spectra]:
  """Joins all graphs in one jraph batch, features padded to the widest, and their spectra."""
  width = max(share.data.graphs.nodes.shape[1] for share in shares)
  parts, spectra = [], []
  for share in shares:
    graphs = share.data.graphs
    nodes = {"features": np.pad(graphs.nodes, [(0, 0), (0, width - graphs.nodes.shape[1])])}
    if structure:
      nodes["structure"] = structure_features(graphs)
    parts.append(graphs._replace(nodes=nodes))
    spectra.append(spectra_cache.laplacian_spectra(graphs))
  if len(parts) == 1:  # no second copy of the spectra
    return parts[0], spectra[0]
  return jraph.batch_np(parts), Spectra(*map(np.concatenate, zip(*spectra, strict=True)))


def _pack(
  graphs: jraph.GraphsTuple,
  labels: np.ndarray,
  spectra: Spectra,
  batches: list[list[np.ndarray]],
  hidden: int,
) -> SpectralBatch:
  """Packs the batches of several clients into one shape: (clients, steps, ...)."""
  steps = max(map(len, batches))
  empty = np.zeros(0, np.int64)
  flat = [b for client in batches for b in client + [empty] * (steps - len(client))]
  packed = packing.pack(graphs, labels, spectra, flat, hidden)
  return jax.tree.map(lambda x: x.reshape(len(batches), steps, *x.shape[1:]), packed)
