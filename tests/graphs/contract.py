"""The promises that every padded batch keeps, whoever builds it: see `jaxmethods.graphs`."""

import numpy as np

from jaxmethods.graphs import batching


def check_contract(batch):
  num_nodes, num_edges, num_graphs = batching.batch_shape(batch)
  mask, edge_mask = batch.nodes["mask"], batch.edges["mask"]
  assert not mask[-1] and not batch.globals["mask"][-1]
  assert batch.n_node.sum() == num_nodes and batch.n_edge.sum() == num_edges
  assert len(batch.n_node) == num_graphs == len(batch.globals["label"])
  for leaf, dtype in (
    (batch.nodes["features"], np.float32),
    (batch.nodes["graph"], np.int32),
    (batch.senders, np.int32),
    (batch.n_edge, np.int32),
    (batch.globals["label"], np.int32),
    (mask, bool),
  ):
    assert leaf.dtype == dtype
  np.testing.assert_array_equal(
    batch.nodes["graph"], np.repeat(np.arange(num_graphs), batch.n_node)
  )
  np.testing.assert_array_equal(batch.globals["mask"][batch.nodes["graph"]], mask)
  order = np.lexsort((batch.senders, batch.receivers))
  np.testing.assert_array_equal(order, np.arange(num_edges))
  assert (batch.senders[~edge_mask] == num_nodes - 1).all()
  assert (batch.receivers[~edge_mask] == num_nodes - 1).all()
  assert (np.diff(edge_mask.astype(int)) <= 0).all()  # padding edges last
  assert mask[batch.senders[edge_mask]].all()


def edges_of(graph):
  return set(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
