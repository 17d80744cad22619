"""TFDS without TensorFlow: the same graphs, digits as PNG, shapes of the image sets."""

import socket
import sys

import numpy as np
import pytest

from jaxmethods.data.sources import load_arrays, load_graphs
from jaxmethods.errors import InputError

pytest.importorskip("tensorflow_datasets")


def _assert_same(a, b):
  for field in ("nodes", "senders", "receivers", "n_node", "n_edge"):
    ours, theirs = getattr(a.graphs, field), getattr(b.graphs, field)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype
  np.testing.assert_array_equal(a.labels, b.labels)
  assert a.labels.dtype == b.labels.dtype and a.num_classes == b.num_classes


def test_graphs_are_identical(data_folder):
  (through_tfds,) = load_graphs("tfds:tu/MUTAG")
  _assert_same(through_tfds, load_graphs("tu:MUTAG")[0])
  _assert_same(through_tfds, load_graphs("embedded:MUTAG")[0])
  assert through_tfds.source.name == "tfds:tu/MUTAG"
  assert list(data_folder.rglob("*.array_record*"))
  # Composite labels and attributes, chosen when loading.
  for features in ("auto", "both", "degree"):
    (through_tfds,) = load_graphs("tfds:tu/Cuneiform", features=features)
    _assert_same(through_tfds, load_graphs("tu:Cuneiform", features=features)[0])
  assert "tensorflow" not in sys.modules


def test_builder_by_its_tfds_name(data_folder):
  import tensorflow_datasets as tfds

  load_graphs("tfds:tu/MUTAG")
  builder = tfds.builder(
    "tu/MUTAG", data_dir=data_folder / "tensorflow_datasets", file_format="array_record"
  )
  source = builder.as_data_source("full")
  assert len(source) == 188 and source[187]["edges"].shape[1] == 2


def test_any_local_set_and_edge_free_graphs(data_folder):
  folder = data_folder / "MINE"
  folder.mkdir()
  texts = {"A": "1,2\n2,1\n", "graph_indicator": "1\n1\n2\n", "graph_labels": "4\n2\n"}
  for part, text in texts.items():
    (folder / f"MINE_{part}.txt").write_text(text)
  _assert_same(load_graphs("tfds:tu/MINE")[0], load_graphs("tu:MINE")[0])


def test_missing_or_damaged_set(data_folder, monkeypatch):
  from jaxmethods.data import files

  def unreachable(*_, **__):
    raise OSError("offline")

  monkeypatch.setattr(files.urllib.request, "urlopen", unreachable)
  with pytest.raises(InputError, match=r"tu:NCI1 is not in .*tudataset/NCI1"):
    load_graphs("tfds:tu/NCI1")
  assert not (data_folder / "tensorflow_datasets").exists()
  with pytest.raises(InputError, match="did you mean 'NCI1'"):
    load_graphs("tfds:tu/NCI2")
  (data_folder / "BZR").mkdir()
  (data_folder / "BZR" / "BZR_A.txt").write_text("1, 2\n")
  with pytest.raises(InputError, match=r"BZR: no BZR_graph_indicator\.txt"):
    load_graphs("tfds:tu/BZR")


def test_digits_through_png(data_folder):
  data = load_arrays("tfds:sklearn_digits")
  x, y = data.splits["all"]
  assert x.shape == (1797, 8, 8, 1) and x.dtype == np.uint8
  pixels, labels = load_arrays("digits").splits["all"]
  np.testing.assert_array_equal(np.rint(x / 255 * 16) / 16, pixels)
  np.testing.assert_array_equal(y, labels)
  part = load_arrays("tfds:sklearn_digits:full[:10%]").splits["full[:10%]"]
  np.testing.assert_array_equal(part[1], labels[:180])
  with pytest.raises(InputError, match="no split 'test'; it has full"):
    load_arrays("tfds:sklearn_digits:test")
  (file,) = data_folder.rglob("*.array_record*")
  file.write_bytes(file.read_bytes()[:2000])
  with pytest.raises(InputError, match="sklearn_digits are damaged or missing"):
    load_arrays("tfds:sklearn_digits")
  file.unlink()
  with pytest.raises(InputError, match="sklearn_digits are damaged or missing"):
    load_arrays("tfds:sklearn_digits")


@pytest.mark.parametrize(
  ("name", "shape"),
  [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3)), ("emnist/letters", (28, 28, 1))],
)
def test_shapes_of_published_sets(data_folder, monkeypatch, name, shape):
  """Random pixels of TFDS' mock: shapes and types only."""
  import tensorflow_datasets as tfds

  from jaxmethods.data import tfds_sources

  monkeypatch.setattr(tfds_sources, "_check_network", lambda name: None)

  with tfds.testing.mock_data(num_examples=4):
    x, y = load_arrays(f"tfds:{name}:train").splits["train"]
  assert x.shape == (4, *shape) and x.dtype == np.uint8
  assert y.shape == (4,) and y.dtype == np.int32


def test_text_set_is_no_image_set(data_folder):
  with pytest.raises(InputError, match=r"expected one image and one class label .* text"):
    load_arrays("tfds:imdb_reviews")


def test_offline_and_unknown(data_folder, monkeypatch):
  def unresolved(*_):
    raise socket.gaierror(-2, "Name or service not known")

  monkeypatch.setattr(socket, "getaddrinfo", unresolved)
  for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    monkeypatch.delenv(proxy, raising=False)
  folder = data_folder / "tensorflow_datasets"
  with pytest.raises(InputError, match=f"tfds:mnist is not in {folder}.*no network.*folder mnist/"):
    load_arrays("tfds:mnist")
  with pytest.raises(InputError, match="did you mean 'mnist'"):
    load_arrays("tfds:mnst")
  with pytest.raises(InputError, match="no such config"):
    load_arrays("tfds:sklearn_digits/colour")
