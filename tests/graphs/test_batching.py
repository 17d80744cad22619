"""The padded batches keep the contract of `jaxmethods.graphs`."""

import jax
import jraph
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.errors import InputError
from jaxmethods.graphs import batching
from tests.graphs.contract import check_contract, edges_of
from tests.graphs.random_graphs import from_adjacencies, random_data

DATA = random_data(num_graphs=23, largest=30)


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.integers(0, 22), min_size=1, max_size=30),
  st.integers(1, 12),
  st.integers(1, 4),
  st.integers(1, 70),
)
def test_contract_roundtrip_and_bounded_shapes(indices, batch_size, max_shapes, multiple):
  batches = batching.batch_graphs(
    DATA,
    indices,
    batch_size,
    max_shapes=max_shapes,
    node_multiple=multiple,
    edge_multiple=2 * multiple,
    node_data={"row": np.arange(len(DATA.graphs.nodes))},
    edge_data={"row": np.arange(len(DATA.graphs.senders))},
  )
  shapes = batching.count_shapes(batches)
  assert len(shapes) <= max_shapes and sum(shapes.values()) == len(batches)
  assert all(s.nodes % multiple == 0 and s.edges % (2 * multiple) == 0 for s in shapes)
  # Copies: jraph.unbatch_np shifts senders and receivers in place.
  originals = jraph.unbatch_np(jax.tree.map(np.copy, DATA.graphs))
  seen = []
  for batch in batches:
    check_contract(batch)
    real, edge_real = batch.nodes["mask"], batch.edges["mask"]
    rows = batch.nodes["row"][real]
    np.testing.assert_array_equal(DATA.graphs.nodes[rows], batch.nodes["features"][real])
    for ends, original in (
      (batch.senders, DATA.graphs.senders),
      (batch.receivers, DATA.graphs.receivers),
    ):
      rows = batch.edges["row"][edge_real]
      np.testing.assert_array_equal(batch.nodes["row"][ends[edge_real]], original[rows])
    seen += [
      (graph, label)
      for graph, label, keep in zip(
        jraph.unbatch_np(jax.tree.map(np.copy, batch._replace(globals=None))),
        batch.globals["label"],
        batch.globals["mask"],
        strict=True,
      )
      if keep
    ]
  assert len(seen) == len(indices)
  for index, (graph, label) in zip(indices, seen, strict=True):
    np.testing.assert_array_equal(graph.nodes["features"], originals[index].nodes)
    assert edges_of(graph) == edges_of(originals[index])
    assert label == DATA.labels[index]


def test_more_shapes_never_pad_more():
  rng = np.random.default_rng(0)
  indices = rng.permutation(23)

  def slots(max_shapes):
    batches = batching.batch_graphs(
      DATA, indices, 3, max_shapes=max_shapes, node_multiple=8, edge_multiple=8
    )
    return sum(batching.batch_shape(b).nodes + batching.batch_shape(b).edges for b in batches)

  padded = [slots(n) for n in range(1, 9)]
  assert padded == sorted(padded, reverse=True) and padded[0] > padded[3]


def test_jraph_reads_the_batch():
  batch = batching.batch_graphs(DATA, range(10), 10)[0]
  np.testing.assert_array_equal(jraph.get_node_padding_mask(batch), batch.nodes["mask"])
  np.testing.assert_array_equal(jraph.get_edge_padding_mask(batch), batch.edges["mask"])
  np.testing.assert_array_equal(jraph.get_graph_padding_mask(batch), batch.globals["mask"])


def test_stack_for_scan():
  batches = batching.batch_graphs(DATA, range(23), 5)
  stacked = batching.stack(batches)
  assert stacked.senders.shape == (5, batching.batch_shape(batches[0]).edges)
  _, count = jax.lax.scan(lambda c, b: (c, b.nodes["mask"].sum()), 0, stacked)
  assert int(count.sum()) == len(DATA.graphs.nodes)
  uneven = batching.batch_graphs(DATA, range(23), 5, max_shapes=5, node_multiple=1, edge_multiple=1)
  with pytest.raises(ValueError, match="one shape"):
    batching.stack(uneven)


def test_graphs_without_edges():
  data = from_adjacencies([np.zeros((3, 3))] * 2, [np.ones((3, 2))] * 2, [0, 1])
  (batch,) = batching.batch_graphs(data, [0, 1], 2)
  check_contract(batch)
  assert not batch.edges["mask"].any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda d: _with(d, nodes=_set(d.graphs.nodes, (7, 1), np.nan)), "not finite"),
    (lambda d: _with(d, nodes=_set(d.graphs.nodes, (7, 1), np.inf)), "not finite"),
    (lambda d: _with(d, senders=_set(d.graphs.senders, 3, 10**6)), "edge outside"),
    (lambda d: _with(d, receivers=_set(d.graphs.receivers, 3, -1)), "edge outside"),
    # A node of another graph is inside the array but not inside the graph.
    (lambda d: _with(d, senders=_set(d.graphs.senders, 0, len(d.graphs.nodes) - 1)), "graph 0"),
    (lambda d: _with(d, n_node=d.graphs.n_node + 1), "do not add up"),
    (lambda d: d._replace(labels=_set(d.labels, 4, 3)), r"graph 4 has label 3, expected 0\.\.2"),
    (lambda d: d._replace(labels=_set(d.labels, 4, -1)), "label -1"),
    (lambda d: d._replace(labels=d.labels[:-1]), "22 labels for 23 graphs"),
  ],
)
def test_bad_data_is_named(change, message):
  with pytest.raises(InputError, match=message):
    batching.batch_graphs(change(DATA), [0, 1])


def test_bad_arguments():
  with pytest.raises(InputError, match="test:random: no graphs"):
    batching.batch_graphs(DATA, [])
  for indices in ([23], [-1]):
    with pytest.raises(InputError, match=r"outside 0\.\.22"):
      batching.batch_graphs(DATA, indices)
  for kwargs in ({"batch_size": 0}, {"max_shapes": 0}, {"node_multiple": 0}):
    with pytest.raises(ValueError, match="at least 1"):
      batching.batch_graphs(DATA, [0], **kwargs)
  with pytest.raises(ValueError, match="integers"):
    batching.batch_graphs(DATA, np.ones(23, bool))


def _set(array, index, value):
  array = array.copy()
  array[index] = value
  return array


def _with(data, **fields):
  return data._replace(graphs=data.graphs._replace(**fields))


def test_given_batches_of_one_shape_may_be_empty():
  chunks = [np.array([3, 1]), np.array([], int), np.array([7])]
  batch = batching.batch_alike(DATA, chunks)
  for i, chunk in enumerate(chunks):
    one = jax.tree.map(lambda x, i=i: x[i], batch)
    check_contract(one)
    assert one.globals["mask"].sum() == len(chunk)
    np.testing.assert_array_equal(one.globals["label"][: len(chunk)], DATA.labels[chunk])
