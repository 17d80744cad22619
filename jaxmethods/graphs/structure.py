"""Structure features of FedStar: return probabilities of random walks, and degrees.

Reference: Tan et al., "Federated Learning on Non-IID Graphs via Structural Knowledge Sharing",
AAAI 2023 (FedStar).
"""

from __future__ import annotations

from collections.abc import Iterator

import jraph
import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from jaxmethods.stats import shapes

# Entries of one (nodes, largest graph) block of walk probabilities: 32 MB in float64.
_BLOCK_ENTRIES = 4_000_000


def return_probabilities(
  graphs: jraph.GraphsTuple, length: int = 16
) -> Float[np.ndarray, "N length"]:
  """Computes the probability that a random walk from a node is back after 1, ..., `length` steps.

  The diagonals of (A D^-1)^t, per graph.

  Args:
    graphs: unpadded numpy batch, both directions of every edge (`GraphData.graphs`).
    length: longest walk.

  Returns:
    (N, length) float32; zeros for a node without edges.

  Raises:
    ValueError: for other shapes.

  >>> jm.graphs.return_probabilities(triangles.graphs, 3)[0].tolist()  # of a triangle's corner
  [0.0, 0.5, 0.25]
  """
  shapes.check(
    n_node=(graphs.n_node, "G"), senders=(graphs.senders, "E"), receivers=(graphs.receivers, "E")
  )
  num_nodes = int(graphs.n_node.sum())
  adjacency = sparse.csr_array(
    (np.ones(len(graphs.senders)), (graphs.receivers, graphs.senders)), (num_nodes, num_nodes)
  )
  degree = adjacency.sum(1)
  scale = sparse.diags_array(1.0 / np.sqrt(np.maximum(degree, 1.0)))
  # D^-1/2 A D^-1/2 has the same diagonals of powers, and being symmetric it gives two of them per
  # product: diag(S^(2t)) = sum_j (S^t)_ij^2 and diag(S^(2t+1)) = sum_j (S^t)_ij (S^(t+1))_ij.
  symmetric = (scale @ adjacency @ scale).tocsr()
  first = np.concatenate([[0], np.cumsum(graphs.n_node)])
  result = np.zeros((num_nodes, length), np.float32)
  for members in _blocks(np.asarray(graphs.n_node)):
    sizes = graphs.n_node[members]
    local = np.concatenate([np.arange(n) for n in sizes])
    rows = np.repeat(first[members], sizes) + local
    step = symmetric[rows][:, rows]  # block diagonal: all graphs of the block at once
    now = np.zeros((len(rows), int(sizes.max())))
    now[np.arange(len(rows)), local] = 1.0
    for t in range(length // 2 + 1):
      if 1 <= 2 * t <= length:
        result[rows, 2 * t - 1] = np.einsum("ij,ij->i", now, now)
      if 2 * t + 1 <= length:
        after = step @ now
        result[rows, 2 * t] = np.einsum("ij,ij->i", now, after)
        now = after
  return result


def _blocks(n_node: Int[np.ndarray, " G"]) -> Iterator[np.ndarray]:
  """Yields graphs of similar size, as many as fit into one block."""
  order = np.argsort(n_node, kind="stable")
  order = order[n_node[order] > 0]
  begin, nodes = 0, 0
  for end, graph in enumerate(order):
    nodes += int(n_node[graph])
    if nodes * int(n_node[graph]) > _BLOCK_ENTRIES and end > begin:
      yield order[begin:end]
      begin, nodes = end, int(n_node[graph])
  if begin < len(order):
    yield order[begin:]


def degree_one_hot(graphs: jraph.GraphsTuple, width: int = 16) -> Float[np.ndarray, "N width"]:
  """Encodes the in-degree of each node, clipped to 1..width, as one-hot: (N, width) float32.

  >>> jm.graphs.degree_one_hot(triangles.graphs, 3)[0].tolist()
  [0.0, 1.0, 0.0]
  """
  degree = np.bincount(graphs.receivers, minlength=int(graphs.n_node.sum()))
  return np.eye(width, dtype=np.float32)[np.clip(degree, 1, width) - 1]


def structure_features(
  graphs: jraph.GraphsTuple, length: int = 16, max_degree: int = 16
) -> Float[np.ndarray, "N width"]:
  """Joins the node features of FedStar, s0 = [return probabilities ; one-hot degree].

  Args:
    graphs: unpadded numpy batch, both directions of every edge.
    length: longest walk.
    max_degree: width of the one-hot degree.

  Returns:
    (N, length + max_degree) float32.
  """
  return np.concatenate(
    [return_probabilities(graphs, length), degree_one_hot(graphs, max_degree)], 1
  )
