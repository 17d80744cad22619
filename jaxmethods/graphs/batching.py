"""Padded batches of a graph data set, on the host, in the layout of `jaxmethods.graphs`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jraph
import numpy as np

from jaxmethods.errors import InputError


class Named(Protocol):
  """Anything with a name."""

  @property
  def name(self) -> str: ...


class LabelledGraphs(Protocol):
  """A set of labelled graphs; `GraphData` of the data records is one.

  Attributes:
    graphs: one jraph batch of numpy arrays, unpadded: `nodes` (N, F) features, both directions of
      every edge.
    labels: (G,) int32 in 0..num_classes-1.
    num_classes: number of classes.
    source: its name is in every message.
  """

  @property
  def graphs(self) -> jraph.GraphsTuple: ...

  @property
  def labels(self) -> np.ndarray: ...

  @property
  def num_classes(self) -> int: ...

  @property
  def source(self) -> Named: ...


class BatchShape(NamedTuple):
  """Static sizes of a batch; every distinct one is a compilation."""

  nodes: int
  edges: int
  graphs: int


def check_graphs(data: LabelledGraphs) -> None:
  """Checks that a data set keeps its contract.

  Raises:
    InputError: naming the data set and the graph.

  >>> jm.graphs.check_graphs(triangles)
  """
  name, graphs = data.source.name, data.graphs
  num_graphs, num_nodes, num_edges = len(graphs.n_node), len(graphs.nodes), len(graphs.senders)
  if len(data.labels) != num_graphs:
    raise InputError(f"{name}: {len(data.labels)} labels for {num_graphs} graphs")
  if graphs.n_node.sum() != num_nodes or graphs.n_edge.sum() != num_edges:
    raise InputError(f"{name}: n_node and n_edge do not add up to the nodes and edges given")
  node_graph = np.repeat(np.arange(num_graphs), graphs.n_node)
  finite = np.isfinite(graphs.nodes).all(1)
  if not finite.all():
    raise InputError(f"{name}: graph {node_graph[~finite][0]} has features that are not finite")
  edge_graph = np.repeat(np.arange(num_graphs), graphs.n_edge)
  first = np.cumsum(graphs.n_node) - graphs.n_node
  for ends in (graphs.senders, graphs.receivers):
    local = ends - first[edge_graph]
    outside = (local < 0) | (local >= graphs.n_node[edge_graph])
    if outside.any():
      raise InputError(f"{name}: graph {edge_graph[outside][0]} has an edge outside its nodes")
  wrong = (data.labels < 0) | (data.labels >= data.num_classes)
  if wrong.any():
    graph = int(np.flatnonzero(wrong)[0])
    raise InputError(
      f"{name}: graph {graph} has label {data.labels[graph]}, expected 0..{data.num_classes - 1}"
    )


def batch_graphs(
  data: LabelledGraphs,
  indices: Sequence[int] | np.ndarray,
  batch_size: int = 128,
  *,
  max_shapes: int = 1,
  node_multiple: int = 32,
  edge_multiple: int = 128,
  node_data: Mapping[str, np.ndarray] | None = None,
  edge_data: Mapping[str, np.ndarray] | None = None,
) -> list[jraph.GraphsTuple]:
  """Cuts the graphs named by `indices` into consecutive batches and pads them.

  One shape for all is the default: a compilation costs as much as 30 to 60 steps, and only the short
  last batch is padded much.

  Args:
    data: the data set.
    indices: which graphs, in which order.
    batch_size: graphs per batch; the last one may hold fewer.
    max_shapes: largest number of distinct shapes.
    node_multiple: node slots are a multiple of this.
    edge_multiple: edge slots are a multiple of this.
    node_data: further arrays (all nodes of `data`, ...), batched and padded with zeros into `nodes`.
    edge_data: further arrays (all edges of `data`, ...), likewise into `edges`.

  Returns:
    Batches in order, numpy arrays, at least one padding node and one padding graph each.

  Raises:
    InputError: if there is no graph, an index is out of range, or `data` breaks its contract.
    ValueError: if `batch_size`, `max_shapes` or a multiple is below 1.

  >>> (batch,) = jm.graphs.batch_graphs(triangles, [0, 1])
  >>> int(batch.globals["mask"].sum()), batch.nodes["features"].shape[0] % 32
  (2, 0)
  """
  indices = np.asarray(indices)
  if min(batch_size, max_shapes, node_multiple, edge_multiple) < 1:
    raise ValueError("batch_size, max_shapes and the multiples must be at least 1")
  name, num_graphs = data.source.name, len(data.labels)
  if indices.size == 0:
    raise InputError(f"{name}: no graphs to batch")
  if not np.issubdtype(indices.dtype, np.integer) or indices.ndim != 1:
    raise ValueError("indices must be a one-dimensional list of integers")
  if indices.min() < 0 or indices.max() >= num_graphs:
    raise InputError(f"{name}: graph index outside 0..{num_graphs - 1}")
  check_graphs(data)
  chunks = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
  shapes = _shapes(data.graphs, chunks, max_shapes, node_multiple, edge_multiple)
  return [
    _pad(data, chunk, shape, dict(node_data or {}), dict(edge_data or {}))
    for chunk, shape in zip(chunks, shapes, strict=True)
  ]


def batch_alike(
  data: LabelledGraphs,
  chunks: Sequence[np.ndarray],
  *,
  node_multiple: int = 32,
  edge_multiple: int = 128,
) -> jraph.GraphsTuple:
  """Pads given batches to the shape of the largest and stacks them; a batch may be empty.

  Args:
    data: the data set.
    chunks: graphs of every batch.
    node_multiple: node slots are a multiple of this.
    edge_multiple: edge slots are a multiple of this.

  Returns:
    Arrays (chunks, ...), at least one padding node and one padding graph in each.

  Raises:
    InputError: `data` breaks its contract.
  """
  check_graphs(data)
  whole = [np.asarray(chunk, int) for chunk in chunks]
  (shape, *_) = _shapes(data.graphs, whole, 1, node_multiple, edge_multiple)
  return stack([_pad(data, chunk, shape, {}, {}) for chunk in whole])


def batch_shape(batch: jraph.GraphsTuple) -> BatchShape:
  """Returns the static sizes of one batch.

  >>> (batch,) = jm.graphs.batch_graphs(triangles, [0, 1])
  >>> jm.graphs.batch_shape(batch).graphs
  3
  """
  return BatchShape(len(batch.nodes["mask"]), len(batch.senders), len(batch.n_node))


def count_shapes(batches: Sequence[jraph.GraphsTuple]) -> dict[BatchShape, int]:
  """Counts the batches of each shape; the number of entries is that of compilations of a step."""
  return dict(Counter(map(batch_shape, batches)))


def stack(batches: Sequence[jraph.GraphsTuple]) -> jraph.GraphsTuple:
  """Stacks batches of one shape along a new first axis, for `lax.scan`.

  Raises:
    ValueError: if there are none or their shapes differ.
  """
  shapes = count_shapes(batches)
  if len(shapes) != 1:
    raise ValueError(f"stack needs batches of one shape, got {len(shapes)}: {list(shapes)}")
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple


def _shapes(
  graphs: jraph.GraphsTuple,
  chunks: list[np.ndarray],
  max_shapes: int,
  node_multiple: int,
  edge_multiple: int,
) -> list[BatchShape]:
  """Chooses a shape per chunk, at most `max_shapes` distinct ones, with little padding."""
  sizes = np.array(
    # One node and one graph more: slot N-1 and graph G-1 are always padding.
    [
      (
        _round_up(int(graphs.n_node[chunk].sum()) + 1, node_multiple),
        _round_up(max(int(graphs.n_edge[chunk].sum()), 1), edge_multiple),
        len(chunk) + 1,
      )
      for chunk in chunks
    ]
  )
  # Groups are runs in the order of size, cut where that saves most; cost of a batch: its slots.
  # best[j] = cheapest cost of the first j batches with the groups allowed so far.
  order = np.lexsort((sizes[:, 1], sizes[:, 0]))
  ranked = sizes[order]
  count = len(ranked)
  best = np.concatenate([[0.0], np.full(count, np.inf)])
  cuts: list[np.ndarray] = []
  for _ in range(min(max_shapes, count)):
    previous, best, cut = best, best.copy(), np.full(count + 1, -1)
    for end in range(1, count + 1):
      largest = np.maximum.accumulate(ranked[:end][::-1], 0)[::-1]  # of the batches begin..end-1
      cost = previous[:end] + (end - np.arange(end)) * (largest[:, 0] + largest[:, 1])
      begin = int(np.argmin(cost))
      if cost[begin] < best[end]:
        best[end], cut[end] = cost[begin], begin
    cuts.append(cut)
  shapes: dict[int, BatchShape] = {}
  end = count
  for cut in reversed(cuts):
    if end == 0 or cut[end] < 0:  # this group brought nothing
      continue
    group = ranked[cut[end] : end].max(0)
    for rank in range(cut[end], end):
      shapes[int(order[rank])] = BatchShape(*map(int, group))
    end = cut[end]
  return [shapes[i] for i in range(count)]


def _ranges(first: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Concatenates first[i], ..., first[i] + length[i] - 1 of all i."""
  return np.repeat(first - (np.cumsum(length) - length), length) + np.arange(length.sum())


def _pad(
  data: LabelledGraphs,
  chunk: np.ndarray,
  shape: BatchShape,
  node_data: dict[str, np.ndarray],
  edge_data: dict[str, np.ndarray],
) -> jraph.GraphsTuple:
  """Copies the graphs of a chunk into a batch of the shape, edges sorted by receiver and sender."""
  graphs, real = data.graphs, len(chunk)
  n_node, n_edge = graphs.n_node[chunk], graphs.n_edge[chunk]
  first_node = (np.cumsum(graphs.n_node) - graphs.n_node)[chunk]
  first_edge = (np.cumsum(graphs.n_edge) - graphs.n_edge)[chunk]
  nodes, edges = _ranges(first_node, n_node), _ranges(first_edge, n_edge)
  shift = np.repeat(np.cumsum(n_node) - n_node - first_node, n_edge)
  senders, receivers = graphs.senders[edges] + shift, graphs.receivers[edges] + shift
  order = np.lexsort((senders, receivers))
  edges, senders, receivers = edges[order], senders[order], receivers[order]

  def fill(rows: np.ndarray, size: int, value: float = 0) -> np.ndarray:
    padded = np.full((size, *rows.shape[1:]), value, rows.dtype)
    padded[: len(rows)] = rows
    return padded

  spare = shape.graphs - real
  node_counts = np.concatenate([n_node, [shape.nodes - len(nodes)], np.zeros(spare - 1)])
  edge_counts = np.concatenate([n_edge, [shape.edges - len(edges)], np.zeros(spare - 1)])
  return jraph.GraphsTuple(
    nodes={
      "features": fill(graphs.nodes[nodes].astype(np.float32), shape.nodes),
      "graph": fill(np.repeat(np.arange(real, dtype=np.int32), n_node), shape.nodes, real),
      "mask": np.arange(shape.nodes) < len(nodes),
      **{key: fill(rows[nodes], shape.nodes) for key, rows in node_data.items()},
    },
    edges={
      "mask": np.arange(shape.edges) < len(edges),
      **{key: fill(rows[edges], shape.edges) for key, rows in edge_data.items()},
    },
    senders=fill(senders.astype(np.int32), shape.edges, shape.nodes - 1),
    receivers=fill(receivers.astype(np.int32), shape.edges, shape.nodes - 1),
    n_node=node_counts.astype(np.int32),
    n_edge=edge_counts.astype(np.int32),
    globals={
      "label": fill(data.labels[chunk].astype(np.int32), shape.graphs),
      "mask": np.arange(shape.graphs) < real,
    },
  )
