"""Laplacian spectra from disk: a set of graphs is decomposed once per machine."""

from __future__ import annotations

import jraph
import numpy as np

from jaxmethods.data.array_cache import cached
from jaxmethods.graphs import spectral
from jaxmethods.graphs.spectral import Spectra

FORMAT = b"1"  # changes when what is stored changes


def laplacian_spectra(graphs: jraph.GraphsTuple) -> Spectra:
  """Like `spectral.laplacian_spectra`, kept under the hash of the graphs' structure."""
  structure = (graphs.n_node, graphs.n_edge, graphs.senders, graphs.receivers)
  stored = cached(
    "spectra",
    [FORMAT, *(np.asarray(part, np.int64) for part in structure)],
    lambda: spectral.laplacian_spectra(graphs)._asdict(),
  )
  return Spectra(stored["eigenvalues"], stored["eigenvectors"])
