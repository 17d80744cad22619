"""Clients: their networks, their losses, an epoch of their own, their accuracy."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxmethods.experiments.rahfl.config import Config
from jaxmethods.federated.algorithm import FederatedAlgorithm, Params
from jaxmethods.federated.algorithms import Loss, local_sgd
from jaxmethods.federated.batching import shuffled
from jaxmethods.federated.exchange import Network, Peer
from jaxmethods.federated.prototypes import prototype_distance
from jaxmethods.methods import rahfl as method
from jaxmethods.models.convnets import Classifier
from jaxmethods.models.init import draw_on_host
from jaxmethods.stats.losses import cross_entropy, mean_of_real

Normalise = Callable[[Array], Array]  # uint8 images (..., s, s, 3) -> float32
Prototypes = tuple[Array, Array]  # (C, w) and which are known, (C,) bool
_EVALUATED = 256  # images a forward pass of an evaluation


def network_of(net: Classifier) -> Network:
  """The network as a function; parameters are {"net": ...}, perhaps with a "projector" beside it."""

  def apply(params, model_state, x, train):
    both = functools.partial(_features_and_logits, train=train)
    variables = {"params": params["net"], "batch_stats": model_state}
    if not train:
      return *net.apply(variables, x, method=both), model_state
    (h, logits), moved = net.apply(variables, x, method=both, mutable=["batch_stats"])
    return h, logits, moved["batch_stats"]

  return apply


def _features_and_logits(net: Classifier, x: Array, train: bool) -> tuple[Array, Array]:
  h = net.features(x, train=train)
  return h, net.logits(h)


def variable_shapes(net: Classifier, side: int, projector: int) -> tuple[Params, Params]:
  """Shapes of the parameters and the batch statistics of a client.

  Args:
    net: of the client.
    side: pixels of its images.
    projector: width of FedProto's projector beside the network; 0: none.
  """
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(net.init, jax.random.key(0), image)
  params = {"net": shapes["params"]}
  if projector:
    width = shapes["params"]["head"]["kernel"].shape[0]
    params["projector"] = jax.ShapeDtypeStruct((width, projector), jnp.float32)
  return params, shapes["batch_stats"]


def draw_variables(
  shapes: tuple[Params, Params], random: np.random.Generator, projectors: np.random.Generator
) -> tuple[Params, Params]:
  """Draws parameters and batch statistics of `variable_shapes`.

  FedProto's projectors come from a generator of their own: the networks of all rows start alike.
  """
  params, batch_stats = shapes
  drawn = draw_on_host({"params": params["net"], "batch_stats": batch_stats}, random)
  made = {"net": drawn["params"]}
  if "projector" in params:
    made["projector"] = draw_on_host({"kernel": params["projector"]}, projectors)["kernel"]
  return made, drawn["batch_stats"]


def with_optimizer(
  variables: tuple[Params, Params], optimizer: optax.GradientTransformation
) -> Peer:
  """Returns stacked clients before their first step."""
  params, batch_stats = variables
  return Peer(params, batch_stats, jax.vmap(optimizer.init)(params))


def make_loss(network: Network, config: Config, received: Prototypes | tuple[()]) -> Loss:
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
    if received:
      prototypes, known = received
      projected = h[0] @ params["projector"]
      # Of known classes only, and summed over the width (code).
      far = projected.shape[-1] * prototype_distance(projected, y, prototypes, known)
      value += config.fedproto_lambda * mean_of_real(far, known[y])
      member = jax.nn.one_hot(y, logits.shape[-1])
      sums = member.T @ jax.lax.stop_gradient(projected)
      metrics = {"prototypes": {"sums": sums, "counts": member.sum(0)}}
    return value, (model_state, metrics)

  return loss


def private_training(
  network: Network, config: Config, optimizer: optax.GradientTransformation
) -> FederatedAlgorithm:
  """An epoch of a client over its own images, and its report.

  The report is the mean loss (RHFL), sums and counts of projected features by class (FedProto), or
  nothing.
  """

  def local(message, client: Peer, data, key):
    loss = make_loss(network, config, message)
    batches = shuffled(config.batch_size, drop_last=True)
    trained, metrics = local_sgd(loss, optimizer, tuple(client), data, key, batches=batches)
    report: Array | dict[str, Array] | tuple[()] = ()
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


def measuring(network: Network, normalise: Normalise) -> FederatedAlgorithm:
  """Accuracy of a client on the images it keeps for that: all that it uploads."""

  def local(message, client: Peer, data, key):
    del message, key
    return client, accuracy(network, client, normalise, data["x"], data["y"]), {}

  def server(standing, uploads, weights):
    return {"accuracy": jnp.where(weights > 0, uploads, standing["accuracy"])}

  return FederatedAlgorithm(
    lambda params, key: (), lambda standing, index: (), local, server,
    lambda message, client: client.params,
  )  # fmt: skip


def accuracy(network: Network, client: Peer, normalise: Normalise, x: Array, y: Array) -> Array:
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
