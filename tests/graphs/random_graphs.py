"""Small random data sets for the graph and model tests."""

import jraph
import numpy as np

from jaxmethods.data.records import GraphData, Source

SOURCE = Source("test:random", "numpy", "none stated", "none", real=False)


def from_adjacencies(adjacencies, features, labels, num_classes=3) -> GraphData:
  """GraphData from dense symmetric 0/1 matrices."""
  n_node = np.array([len(a) for a in adjacencies], np.int32)
  first = np.cumsum(n_node) - n_node
  pairs = [np.argwhere(a) + f for a, f in zip(adjacencies, first, strict=True)]
  edges = np.concatenate(pairs).astype(np.int32)
  graphs = jraph.GraphsTuple(
    nodes=np.concatenate(features).astype(np.float32),
    edges=None,
    senders=edges[:, 0],
    receivers=edges[:, 1],
    n_node=n_node,
    n_edge=np.array([len(p) for p in pairs], np.int32),
    globals=None,
  )
  return GraphData(graphs, np.asarray(labels, np.int32), num_classes, SOURCE)


def random_adjacency(rng, nodes, density=0.3):
  upper = np.triu(rng.random((nodes, nodes)) < density, 1)
  return (upper | upper.T).astype(float)


def random_data(num_graphs=10, width=5, seed=0, largest=12, density=0.3) -> GraphData:
  """Graphs of 2 to `largest` nodes; some nodes are isolated."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(2, largest + 1, num_graphs)
  return from_adjacencies(
    [random_adjacency(rng, n, density) for n in sizes],
    [rng.normal(size=(n, width)) for n in sizes],
    rng.integers(0, 3, num_graphs),
  )


def dense(batch):
  """(N, N) matrix A[receiver, sender] of the real edges of a padded batch."""
  a = np.zeros((len(batch.nodes["mask"]),) * 2)
  real = np.asarray(batch.edges["mask"])
  np.add.at(a, (np.asarray(batch.receivers)[real], np.asarray(batch.senders)[real]), 1.0)
  return a
