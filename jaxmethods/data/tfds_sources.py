"""TensorFlow Datasets without TensorFlow: our graph and digit builders, and its image sets.

Prepared sets lie in `tensorflow_datasets/` of the data folder as array_record files, which
`tfds.data_source` (and so grain) reads at random. Importing this module registers the builders, so
`tfds.data_source("tu/MUTAG", builder_kwargs={"file_format": "array_record"})` works as well.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxmethods.data import embedded, tu
from jaxmethods.data.files import data_dir
from jaxmethods.data.pictures import as_pictures
from jaxmethods.data.records import ArrayData, GraphData, Source
from jaxmethods.data.tu_format import Features, RawGraphs, to_graph_data
from jaxmethods.errors import InputError
from jaxmethods.trees import PyTree


class Tu(tfds.core.GeneratorBasedBuilder):
  """The TUDataset collection, one config per set, one example per graph, as published.

  Read from wherever `tu:NAME` reads it; features are chosen when loading, not when storing.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in tu.NAMES)

  def _info(self) -> tfds.core.DatasetInfo:
    # Two free dimensions need an encoding. A table without columns: the set has none.
    table = functools.partial(tfds.features.Tensor, shape=(None, None), encoding="zlib")
    features = {
      # Both directions, ids within the graph.
      "edges": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
      "num_nodes": np.int32,
      "node_labels": table(dtype=np.int64),
      "node_attributes": table(dtype=np.float32),
      "label": np.int64,
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(features),
      citation=tu.CITATION,
      license=tu.LICENCE,
      disable_shuffling=True,  # keep the published order, on which the published splits rest
    )

  def _split_generators(self, dl_manager: object) -> dict[str, PyTree]:
    return {"full": self._generate_examples(tu.read(self.builder_config.name).raw)}

  def _generate_examples(self, raw: RawGraphs) -> Iterator[tuple[int, dict[str, PyTree]]]:
    first_node = np.cumsum(raw.n_node, dtype=np.int32) - raw.n_node
    node_parts = np.cumsum(raw.n_node)[:-1]
    none = np.zeros((int(raw.n_node.sum()), 0))
    edges = np.stack([raw.senders, raw.receivers], axis=1)
    labels = none if raw.node_labels is None else raw.node_labels
    attributes = none if raw.node_attributes is None else raw.node_attributes
    per_graph = zip(
      np.split(edges, np.cumsum(raw.n_edge)[:-1]),
      np.split(labels.astype(np.int64), node_parts),
      np.split(attributes.astype(np.float32), node_parts),
      strict=True,
    )
    for i, (edge, label, attribute) in enumerate(per_graph):
      yield (
        i,
        {
          "edges": edge - first_node[i],
          "num_nodes": raw.n_node[i],
          "node_labels": label,
          "node_attributes": attribute,
          "label": raw.graph_labels[i],
        },
      )


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
  """scikit-learn's 1,797 digits as 8x8 PNG images (0..16 stretched to 0..255)."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Image(shape=(8, 8, 1)),
      "label": tfds.features.ClassLabel(num_classes=10),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(features),
      citation=embedded.DIGITS_CITATION,
      license=embedded.DIGITS_LICENCE,
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: object) -> dict[str, PyTree]:
    return {"full": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, PyTree]]]:
    images, labels = embedded.load_arrays("digits").splits["all"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      png = io.BytesIO()
      Image.fromarray(np.rint(image[..., 0] * 255).astype(np.uint8)).save(png, "PNG")
      yield i, {"image": png.getvalue(), "label": int(label)}


def load_graphs(
  selection: str, features: Features = "auto", max_degree: int | None = None
) -> list[GraphData]:
  """`tfds:tu/SELECTION`: the graphs of `tu:SELECTION` through TFDS' storage."""
  return [_load_graph_set(name, features, max_degree) for name in tu.expand(selection)]


def _load_graph_set(name: str, features: Features, max_degree: int | None) -> GraphData:
  known = {config.name: config for config in Tu.BUILDER_CONFIGS}
  config = known.get(name) or tfds.core.BuilderConfig(name=name)
  with _reading(f"tu/{name}"):
    return _stored_graphs(name, config, features, max_degree)


def _stored_graphs(
  name: str, config: tfds.core.BuilderConfig, features: Features, max_degree: int | None
) -> GraphData:
  builder = _builder(f"tu/{name}", functools.partial(Tu, config=config))
  if not builder.is_prepared():
    tu.read(name)  # a missing or damaged set stops here, before TFDS makes folders
    _prepare(builder, f"tu/{name}")
  source = builder.as_data_source(split="full")
  examples = [source[i] for i in range(len(source))]
  n_node = np.array([example["num_nodes"] for example in examples], np.int32)
  n_edge = np.array([len(example["edges"]) for example in examples], np.int32)
  first_node = np.cumsum(n_node) - n_node
  edges = np.concatenate([example["edges"] for example in examples])
  edges = (edges + np.repeat(first_node, n_edge)[:, None]).astype(np.int32)

  def per_node(key: str) -> np.ndarray | None:
    table = np.concatenate([example[key] for example in examples])
    return table if table.shape[1] else None

  raw = RawGraphs(
    n_node=n_node,
    n_edge=n_edge,
    senders=edges[:, 0].copy(),
    receivers=edges[:, 1].copy(),
    graph_labels=np.array([example["label"] for example in examples], np.int64),
    node_labels=per_node("node_labels"),
    node_attributes=per_node("node_attributes"),
  )
  origin = f"TFDS tu/{name}:{builder.version} in {builder.data_dir}"
  return to_graph_data(raw, tu.source(name, origin, prefix="tfds:tu/"), features, max_degree)


def load_arrays(name: str) -> ArrayData:
  """`tfds:NAME[:SPLIT]`: a labelled image set.

  Args:
    name: TFDS name, with a config (`NAME/CONFIG`) and a split (`train`, `train[:10%]`) as TFDS
      spells them. Without a split all published splits are loaded.

  Returns:
    Images uint8 (n, height, width, channels) and labels.

  Raises:
    InputError: if TFDS does not know the set, cannot fetch it, or it is no set of labelled images of one
      size.
  """
  name, _, split = name.partition(":")
  with _reading(name):
    return _stored_arrays(name, split)


def _stored_arrays(name: str, split: str) -> ArrayData:
  builder = _builder(name, functools.partial(tfds.builder, name, try_gcs=False))
  images = [key for key, f in builder.info.features.items() if isinstance(f, tfds.features.Image)]
  labels = [
    key for key, f in builder.info.features.items() if isinstance(f, tfds.features.ClassLabel)
  ]
  if len(images) != 1 or len(labels) != 1:
    raise InputError(
      f"tfds:{name}: expected one image and one class label per example, "
      f"found the features {', '.join(builder.info.features)}"
    )
  if not builder.is_prepared():
    if not isinstance(builder, SklearnDigits):
      _check_network(name)
    _prepare(builder, name)
  wanted = [split] if split else list(builder.info.splits)
  splits = {}
  for each in wanted:
    try:
      source = builder.as_data_source(split=each)
    except (ValueError, KeyError) as error:
      known = ", ".join(builder.info.splits)
      raise InputError(f"tfds:{name}: no split {each!r}; it has {known}") from error
    examples = [source[i] for i in range(len(source))]
    shapes = {example[images[0]].shape for example in examples}
    if len(shapes) != 1:
      raise InputError(
        f"tfds:{name}:{each}: expected images of one size, found {len(shapes)} sizes"
      )
    x = as_pictures({each: np.stack([example[images[0]] for example in examples])}, f"tfds:{name}")[
      each
    ]
    y = np.array([example[labels[0]] for example in examples], np.int32)
    splits["all" if each == "full" else each] = x, y
  source_record = Source(
    f"tfds:{name}",
    f"TFDS {name}:{builder.version} in {builder.data_dir}",
    builder.info.redistribution_info.license or "none stated by TFDS",
    " ".join((builder.info.citation or "").split()),
    real=True,
  )
  num_classes = int(builder.info.features[labels[0]].num_classes)
  return ArrayData(splits, num_classes, source_record)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
  """Turns whatever TFDS and its readers raise on damaged or missing files into one line."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    folder = _folder() / name.partition(":")[0].partition("/")[0]
    raise InputError(
      f"tfds:{name}: its files in {folder} are damaged or missing ({reason}): remove that folder, and "
      "the set is prepared again"
    ) from error


def _builder(name: str, make: Callable[..., tfds.core.DatasetBuilder]) -> tfds.core.DatasetBuilder:
  """The builder of a set, which may still have to be prepared."""
  tfds.disable_progress_bar()
  try:
    return make(data_dir=_folder(), file_format="array_record")
  except tfds.core.registered.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name.partition("/")[0], known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"tfds:{name}: TFDS has no such set{hint}") from error
  except ValueError as error:
    raise InputError(f"tfds:{name}: TFDS has no such config or version") from error


def _prepare(builder: tfds.core.DatasetBuilder, name: str) -> None:
  """Downloads, if need be, and writes the files of a set."""
  try:
    with contextlib.redirect_stdout(sys.stderr):  # TFDS announces its work with print
      builder.download_and_prepare()
  except Exception as error:  # TFDS lets through whatever its transport and its builders raise
    raise _unavailable(name, " ".join(str(error).split())[:200] or type(error).__name__) from error


def _check_network(name: str) -> None:
  """Fails at once without a network, where TFDS itself retries for minutes."""
  if urllib.request.getproxies():
    return  # behind a proxy, names need not resolve here
  try:
    socket.getaddrinfo("storage.googleapis.com", 443)
  except OSError as error:
    raise _unavailable(name, "no network") from error


def _unavailable(name: str, reason: str) -> InputError:
  return InputError(
    f"tfds:{name} is not in {_folder()} and could not be prepared ({reason}): put the folder "
    f"{name.partition('/')[0]}/ of a machine where TFDS prepared it as array_record there"
  )


def _folder() -> Path:
  return data_dir() / "tensorflow_datasets"
