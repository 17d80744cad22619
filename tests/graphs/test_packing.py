"""Spectral batches in packed rows: the layout contract, and the packing itself."""

import jax
import jraph
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.errors import InputError
from jaxmethods.graphs.packing import first_fit_decreasing, pack, row_lengths
from jaxmethods.graphs.spectral import laplacian_spectra, sine_encoding
from tests.graphs.contract import check_contract, edges_of
from tests.graphs.random_graphs import from_adjacencies, random_data

HIDDEN = 6
DATA = random_data(num_graphs=17, largest=14, density=0.4)
SPECTRA = laplacian_spectra(DATA.graphs)
BATCHES = [np.arange(9), np.array([16, 3, 11]), np.zeros(0, np.int64), np.arange(9, 17)]
EVERY_LAYOUT = pytest.mark.parametrize(
  "lengths", [None, (14,), (40,), (6, 14), (8, 24), (5, 9, 16)]
)


def packed(lengths=None, batches=BATCHES, data=DATA, **options):
  """The batches one by one, as numpy."""
  spectra = SPECTRA if data is DATA else laplacian_spectra(data.graphs)
  stacked = pack(data.graphs, data.labels, spectra, batches, HIDDEN, lengths, **options)
  return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(batches))]


def node_slots(batch):
  """Graph id -> the slots of its nodes."""
  graphs = batch.graphs
  first = np.cumsum(graphs.n_node) - graphs.n_node
  ids = graphs.globals["id"]
  return {int(ids[g]): first[g] + np.arange(graphs.n_node[g]) for g in np.flatnonzero(ids >= 0)}


def eigenvectors(k):
  n = DATA.graphs.n_node
  start = (n[:k].astype(int) ** 2).sum()
  return SPECTRA.eigenvectors[start : start + n[k] ** 2].reshape(n[k], n[k])


@EVERY_LAYOUT
def test_layout_contract(lengths):
  for batch, ids in zip(packed(lengths), BATCHES, strict=True):
    check_contract(batch.graphs)
    graphs = batch.graphs
    assert sorted(graphs.globals["id"][graphs.globals["mask"]]) == sorted(ids)
    assert (graphs.globals["id"][~graphs.globals["mask"]] == -1).all()
    assert batch.encoding.shape == (len(graphs.nodes["mask"]), HIDDEN + 1)
    assert sum(p.shape[0] * p.shape[2] for p in batch.products) == len(graphs.nodes["mask"])
    assert len(batch.product_of) == len(batch.edge_mask) == len(graphs.senders) / 2
    assert (np.diff(batch.edge_mask.astype(int)) <= 0).all()  # padding last
    used = batch.product_of[batch.edge_mask]
    assert len(set(used)) == len(used)  # a product belongs to one edge
    # A graph lies within one row.
    row = np.repeat(
      np.arange(sum(p.shape[0] for p in batch.products)),
      np.concatenate([np.full(p.shape[0], p.shape[2]) for p in batch.products]),
    )
    for slots in node_slots(batch).values():
      assert len(set(row[slots])) == 1


@EVERY_LAYOUT
def test_round_trip(lengths):
  # Copies: jraph.unbatch_np shifts senders and receivers in place.
  originals = jraph.unbatch_np(jax.tree.map(np.copy, DATA.graphs))
  first = np.cumsum(DATA.graphs.n_node) - DATA.graphs.n_node
  table = sine_encoding(SPECTRA.eigenvalues, HIDDEN)
  for batch in packed(lengths):
    graphs = batch.graphs
    parts = jraph.unbatch_np(jax.tree.map(np.copy, graphs._replace(globals=None)))
    globals_ = graphs.globals
    for part, k, label in zip(parts, globals_["id"], globals_["label"], strict=True):
      if k >= 0:
        np.testing.assert_array_equal(part.nodes["features"], originals[k].nodes)
        assert edges_of(part) == edges_of(originals[k])
        assert label == DATA.labels[k]
    for k, slots in node_slots(batch).items():
      rows = first[k] + np.arange(len(slots))
      np.testing.assert_array_equal(batch.encoding[slots], table[rows].astype(np.float32))
    padding = ~graphs.nodes["mask"]
    assert not batch.encoding[padding].any() and not graphs.nodes["features"][padding].any()


@EVERY_LAYOUT
def test_edge_products(lengths):
  for batch in packed(lengths, dtype=np.float64):
    owner = {int(s): (k, i) for k, slots in node_slots(batch).items() for i, s in enumerate(slots)}
    # Every product as one row over all slots of the batch.
    num_products = sum(p.shape[0] * p.shape[1] for p in batch.products)
    spread = np.zeros((num_products, len(batch.encoding)))
    slot = edge = 0
    for product in batch.products:
      count, capacity, length = product.shape
      for r in range(count):
        spread[edge : edge + capacity, slot : slot + length] = product[r]
        slot, edge = slot + length, edge + capacity
    graphs = batch.graphs
    real = np.flatnonzero(graphs.edges["mask"])
    # Both directions of an edge share an undirected one, and every real one has them.
    uses = np.bincount(batch.twin[real], minlength=len(batch.edge_mask))
    np.testing.assert_array_equal(uses, 2 * batch.edge_mask)
    for e in real:
      (k, j), (same, i) = owner[int(graphs.senders[e])], owner[int(graphs.receivers[e])]
      assert k == same
      expected = np.zeros(len(batch.encoding))
      u = eigenvectors(k)
      expected[node_slots(batch)[k]] = u[j] * u[i]
      product = spread[batch.product_of[batch.twin[e]]]
      np.testing.assert_allclose(product, expected, atol=1e-14)
    unused = np.setdiff1d(np.arange(num_products), batch.product_of[batch.edge_mask])
    assert len(unused) and not spread[unused].any()


def test_one_shape_for_all_batches_and_nothing_in_an_empty_one():
  empty = packed()[2]
  assert not empty.graphs.nodes["mask"].any() and not empty.graphs.edges["mask"].any()
  assert not empty.graphs.globals["mask"].any() and not empty.edge_mask.any()
  assert not any(product.any() for product in empty.products)


def test_large_graph_goes_to_the_long_rows():
  sizes = DATA.graphs.n_node
  short = 8
  assert (sizes > short).any() and (sizes <= short).any()
  for batch in packed((short, 16)):
    short_slots = batch.products[0].shape[0] * short
    for k, slots in node_slots(batch).items():
      assert (slots[0] >= short_slots) == (sizes[k] > short)


def test_rows_that_are_exactly_full_still_leave_padding():
  data = from_adjacencies([1 - np.eye(8)] * 4, [np.ones((8, 2))] * 4, [0] * 4)
  for ids in (np.arange(4), np.arange(3)):
    (batch,) = packed((8,), [ids], data)
    check_contract(batch.graphs)


def test_length_that_no_graph_needs():
  short = np.flatnonzero(DATA.graphs.n_node <= 8)
  (batch,) = packed((8, 16), [short])
  check_contract(batch.graphs)
  assert sorted(node_slots(batch)) == short.tolist()


def test_graph_that_fits_no_row_is_named():
  largest = int(DATA.graphs.n_node.argmax())
  with pytest.raises(InputError, match=f"graph {largest} has 14 nodes"):
    packed((4, 13))


def test_further_node_arrays_travel_along():
  nodes = DATA.graphs.nodes
  extra = np.arange(2 * len(nodes)).reshape(-1, 2)
  graphs = DATA.graphs._replace(nodes={"features": nodes, "structure": extra})
  first = np.cumsum(graphs.n_node) - graphs.n_node
  batch = jax.tree.map(lambda x: x[0], pack(graphs, DATA.labels, SPECTRA, [np.arange(17)], HIDDEN))
  for k, slots in node_slots(batch).items():
    np.testing.assert_array_equal(
      batch.graphs.nodes["structure"][slots], extra[first[k] + np.arange(len(slots))]
    )


graph_sizes = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), max_size=60)


@given(graph_sizes, st.integers(0, 30), st.integers(0, 40))
def test_first_fit_decreasing_keeps_both_capacities(graphs, more_slots, more_edges):
  sizes, edges = [n for n, _ in graphs], [m for _, m in graphs]
  length, max_edges = max(sizes, default=0) + more_slots, max(edges, default=0) + more_edges
  rows = first_fit_decreasing(sizes, edges, length, max_edges)
  assert sorted(i for row in rows for i in row) == list(range(len(graphs)))
  for row in rows:
    assert sum(sizes[i] for i in row) <= length
    assert sum(edges[i] for i in row) <= max_edges
  # First fit: what opened a later row had no place in any earlier one.
  for later, row in enumerate(rows):
    opener = row[0]
    for earlier in rows[:later]:
      before = [i for i in earlier if (-sizes[i], i) < (-sizes[opener], opener)]
      assert (
        sum(sizes[i] for i in before) + sizes[opener] > length
        or sum(edges[i] for i in before) + edges[opener] > max_edges
      )


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 60))
def test_at_most_one_row_is_half_empty(sizes, length):
  rows = first_fit_decreasing(sizes, [0] * len(sizes), length, 0)
  filled = [sum(sizes[i] for i in row) for row in rows]
  assert sum(2 * f <= length for f in filled) <= 1


def chosen(sizes, multiple=8):
  """The row lengths for rings of these sizes, all in one batch."""
  sizes = np.asarray(sizes)
  rings = jraph.GraphsTuple(
    nodes=None, edges=None, globals=None, senders=None, receivers=None, n_node=sizes,
    n_edge=2 * sizes,
  )  # fmt: skip
  return row_lengths(rings, [np.arange(len(sizes))], multiple)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=80), st.sampled_from([1, 8]))
def test_row_lengths(sizes, multiple):
  lengths = chosen(sizes, multiple)
  assert 1 <= len(lengths) <= 2
  assert list(lengths) == sorted(set(lengths))
  assert all(length % multiple == 0 for length in lengths)
  assert max(sizes) <= lengths[-1] < 3 * (max(sizes) + multiple)
  assert chosen(sizes[::-1], multiple) == lengths


def test_row_lengths_hold_several_graphs():
  """Rows of 24 slots would hold one graph of 17 nodes each and waste a third of them."""
  (length,) = chosen(np.full(100, 17))
  assert (length % 17) / length < 0.1


def test_row_lengths_split_only_where_it_pays():
  short, long = chosen(np.concatenate([np.full(300, 30), [620]]))
  assert 30 <= short < 300 and long == 624


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_any_data_any_batches(seed, num_batches):
  rng = np.random.default_rng(seed)
  data = random_data(num_graphs=12, largest=20, density=rng.random(), seed=seed)
  cuts = np.sort(rng.integers(0, 13, num_batches - 1))
  batches = np.split(rng.permutation(12), cuts)
  for batch, ids in zip(packed(None, batches, data), batches, strict=True):
    check_contract(batch.graphs)
    assert sorted(node_slots(batch)) == sorted(ids)


def test_most_slots_are_real():
  """What the packing is for: 93 to 97 % of the slots hold a node when rows are long enough."""
  data = random_data(num_graphs=128, largest=20, density=0.2)
  (batch,) = packed((64,), [np.arange(128)], data)
  assert batch.graphs.nodes["mask"].mean() > 0.9
