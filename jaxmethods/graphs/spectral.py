"""Spectra of graph Laplacians, computed once per graph before training."""

from __future__ import annotations

from typing import NamedTuple

import jraph
import numpy as np
from jaxtyping import Float

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes


class Spectra(NamedTuple):
  """Eigendecompositions L = U diag(e) U^T of many graphs, concatenated.

  Attributes:
    eigenvalues: (N,) float64, N = sum of n, ascending within each graph.
    eigenvectors: (N2,) float64, N2 = sum of n^2; graph k holds its (n, n) matrix
      row-major, vectors in columns.
  """

  eigenvalues: Float[np.ndarray, " N"]
  eigenvectors: Float[np.ndarray, " N2"]


def laplacian_spectra(graphs: jraph.GraphsTuple) -> Spectra:
  """Decomposes the unnormalised Laplacian L = D - A of every graph.

  The work is done in float64: encoders multiply an eigenvalue by 100 before taking its sine, which
  amplifies the 1e-4 error of a float32 solver (FedSSP spec).

  Args:
    graphs: unpadded jraph batch of numpy arrays, both directions of every edge present once.

  Returns:
    Spectra in the order of the graphs.

  Raises:
    InputError: naming the graph, if an adjacency is not symmetric.
    ValueError: for other shapes.

  >>> jm.graphs.laplacian_spectra(triangles.graphs).eigenvalues[:3].round(6).tolist()
  [0.0, 3.0, 3.0]
  """
  shapes.check(
    n_node=(graphs.n_node, "G"), n_edge=(graphs.n_edge, "G"),
    senders=(graphs.senders, "E"), receivers=(graphs.receivers, "E"),
  )  # fmt: skip
  sizes = np.asarray(graphs.n_node)
  node_start = np.concatenate([[0], np.cumsum(sizes)])
  matrix_start = np.concatenate([[0], np.cumsum(sizes.astype(np.int64) ** 2)])
  edge_graph = np.repeat(np.arange(len(sizes)), graphs.n_edge)
  row = graphs.senders - node_start[edge_graph]
  column = graphs.receivers - node_start[edge_graph]

  eigenvalues = np.zeros(node_start[-1])
  eigenvectors = np.zeros(matrix_start[-1])
  for n in np.unique(sizes[sizes > 0]):  # one batched solver call per size
    members = np.flatnonzero(sizes == n)
    slot = np.full(len(sizes), -1)
    slot[members] = np.arange(len(members))
    here = slot[edge_graph] >= 0
    laplacian = np.zeros((len(members), n, n))
    laplacian[slot[edge_graph[here]], row[here], column[here]] = -1.0
    lopsided = np.flatnonzero((laplacian != laplacian.swapaxes(1, 2)).any((1, 2)))
    if lopsided.size:
      raise InputError(f"graph {members[lopsided[0]]}: adjacency is not symmetric")
    diagonal = np.arange(n)
    laplacian[:, diagonal, diagonal] = -laplacian.sum(-1)
    values, vectors = np.linalg.eigh(laplacian)
    eigenvalues[node_start[members][:, None] + diagonal] = values
    eigenvectors[matrix_start[members][:, None] + np.arange(n * n)] = vectors.reshape(-1, n * n)
  return Spectra(eigenvalues, eigenvectors)


def sine_encoding(
  eigenvalues: Float[np.ndarray, "*shape"], width: int
) -> Float[np.ndarray, "*shape H+1"]:
  """Encodes eigenvalues as [v, sin(100 v w_q), cos(100 v w_q)], w_q = exp(-2 q ln(10000) / width).

  A constant of the data, tabulated once in float64 instead of being recomputed every step.

  Args:
    eigenvalues: (...,) float64.
    width: H, even; q runs over 0..H/2-1.

  Returns:
    (..., H + 1) float64.

  Raises:
    InputError: if `width` is odd.

  >>> jm.graphs.sine_encoding(np.array([0.0, 3.0]), 4).shape
  (2, 5)
  """
  if width % 2:
    raise InputError(f"hidden: the sine encoding needs an even width, got {width}")
  # The published code builds its frequencies in float32; in float64 they differ by 1e-7 relative,
  # which the factor 100 turns into 1e-6 of the encoding.
  exponent = np.arange(0, width, 2, dtype=np.float32) * np.float32(-np.log(10000.0) / width)
  phase = 100.0 * eigenvalues[..., None] * np.exp(exponent).astype(np.float64)
  return np.concatenate([eigenvalues[..., None], np.sin(phase), np.cos(phase)], axis=-1)
