"""Federated training of different convnets on corrupted images: RAHFL and its rivals together.

The heavy half of `experiments.rahfl`. One step of the run is an epoch of training alone or, later, a
round: measure accuracies, learn from each other, learn from one's own images. One forward pass sees all
views of a private batch (code: two passes of three).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxmethods.data.array_cache import cached_tree
from jaxmethods.errors import InputError
from jaxmethods.experiments.rahfl import clients as corrupted_clients
from jaxmethods.experiments.rahfl.clients import Clients, client_names
from jaxmethods.federated import engine, exchange
from jaxmethods.federated.algorithm import FederatedAlgorithm
from jaxmethods.federated.algorithms import Loss, local_sgd
from jaxmethods.federated.batching import shuffled
from jaxmethods.federated.exchange import Network, Peer, Teachers
from jaxmethods.images import augment, views
from jaxmethods.methods import rahfl as method
from jaxmethods.models.convnets import Classifier, classifier
from jaxmethods.models.init import draw_on_host
from jaxmethods.runtime import compiler, loop
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.stats.losses import cross_entropy

if TYPE_CHECKING:
  from jaxmethods.experiments.rahfl.config import Config

_EVALUATED = 256  # images a forward pass of an evaluation
_FORMAT = b"trained alone 1"  # changes when training alone changes
# What training alone depends on, beside the clients' images and the key.
_PRETRAINING = (
  "pretrain", "architectures", "clients_per_architecture", "narrow", "stages", "batch_size",
  "learning_rate",
)  # fmt: skip


class State(NamedTuple):
  """Everything a checkpoint needs; `held` is fixed once drawn.

  Attributes:
    peers: per architecture, stacked.
    standing: what the server knows of the clients between rounds.
    held: the clients' images.
    key: of the steps.
    round: steps completed, those of training alone included.
  """

  peers: tuple[Peer, ...]
  standing: Any
  held: Clients
  key: Array
  round: Array


# --- networks and losses --------------------------------------------------------------------------


def network_of(net: Classifier) -> Network:
  """The network as a function; parameters are {"net": ...}, perhaps with a "projector" beside it."""

  def apply(params, model_state, x, train):
    def both(net, x):
      h = net.features(x, train=train)
      return h, net.logits(h)

    variables = {"params": params["net"], "batch_stats": model_state}
    if not train:
      return *net.apply(variables, x, method=both), model_state
    (h, logits), moved = net.apply(variables, x, method=both, mutable=["batch_stats"])
    return h, logits, moved["batch_stats"]

  return apply


def new_peer(
  net: Classifier,
  random: np.random.Generator,
  projectors: np.random.Generator,
  side: int,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> Peer:
  """A client before its first step, for images of `side` pixels.

  FedProto's projectors come from a generator of their own: the networks of all rows start alike.
  """
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  drawn = draw_on_host(jax.eval_shape(net.init, jax.random.key(0), image), random)
  params = {"net": drawn["params"]}
  if config.exchange == "fedproto":
    width = drawn["params"]["head"]["kernel"].shape[0]
    shape = {"kernel": jax.ShapeDtypeStruct((width, config.fedproto_width), jnp.float32)}
    params["projector"] = draw_on_host(shape, projectors)["kernel"]
  return Peer(params, drawn["batch_stats"], optimizer.init(params))


def make_loss(network: Network, config: Config, received: Any) -> Loss:
  """L_local on a batch {"views" (B, V, s, s, 3), "y" (B,)} without padding; `received`: prototypes."""

  def loss(params, model_state, batch, key):
    del key
    y, x = batch["y"], batch["views"].swapaxes(0, 1)
    h, logits, model_state = network(params, model_state, x.reshape(-1, *x.shape[2:]), True)
    h, logits = (a.reshape(*x.shape[:2], -1) for a in (h, logits))
    supervised = method.symmetric_cross_entropy if config.local == "sce" else cross_entropy
    value, metrics = supervised(logits[0], y), {}
    if config.local in ("jsd", "supcon", "dcl"):
      value += config.lambda_jsd * method.jensen_shannon(logits[:3])
    if config.local in ("supcon", "dcl"):
      unit = h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
      value += method.diversity_contrast(
        unit[0], unit[3], unit[1], y, beta=config.beta if config.local == "dcl" else 0.0,
        temperature=config.temperature, base_temperature=config.base_temperature,
        ddm_temperature=config.ddm_temperature, form=config.ddm_form,
      )  # fmt: skip
    if config.exchange == "fedproto":
      prototypes, known = received
      projected = h[0] @ params["projector"]
      value += config.fedproto_lambda * method.prototype_distance(projected, prototypes, known, y)
      member = jax.nn.one_hot(y, logits.shape[-1])
      sums = member.T @ jax.lax.stop_gradient(projected)
      metrics = {"prototypes": {"sums": sums, "counts": member.sum(0)}}
    return value, (model_state, metrics)

  return loss


def private_training(
  network: Network, config: Config, optimizer: optax.GradientTransformation
) -> FederatedAlgorithm:
  """A client's epoch over its own images, and what it says of itself afterwards.

  The upload is its mean loss (RHFL), sums and counts of projected features by class (FedProto), or
  nothing.
  """

  def local(message, client: Peer, data, key):
    loss = make_loss(network, config, message)
    batches = shuffled(config.batch_size, drop_last=True)
    trained, metrics = local_sgd(loss, optimizer, tuple(client), data, key, batches=batches)
    report: Any = ()
    if config.exchange == "rhfl":
      report = metrics["loss"]
    elif config.exchange == "fedproto":
      report = metrics["prototypes"]
    return Peer(*trained), report, {"loss": metrics["loss"]}

  def download(standing, index):
    del index
    return standing if config.exchange == "fedproto" else ()

  def server(standing, uploads, weights):
    here = weights > 0
    if config.exchange == "rhfl":
      current = jnp.where(here, uploads, standing["current"])
      return {"previous": standing["current"], "current": current}
    if config.exchange == "fedproto":
      prototypes, known = method.merge_prototypes(uploads["sums"], uploads["counts"])
      return jax.tree.map(
        lambda new, old: jnp.where(here.any(), new, old), (prototypes, known), standing
      )
    return standing

  return FederatedAlgorithm(
    lambda params, key: (), download, local, server, lambda message, client: client.params
  )


def measuring(network: Network, normalise: Callable[[Array], Array]) -> FederatedAlgorithm:
  """A client's accuracy on the images it has for that: all that it uploads."""

  def local(message, client: Peer, data, key):
    del message, key
    return client, accuracy(network, client, normalise, data["x"], data["y"]), {}

  def server(standing, uploads, weights):
    return {"accuracy": jnp.where(weights > 0, uploads, standing["accuracy"])}

  return FederatedAlgorithm(
    lambda params, key: (), lambda standing, index: (), local, server,
    lambda message, client: client.params,
  )  # fmt: skip


def accuracy(
  network: Network, client: Peer, normalise: Callable[[Array], Array], x: Array, y: Array
) -> Array:
  """Share of the images (n, ...) with y >= 0 that a client gets right; NaN if an output is none."""
  size = min(_EVALUATED, len(y))
  extra = -len(y) % size
  x = jnp.pad(x, ((0, extra), *[(0, 0)] * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])
  y = jnp.pad(y, (0, extra), constant_values=-1).reshape(-1, size)

  def chunk(part):
    x, y = part
    _, logits, _ = network(client.params, client.model_state, normalise(x), False)
    return (logits.argmax(-1) == y).sum(), jnp.isfinite(logits).all()

  right, finite = jax.lax.map(chunk, (x, y))
  return jnp.where(finite.all(), right.sum() / jnp.maximum((y >= 0).sum(), 1), jnp.nan)


def first_standing(config: Config, clients: int, num_classes: int) -> Any:
  """What the server knows before the first round."""
  match config.exchange:
    case "asym":
      return {"accuracy": jnp.zeros(clients)}
    case "rhfl":
      return {"previous": jnp.zeros(clients), "current": jnp.zeros(clients)}
    case "fedproto":
      return jnp.zeros((num_classes, config.fedproto_width)), jnp.zeros(num_classes, bool)
  return ()


def make_teach(config: Config) -> exchange.Teach | None:
  """The method's rule: from what is known of the clients and their answers to a teacher for each."""
  if config.exchange in ("none", "fedproto"):
    return None

  def teach(standing, answers, present) -> Teachers:
    log_p, clients = answers[:, 0], len(present)
    others = present[None, :] & ~jnp.eye(clients, dtype=bool)
    match config.exchange:
      case "asym":
        allowed = method.knowledge_transfer(standing["accuracy"]) & present[None, :]
        weights = method.transfer_weights(allowed)
      case "hfl":
        weights = method.transfer_weights(others)
      case "rhfl":
        measured = (standing["previous"] > 0).all()
        confidence = method.confidence_weights(
          jnp.where(measured, standing["previous"], 2.0),
          jnp.where(measured, standing["current"], 1.0),
          config.rhfl_eta,
        )
        weights = jnp.where(measured, confidence, 1 / (clients - 1)) * others
      case "aughfl":
        weights = method.augmentation_weights(answers, present) * others
      case "fedmd":
        weights = method.transfer_weights(jnp.broadcast_to(present, (clients, clients)))
      case _:  # feddf
        mean = jnp.where(present[:, None, None], log_p, 0).sum(0) / jnp.maximum(present.sum(), 1)
        teacher = jnp.broadcast_to(jax.nn.softmax(mean), log_p.shape)
        return Teachers(teacher, jnp.broadcast_to(present.any(), present.shape))
    return method.mixed_teachers(log_p, weights)

  return teach


# --- the experiment -----------------------------------------------------------------------------


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: data that are missing or cannot be used, or an unknown architecture.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  nets = [
    classifier(name, 1, narrow=config.narrow, stages=config.stages) for name in config.architectures
  ]
  data = corrupted_clients.load(config)
  nets = [net.clone(num_classes=data.num_classes) for net in nets]
  networks = [network_of(net) for net in nets]
  names, each = client_names(config), config.clients_per_architecture
  cuts = np.arange(each, len(names), each)
  optimizer = optax.adam(config.learning_rate)
  teach = make_teach(config)
  engine_options: dict[str, Any] = {"client_map": "shard" if mesh else None, "mesh": mesh}
  private_scale, public_scale = data.scale
  normalise = lambda x: augment.normalise(x.astype(jnp.float32), *private_scale)

  def init(key) -> State:
    *_, seed = np.asarray(jax.random.key_data(key))
    random, projectors = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    held = corrupted_clients.draw_clients(random, data, config)
    peers = tuple(
      jax.tree.map(
        lambda *a: jnp.stack(a),
        *(
          new_peer(net, random, projectors, data.pool.shape[1], optimizer, config)
          for _ in range(each)
        ),
      )
      for net in nets
    )
    standing = first_standing(config, len(names), data.num_classes)
    return State(peers, standing, held, key, jnp.zeros((), jnp.int32))

  def batches(step: int) -> Iterator[dict[str, Any]]:
    while True:
      # An epoch alone has no public images: the structure of a batch says which step it is.
      alone = step < config.pretrain
      shared: dict[str, Any] = {} if alone else {"public": data.public}
      if not alone and config.accuracy_from == "test":
        shared["test"] = (data.test["clean"], data.test["y"])
      yield {"pool": data.pool} | shared
      step += 1

  def grouped(tree: Any) -> list[Any]:
    """Splits arrays over all clients into one tree for each architecture."""
    parts = jax.tree.map(lambda a: jnp.split(a, cuts), tree)
    pick = lambda g: jax.tree.map(lambda p: p[g], parts, is_leaf=lambda p: isinstance(p, list))
    return [pick(g) for g in range(len(nets))]

  def train_alone(state: State, pool, key, settings: Config, draw: Callable):
    """An epoch of everybody on views drawn for it, all at once: compiled once, not per architecture.

    In float32 they take 4 clients x 9,000 images x 4 views x 12 kB = 1.8 GB at the published sizes.
    """
    view_key, train_key = jax.random.split(key)
    images = pool[state.held.rows]
    flat = images.reshape(-1, *images.shape[2:])
    drawn = _over_images(draw, view_key, flat)
    drawn = normalise(drawn).reshape(*images.shape[:2], *drawn.shape[1:])
    y = state.held.y
    examples = {"views": drawn, "y": jnp.maximum(y, 0), "mask": y >= 0}
    weights = (y >= 0).sum(1).astype(jnp.float32)
    standing, peers, metrics = engine.federated_round(
      [private_training(network, settings, optimizer) for network in networks],
      state.standing, state.peers, grouped(examples), grouped(weights), train_key,
      drop_nonfinite=True, **engine_options,
    )  # fmt: skip
    return state._replace(standing=standing, peers=peers), metrics

  def pretrain(state: State, batch, key):
    plain = dataclasses.replace(config, local="ce", exchange="none")
    return train_alone(
      state,
      batch["pool"],
      key,
      plain,
      lambda k, x: method.private_views(k, x, strong=False, weak=False),
    )

  def collaborate(state: State, batch, key):
    measure_key, view_key, exchange_key, train_key = jax.random.split(key, 4)
    weights = grouped(jnp.ones(len(names)))
    sums: dict[str, Array] = {}
    standing, peers = state.standing, state.peers
    if config.exchange == "asym":
      held = state.held
      if config.accuracy_from == "test":
        x, y = (jnp.broadcast_to(a, (len(names), *a.shape)) for a in batch["test"])
      else:
        x, y = batch["pool"][held.validation], held.validation_y
      standing, peers, measured = engine.federated_round(
        [measuring(network, normalise) for network in networks],
        standing, peers, grouped({"x": x, "y": y}), weights, measure_key,
        drop_nonfinite=True, **engine_options,
      )  # fmt: skip
      sums = _add(sums, measured)
    if teach is not None:
      public = _public_batches(view_key, batch["public"])
      peers, exchanged = exchange.exchange(
        networks, teach, optimizer, standing, peers, weights, public, exchange_key,
        keep_optimizer=config.adam_state == "keep", **engine_options,
      )  # fmt: skip
      sums = _add(sums, exchanged)
    if config.adam_state == "reset":
      peers = tuple(p._replace(opt_state=jax.vmap(optimizer.init)(p.params)) for p in peers)
    state = state._replace(standing=standing, peers=peers)
    augmented = config.local in ("jsd", "supcon", "dcl")
    draw = lambda k, x: method.private_views(
      k, x, strong=augmented, weak=config.local in ("supcon", "dcl")
    )
    state, trained = train_alone(state, batch["pool"], train_key, config, draw)
    return state, _add(sums, trained)

  def _public_batches(key, images):
    """Views of all public images, (steps, V, B, s, s, 3); of each, AugHFL draws two more.

    All clients see one draw (code: each its own).
    """
    count = len(images) // config.batch_size
    order_key, draw_key = jax.random.split(key)
    chosen = jax.random.permutation(order_key, len(images))[: count * config.batch_size]

    def draw(key, image):
      first, second = jax.random.split(key)
      seen = views.public_view(first, image, pad=method.border(image))
      if config.exchange != "aughfl":
        return seen[None]
      mixed = jax.lax.map(lambda k: augment.augmix(k, seen), jax.random.split(second))
      return jnp.concatenate([seen[None], mixed])

    drawn = augment.normalise(_over_images(draw, draw_key, images[chosen]), *public_scale)
    drawn = drawn.reshape(count, config.batch_size, *drawn.shape[1:])
    return drawn.swapaxes(1, 2)

  def step(state: State, batch):
    key = jax.random.fold_in(state.key, state.round)
    work = collaborate if "public" in batch else pretrain
    state, metrics = work(state, batch, key)
    finite = jnp.isfinite(metrics["loss"])
    rejected = ~finite | metrics["rejected"]
    report = {
      "loss": jnp.where(finite, metrics["loss"], 0).sum() / finite.sum(),  # nobody left: NaN
      "bytes_up": metrics["bytes_up"].sum(),
      "bytes_down": metrics["bytes_down"].sum(),
      "rejected": rejected.sum(),
      **{f"rejected/{name}": rejected[k] for k, name in enumerate(names)},
    }
    if "distillation" in metrics:
      report["distillation"] = metrics["distillation"].mean()
    return state._replace(round=state.round + 1), report

  def evaluate(state: State, test):
    sets = jnp.stack([test["corrupted"], test["clean"]])

    def of_client(network):
      one = lambda p: jax.lax.map(lambda x: accuracy(network, p, normalise, x, test["y"]), sets)
      return lambda peers: jax.lax.map(one, peers)

    reached = [of_client(net)(peers) for net, peers in zip(networks, state.peers, strict=True)]
    scores = jnp.nan_to_num(jnp.concatenate(reached))  # outputs that are not finite are wrong
    kinds = ("corrupted", "clean")
    return {f"{kind}_accuracy": scores[:, i].mean() for i, kind in enumerate(kinds)} | {
      f"{kind}_accuracy/{name}": scores[k, i]
      for i, kind in enumerate(kinds)
      for k, name in enumerate(names)
    }

  def figures(state: State):
    scores = jax.device_get(compiler.jit(evaluate)(state, data.test))
    held = np.asarray(state.held.y)
    return {
      "accuracy": corrupted_clients.accuracy_bars(names, scores),
      "private_images": corrupted_clients.class_counts(held, names, data.num_classes),
      "corruptions": corrupted_clients.sample_images(data),
    }

  one_step = compiler.jit(step)

  def pretrained(key) -> State:
    """The state after the epochs alone, in which all rows agree: computed once, then cached."""
    state = init(key)
    learned = lambda state: [(p.params["net"], p.model_state) for p in state.peers]

    def compute() -> Any:
      reached = loop.advance(one_step, state, batches(0), config.pretrain, "training alone")
      return learned(reached)

    settings = [repr((name, getattr(config, name))).encode() for name in _PRETRAINING]
    arrays = [np.asarray(x) for x in (data.pool, state.held.rows, state.held.y)]
    arrays.append(np.asarray(jax.random.key_data(key)))
    depends: list[bytes | np.ndarray] = [_FORMAT, *settings, *arrays]
    nets = cached_tree("trained_alone", depends, jax.tree.structure(learned(state)), compute)
    peers = tuple(
      peer._replace(params=peer.params | {"net": net}, model_state=model_state)
      for peer, (net, model_state) in zip(state.peers, nets, strict=True)
    )
    return state._replace(peers=peers, round=jnp.int32(config.pretrain))

  if config.reuse:
    rounds = lambda step: batches(config.pretrain + step)
    return Experiment(
      pretrained, rounds, step, evaluate, data.test, figures, config.steps, data.about
    )
  total = config.pretrain + config.steps
  return Experiment(init, batches, step, evaluate, data.test, figures, total, data.about)


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
