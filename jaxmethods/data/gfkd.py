"""A published teacher with the data it was trained and tested on: graph-free distillation's MUTAG.

Deng and Zhang, "Graph-Free Knowledge Distillation for Graph Neural Networks", IJCAI 2021. The teacher,
its 70/30 split and the graphs that the published code made up for it, in one archive of the data
folder (`gfkd_mutag/gfkd_mutag.npz`, whose README tells how it was put together).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jraph
import numpy as np

from jaxmethods.data import files
from jaxmethods.data.records import GraphData, Source
from jaxmethods.errors import InputError

NAME = "gfkd:mutag"
_FEATURES = 7


class Published(NamedTuple):
  """The archive.

  Attributes:
    data: the 188 real graphs, one-hot atoms in the order that the teacher reads.
    train, test: indices of the teacher's split.
    pseudo: the 131 graphs made up by the published code (directed; two nodes without any edge).
    pseudo_self_loop: (nodes of `pseudo`,) bool; the published loader gives isolated nodes no self loop.
    logits: of the teacher, as recorded, for `data` and `pseudo`: (188, 2), (131, 2).
  """

  data: GraphData
  train: np.ndarray
  test: np.ndarray
  pseudo: GraphData
  pseudo_self_loop: np.ndarray
  logits: tuple[np.ndarray, np.ndarray]


def archive_path() -> Path:
  """Where the archive is expected."""
  return files.data_dir() / "gfkd_mutag" / "gfkd_mutag.npz"


def load() -> Published:
  """Reads the archive.

  Raises:
    InputError: if it is missing or damaged.
  """
  path = archive_path()
  arrays = _read(path)
  try:
    return Published(
      _graphs(arrays, "real", NAME, path),
      arrays["real/train_index"],
      arrays["real/test_index"],
      _graphs(arrays, "pseudo", f"{NAME} (made up by the published code)", path),
      arrays["pseudo/has_self_loop"],
      (arrays["real/teacher_logits"], arrays["pseudo/teacher_logits"]),
    )
  except KeyError as error:
    raise InputError(f"{path}: has no array {error}") from error


def teacher_weights(path: Path) -> dict[str, np.ndarray]:
  """The arrays `teacher/NAME` of an archive, under the names of the published code.

  Raises:
    InputError: if there are none, or they cannot be read.
  """
  prefix = "teacher/"
  weights = {
    name.removeprefix(prefix): value
    for name, value in _read(path).items()
    if name.startswith(prefix)
  }
  if not weights:
    raise InputError(f"{path}: has no arrays teacher/...")
  return weights


def _read(path: Path) -> Mapping[str, np.ndarray]:
  if not path.is_file():
    raise InputError(
      f"{path}: no such file; put the archive of the published teacher there, or let JAXMETHODS_DATA "
      "name the folder that holds gfkd_mutag"
    )
  try:
    with np.load(path) as archive:
      return dict(archive)
  except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
    raise InputError(f"{path}: not a readable npz archive ({error})") from error


def _graphs(arrays: Mapping[str, np.ndarray], kind: str, name: str, path: Path) -> GraphData:
  get = lambda part: arrays[f"{kind}/{part}"]
  n_node = get("num_nodes").astype(np.int32)
  n_edge = get("num_directed_edges").astype(np.int32)
  graph = np.repeat(np.arange(len(n_node)), n_edge)
  edges = get("edges").astype(np.int32) + (np.cumsum(n_node) - n_node)[graph][:, None].astype(
    np.int32
  )
  edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]  # node ids grow with the graph
  graphs = jraph.GraphsTuple(
    nodes=np.eye(_FEATURES, dtype=np.float32)[get("node_label")],
    edges=None,
    senders=edges[:, 0],
    receivers=edges[:, 1],
    n_node=n_node,
    n_edge=n_edge,
    globals=None,
  )
  labels = get("graph_label").astype(np.int32)
  source = Source(
    name,
    str(path),
    "none stated (files of the repository Xiang-Deng-DL/GFKD)",
    "Deng and Zhang, Graph-Free Knowledge Distillation for Graph Neural Networks, IJCAI 2021",
    real=kind == "real",
  )
  return GraphData(graphs, labels, 2, source)
