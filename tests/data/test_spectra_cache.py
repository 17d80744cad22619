"""Spectra kept on disk: the same numbers, however the file fared."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxmethods import folders
from jaxmethods.data import spectra_cache
from jaxmethods.errors import InputError
from jaxmethods.graphs import spectral
from tests.graphs.random_graphs import random_data

GRAPHS = random_data(num_graphs=5).graphs


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache/spectra"


@pytest.fixture
def computed(monkeypatch):
  """Counts the decompositions."""
  calls = []
  fresh = spectral.laplacian_spectra
  monkeypatch.setattr(spectral, "laplacian_spectra", lambda g: calls.append(1) or fresh(g))
  return calls


def assert_same(got, want):
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype == np.float64
    np.testing.assert_array_equal(a, b)


def test_folder_from_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path / "elsewhere"))
  assert folders.cache() == tmp_path / "elsewhere"
  for nothing in (lambda: monkeypatch.setenv("JAXMETHODS_CACHE", ""),
                  lambda: monkeypatch.delenv("JAXMETHODS_CACHE")):  # fmt: skip
    nothing()
    assert folders.cache() == Path.home() / ".cache/jaxmethods"


def test_second_time_comes_from_disk(folder, computed):
  fresh = spectral.laplacian_spectra(GRAPHS)
  computed.clear()
  assert_same(spectra_cache.laplacian_spectra(GRAPHS), fresh)
  assert_same(spectra_cache.laplacian_spectra(GRAPHS), fresh)
  assert len(computed) == 1
  assert [path.suffix for path in folder.iterdir()] == [".npz"]  # no temporary file is left


def test_structure_is_the_key_and_features_are_not(folder, computed):
  spectra_cache.laplacian_spectra(GRAPHS)
  spectra_cache.laplacian_spectra(GRAPHS._replace(nodes=GRAPHS.nodes + 1))
  wide = GRAPHS._replace(senders=GRAPHS.senders.astype(np.int64))
  assert_same(spectra_cache.laplacian_spectra(wide), spectral.laplacian_spectra(GRAPHS))
  assert len(list(folder.iterdir())) == 1
  # One edge less; the same edges cut into other graphs; graphs in another order.
  others = [random_data(num_graphs=5, seed=seed).graphs for seed in (1, 2)]
  merged = GRAPHS._replace(
    n_node=np.array([GRAPHS.n_node.sum()]), n_edge=np.array([GRAPHS.n_edge.sum()])
  )
  for count, graphs in enumerate([*others, merged], 2):
    assert_same(spectra_cache.laplacian_spectra(graphs), spectral.laplacian_spectra(graphs))
    assert len(list(folder.iterdir())) == count


def test_damaged_file_is_replaced(folder, computed):
  fresh = spectra_cache.laplacian_spectra(GRAPHS)
  (path,) = folder.iterdir()
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  damages = [b"", b"not an archive", whole[: len(whole) // 2], whole[:-1], b"\x93NUMPY" + whole]
  central = whole.rindex(b"PK\x01\x02")
  for position in range(central, central + 20):  # version, flags (encrypted, ..), compression
    damages.append(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
  for position in rng.integers(0, len(whole), 60):
    flipped = bytearray(whole)
    flipped[position] ^= 1 << int(rng.integers(8))
    damages.append(bytes(flipped))
  for damage in damages:
    path.write_bytes(damage)
    assert_same(spectra_cache.laplacian_spectra(GRAPHS), fresh)
  path.write_bytes(b"")
  spectra_cache.laplacian_spectra(GRAPHS)
  assert path.read_bytes() == whole
  assert len(list(folder.iterdir())) == 1


def test_folder_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path / "file"))
  assert_same(spectra_cache.laplacian_spectra(GRAPHS), spectral.laplacian_spectra(GRAPHS))


def test_bad_graphs_leave_nothing_behind(folder):
  lopsided = GRAPHS._replace(
    senders=GRAPHS.senders[1:],
    receivers=GRAPHS.receivers[1:],
    n_edge=GRAPHS.n_edge - np.eye(5, dtype=int)[0],
  )
  with pytest.raises(InputError, match="graph 0: adjacency is not symmetric"):
    spectra_cache.laplacian_spectra(lopsided)
  assert not folder.exists()


def test_two_at_once(folder):
  """Processes of one run start together and write the same file."""
  results, start = [], threading.Barrier(4)

  def work():
    start.wait()
    results.append(spectra_cache.laplacian_spectra(GRAPHS))

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for result in results:
    assert_same(result, spectral.laplacian_spectra(GRAPHS))
  assert len(os.listdir(folder)) == 1
