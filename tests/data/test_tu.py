"""TU sets: format, features, places, published counts, bad input."""

import gzip
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxmethods.data import files, tu
from jaxmethods.data.records import describe
from jaxmethods.data.sources import load_graphs
from jaxmethods.errors import InputError

SHARED = Path(os.environ.get("JAXMETHODS_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_shared = pytest.mark.skipif(
  not (SHARED / "tudataset" / "NCI1").is_dir(),
  reason="needs the TU sets: let JAXMETHODS_DATA name a folder with tudataset/",
)

# Two graphs: a triangle with a tail, and a path of three nodes.
TINY = {
  "A": "1, 2\n2, 1\n2, 3\n3, 2\n1, 3\n3, 1\n3, 4\n4, 3\n5, 6\n6, 5\n6, 7\n7, 6\n",
  "graph_indicator": "1\n1\n1\n1\n2\n2\n2\n",
  "graph_labels": "1\n-1\n",
  "node_labels": "5\n3\n3\n8\n3\n5\n3\n",
  "node_attributes": "0.5, 1\n1, 2\n2, 3\n3, 4\n4, 5\n5, 6\n6, 7.25\n",
}


@pytest.fixture
def write_tiny(data_folder):
  """Writes the set TINY with some texts replaced (None: left out) and returns its folder."""

  def write(**changes: str | None) -> Path:
    folder = data_folder / "tudataset" / "TINY"
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in {**TINY, **changes}.items():
      if text is not None:
        (folder / f"TINY_{part}.txt").write_text(text)
    return folder

  return write


def _check_record(data):
  """The promises of GraphData."""
  graphs = data.graphs
  assert graphs.nodes.dtype == np.float32
  for ids in (graphs.senders, graphs.receivers, graphs.n_node, graphs.n_edge, data.labels):
    assert ids.dtype == np.int32
  graph_of_node = np.repeat(np.arange(len(graphs.n_node)), graphs.n_node)
  assert len(graphs.nodes) == len(graph_of_node) and graphs.n_edge.sum() == len(graphs.senders)
  np.testing.assert_array_equal(graph_of_node[graphs.senders], graph_of_node[graphs.receivers])
  np.testing.assert_array_equal(
    np.repeat(np.arange(len(graphs.n_edge)), graphs.n_edge), graph_of_node[graphs.senders]
  )
  assert (graphs.senders != graphs.receivers).all()
  key = graphs.senders.astype(np.int64) * len(graph_of_node) + graphs.receivers
  assert (np.diff(key) > 0).all(), "sorted, no duplicates"
  reverse = graphs.receivers.astype(np.int64) * len(graph_of_node) + graphs.senders
  np.testing.assert_array_equal(np.sort(reverse), key)
  np.testing.assert_array_equal(np.unique(data.labels), np.arange(data.num_classes))
  assert np.isfinite(graphs.nodes).all()


def test_tiny_by_hand(write_tiny):
  write_tiny()
  (data,) = load_graphs("tu:TINY")
  _check_record(data)
  np.testing.assert_array_equal(data.graphs.senders, [0, 0, 1, 1, 2, 2, 2, 3, 4, 5, 5, 6])
  np.testing.assert_array_equal(data.graphs.receivers, [1, 2, 0, 2, 0, 1, 3, 2, 5, 4, 6, 5])
  np.testing.assert_array_equal(data.graphs.n_node, [4, 3])
  np.testing.assert_array_equal(data.graphs.n_edge, [8, 4])
  np.testing.assert_array_equal(data.labels, [1, 0])  # -1 < 1
  # labels 3..8 shifted by 3, one-hot over the whole range; attributes dropped
  np.testing.assert_array_equal(data.graphs.nodes, np.eye(6)[[2, 0, 0, 5, 0, 2, 0]])
  assert data.source.name == "tu:TINY" and data.source.real


def test_features(write_tiny):
  write_tiny()
  labels = load_graphs("tu:TINY", features="labels")[0].graphs.nodes
  attributes = load_graphs("tu:TINY", features="attributes")[0].graphs.nodes
  assert attributes.shape == (7, 2) and attributes[6, 1] == 7.25
  both = load_graphs("tu:TINY", features="both")[0].graphs.nodes
  np.testing.assert_array_equal(both, np.concatenate([labels, attributes], axis=1))
  degree = load_graphs("tu:TINY", features="degree")[0].graphs.nodes
  np.testing.assert_array_equal(degree, np.eye(4)[[2, 2, 3, 1, 1, 2, 1]])
  clipped = load_graphs("tu:TINY", features="degree", max_degree=2)[0].graphs.nodes
  np.testing.assert_array_equal(clipped, np.eye(3)[[2, 2, 2, 1, 1, 2, 1]])
  with pytest.raises(InputError, match="max_degree=0"):
    load_graphs("tu:TINY", features="degree", max_degree=0)
  with pytest.raises(InputError, match=r"features='colour'.*labels"):
    load_graphs("tu:TINY", features="colour")


def test_auto_without_labels(write_tiny):
  write_tiny(node_labels=None)
  assert load_graphs("tu:TINY")[0].graphs.nodes.shape == (7, 2)
  with pytest.raises(InputError, match="no node labels"):
    load_graphs("tu:TINY", features="labels")


def test_auto_with_edges_only(write_tiny):
  # Every edge twice, as in the IMDB files, and self loops: neither counts as degree.
  folder = write_tiny(node_labels=None, node_attributes=None, A=TINY["A"] * 2 + "1, 1\n1, 1\n")
  nodes = load_graphs("tu:TINY")[0].graphs.nodes
  np.testing.assert_array_equal(nodes, np.eye(4)[[2, 2, 3, 1, 1, 2, 1]])
  with pytest.raises(InputError, match="no node attributes"):
    load_graphs("tu:TINY", features="attributes")
  assert folder.is_dir()


def test_graphs_without_edges_are_kept(write_tiny):
  write_tiny(A="1, 2\n2, 1\n")
  graphs = load_graphs("tu:TINY")[0].graphs
  np.testing.assert_array_equal(graphs.n_edge, [2, 0])
  write_tiny(A="")
  assert load_graphs("tu:TINY")[0].graphs.n_edge.sum() == 0


def test_huge_one_hot_is_refused(write_tiny):
  write_tiny(node_labels="5\n3\n3\n8\n3\n5\n999999999\n")
  with pytest.raises(InputError, match=r"tu:TINY: one-hot .* 2 GiB"):
    load_graphs("tu:TINY")


def _same(a, b):
  np.testing.assert_array_equal(a.graphs.nodes, b.graphs.nodes)
  np.testing.assert_array_equal(a.graphs.senders, b.graphs.senders)
  np.testing.assert_array_equal(a.graphs.receivers, b.graphs.receivers)
  np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize(
  "place", ["tudataset/TINY", "TINY", "TINY/raw", "tudataset/TINY.zip", "TINY/TINY.zip", "gz"]
)
def test_places_and_packings(write_tiny, data_folder, place):
  folder = write_tiny()
  (expected,) = load_graphs("tu:TINY")
  texts = {file.name: file.read_bytes() for file in folder.iterdir()}
  for file in folder.iterdir():
    file.unlink()
  if place.endswith(".zip"):
    path = data_folder / place
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
      for file, text in texts.items():
        archive.writestr(f"TINY/{file}", text)
      archive.writestr("TINY/README.txt", "about")
  elif place == "gz":
    for file, text in texts.items():
      (folder / f"{file}.gz").write_bytes(gzip.compress(text))
  else:
    (data_folder / place).mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
      (data_folder / place / file).write_bytes(text)
  _same(load_graphs("tu:TINY")[0], expected)


def test_compact_archive(write_tiny, data_folder):
  folder = write_tiny(node_labels=None, node_attributes=None)
  (expected,) = load_graphs("tu:TINY")
  for file in folder.iterdir():
    file.unlink()
  path = data_folder / "tudataset_extra" / "TINY.npz"
  path.parent.mkdir()
  arrays = {
    "num_nodes": [4, 3],
    "graph_label": [1, 0],
    "upper_degree": [2, 1, 1, 0, 1, 1, 0],
    "delta": [1, 1, 1, 1, 1, 1],
  }
  np.savez(path, **arrays)
  _same(load_graphs("tu:TINY")[0], expected)
  for key, value, message in [
    ("delta", [1, 1, 1, 2, 1, 1], "leaves its graph"),
    ("delta", [1, 1, 1], "lengths"),
    ("graph_label", [1], "lengths"),
  ]:
    np.savez(path, **{**arrays, key: value})
    with pytest.raises(InputError, match=message):
      load_graphs("tu:TINY")
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(InputError, match=r"TINY\.npz: not a compact"):
    load_graphs("tu:TINY")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"graph_labels": "1\n"}, r"graph_labels.txt: 1 labels.*2 graphs"),
    ({"graph_labels": "1\n-1\n1\n"}, r"graph_labels.txt: 3 labels.*2 graphs"),
    ({"graph_labels": "1\nx\n"}, r"graph_labels.txt: row 2: 'x' is not a whole number"),
    ({"graph_labels": "1, 2\n3, 4\n"}, r"graph_labels.txt: row 1: 2 values, expected 1"),
    ({"graph_labels": ""}, r"graph_labels.txt: empty"),
    (
      {"graph_indicator": "1\n1\n2\n2\n1\n2\n2\n"},
      r"graph_indicator.txt: row 5: graph 1 after graph 2",
    ),
    (
      {"graph_indicator": "1\n1\n1\n1\n3\n3\n3\n"},
      r"row 5: graph 3 after graph 1: .* without a node",
    ),
    (
      {"graph_indicator": "0\n0\n0\n0\n1\n1\n1\n"},
      r"row 1: graph 0 after graph 0: ids must start at 1",
    ),
    ({"graph_indicator": "\n"}, r"graph_indicator.txt: empty"),
    ({"graph_indicator": None}, r"no TINY_graph_indicator.txt"),
    ({"A": None}, r"no TINY_A.txt"),
    ({"A": TINY["A"] + "7, 8\n8, 7\n"}, r"A.txt: row 13: node id outside 1\.\.7"),
    ({"A": "0, 1\n1, 0\n"}, r"A.txt: row 1: node id outside"),
    ({"A": TINY["A"] + "4, 5\n5, 4\n"}, r"A.txt: row 13: the edge joins two graphs"),
    ({"A": TINY["A"] + "1, 4\n"}, r"A.txt: edge 1, 4 without its reverse 4, 1"),
    ({"A": "1, 2\n2, 1, 3\n"}, r"A.txt: row 2: 3 values, expected 2"),
    ({"A": "1\n2\n"}, r"A.txt: row 1: 1 values, expected 2"),
    ({"A": "1, 2\n2, 1.5\n"}, r"A.txt: row 2: '1.5' is not a whole number"),
    ({"A": "1, 2\n2, 99999999999999999999\n"}, r"A.txt"),
    ({"node_labels": "1\n2\n"}, r"node_labels.txt: 2 rows, expected 7"),
    ({"node_attributes": "nan, 1\n" + "1, 2\n" * 6}, r"node_attributes.txt: row 1: .*finite"),
    ({"node_attributes": "1, 2\n" * 6 + "1, inf\n"}, r"node_attributes.txt: row 7: .*finite"),
    (
      {"node_attributes": "1, 2\n" * 6 + "1, \n"},
      r"node_attributes.txt: row 7: '' is not a number",
    ),
    ({"node_attributes": "\xff\xfe\x00"}, r"node_attributes.txt: row 1"),
  ],
)
def test_damaged_sets(write_tiny, changes, message):
  folder = write_tiny(**changes)
  with pytest.raises(InputError, match=message) as caught:
    load_graphs("tu:TINY")
  assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_damaged_archives(data_folder):
  folder = data_folder / "TINY"
  folder.mkdir()
  packed = gzip.compress(TINY["A"].encode())
  (folder / "TINY_A.txt.gz").write_bytes(packed[:-9])
  with pytest.raises(InputError, match=r"TINY_A\.txt\.gz: damaged gzip"):
    load_graphs("tu:TINY")
  (folder / "TINY_A.txt.gz").write_bytes(b"no gzip")
  with pytest.raises(InputError, match="damaged gzip"):
    load_graphs("tu:TINY")
  (folder / "TINY_A.txt.gz").unlink()
  archive = io.BytesIO()
  with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
    zipped.writestr("TINY/TINY_A.txt", TINY["A"] * 50)
  for content in (archive.getvalue()[:-30], archive.getvalue()[:60], b"PK", b""):
    (data_folder / "TINY.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"TINY\.zip: damaged zip"):
      load_graphs("tu:TINY")
  flipped = bytearray(archive.getvalue())
  flipped[60] ^= 0xFF
  (data_folder / "TINY.zip").write_bytes(flipped)
  with pytest.raises(InputError, match=r"TINY\.zip: damaged zip"):
    load_graphs("tu:TINY")
  (data_folder / "TINY.zip").write_bytes(archive.getvalue())
  with pytest.raises(InputError, match=r"TINY\.zip: no TINY_graph_indicator"):
    load_graphs("tu:TINY")


def test_selections(data_folder):
  assert tu.expand("SM") == tu.GROUPS["SM"]
  assert tu.expand("BIO-SM") == tu.expand("SM-BIO") == tu.GROUPS["SM"] + tu.GROUPS["BIO"]
  sizes = {"SM": 7, "BIO-SM": 10, "SM-CV": 10, "BIO-SM-SN": 12, "BIO-SN-CV": 8, "SM-SN-CV": 12}
  assert {setting: len(tu.expand(setting)) for setting in sizes} == sizes
  assert tu.expand("MUTAG, IMDB-BINARY") == ("MUTAG", "IMDB-BINARY")
  for bad, hint in [
    ("NCI2", "NCI1"),
    ("mutag", "MUTAG"),
    ("IMDB-BINAY", "IMDB-BINARY"),
    ("QQ", "groups"),
  ]:
    with pytest.raises(InputError, match=hint):
      tu.expand(bad)
  with pytest.raises(InputError, match="twice"):
    tu.expand("SM,MUTAG")
  with pytest.raises(InputError, match="no set named"):
    tu.expand("../TINY")


def test_mutag_comes_from_the_wheel(data_folder):
  (data,) = load_graphs("tu:MUTAG")
  _check_record(data)
  assert data.source.origin.startswith("grakel")
  np.testing.assert_array_equal(np.bincount(data.labels), [63, 125])


def test_changed_copy_of_a_published_set_says_so(write_tiny, data_folder):
  folder = write_tiny()
  target = data_folder / "BZR"
  target.mkdir()
  for file in folder.iterdir():
    file.rename(target / file.name.replace("TINY", "BZR"))
  assert "differs from the published" in load_graphs("tu:BZR")[0].source.origin


# graphs, nodes, average nodes and edges, class counts, features, largest graph, largest degree, no edges
PUBLISHED = {
  "MUTAG": (188, 3371, 17.93, 19.79, [63, 125], 7, 28, 4, 0),
  "BZR": (405, 14479, 35.75, 38.36, [319, 86], 53, 57, 4, 0),
  "COX2": (467, 19252, 41.22, 43.45, [365, 102], 35, 56, 4, 0),
  "DHFR": (756, 32075, 42.43, 44.54, [295, 461], 53, 71, 4, 0),
  "PTC_MR": (344, 4915, 14.29, 14.69, [192, 152], 18, 64, 4, 0),
  "AIDS": (2000, 31385, 15.69, 16.20, [400, 1600], 38, 95, 6, 0),
  "NCI1": (4110, 122747, 29.87, 32.30, [2053, 2057], 37, 111, 4, 0),
  "OHSU": (79, 6479, 82.01, 199.66, [35, 44], 190, 171, 37, 0),
  "Peking_1": (85, 3341, 39.31, 77.35, [49, 36], 190, 134, 21, 0),
  "PROTEINS": (1113, 43471, 39.06, 72.82, [663, 450], 3, 620, 25, 0),
  "ENZYMES": (600, 19580, 32.63, 62.14, [100] * 6, 3, 126, 9, 0),
  "IMDB-BINARY": (1000, 19773, 19.77, 96.53, [500] * 2, 136, 136, 135, 0),
  "IMDB-MULTI": (1500, 19502, 13.00, 65.94, [500] * 3, 89, 89, 88, 0),
  "Letter-low": (2250, 10522, 4.68, 3.13, [150] * 15, 2, 8, 4, 7),
  "Letter-med": (2250, 10518, 4.67, 3.21, [150] * 15, 2, 9, 4, 9),
  "Letter-high": (2250, 10507, 4.67, 4.50, [150] * 15, 2, 9, 5, 9),
}


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_DATA", str(SHARED))
  (data,) = load_graphs(f"tu:{name}")
  _check_record(data)
  assert "differs" not in data.source.origin
  graphs = data.graphs
  found = (
    len(data.labels),
    len(graphs.nodes),
    round(float(graphs.n_node.mean()), 2),
    round(float(graphs.n_edge.mean() / 2), 2),
    np.bincount(data.labels).tolist(),
    graphs.nodes.shape[1],
    int(graphs.n_node.max()),
    int(np.bincount(graphs.senders).max()),
    int((graphs.n_edge == 0).sum()),
  )
  expected = PUBLISHED[name]
  assert found[:2] + found[4:] == expected[:2] + expected[4:]
  np.testing.assert_allclose(found[2:4], expected[2:4], atol=0.011)


@needs_shared
def test_compact_dd(monkeypatch):
  monkeypatch.setenv("JAXMETHODS_DATA", str(SHARED))
  (data,) = load_graphs("tu:DD")
  _check_record(data)
  assert len(data.labels) == 1178
  assert round(float(data.graphs.n_edge.mean() / 2), 2) == 715.66
  with pytest.raises(InputError, match="2 GiB"):  # 859,254 nodes x 3,063 degrees
    load_graphs("tu:REDDIT-BINARY")


def test_published_digests_name_known_sets():
  assert set(tu.PUBLISHED_SHA256) <= set(tu.NAMES)
  assert len(set(tu.NAMES)) == len(tu.NAMES)
  assert files.data_dir().is_absolute()


def test_other_spellings_of_the_same_numbers(write_tiny):
  folder = write_tiny()
  (expected,) = load_graphs("tu:TINY", features="both")
  for end in ("\r\n", "\r"):
    for part, text in TINY.items():
      file = folder / f"TINY_{part}.txt"
      file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
    (data,) = load_graphs("tu:TINY", features="both")
    np.testing.assert_array_equal(data.graphs.nodes, expected.graphs.nodes)
    np.testing.assert_array_equal(data.graphs.senders, expected.graphs.senders)
    np.testing.assert_array_equal(data.labels, expected.labels)
    assert data.source.digest == expected.source.digest
  write_tiny(graph_labels="1.0\n-1.0\n", node_labels="5.\n3.0\n3e0\n8\n3\n5\n3\n")
  (data,) = load_graphs("tu:TINY", features="both")
  np.testing.assert_array_equal(data.graphs.nodes, expected.graphs.nodes)
  np.testing.assert_array_equal(data.labels, expected.labels)
  for label in ("1.5", "nan", "inf", "1e30", "one"):
    write_tiny(graph_labels=f"1\n{label}\n")
    with pytest.raises(InputError, match=f"row 2: '{label}' is not a whole number"):
      load_graphs("tu:TINY")


def test_sets_of_ones_own(write_tiny, tmp_path):
  folder = write_tiny()
  (data,) = load_graphs("tu:TINY")
  assert data.source.own and not data.source.citation
  (by_path,) = load_graphs(f"tu:{folder}")
  assert by_path.source.own and by_path.source.digest == data.source.digest
  with zipfile.ZipFile(tmp_path / "any.zip", "w") as archive:
    for file in folder.iterdir():
      archive.write(file, f"inside/{file.name}")
  (packed,) = load_graphs(f"tu:{tmp_path / 'any.zip'}")
  assert packed.source.digest == data.source.digest
  (folder / "TINY_edge_weights.txt").write_text("1\n")
  assert load_graphs(f"tu:{folder}")[0].source.origin == f"{folder} (not read: edge_weights)"
  assert "data of yours" in describe([data]) and "TUDataset" not in describe([data])
  for path, message in ((tmp_path, "found 0"), (folder / "TINY_A.txt", "is no folder and no zip")):
    with pytest.raises(InputError, match=message):
      load_graphs(f"tu:{path}")
  with pytest.raises(
    InputError, match=r"your own go to .*tudataset/NOSUCH, or are named by tu:PATH"
  ):
    load_graphs("tu:NOSUCH")
