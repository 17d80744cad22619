"""Packed graphs, spectra and structure."""

from jaxmethods.graphs.batching import (
  BatchShape as BatchShape,
  LabelledGraphs as LabelledGraphs,
  batch_graphs as batch_graphs,
  batch_shape as batch_shape,
  check_graphs as check_graphs,
)
from jaxmethods.graphs.packing import pack as pack
from jaxmethods.graphs.spectral import (
  Spectra as Spectra,
  laplacian_spectra as laplacian_spectra,
  sine_encoding as sine_encoding,
)
from jaxmethods.graphs.structure import (
  degree_one_hot as degree_one_hot,
  return_probabilities as return_probabilities,
)
