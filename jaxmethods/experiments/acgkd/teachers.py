"""What graph-free distillation starts from: a trained teacher, and the graphs it is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax

from jaxmethods.data import gfkd, records, sources
from jaxmethods.data.array_cache import cached
from jaxmethods.data.records import GraphData
from jaxmethods.errors import InputError
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

if TYPE_CHECKING:
  from jaxmethods.experiments.acgkd.config import Config

FORMAT = b"2"  # changes when teachers are trained in another way


class Material(NamedTuple):
  """Data and teacher of a run.

  Attributes:
    data: the real graphs.
    train: indices of the graphs that the teacher was trained on, in order.
    test: indices of the others.
    encoder: the teacher's network.
    teacher: its weights.
    about: the line for reports.
  """

  data: GraphData
  train: np.ndarray
  test: np.ndarray
  encoder: GraphEncoder
  teacher: Classifier
  about: str


def load(config: Config) -> Material:
  """Loads the data, and loads or trains the teacher.

  Raises:
    InputError: data that are missing, or a teacher that does not fit them.
  """
  if config.data == gfkd.NAME:
    published = gfkd.load()
    data, train, test = published.data, published.train, published.test
  else:
    found = sources.load_graphs(config.data, max_degree=config.max_degree or None)
    if len(found) != 1:
      raise InputError(f"data: {config.data}: expected one set of graphs, got {len(found)}")
    (data,) = found
    train, test = split(len(data.labels), config.train_share, config.split_seed)
  name = data.source.name
  if empty := np.flatnonzero(np.asarray(data.graphs.n_node) == 0).tolist():
    raise InputError(f"{name}: graph {empty[0]} has no nodes")
  if config.teacher == "trained":
    encoder, teacher = _trained(config, data, train)
  else:
    encoder, teacher = _read(config, data)
  about = (
    f"{records.describe([data])}; {len(train)} train the teacher, {len(test)} test; teacher "
    f"{config.teacher} {encoder.kind.upper()}-{encoder.layers}-{encoder.width}"
  )
  if not encoder.batch_norm:
    about += " without batch normalisation: that term of the generation is dropped"
  return Material(data, train, test, encoder, teacher, about)


def split(count: int, train_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices of training and test graphs: the first share of a seeded shuffle (GFKD)."""
  order = np.random.RandomState(seed).permutation(count)
  cut = int(train_share * count)
  if not 0 < cut < count:
    raise InputError(f"train_share: {train_share} of {count} graphs leaves a part empty")
  return order[:cut], order[cut:]


def real_batches(data: GraphData, ids: np.ndarray, batch_size: int) -> jraph.GraphsTuple:
  """All batches of the graphs, stacked."""
  return stack(batch_graphs(data, ids, batch_size))


def train_logits(
  encoder: GraphEncoder,
  params: Any,
  batch_stats: Any,
  head: Head,
  batch: jraph.GraphsTuple,
  rate: float,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
  """Training mode: logits after dropout, pooled features, new running statistics."""
  variables = {"params": params, "batch_stats": batch_stats}
  pooled, changed = encoder.apply(variables, batch, train=True, mutable=["batch_stats"])
  return dropout(head(pooled), rate, key), pooled, changed.get("batch_stats", {})


def _read(config: Config, data: GraphData) -> tuple[GraphEncoder, Classifier]:
  if config.teacher == "published":
    if config.data != gfkd.NAME:
      raise InputError(
        f"teacher: the published one belongs to --data {gfkd.NAME}, got {config.data}; "
        "--teacher trained trains one"
      )
    path = gfkd.archive_path()
  else:
    path = Path(config.teacher.removeprefix("npz:")).expanduser()
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


def _trained(config: Config, data: GraphData, train: np.ndarray) -> tuple[GraphEncoder, Classifier]:
  """Trains a teacher, or takes it from the cache; the same for every seed of a comparison."""
  encoder = GraphEncoder(
    config.teacher_kind, config.teacher_layers, config.teacher_width, symmetric=True
  )
  graphs = data.graphs
  settings = (
    encoder,
    config.teacher_epochs,
    config.batch_size,
    config.learning_rate,
    config.dropout,
  )
  batches = real_batches(data, train, config.batch_size)
  key = jax.random.key(0)
  start = _start(encoder, jax.tree.map(lambda x: x[0], batches), data.num_classes, key)

  def leaves() -> dict[str, np.ndarray]:
    print(f"training the teacher on {len(train)} graphs", flush=True)
    teacher = jax.device_get(fit(encoder, start, batches, config, key))
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(teacher))}

  parts = (graphs.n_node, graphs.senders, graphs.receivers, graphs.nodes, data.labels, train)
  stored = cached("teachers", [FORMAT, *parts, repr(settings).encode()], leaves)
  kept = [jnp.asarray(stored[str(i)]) for i in range(len(stored))]
  return encoder, jax.tree.unflatten(jax.tree.structure(start), kept)


def _start(encoder: GraphEncoder, batch, num_classes: int, key: jax.Array) -> Classifier:
  keys = jax.random.split(key)
  variables = compiler.jit(encoder.init)(keys[0], batch)
  head = init_head(keys[1], encoder.width, num_classes)
  return Classifier(variables["params"], variables.get("batch_stats", {}), head)


def fit(
  encoder: GraphEncoder,
  start: Classifier,
  batches: jraph.GraphsTuple,
  config: Config,
  key: jax.Array,
) -> Classifier:
  """Supervised training: cross-entropy, Adam, learning rate to 0 in a straight line."""
  adam = optax.scale_by_adam()
  count = batches.n_node.shape[0]

  def loss(weights, batch_stats, batch, key):
    params, head = weights
    logits, _, batch_stats = train_logits(
      encoder, params, batch_stats, head, batch, config.dropout, key
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.globals["label"])
    return losses.mean(where=batch.globals["mask"]), batch_stats

  def epoch(carry, t, data):
    order = jax.random.permutation(jax.random.fold_in(key, t), count)
    rate = config.learning_rate * (1 - t / config.teacher_epochs)

    def step(i, carry):
      weights, batch_stats, moments, total = carry
      batch = jax.tree.map(lambda x: x[order[i]], data)
      mask_key = jax.random.fold_in(key, config.teacher_epochs + t * count + i)
      (value, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(
        weights, batch_stats, batch, mask_key
      )
      updates, moments = adam.update(gradients, moments)
      weights = jax.tree.map(lambda w, u: w - rate * u, weights, updates)
      return weights, batch_stats, moments, total + value

    *carry, total = jax.lax.fori_loop(0, count, step, (*carry, jnp.float32(0)))
    return tuple(carry), total / count

  data = jax.device_put(batches)
  weights = start.params, start.head
  carry = weights, start.batch_stats, adam.init(weights)
  run = compiler.jit(epoch, donate_argnums=0)
  with Display("teacher", 0, config.teacher_epochs) as display:
    for t in range(config.teacher_epochs):
      carry, mean = run(carry, jnp.int32(t), data)
      display.update(t + 1, {"loss": float(mean)})
  (params, head), batch_stats, _ = carry
  return Classifier(params, batch_stats, head)
