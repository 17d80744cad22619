"""Structure features against dense matrix powers."""

import time

import networkx as nx
import numpy as np
import pytest

from jaxmethods.graphs import structure
from tests.graphs.random_graphs import from_adjacencies, random_data


def dense_graphs(data):
  first = np.cumsum(data.graphs.n_node) - data.graphs.n_node
  a = np.zeros((len(data.graphs.nodes),) * 2)
  a[data.graphs.receivers, data.graphs.senders] = 1
  for begin, n in zip(first, data.graphs.n_node, strict=True):
    yield slice(begin, begin + n), a[begin : begin + n, begin : begin + n]


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("block", [1, 60, 10**6])  # from one graph per block to all in one
def test_return_probabilities(length, block, monkeypatch):
  monkeypatch.setattr(structure, "_BLOCK_ENTRIES", block)
  data = random_data(num_graphs=12, density=0.25)
  features = structure.structure_features(data.graphs, length, 4)
  assert features.dtype == np.float32 and features.shape == (len(data.graphs.nodes), length + 4)
  for rows, a in dense_graphs(data):
    walk = a / np.maximum(a.sum(0), 1)
    power = np.eye(len(a))
    for t in range(length):
      power = walk @ power
      np.testing.assert_allclose(features[rows, t], np.diag(power), atol=1e-6)
    degree = np.clip(a.sum(1), 1, 4).astype(int)
    np.testing.assert_array_equal(features[rows, length:], np.eye(4)[degree - 1])


def test_known_graphs():
  path = nx.to_numpy_array(nx.path_graph(2))
  triangle = nx.to_numpy_array(nx.complete_graph(3))
  star = nx.to_numpy_array(nx.star_graph(30))
  lonely = np.zeros((1, 1))
  graphs = [path, triangle, star, lonely]
  data = from_adjacencies(graphs, [np.ones((len(a), 1)) for a in graphs], [0] * 4)
  f = structure.structure_features(data.graphs)
  assert f.shape == (2 + 3 + 31 + 1, 32)
  np.testing.assert_allclose(f[:2, :16], np.tile([0.0, 1.0], (2, 8)), atol=1e-7)
  np.testing.assert_allclose(f[2:5, :4], [[0, 1 / 2, 1 / 4, 3 / 8]] * 3, atol=1e-7)
  np.testing.assert_allclose(f[5, :2], [0, 1], atol=1e-6)
  np.testing.assert_allclose(f[6, :2], [0, 1 / 30], atol=1e-6)
  assert f[5, 31] == 1 and f[6, 16] == 1  # degree 30 counts as 16
  np.testing.assert_array_equal(f[-1, :16], 0)
  assert f[-1, 16] == 1  # no degree 0: clipped to 1


def test_thousands_of_graphs_in_seconds():
  trees = [nx.to_numpy_array(nx.random_labeled_tree(30, seed=i)) for i in range(20)] * 100
  data = from_adjacencies(trees, [np.ones((30, 1))] * 2000, [0] * 2000)
  start = time.process_time()
  structure.structure_features(data.graphs)
  assert time.process_time() - start < 5.0
