"""The TUDataset text format: reading, checking, node features.

A set NAME is a folder (or zip) of comma separated text files: `NAME_A` (directed edges of 1-based node
ids), `NAME_graph_indicator` (graph of each node), `NAME_graph_labels`, and optionally `NAME_node_labels`
and `NAME_node_attributes`. What we make of them:

- duplicate edges and self loops are dropped (the IMDB files list every edge twice);
- graphs are undirected: an edge whose reverse is missing is an error, not silently mirrored;
- graph labels, the sorted distinct values, become 0..C-1;
- graphs without edges are kept (the Letter sets have some): the experiment decides and counts.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jraph
import numpy as np
import scipy.sparse

from jaxmethods.data.records import GraphData, Source
from jaxmethods.errors import InputError

Features = Literal["auto", "labels", "attributes", "degree", "both"]

PARTS = ("A", "graph_indicator", "graph_labels", "node_labels", "node_attributes")
_REQUIRED = PARTS[:3]
_MAX_FEATURE_BYTES = 2**31  # one-hot degrees of REDDIT-BINARY would take 10 GB


class TextFiles(NamedTuple):
  """The text files of one set, wherever they lie.

  Attributes:
    origin: folder, archive or package, for messages and reports.
    parts: part ("A", "graph_labels", ...) -> (file name, decompressed text).
  """

  origin: str
  parts: dict[str, tuple[str, bytes]]

  def sha256(self) -> str:
    """Digest over the texts in the order of `PARTS`, however they were packed."""
    return hashlib.sha256(b"".join(self.parts[p][1] for p in PARTS if p in self.parts)).hexdigest()


class RawGraphs(NamedTuple):
  """What the files say, checked, before features are chosen.

  Attributes:
    n_node: (G,) int32.
    n_edge: (G,) int32, directed edges.
    senders, receivers: (E,) int32 ids within the whole set, sorted by (sender, receiver).
    graph_labels: (G,) int64 as published.
    node_labels: (N, L) int64 or None; L > 1 for sets with composite labels.
    node_attributes: (N, A) float32 or None.
  """

  n_node: np.ndarray
  n_edge: np.ndarray
  senders: np.ndarray
  receivers: np.ndarray
  graph_labels: np.ndarray
  node_labels: np.ndarray | None
  node_attributes: np.ndarray | None


def to_graph_data(
  raw: RawGraphs, source: Source, features: Features = "auto", max_degree: int | None = None
) -> GraphData:
  """Chooses node features (see `node_features`) and numbers the classes."""
  classes, labels = np.unique(raw.graph_labels, return_inverse=True)
  graphs = jraph.GraphsTuple(
    nodes=node_features(raw, features, max_degree, source.name),
    edges=None,
    senders=raw.senders,
    receivers=raw.receivers,
    n_node=raw.n_node,
    n_edge=raw.n_edge,
    globals=None,
  )
  return GraphData(graphs, labels.astype(np.int32), len(classes), source)


def node_features(
  raw: RawGraphs, kind: Features = "auto", max_degree: int | None = None, name: str = "graphs"
) -> np.ndarray:
  """Node features as FedSSP (and most of the literature) builds them.

  Args:
    raw: parsed set.
    kind: "labels": each label column shifted by its minimum and one-hot over its whole range (BZR:
      53 columns, of which 10 are ever used); "attributes": as published; "both": labels, then
      attributes; "degree": one-hot degree, max degree + 1 columns; "auto": labels if the set has
      them, else attributes, else degree.
    max_degree: clips the degree, so that the last column means "this or more".
    name: for error messages.

  Returns:
    (N, F) float32.

  Raises:
    InputError: if the set lacks what `kind` asks for, or the result would exceed 2 GiB.
  """
  if kind not in get_args(Features):
    raise InputError(f"features={kind!r}: expected one of {', '.join(get_args(Features))}")
  if max_degree is not None and max_degree < 1:
    raise InputError(f"max_degree={max_degree}: expected at least 1")
  if kind == "auto":
    kind = (
      "labels"
      if raw.node_labels is not None
      else "attributes"
      if raw.node_attributes is not None
      else "degree"
    )
  if kind == "degree":
    degree = np.bincount(raw.senders, minlength=int(raw.n_node.sum()))
    return _one_hot(degree if max_degree is None else np.minimum(degree, max_degree), name)
  columns = []
  if kind in ("labels", "both"):
    if raw.node_labels is None:
      raise InputError(f"{name}: features={kind!r}, but the set has no node labels")
    columns += [_one_hot(column - column.min(), name) for column in raw.node_labels.T]
  if kind in ("attributes", "both"):
    if raw.node_attributes is None:
      raise InputError(f"{name}: features={kind!r}, but the set has no node attributes")
    columns.append(raw.node_attributes)
  return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def parse(name: str, source: TextFiles) -> RawGraphs:
  """Checks and reads the text files of a set.

  Raises:
    InputError: naming the file, the row and what was expected.
  """
  parts = source.parts
  for part in _REQUIRED:
    if part not in parts:
      raise InputError(f"{source.origin}: no {name}_{part}.txt")

  file, text = parts["graph_labels"]
  graph_labels = _table(file, text, np.int64, columns=1)[:, 0]
  graph_of_node = _graph_of_node(*parts["graph_indicator"])
  num_graphs, num_nodes = int(graph_of_node[-1]) + 1, len(graph_of_node)
  if num_graphs != len(graph_labels):
    raise InputError(
      f"{file}: {len(graph_labels)} labels, but {name}_graph_indicator names {num_graphs} graphs"
    )

  node_labels = node_attributes = None
  if "node_labels" in parts:
    node_labels = _table(*parts["node_labels"], np.int64, rows=num_nodes)
  if "node_attributes" in parts:
    file, text = parts["node_attributes"]
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, caught below
      node_attributes = _table(file, text, np.float64, rows=num_nodes).astype(np.float32)
    _check_rows(
      np.isfinite(node_attributes).all(axis=1), file, "an attribute is not a finite number"
    )

  file, text = parts["A"]
  # A set in which no graph has an edge has an empty edge file.
  edges = _table(file, text, np.int64, columns=2) if text.strip() else np.zeros((0, 2), np.int64)
  inside = (edges.min(axis=1) >= 1) & (edges.max(axis=1) <= num_nodes)
  _check_rows(inside, file, f"node id outside 1..{num_nodes}")
  senders, receivers = edges.T - 1
  same_graph = graph_of_node[senders] == graph_of_node[receivers]
  _check_rows(same_graph, file, "the edge joins two graphs")
  senders, receivers = _undirected(file, senders, receivers, num_nodes)
  return RawGraphs(
    n_node=np.bincount(graph_of_node).astype(np.int32),
    n_edge=np.bincount(graph_of_node[senders], minlength=num_graphs).astype(np.int32),
    senders=senders,
    receivers=receivers,
    graph_labels=graph_labels,
    node_labels=node_labels,
    node_attributes=node_attributes,
  )


def parse_compact(path: Path) -> RawGraphs:
  """Reads the compact arrays of large sets (COLLAB, DD, REDDIT-BINARY).

  Keys: `num_nodes`, `graph_label` (G), optional `node_label` (N), `upper_degree` (N): number of
  neighbours with a larger local index, `delta` (undirected edges): for each node in turn its larger
  neighbours in increasing order, the first relative to the node, the others to the one before.
  """
  try:
    with np.load(path) as arrays:
      n_node = arrays["num_nodes"].astype(np.int64)
      upper_degree = arrays["upper_degree"].astype(np.int64)
      delta = arrays["delta"].astype(np.int64)
      graph_labels = arrays["graph_label"].astype(np.int64)
      node_labels = arrays["node_label"].astype(np.int64) if "node_label" in arrays else None
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise InputError(f"{path}: not a compact graph archive ({error})") from error
  num_nodes = int(n_node.sum())
  if (
    len(upper_degree) != num_nodes
    or upper_degree.sum() != len(delta)
    or len(graph_labels) != len(n_node)
    or (n_node < 1).any()
  ):
    raise InputError(f"{path}: array lengths do not fit together")
  lower = np.repeat(np.arange(num_nodes), upper_degree)
  running = np.cumsum(delta)
  # Sum of all deltas before the first one of each node, repeated over the node's edges.
  before = np.concatenate([[0], running])[np.cumsum(upper_degree) - upper_degree]
  upper = lower + running - np.repeat(before, upper_degree)
  graph_of_node = np.repeat(np.arange(len(n_node)), n_node)
  if (delta < 1).any() or (upper >= np.repeat(np.cumsum(n_node), n_node)[lower]).any():
    raise InputError(f"{path}: an edge leaves its graph")
  senders, receivers = _undirected(
    str(path), np.concatenate([lower, upper]), np.concatenate([upper, lower]), num_nodes
  )
  return RawGraphs(
    n_node=n_node.astype(np.int32),
    n_edge=np.bincount(graph_of_node[senders], minlength=len(n_node)).astype(np.int32),
    senders=senders,
    receivers=receivers,
    graph_labels=graph_labels,
    node_labels=None if node_labels is None else node_labels[:, None],
    node_attributes=None,
  )


def _graph_of_node(file: str, text: bytes) -> np.ndarray:
  """0-based graph of every node; graphs come in order and each has a node."""
  graph = _table(file, text, np.int64, columns=1)[:, 0] - 1
  before = np.concatenate([[-1], graph[:-1]])
  good = (graph == before) | (graph == before + 1)
  good[0] = graph[0] == 0
  if not good.all():
    row = int(good.argmin())
    raise InputError(
      f"{file}: row {row + 1}: graph {graph[row] + 1} after graph {before[row] + 1}: "
      "ids must start at 1, be sorted, and leave no graph without a node"
    )
  return graph


def _check_rows(good: np.ndarray | np.bool_, file: str, problem: str) -> None:
  if not good.all():
    raise InputError(f"{file}: row {int(good.argmin()) + 1}: {problem}")


def _undirected(
  file: str, senders: np.ndarray, receivers: np.ndarray, num_nodes: int
) -> tuple[np.ndarray, np.ndarray]:
  """Sorted directed edges without duplicates and loops, or an error if a reverse is missing."""
  keep = senders != receivers
  senders, receivers = senders[keep].astype(np.int32), receivers[keep].astype(np.int32)
  shape = (num_nodes, num_nodes)
  # Counting sort and de-duplication in C.
  adjacency = scipy.sparse.coo_matrix(
    (np.ones(len(senders), bool), (senders, receivers)), shape
  ).tocsr()
  adjacency.sum_duplicates()
  reverse = adjacency.T.tocsr()
  reverse.sort_indices()
  if not (
    np.array_equal(adjacency.indptr, reverse.indptr)
    and np.array_equal(adjacency.indices, reverse.indices)
  ):
    i, j = (int(ids[0]) + 1 for ids in (adjacency > reverse).nonzero())
    raise InputError(f"{file}: edge {i}, {j} without its reverse {j}, {i}: list both directions")
  senders = np.repeat(np.arange(num_nodes, dtype=np.int32), np.diff(adjacency.indptr))
  return senders, adjacency.indices.astype(np.int32)


def _one_hot(values: np.ndarray, name: str) -> np.ndarray:
  width = int(values.max()) + 1
  if 4 * len(values) * width > _MAX_FEATURE_BYTES:
    raise InputError(
      f"{name}: one-hot features of {len(values)} nodes x {width} values exceed 2 GiB: "
      "use features='degree' with a max_degree, or 'attributes'"
    )
  one_hot = np.zeros((len(values), width), np.float32)
  one_hot[np.arange(len(values)), values] = 1
  return one_hot


def _table(
  file: str, text: bytes, dtype: type, columns: int | None = None, rows: int | None = None
) -> np.ndarray:
  """Comma separated numbers, (rows, columns)."""
  text = _plain(text)
  if not text.strip():
    raise InputError(f"{file}: empty")
  table = _numbers(text, dtype)
  if table is None:
    raise InputError(f"{file}: {_bad_row(text, dtype)}")
  if columns is not None and table.shape[1] != columns:
    raise InputError(f"{file}: row 1: {table.shape[1]} values, expected {columns}")
  if rows is not None and len(table) != rows:
    raise InputError(f"{file}: {len(table)} rows, expected {rows}, one per node")
  return table


def _plain(text: bytes) -> bytes:
  """The text with line feeds alone at the ends of its lines, and without a byte order mark."""
  return text.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _numbers(text: bytes, dtype: type) -> np.ndarray | None:
  """A table of numbers, None if it is none; whole ones may be written 1.0 or 1e3."""
  load = lambda kind: np.loadtxt(io.BytesIO(text), kind, delimiter=",", ndmin=2, comments=None)
  try:
    return load(dtype)
  except ValueError:
    if dtype is not np.int64:
      return None
  try:
    table = load(np.float64)
  except ValueError:
    return None
  whole = (table == np.rint(table)) & (np.abs(table) <= 2**53)
  return table.astype(np.int64) if whole.all() else None


def _bad_row(text: bytes, dtype: type) -> str:
  """Says which row numpy could not read; slow, so only after it failed."""
  kind = "a whole number" if dtype is np.int64 else "a number"
  width = None
  for row, line in enumerate(text.splitlines(), 1):
    values = line.split(b",")
    width = width or len(values)
    if len(values) != width:
      return f"row {row}: {len(values)} values, expected {width}"
    for value in values:
      try:
        number = float(value)
        bad = dtype is np.int64 and not (number.is_integer() and abs(number) <= 2**53)
      except (ValueError, OverflowError):
        bad = True
      if bad:
        return f"row {row}: {value.decode(errors='replace').strip()[:40]!r} is not {kind}"
  return "not a table of numbers"
