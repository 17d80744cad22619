"""Laplacian spectra from disk: a set of graphs is decomposed once per machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import jraph
import numpy as np

from jaxmethods.graphs import spectral
from jaxmethods.graphs.spectral import Spectra

FORMAT = b"1"  # changes when what is stored changes


def cache_folder() -> Path:
  """`$JAXMETHODS_CACHE`, else `~/.cache/jaxmethods`."""
  return Path(os.environ.get("JAXMETHODS_CACHE") or Path.home() / ".cache" / "jaxmethods")


def laplacian_spectra(graphs: jraph.GraphsTuple) -> Spectra:
  """Like `spectral.laplacian_spectra`, kept under the hash of the graphs' structure.

  A damaged cache file is computed anew and replaced.
  """
  digest = hashlib.sha256(FORMAT)
  for part in (graphs.n_node, graphs.n_edge, graphs.senders, graphs.receivers):
    digest.update(np.ascontiguousarray(part, np.int64).tobytes())
  path = cache_folder() / "spectra" / f"{digest.hexdigest()}.npz"
  try:
    with np.load(path) as stored:
      return Spectra(stored["eigenvalues"], stored["eigenvectors"])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    pass
  spectra = spectral.laplacian_spectra(graphs)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Written aside and renamed: a run killed here leaves no half file behind.
  with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
    np.savez(file, **spectra._asdict())
  os.replace(file.name, path)
  return spectra
