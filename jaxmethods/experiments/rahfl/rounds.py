"""State, first state, steps and evaluation of one row, as functions of the parts it is made of.

A step is an epoch of training alone or, later, a round: measure accuracies, learn from each other, learn
from one's own images. One forward pass sees all views of a private batch (code: two passes of three).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.experiments.rahfl import figures, peers, teaching
from jaxmethods.experiments.rahfl.clients import Clients, Data, client_shapes, draw_clients
from jaxmethods.experiments.rahfl.config import Config
from jaxmethods.experiments.rahfl.teaching import Standing
from jaxmethods.federated import engine, exchange
from jaxmethods.federated.algorithm import Params
from jaxmethods.federated.engine import ClientMap
from jaxmethods.federated.exchange import Network, Peer, Teach
from jaxmethods.images import augment, views
from jaxmethods.methods import rahfl as method
from jaxmethods.models.convnets import Classifier
from jaxmethods.runtime import compiler, host, pictures
from jaxmethods.testbeds.federated_images.figures import own_examples
from jaxmethods.trees import PyTree

Batch = Mapping[str, PyTree]  # "pool", in rounds "public", and "test" where accuracies come from it
Metrics = dict[str, Array]
AUGMENTED, CONTRASTED = ("jsd", "supcon", "dcl"), ("supcon", "dcl")  # losses on more views


class EngineOptions(TypedDict):
  """Keywords of `engine.federated_round`."""

  client_map: ClientMap | None
  mesh: Mesh | None


class Parts(NamedTuple):
  """Everything that a row is made of.

  Attributes:
    config: of the row.
    data: its arrays.
    names: of the clients, group after group.
    nets: one for each group of clients.
    networks: the same as functions.
    optimizer: of the clients.
    public_optimizer: of them, at public steps.
    teach: rule of the exchange, None without one.
    engine: how clients are mapped.
  """

  config: Config
  data: Data
  names: list[str]
  nets: list[Classifier]
  networks: list[Network]
  optimizer: optax.GradientTransformation
  public_optimizer: optax.GradientTransformation
  teach: Teach | None
  engine: EngineOptions


class State(NamedTuple):
  """Everything a checkpoint needs; `held` is fixed once drawn.

  Attributes:
    peers: per architecture, stacked.
    standing: knowledge of the server about the clients between rounds.
    held: the clients' images.
    key: of the steps.
    round: steps completed, those of training alone included.
  """

  peers: tuple[Peer, ...]
  standing: Standing
  held: Clients[Array]
  key: Array
  round: Array


# --- the first state ----------------------------------------------------------------------------


def init(parts: Parts, key: Array) -> State:
  """Draws who holds what and the clients' networks, by numpy, from a seed that the key gives.

  Raises:
    InputError: naming the client that has too few images.
  """
  config, data = parts.config, parts.data
  width = config.fedproto_width if config.exchange == "fedproto" else 0
  side, each = data.pool.shape[1], config.clients_per_architecture
  shapes = [peers.variable_shapes(net, side, width) for net in parts.nets]

  def draw(seed: np.ndarray) -> tuple[Clients[np.ndarray], list[tuple[Params, Params]]]:
    random, projectors = (np.random.default_rng(s) for s in (int(seed), (int(seed), 1)))
    held = draw_clients(random, data.labels, data.num_classes, config)
    drawn = [[peers.draw_variables(s, random, projectors) for _ in range(each)] for s in shapes]
    return held, [jax.tree.map(lambda *a: np.stack(a), *group) for group in drawn]

  stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((each, *s.shape), s.dtype), shapes)
  described = client_shapes(data.labels, config), stacked
  held, variables = host.call(draw, described, jax.random.key_data(key)[-1])
  clients = tuple(peers.with_optimizer(group, parts.optimizer) for group in variables)
  standing = teaching.first_standing(
    config.exchange, len(parts.names), data.num_classes, config.fedproto_width
  )
  return State(clients, standing, held, key, jnp.zeros((), jnp.int32))


def batches(parts: Parts, step: int) -> Iterator[Batch]:
  """Batches from a step on. Epochs alone have no public images: the structure tells the step."""
  data, config = parts.data, parts.config
  alone = {"pool": data.pool}
  together: dict[str, PyTree] = {"pool": data.pool, "public": data.public}
  if config.accuracy_from == "test":
    together["test"] = (data.test["clean"], data.test["y"])
  while True:
    yield alone if step < config.pretrain else together
    step += 1


# --- a step -------------------------------------------------------------------------------------


def step(parts: Parts, state: State, batch: Batch) -> tuple[State, Metrics]:
  """An epoch alone, or a round where the batch has public images."""
  key = jax.random.fold_in(state.key, state.round)
  work = collaborate if "public" in batch else pretrain
  state, metrics = work(parts, state, batch, key)
  finite = jnp.isfinite(metrics["loss"])
  rejected = ~finite | metrics["rejected"]
  report = {
    "loss": jnp.where(finite, metrics["loss"], 0).sum() / finite.sum(),  # nobody left: NaN
    "bytes_up": metrics["bytes_up"].sum(),
    "bytes_down": metrics["bytes_down"].sum(),
    "rejected": rejected.sum(),
    **{f"rejected/{name}": rejected[k] for k, name in enumerate(parts.names)},
  }
  if "distillation" in metrics:
    report["distillation"] = metrics["distillation"].mean()
  return state._replace(round=state.round + 1), report


def pretrain(parts: Parts, state: State, batch: Batch, key: Array) -> tuple[State, Metrics]:
  """An epoch of plain cross-entropy."""
  plain = dataclasses.replace(parts.config, local="ce", exchange="none")
  return train_alone(parts, state, batch["pool"], key, plain)


def train_alone(
  parts: Parts, state: State, pool: Array, key: Array, config: Config
) -> tuple[State, Metrics]:
  """An epoch of all clients on views drawn for it, all at once: compiled once, not per architecture.

  In float32 they take 4 clients x 9,000 images x 4 views x 12 kB = 1.8 GB at the published sizes.
  """
  view_key, train_key = jax.random.split(key)
  images, y = pool[state.held.rows], state.held.y
  draw = functools.partial(
    method.private_views,
    strong=config.local in AUGMENTED,
    weak=config.local in CONTRASTED,
    flip=config.flip,
  )
  drawn = _over_images(draw, view_key, images.reshape(-1, *images.shape[2:]))
  drawn = normalise(parts, drawn).reshape(*images.shape[:2], *drawn.shape[1:])
  examples = {"views": drawn, "y": jnp.maximum(y, 0), "mask": y >= 0}
  weights = (y >= 0).sum(1).astype(jnp.float32)
  standing, clients, metrics = engine.federated_round(
    [peers.private_training(network, config, parts.optimizer) for network in parts.networks],
    state.standing, state.peers, grouped(parts, examples), grouped(parts, weights), train_key,
    drop_nonfinite=True, **parts.engine,
  )  # fmt: skip
  return state._replace(standing=standing, peers=clients), metrics


def collaborate(parts: Parts, state: State, batch: Batch, key: Array) -> tuple[State, Metrics]:
  """A round: accuracies where the rule asks for them, the exchange, an epoch of one's own."""
  config = parts.config
  measure_key, view_key, exchange_key, train_key = jax.random.split(key, 4)
  weights = grouped(parts, jnp.ones(len(parts.names)))
  sums: Metrics = {}
  standing, clients = state.standing, state.peers
  if config.exchange == "asym":
    standing, clients, measured = engine.federated_round(
      [peers.measuring(network, functools.partial(normalise, parts)) for network in parts.networks],
      standing, clients, grouped(parts, _measured_on(parts, state.held, batch)), weights,
      measure_key, drop_nonfinite=True, **parts.engine,
    )  # fmt: skip
    sums = _add(sums, measured)
  if parts.teach is not None:
    public = public_batches(parts, batch["public"], view_key)
    clients, exchanged = exchange.exchange(
      parts.networks, parts.teach, parts.public_optimizer, standing, clients, weights, public,
      exchange_key, keep_optimizer=config.adam_state == "keep", **parts.engine,
    )  # fmt: skip
    sums = _add(sums, exchanged)
  if config.adam_state == "reset":
    clients = tuple(
      peers.with_optimizer((p.params, p.model_state), parts.optimizer) for p in clients
    )
  state = state._replace(standing=standing, peers=clients)
  state, trained = train_alone(parts, state, batch["pool"], train_key, config)
  return state, _add(sums, trained)


def public_batches(parts: Parts, images: Array, key: Array) -> Array:
  """Draws views of all public images, (steps, V, B, s, s, 3); of each, AugHFL draws two more.

  All clients see one draw (code: each its own).
  """
  size = parts.config.batch_size
  count = len(images) // size
  count = min(count, parts.config.public_steps or count)
  order_key, draw_key = jax.random.split(key)
  chosen = jax.random.permutation(order_key, len(images))[: count * size]
  draw = functools.partial(
    _public_views, augmented=parts.config.exchange == "aughfl", flip=parts.config.flip
  )
  drawn = augment.normalise(_over_images(draw, draw_key, images[chosen]), *parts.data.scale[1])
  return drawn.reshape(count, size, *drawn.shape[1:]).swapaxes(1, 2)


# --- evaluation ---------------------------------------------------------------------------------


def evaluate(parts: Parts, state: State, test: Mapping[str, Array]) -> Metrics:
  """Accuracy of every client on corrupted and clean test images, and their means.

  Where `test` has the "pool" too, so do the mean accuracies on the clients' own validation and training
  images, as they are kept.
  """
  sets = jnp.stack([test["corrupted"], test["clean"]])
  scale = functools.partial(normalise, parts)

  def reached(network: Network, clients: Peer) -> Array:
    one = lambda p: jax.lax.map(lambda x: peers.accuracy(network, p, scale, x, test["y"]), sets)
    return jax.lax.map(one, clients)

  scores = jnp.concatenate(list(map(reached, parts.networks, state.peers)))
  scores = jnp.nan_to_num(scores)  # outputs that are not finite are wrong
  kinds = ("corrupted", "clean")
  means = {f"{kind}_accuracy": scores[:, i].mean() for i, kind in enumerate(kinds)}
  if "pool" in test:
    held = state.held
    for name, rows, y in (
      ("validation", held.validation, held.validation_y), ("training", held.rows, held.y),
    ):  # fmt: skip
      means[f"{name}_accuracy"] = _on_own(parts, state, test["pool"], rows, y)
  return means | {
    f"{kind}_accuracy/{name}": scores[k, i]
    for i, kind in enumerate(kinds)
    for k, name in enumerate(parts.names)
  }


def _on_own(parts: Parts, state: State, pool: Array, rows: Array, y: Array) -> Array:
  """Mean accuracy of the clients on images of their own: rows and labels (K, n)."""
  scale = functools.partial(normalise, parts)

  def reached(network: Network, each: tuple[Peer, Array, Array]) -> Array:
    client, rows, y = each
    return peers.accuracy(network, client, scale, pool[rows], y)

  own = zip(parts.networks, state.peers, grouped(parts, rows), grouped(parts, y), strict=True)
  scores = [jax.lax.map(functools.partial(reached, net), tuple(each)) for net, *each in own]
  return jnp.nan_to_num(jnp.concatenate(scores)).mean()


def draw_figures(parts: Parts, state: State) -> dict[str, Figure]:
  """Draws the clients' accuracies, their private images by class, and samples of all images."""
  data = parts.data
  program = compiler.jit(functools.partial(evaluate, parts))
  scores = jax.device_get(program(state, data.test))
  accuracies = {
    kind: {name: float(scores[f"{kind}_accuracy/{name}"]) for name in parts.names}
    for kind in ("clean", "corrupted")
  }
  counts = [np.bincount(y[y >= 0], minlength=data.num_classes) for y in np.asarray(state.held.y)]
  samples = {"clean": data.test["clean"], "corrupted": data.test["corrupted"]}
  return {
    "accuracy": pictures.bars(accuracies, "test accuracy"),
    "private_images": own_examples(np.stack(counts), parts.names, "private training images"),
    "corruptions": figures.sample_images(samples | {"public": data.public}),
  }


# --- helpers ------------------------------------------------------------------------------------


def normalise(parts: Parts, x: Array) -> Array:
  """Private images as the networks see them."""
  return augment.normalise(x.astype(jnp.float32), *parts.data.scale[0])


def grouped(parts: Parts, tree: PyTree) -> list[PyTree]:
  """Splits arrays over all clients into one tree for each architecture."""
  each = parts.config.clients_per_architecture
  groups = [slice(start, start + each) for start in range(0, len(parts.names), each)]
  return [jax.tree.map(lambda a, rows=rows: a[rows], tree) for rows in groups]


def _measured_on(parts: Parts, held: Clients[Array], batch: Batch) -> dict[str, Array]:
  """Images "x" (K, n, ...) and labels "y" (K, n) that accuracies of a round come from."""
  if parts.config.accuracy_from == "test":
    x, y = (jnp.broadcast_to(a, (len(parts.names), *a.shape)) for a in batch["test"])
    return {"x": x, "y": y}
  return {"x": batch["pool"][held.validation], "y": held.validation_y}


def _public_views(key: Array, image: Array, *, augmented: bool, flip: bool) -> Array:
  """The view of a public image, and two AugMix draws of it where they are asked for, (V, s, s, 3)."""
  first, second = jax.random.split(key)
  seen = views.public_view(first, image, pad=method.border(image), flip=flip)
  if not augmented:
    return seen[None]
  mixed = jax.lax.map(lambda k: augment.augmix(k, seen), jax.random.split(second))
  return jnp.concatenate([seen[None], mixed])


def _over_images(draw: Callable[[Array, Array], Array], key: Array, images: Array) -> Array:
  """`draw(key, image)` of every image; on CPU one by one, so that AugMix computes only what it draws."""
  keys = jax.random.split(key, len(images))
  size = None if jax.default_backend() == "cpu" else 1024
  return jax.lax.map(lambda each: draw(*each), (keys, images), batch_size=size)


def _add(sums: dict[str, Array], metrics: dict[str, Array]) -> dict[str, Array]:
  """Adds up what several phases of a round report for every client."""
  for name, value in metrics.items():
    if name == "rejected":
      value = sums.get(name, False) | value
    elif name in sums:
      value = sums[name] + value
    sums = sums | {name: value}
  return sums
