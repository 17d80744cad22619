"""Laplacian spectra from disk: a set of graphs is decomposed once per machine."""

from __future__ import annotations

import contextlib
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

  A damaged cache file is computed anew and replaced; a folder that cannot be written costs the time
  of computing, nothing else.
  """
  digest = hashlib.sha256(FORMAT)
  for part in (graphs.n_node, graphs.n_edge, graphs.senders, graphs.receivers):
    digest.update(np.ascontiguousarray(part, np.int64).tobytes())
  path = cache_folder() / "spectra" / f"{digest.hexdigest()}.npz"
  try:
    with np.load(path) as stored:
      return Spectra(stored["eigenvalues"], stored["eigenvectors"])
  except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
    pass
  spectra = spectral.laplacian_spectra(graphs)
  with contextlib.suppress(OSError):
    _write(path, spectra)
  return spectra


def _write(path: Path, spectra: Spectra) -> None:
  """Writes aside and renames: readers, and a run killed here, never see half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as aside:
    np.savez(Path(aside, path.name), **spectra._asdict())
    os.replace(Path(aside, path.name), path)
