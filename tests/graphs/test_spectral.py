"""Laplacian spectra, and the sine encoding of eigenvalues."""

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.errors import InputError
from jaxmethods.graphs.spectral import laplacian_spectra, sine_encoding
from tests.graphs.random_graphs import from_adjacencies, random_adjacency, random_data


def of_each_graph(spectra, n_node):
  """(eigenvalues (n,), eigenvectors (n, n)) of every graph."""
  values = np.split(spectra.eigenvalues, np.cumsum(n_node)[:-1])
  vectors = np.split(spectra.eigenvectors, np.cumsum(n_node**2)[:-1])
  return [(e, u.reshape(len(e), len(e))) for e, u in zip(values, vectors, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_spectrum_of_random_graphs(seed, density):
  rng = np.random.default_rng(seed)
  adjacencies = [random_adjacency(rng, n, density) for n in rng.integers(1, 15, 6)]
  graphs = from_adjacencies(
    adjacencies, [np.ones((len(a), 1)) for a in adjacencies], [0] * 6
  ).graphs
  spectra = laplacian_spectra(graphs)
  assert spectra.eigenvalues.dtype == spectra.eigenvectors.dtype == np.float64
  for a, (e, u) in zip(adjacencies, of_each_graph(spectra, graphs.n_node), strict=True):
    degree = a.sum(1)
    np.testing.assert_allclose(u @ np.diag(e) @ u.T, np.diag(degree) - a, atol=1e-12)
    np.testing.assert_allclose(u.T @ u, np.eye(len(a)), atol=1e-12)
    assert (np.diff(e) >= 0).all()
    assert abs(e[0]) < 1e-12 and e.min() >= -1e-5
    assert e.max() <= 2 * degree.max() + 1e-12
    assert (e < 1e-9).sum() == nx.number_connected_components(nx.from_numpy_array(a))


def test_known_spectra():
  path = np.eye(3, k=1) + np.eye(3, k=-1)
  complete = 1 - np.eye(4)
  graphs = from_adjacencies([path, complete], [np.ones((3, 1)), np.ones((4, 1))], [0, 1]).graphs
  e = laplacian_spectra(graphs).eigenvalues
  np.testing.assert_allclose(e, [0, 1, 3, 0, 4, 4, 4], atol=1e-12)


@pytest.mark.parametrize("graph", [0, 3, 9])
def test_graph_that_is_not_symmetric_is_named(graph):
  graphs = random_data(num_graphs=10, density=0.9).graphs
  edge = graphs.n_edge[:graph].sum()
  n_edge = graphs.n_edge.copy()
  n_edge[graph] -= 1
  lopsided = graphs._replace(
    senders=np.delete(graphs.senders, edge),
    receivers=np.delete(graphs.receivers, edge),
    n_edge=n_edge,
  )
  with pytest.raises(InputError, match=f"graph {graph}: adjacency is not symmetric"):
    laplacian_spectra(lopsided)


@pytest.mark.parametrize("width", [2, 6, 128])
def test_sine_encoding_is_the_formula(width):
  values = np.array([0.0, 0.5, 3.25, 17.0])
  encoded = sine_encoding(values, width)
  assert encoded.shape == (4, width + 1) and encoded.dtype == np.float64
  frequencies = [math.exp(-2 * q * math.log(10000) / width) for q in range(width // 2)]
  for v, row in zip(values, encoded, strict=True):
    phases = [100 * v * w for w in frequencies]
    expected = [v, *map(math.sin, phases), *map(math.cos, phases)]
    # The published frequencies are float32: relative 1e-7 of a phase of up to 100 v.
    np.testing.assert_allclose(row, expected, atol=100 * v * 4e-7 + 1e-12)
  assert encoded[0].tolist() == [0.0] * (1 + width // 2) + [1.0] * (width // 2)


def test_odd_width_is_refused():
  with pytest.raises(InputError, match=r"hidden: .* even width, got 7"):
    sine_encoding(np.ones(3), 7)
