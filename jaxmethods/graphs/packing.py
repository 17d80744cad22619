"""Spectral graph batches in packed rows: many small graphs share one row of fixed length.

Attention over a graph's eigenvalues is quadratic in the row length, and every dense layer is linear
in the number of slots. Packing graphs first-fit-decreasing into rows keeps 84 to 91 % of the slots
real over all batches of COX2, DHFR, AIDS and NCI1 (the short last batch included). Two row lengths serve
data sets with a few very large graphs (PROTEINS: 620 nodes, mean 39).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jraph
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmethods.errors import InputError
from jaxmethods.graphs.spectral import Spectra, sine_encoding
from jaxmethods.stats import shapes
from jaxmethods.trees import PyTree

Array: TypeAlias = np.ndarray | jax.Array  # numpy on the host, jax on the device
Layout: TypeAlias = list[list[list[int]]]  # per row group, its rows of graph ids


class SpectralBatch(NamedTuple):
  """A padded batch (layout of `jaxmethods.graphs`) with the arrays of a spectral filter on edges.

  Slots are laid out row after row; a row is one of `R` rows of length `L` of its group, and the
  slack of each row is one padding graph. U products of undirected edges belong to each row; the edges
  themselves are listed without gaps, so that arrays over edges are padded in the smaller batches alone.

  Attributes:
    graphs: the batch, in the layout of `jaxmethods.graphs`.
    encoding: (N, H + 1) float32, sine encoding of the eigenvalue of each slot (zero in padding).
    products: one array (R, U, L) per row group: U[j, r] U[i, r] for the undirected edge {i, j} of
      the row and every eigenvalue slot r of the row; zero outside the graph of the edge. The signs
      of eigenvectors cancel in it.
    product_of: (E / 2,) int32, the product of each undirected edge, counted through the row groups.
    edge_mask: (E / 2,) bool, which undirected edges are real; padding last.
    twin: (E,) int32, the undirected edge of each directed edge.
  """

  graphs: jraph.GraphsTuple
  encoding: Float[Array, "N H+1"]
  products: tuple[Float[Array, "R U L"], ...]
  product_of: Int[Array, " E/2"]
  edge_mask: Bool[Array, " E/2"]
  twin: Int[Array, " E"]


def row_lengths(
  graphs: jraph.GraphsTuple, batches: Sequence[np.ndarray], multiple: int = 8
) -> tuple[int, ...]:
  """Chooses one or two row lengths by packing the largest batch with each candidate.

  Rows just as long as the largest graph often hold a single one (COX2: 41 nodes on average, 56 at
  most); longer ones fill better and cost more attention. The cost of a node slot is taken as
  1 + L / 700 and that of a product of length L as L / 10,000, roughly the shares of a training step
  measured on CPU. A second row group must save a tenth, since it doubles the number of attention
  kernels.

  Args:
    graphs: unpadded jraph batch.
    batches: graph ids of each batch.
    multiple: lengths are rounded up to this.

  Returns:
    Ascending row lengths, the last at least the largest size.
  """
  return _best_rows(graphs, batches, multiple).lengths


def shared_cost(graphs: jraph.GraphsTuple, batches: Sequence[np.ndarray]) -> tuple[float, float]:
  """Estimates the cost of a batch in the shape that all of these batches share.

  Args:
    graphs: unpadded jraph batch, of which only the counts are read.
    batches: graph ids of each batch.

  Returns:
    Node slots as in `row_lengths`, an edge taken as a tenth of one, and the numbers kept: those of
    products and, roughly, of encodings.
  """
  rows = _best_rows(graphs, batches, multiple=8)
  edges = max(np.asarray(graphs.n_edge)[ids].sum() for ids in batches)
  kept = sum(n * l * (128 + e) for n, l, e in zip(*rows[:3], strict=True))
  return rows.cost + edges / 10, kept


class _Rows(NamedTuple):
  """Rows of the largest batch, by row group: their length, number and products; and their cost."""

  lengths: tuple[int, ...]
  counts: tuple[int, ...]
  edges: tuple[int, ...]
  cost: float


def _best_rows(graphs: jraph.GraphsTuple, batches: Sequence[np.ndarray], multiple: int) -> _Rows:
  """Packs the largest batch with each candidate and keeps the cheapest."""
  sizes, used = np.asarray(graphs.n_node), np.concatenate(batches)
  sample = max(batches, key=lambda ids: sizes[ids].sum())
  longest = _round_up(sizes[used].max(), multiple)
  step = _round_up(longest / 12, multiple)
  candidates: list[tuple[int, ...]] = [(l,) for l in range(longest, 3 * longest + 1, step)]
  for share in (0.5, 0.8, 0.95):
    typical = np.quantile(sizes[used], share)
    for graphs_per_row in (1, 2, 3):
      short = _round_up(graphs_per_row * typical, multiple)
      if short < longest:
        candidates.append((short, longest))

  def lay_out(lengths: tuple[int, ...]) -> _Rows:
    edges = _row_edges(graphs, used, lengths)
    counts = tuple(max(len(rows), 1) for rows in _layout(graphs, sample, lengths, edges))
    total = sum(
      n * l * (1 + l / 700 + e / 10_000) for n, l, e in zip(counts, lengths, edges, strict=True)
    )
    return _Rows(lengths, counts, edges, total * (1.1 if len(lengths) > 1 else 1.0))

  return min(map(lay_out, candidates), key=lambda rows: rows.cost)


def _round_up(n: float, multiple: int) -> int:
  """Rounds up to a multiple."""
  return int(-(-n // multiple) * multiple)


def first_fit_decreasing(
  sizes: Sequence[int], edges: Sequence[int], length: int, max_edges: int
) -> list[list[int]]:
  """Packs graphs into rows of `length` node slots and `max_edges` edge slots.

  Args:
    sizes: node counts, each at most `length`.
    edges: undirected edge counts, each at most `max_edges`.
    length: node slots of a row.
    max_edges: edge slots of a row.

  Returns:
    The graph indices of each row.
  """
  rows: list[list[int]] = []
  room: list[tuple[int, int]] = []
  for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    for r, (slots, links) in enumerate(room):
      if sizes[item] <= slots and edges[item] <= links:
        rows[r].append(item)
        room[r] = (slots - sizes[item], links - edges[item])
        break
    else:
      rows.append([item])
      room.append((length - sizes[item], max_edges - edges[item]))
  return rows


def pack(
  graphs: jraph.GraphsTuple,
  labels: np.ndarray,
  spectra: Spectra,
  batches: Sequence[np.ndarray],
  hidden: int,
  lengths: tuple[int, ...] | None = None,
  dtype: type = np.float32,
) -> SpectralBatch:
  """Packs each list of graph ids into one batch and stacks the batches: one shape for all of them.

  Args:
    graphs: unpadded jraph batch; `nodes` (sum n, F) features, or a dict of such arrays with
      "features" among them.
    labels: (graphs,) int.
    spectra: of the same graphs.
    batches: graph ids of each batch.
    hidden: H, the width of the sine encoding.
    lengths: ascending row lengths (one that no graph needs is left out); default `row_lengths` of
      the graphs used.
    dtype: of features, encoding and products.

  Returns:
    SpectralBatch with a leading axis of len(batches) on every array. `globals` also hold "id", each
    graph's index in `graphs` (-1 for padding graphs).

  Raises:
    InputError: if a graph has more nodes than the longest row has slots.
    ValueError: for other shapes.

  >>> spectra = jm.graphs.laplacian_spectra(triangles.graphs)
  >>> one = [np.array([0, 1])]
  >>> packed = jm.graphs.pack(triangles.graphs, triangles.labels, spectra, one, hidden=8)
  >>> packed.graphs.globals["id"].tolist()
  [[0, 1, -1]]
  """
  shapes.check(
    n_node=(graphs.n_node, "G"), n_edge=(graphs.n_edge, "G"), labels=(labels, "G"),
    eigenvalues=(spectra.eigenvalues, "N"),
  )  # fmt: skip
  sizes = np.asarray(graphs.n_node)
  used = np.concatenate(batches)
  if lengths is None:
    lengths = row_lengths(graphs, batches)
  shortest = np.searchsorted(lengths, sizes[used])  # the row group of each graph
  if (shortest == len(lengths)).any():
    k = used[shortest.argmax()]
    raise InputError(f"graph {k} has {sizes[k]} nodes, but the longest row has {lengths[-1]} slots")
  lengths = tuple(lengths[g] for g in np.unique(shortest))
  row_edges = _row_edges(graphs, used, lengths)
  layouts = [_layout(graphs, ids, lengths, row_edges) for ids in batches]
  num_rows = tuple(max(len(layout[g]) for layout in layouts) for g in range(len(lengths)))
  # The last slot has to be padding: it is what padding edges point at.
  if any(
    len(layout[-1]) == num_rows[-1] and sizes[layout[-1][-1]].sum() == lengths[-1]
    for layout in layouts
  ):
    num_rows = (*num_rows[:-1], num_rows[-1] + 1)
  num_edges = _round_up(max(int(graphs.n_edge[ids].sum()) for ids in batches), 16)
  shape = _Shape(
    lengths, num_rows, row_edges, num_edges, sum(num_rows) + max(len(ids) for ids in batches)
  )
  nodes = graphs.nodes if isinstance(graphs.nodes, dict) else {"features": graphs.nodes}
  source = _Source(graphs._replace(nodes=nodes), labels, spectra, hidden, dtype, _Starts.of(graphs))
  packed = [_pack_one(source, layout, shape) for layout in layouts]
  return SpectralBatch(*(_stack(field) for field in zip(*packed, strict=True)))


class _Shape(NamedTuple):
  """Static sizes of a batch."""

  lengths: tuple[int, ...]
  num_rows: tuple[int, ...]
  row_edges: tuple[int, ...]
  num_edges: int
  num_graphs: int


class _Source(NamedTuple):
  """Arrays that all batches are cut from."""

  graphs: jraph.GraphsTuple
  labels: np.ndarray
  spectra: Spectra
  hidden: int
  dtype: type
  starts: _Starts


class _Starts(NamedTuple):
  """Where the nodes, edges and eigenvectors of every graph begin in the joined arrays."""

  node: np.ndarray
  edge: np.ndarray
  matrix: np.ndarray

  @classmethod
  def of(cls, graphs: jraph.GraphsTuple) -> _Starts:
    sizes = np.asarray(graphs.n_node).astype(np.int64)
    return cls(*map(_cumulated, (sizes, graphs.n_edge, sizes**2)))


def _cumulated(counts: np.ndarray) -> np.ndarray:
  """Returns where each stretch of `counts` entries begins, and where the last one ends."""
  return np.concatenate([[0], np.cumsum(counts)])


def _row_edges(
  graphs: jraph.GraphsTuple, ids: np.ndarray, lengths: tuple[int, ...]
) -> tuple[int, ...]:
  """Chooses the products of a row: a fifth above the average, never below the densest graph."""
  sizes, links = np.asarray(graphs.n_node)[ids], np.asarray(graphs.n_edge)[ids] // 2
  capacity, shorter = [], 0
  for length in lengths:
    here = (sizes > shorter) & (sizes <= length)
    density = links[here].sum() / max(sizes[here].sum(), 1)
    slots = max(1.2 * density * length, links[here].max(initial=1))
    capacity.append(_round_up(slots, 8))
    shorter = length
  return tuple(capacity)


def _layout(
  graphs: jraph.GraphsTuple, ids: np.ndarray, lengths: tuple[int, ...], row_edges: tuple[int, ...]
) -> Layout:
  """Lays graph ids out in the rows of each row group, every graph in the shortest row it fits."""
  sizes, links = np.asarray(graphs.n_node), np.asarray(graphs.n_edge) // 2
  layout, shorter = [], 0
  for length, capacity in zip(lengths, row_edges, strict=True):
    members = [int(k) for k in ids if shorter < sizes[k] <= length]
    rows = first_fit_decreasing(sizes[members].tolist(), links[members].tolist(), length, capacity)
    rows = [[members[i] for i in row] for row in rows]
    layout.append(sorted(rows, key=lambda row: -sizes[row].sum()))
    shorter = length
  return layout


def _pack_one(source: _Source, layout: Layout, shape: _Shape) -> SpectralBatch:
  """Fills the arrays of one batch."""
  rows = list(_rows(layout, shape))
  num_slots = sum(row.length for row in rows)
  nodes, eigenvalues = _nodes(source, rows, num_slots)
  edges = _edges(source, rows, shape)
  n_node, n_edge, ids = _counts(source, rows, shape)
  order = np.lexsort((edges.senders, edges.receivers))
  pad = lambda values, fill: np.concatenate(
    [values[order], np.full(shape.num_edges - len(order), fill)], dtype=np.int32, casting="unsafe"
  )
  batch = jraph.GraphsTuple(
    nodes=nodes | {"graph": np.repeat(np.arange(len(n_node)), n_node).astype(np.int32)},
    edges={"mask": np.arange(shape.num_edges) < len(order)},
    senders=pad(edges.senders, num_slots - 1),
    receivers=pad(edges.receivers, num_slots - 1),
    n_node=n_node,
    n_edge=n_edge,
    globals={
      "label": np.where(ids >= 0, source.labels[ids], 0).astype(np.int32),
      "mask": ids >= 0,
      "id": ids,
    },
  )
  real = nodes["mask"]
  encoding: np.ndarray = np.zeros((num_slots, source.hidden + 1), source.dtype)
  encoding[real] = sine_encoding(eigenvalues[real], source.hidden)
  undirected = np.arange(shape.num_edges // 2) < len(edges.product_of)
  product_of = np.zeros(len(undirected), np.int32)
  product_of[undirected] = edges.product_of
  return SpectralBatch(batch, encoding, edges.products, product_of, undirected, pad(edges.twins, 0))


class _Row(NamedTuple):
  """One row of a batch: its group, its place there, its first slot, and its graphs."""

  group: int
  place: int
  start: int
  length: int
  graphs: Sequence[int]


def _rows(layout: Layout, shape: _Shape) -> Iterator[_Row]:
  """Yields every row of a batch, those without graphs too."""
  start = 0
  groups = zip(layout, shape.num_rows, shape.lengths, strict=True)
  for group, (rows, count, length) in enumerate(groups):
    for place in range(count):
      yield _Row(group, place, start, length, rows[place] if place < len(rows) else ())
      start += length


def _nodes(
  source: _Source, rows: Sequence[_Row], num_slots: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Puts node features and eigenvalues into their slots; "mask" says which are real."""
  graphs, first = source.graphs, source.starts.node
  nodes = {
    name: np.zeros((num_slots, x.shape[1]), source.dtype) for name, x in graphs.nodes.items()
  }
  eigenvalues, mask = np.zeros(num_slots), np.zeros(num_slots, bool)
  for row in rows:
    start = row.start
    for k in row.graphs:
      given, here = slice(first[k], first[k + 1]), slice(start, start + int(graphs.n_node[k]))
      for name, x in graphs.nodes.items():
        nodes[name][here] = x[given]
      eigenvalues[here] = source.spectra.eigenvalues[given]
      mask[here] = True
      start = here.stop
  return nodes | {"mask": mask}, eigenvalues


class _Edges(NamedTuple):
  """Edges of a batch in the order of its graphs, and its products; see `SpectralBatch`."""

  senders: np.ndarray
  receivers: np.ndarray
  twins: np.ndarray
  product_of: np.ndarray
  products: tuple[np.ndarray, ...]


def _edges(source: _Source, rows: Sequence[_Row], shape: _Shape) -> _Edges:
  """Lists the edges of a batch between slots, and multiplies eigenvectors along them."""
  forms = list(zip(shape.num_rows, shape.row_edges, shape.lengths, strict=True))
  products: tuple[np.ndarray, ...] = tuple(np.zeros(form, source.dtype) for form in forms)
  before = _cumulated(np.array([count * capacity for count, capacity, _ in forms]))
  nothing: np.ndarray = np.zeros(0, np.int32)  # a batch may be empty
  senders, receivers, twins, product_of = [nothing], [nothing], [nothing], [nothing]
  num_undirected = 0
  for row in rows:
    capacity = forms[row.group][1]
    offset = used = 0
    for k in row.graphs:
      n = int(source.graphs.n_node[k])
      i, j, pair, undirected = _pairs(source, k)
      first, last = source.starts.matrix[k : k + 2]
      vectors = source.spectra.eigenvectors[first:last].reshape(n, n)
      edges = slice(used, used + len(pair))
      values = vectors[pair // n] * vectors[pair % n]
      products[row.group][row.place, edges, offset : offset + n] = values
      product_of.append(before[row.group] + row.place * capacity + np.arange(used, edges.stop))
      senders.append(j + row.start + offset)
      receivers.append(i + row.start + offset)
      twins.append(num_undirected + undirected)
      num_undirected += len(pair)
      offset, used = offset + n, edges.stop
  return _Edges(
    np.concatenate(senders),
    np.concatenate(receivers),
    np.concatenate(twins),
    np.concatenate(product_of),
    products,
  )


def _pairs(source: _Source, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns (i, j, pairs, pair of each edge) of graph k: edges j -> i, and low * n + high of a pair."""
  graphs, n = source.graphs, int(source.graphs.n_node[k])
  here = slice(*source.starts.edge[k : k + 2])
  j, i = (ends[here] - source.starts.node[k] for ends in (graphs.senders, graphs.receivers))
  low, high = np.minimum(i, j), np.maximum(i, j)
  pair, undirected = np.unique(low.astype(np.int64) * n + high, return_inverse=True)
  return i, j, pair, undirected


def _counts(
  source: _Source, rows: Sequence[_Row], shape: _Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (nodes, edges, id) of every graph of a batch; those of padding have the id -1."""
  n_node, n_edge, ids = [], [], []
  for row in rows:
    sizes = [int(source.graphs.n_node[k]) for k in row.graphs]
    n_node += [*sizes, row.length - sum(sizes)]  # the row's slack, a graph of padding
    n_edge += [*(int(source.graphs.n_edge[k]) for k in row.graphs), 0]
    ids += [*row.graphs, -1]
  # Padding edges are the last padding graph's: the one that holds the last slot.
  n_edge[-1] = shape.num_edges - sum(n_edge)
  padding = shape.num_graphs - len(n_node)  # fewer graphs than the largest batch has
  fill = lambda values, value: np.array([*values, *[value] * padding], np.int32)
  return fill(n_node, 0), fill(n_edge, 0), fill(ids, -1)


def _stack(trees: Sequence[PyTree]) -> PyTree:
  """Stacks trees on a new first axis."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
