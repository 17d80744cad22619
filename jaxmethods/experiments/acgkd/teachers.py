"""The trained teacher, and the graphs that students are tested on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from jaxmethods import folders
from jaxmethods.data import files, gfkd, records, sources
from jaxmethods.data.array_cache import cached
from jaxmethods.data.records import GraphData
from jaxmethods.errors import InputError
from jaxmethods.experiments.acgkd.config import TeacherSettings
from jaxmethods.graphs.batching import batch_graphs, stack
from jaxmethods.models.graph_classifier import (
  Classifier,
  GraphEncoder,
  Head,
  from_published,
  init_head,
)
from jaxmethods.runtime import compiler
from jaxmethods.runtime.metric_log import Display
from jaxmethods.stats.dropout import dropout
from jaxmethods.trees import Key, Params, PyTree

FORMAT = b"2"  # changes when teachers are trained in another way
ADAM = optax.scale_by_adam()


class Targets(NamedTuple):
  """Answers of the teacher on graphs: logits (P, C) and pooled features (P, d)."""

  logits: Float[Array, "P C"]
  pooled: Float[Array, "P d"]


class Material(NamedTuple):
  """Data and teacher of a run.

  Attributes:
    data: the real graphs.
    train: indices of the graphs that the teacher was trained on, in order.
    test: indices of the others.
    encoder: the teacher's network.
    teacher: its weights.
    about: line for reports.
  """

  data: GraphData
  train: np.ndarray
  test: np.ndarray
  encoder: GraphEncoder
  teacher: Classifier
  about: str


def load(settings: TeacherSettings) -> Material:
  """Loads the data, and loads or trains the teacher.

  Raises:
    InputError: data are missing, or a teacher does not fit them.
  """
  data, train, test = _graphs(settings)
  if empty := np.flatnonzero(np.asarray(data.graphs.n_node) == 0).tolist():
    raise InputError(f"{data.source.name}: graph {empty[0]} has no nodes")
  named = settings.teacher
  if settings.teacher == "trained":
    encoder, teacher = _trained(settings, data, train)
  else:
    file = _file_of(settings)
    encoder, teacher = _read(file, data)
    named = records.sealed(settings.teacher, files.digest(file))
  about = (
    f"{records.describe([data])}; {len(train)} train the teacher, {len(test)} test; teacher "
    f"{named} {encoder.kind.upper()}-{encoder.layers}-{encoder.width}"
  )
  if not encoder.batch_norm:
    about += " without batch normalisation: that term of the generation is dropped"
  return Material(data, train, test, encoder, teacher, about)


def split(count: int, train_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Splits graphs into training and test: the first share of a seeded shuffle (GFKD).

  Raises:
    InputError: a part would be empty.
  """
  order = np.random.RandomState(seed).permutation(count)
  cut = int(train_share * count)
  if not 0 < cut < count:
    raise InputError(f"train_share: {train_share} of {count} graphs leaves a part empty")
  return order[:cut], order[cut:]


def real_batches(data: GraphData, ids: np.ndarray, batch_size: int) -> jraph.GraphsTuple:
  """Stacks all batches of the graphs."""
  return stack(batch_graphs(data, ids, batch_size))


def answers(encoder: GraphEncoder, teacher: Classifier, batches: jraph.GraphsTuple) -> Targets:
  """Asks the teacher about stacked batches."""
  pooled = jax.lax.map(lambda batch: encoder.apply(teacher.variables, batch), batches)
  return Targets(teacher.head(pooled), pooled)


def accuracy(logits: Float[Array, "S G C"], batches: jraph.GraphsTuple) -> Float[Array, ""]:
  """Computes the share of real graphs that are classified rightly."""
  right = logits.argmax(-1) == batches.globals["label"]
  return right.mean(where=batches.globals["mask"])


def train_logits(
  encoder: GraphEncoder,
  params: Params,
  batch_stats: PyTree,
  head: Head,
  batch: jraph.GraphsTuple,
  rate: float,
  key: Key,
) -> tuple[Float[Array, "G C"], Float[Array, "G d"], PyTree]:
  """Classifies graphs in training mode.

  Args:
    encoder: the network.
    params: its weights.
    batch_stats: its running statistics.
    head: classifier.
    batch: G graphs.
    rate: share of the logits that are dropped.
    key: of the dropout.

  Returns:
    Logits after dropout, pooled features, new running statistics.
  """
  variables = {"params": params, "batch_stats": batch_stats}
  pooled, changed = encoder.apply(variables, batch, train=True, mutable=["batch_stats"])
  return dropout(head(pooled), rate, key), pooled, changed.get("batch_stats", {})


def _graphs(settings: TeacherSettings) -> tuple[GraphData, np.ndarray, np.ndarray]:
  """Loads the real graphs and their split."""
  if settings.data == gfkd.NAME:
    published = gfkd.load()
    return records.signed(published.data), published.train, published.test
  found = sources.load_graphs(settings.data, max_degree=settings.max_degree or None)
  if len(found) != 1:
    raise InputError(f"data: {settings.data}: expected one set of graphs, got {len(found)}")
  (data,) = found
  return data, *split(len(data.labels), settings.train_share, settings.split_seed)


def _file_of(settings: TeacherSettings) -> Path:
  """Finds the file of a teacher."""
  if settings.teacher != "published":
    return folders.expanded(settings.teacher.removeprefix("npz:"))
  if settings.data == gfkd.NAME:
    return gfkd.archive_path()
  raise InputError(
    f"teacher: the published one belongs to --data {gfkd.NAME}, got {settings.data}; "
    "--teacher trained trains one"
  )


def _read(path: Path, data: GraphData) -> tuple[GraphEncoder, Classifier]:
  """Reads a teacher under the published names, and checks that it fits the data."""
  try:
    encoder, teacher = from_published(gfkd.teacher_weights(path))
  except ValueError as error:
    raise InputError(f"{path}: {error}") from error
  classes, width = teacher.head.bias.shape[0], data.graphs.nodes.shape[1]
  if classes != data.num_classes:
    raise InputError(
      f"{path}: the teacher has {classes} classes, {data.source.name} has {data.num_classes}"
    )
  first = teacher.params["conv_0"]
  read = (first if encoder.kind == "gcn" else first["linear_0"])["kernel"].shape[0]
  if read != width:
    raise InputError(
      f"{path}: the teacher reads {read} features, the nodes of {data.source.name} have {width}"
    )
  return encoder, teacher


# --- teachers of our own --------------------------------------------------------------------------


class Training(NamedTuple):
  """Static parts of the training of a teacher.

  Attributes:
    encoder: the network.
    epochs: number of epochs, over which the learning rate falls to 0.
    learning_rate: of the first epoch.
    dropout: rate, on the logits.
  """

  encoder: GraphEncoder
  epochs: int
  learning_rate: float
  dropout: float


class Trainee(NamedTuple):
  """A teacher in training: weights (encoder, head), running statistics, moments of Adam."""

  weights: tuple[Params, Head]
  batch_stats: PyTree
  moments: optax.OptState


def _trained(
  settings: TeacherSettings, data: GraphData, train: np.ndarray
) -> tuple[GraphEncoder, Classifier]:
  """Trains a teacher, or takes it from the cache; the same for every seed of a comparison."""
  encoder = GraphEncoder(
    settings.teacher_kind, settings.teacher_layers, settings.teacher_width, symmetric=True
  )
  training = Training(encoder, settings.teacher_epochs, settings.learning_rate, settings.dropout)
  batches = real_batches(data, train, settings.batch_size)
  key = jax.random.key(0)
  start = _start(encoder, jax.tree.map(lambda x: x[0], batches), data.num_classes, key)

  def leaves() -> dict[str, np.ndarray]:
    print(f"training the teacher on {len(train)} graphs", flush=True)
    teacher = jax.device_get(fit(training, start, batches, key))
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(teacher))}

  graphs = data.graphs
  parts = (graphs.n_node, graphs.senders, graphs.receivers, graphs.nodes, data.labels, train)
  depends_on = [FORMAT, *parts, described(training, settings.batch_size)]
  stored = cached("teachers", depends_on, leaves)
  kept = [jnp.asarray(stored[str(i)]) for i in range(len(stored))]
  return encoder, jax.tree.unflatten(jax.tree.structure(start), kept)


def described(training: Training, batch_size: int) -> bytes:
  """Describes the training as a part of the cache key.

  Every field is named here, in the text of the first version: its teachers stay in the cache wherever
  classes move, and whatever fields they get.
  """
  encoder, epochs, learning_rate, dropout = training
  named = ("kind", "layers", "width", "projection", "batch_norm", "symmetric")
  network = "".join(f"    {name} = {getattr(encoder, name)!r}\n" for name in named)
  values = ", ".join(map(repr, (epochs, batch_size, learning_rate, dropout)))
  return f"(GraphEncoder(\n    # attributes\n{network}), {values})".encode()


def _start(
  encoder: GraphEncoder, batch: jraph.GraphsTuple, num_classes: int, key: Key
) -> Classifier:
  """Draws a teacher; the batch gives the shapes."""
  keys = jax.random.split(key)
  variables = compiler.jit(encoder.init)(keys[0], batch)
  head = init_head(keys[1], encoder.width, num_classes)
  return Classifier(variables["params"], variables.get("batch_stats", {}), head)


def fit(training: Training, start: Classifier, batches: jraph.GraphsTuple, key: Key) -> Classifier:
  """Trains with cross-entropy and Adam; the learning rate falls to 0 in a straight line.

  Args:
    training: static parts.
    start: initial weights.
    batches: stacked batches.
    key: of shuffling and dropout.
  """
  data = jax.device_put(batches)
  weights = start.params, start.head
  trainee = Trainee(weights, start.batch_stats, ADAM.init(weights))
  run = compiler.jit(functools.partial(_epoch, training), donate_argnums=0)
  with Display("teacher", 0, training.epochs) as display:
    for t in range(training.epochs):
      trainee, mean = run(trainee, jnp.int32(t), data, key)
      display.update(t + 1, {"loss": float(mean)})
  params, head = trainee.weights
  return Classifier(params, trainee.batch_stats, head)


def _epoch(
  training: Training, trainee: Trainee, t: Int[Array, ""], data: jraph.GraphsTuple, key: Key
) -> tuple[Trainee, Float[Array, ""]]:
  """Trains for one epoch; returns the mean loss too."""
  count = data.n_node.shape[0]
  order = jax.random.permutation(jax.random.fold_in(key, t), count)
  rate = training.learning_rate * (1 - t / training.epochs)

  def step(i: Array, carry: tuple[Trainee, Array]) -> tuple[Trainee, Array]:
    (weights, batch_stats, moments), total = carry
    batch = jax.tree.map(lambda x: x[order[i]], data)
    mask_key = jax.random.fold_in(key, training.epochs + t * count + i)
    (value, batch_stats), gradients = jax.value_and_grad(_loss, has_aux=True)(
      weights, batch_stats, training, batch, mask_key
    )
    updates, moments = ADAM.update(gradients, moments)
    weights = jax.tree.map(lambda w, u: w - rate * u, weights, updates)
    return Trainee(weights, batch_stats, moments), total + value

  trainee, total = jax.lax.fori_loop(0, count, step, (trainee, jnp.float32(0)))
  return trainee, total / count


def _loss(
  weights: tuple[Params, Head],
  batch_stats: PyTree,
  training: Training,
  batch: jraph.GraphsTuple,
  key: Key,
) -> tuple[Float[Array, ""], PyTree]:
  """Computes the mean cross-entropy of a batch, and the new running statistics."""
  params, head = weights
  logits, _, batch_stats = train_logits(
    training.encoder, params, batch_stats, head, batch, training.dropout, key
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.globals["label"])
  return losses.mean(where=batch.globals["mask"]), batch_stats
