"""Pictures show the numbers they were given."""

import itertools

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from jaxmethods.runtime import pictures


@pytest.fixture(autouse=True)
def closed():
  yield
  plt.close("all")


def texts(axis) -> list[str]:
  return [text.get_text() for text in axis.texts]


def test_bars_have_the_lengths_of_the_values():
  series = {"before": {"a": 0.25, "b": 0.5}, "after": {"a": 0.75, "b": 1.0}}
  figure = pictures.bars(series, "accuracy")
  (axis,) = figure.axes
  lengths = [[bar.get_width() for bar in group] for group in axis.containers]
  assert lengths == [[0.25, 0.5], [0.75, 1.0]]
  assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
  assert texts(axis) == ["0.25", "0.5", "0.75", "1"]
  assert axis.get_xlabel() == "accuracy"
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == ["before", "after"]
  # Groups do not overlap.
  edges = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in axis.patches)
  assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(edges))


def test_marks_lie_at_their_values_and_text_beside_them():
  figure = pictures.bars({"ours": {"a": 0.2, "b": 0.9}}, "share", marks={"even": [0.5, 0.5]})
  (axis,) = figure.axes
  (marks,) = axis.collections
  np.testing.assert_allclose(marks.get_offsets(), [[0.5, 0], [0.5, 1]])
  assert [text.get_position()[0] for text in axis.texts] == pytest.approx([0.515, 0.915])


def test_heat_table_writes_every_number():
  counts = np.array([[0, 4], [100, 9], [1, 16]])
  figure = pictures.heat_table(counts, ["x", "y", "z"], ["c0", "c1"], "counts", label="classes")
  (axis,) = figure.axes
  assert texts(axis) == ["0", "4", "100", "9", "1", "16"]
  np.testing.assert_allclose(axis.images[0].get_array(), np.sqrt(counts))
  assert [text.get_color() for text in axis.texts][2] == "white"  # on the darkest cell
  assert (axis.get_title(), axis.get_xlabel()) == ("counts", "classes")


def test_open_frame_keeps_the_axes():
  axis = plt.figure().subplots()
  pictures.open_frame(axis)
  assert {side for side, spine in axis.spines.items() if spine.get_visible()} == {"left", "bottom"}
