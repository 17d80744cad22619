"""Federated averaging and its relatives, as one function with options.

fedavg  McMahan et al. 2017. Communication-efficient learning of deep networks from decentralized data.
fedprox Li et al. 2020. Federated optimization in heterogeneous networks.
fedper  Arivazhagan et al. 2019. Federated learning with personalization layers.
fedopt  Reddi et al. 2021. Adaptive federated optimization (FedAvgM, FedAdam, FedYogi).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
import optax

from jaxmethods import trees
from jaxmethods.federated.algorithm import ClientData, FederatedAlgorithm, Metrics, Params
from jaxmethods.federated.batching import Batch, Batching, prebatched
from jaxmethods.federated.engine import weighted_mean
from jaxmethods.trees import Key, PyTree

ModelState: TypeAlias = PyTree  # non-trained collections, () without any
# (parameters, model state, batch, key) -> (scalar, (new model state, metrics))
Loss: TypeAlias = Callable[
  [Params, ModelState, Batch, Key], tuple[jax.Array, tuple[ModelState, Metrics]]
]
# (parameters, received, the client's own of the round before, batch) -> scalar
Penalty: TypeAlias = Callable[[Params, Params, Params, Batch], jax.Array]


class Options(TypedDict, total=False):
  """Options of `fedavg` that a variation of it passes on."""

  shared: trees.Predicate
  proximal: float
  weighted: bool
  local_epochs: int
  keep_optimizer: bool
  batches: Batching
  unroll: int | bool


class ClientState(NamedTuple):
  """What a client keeps.

  Attributes:
    params: its local parameters (those that are not shared).
    model_state: what is not trained by gradient, such as batch-norm statistics; never leaves it.
    opt_state: optimiser state over all its parameters, or () if it starts anew every round.
    previous: all its parameters after its last round, () unless a penalty looks at them.
  """

  params: Params
  model_state: ModelState
  opt_state: PyTree
  previous: PyTree = ()


class ServerState(NamedTuple):
  """Shared parameters and the state of the server's optimiser (() without one)."""

  params: Params
  opt_state: PyTree


def init_client(
  params: Params,
  model_state: ModelState = (),
  *,
  shared: trees.Predicate = trees.everything,
  optimizer: optax.GradientTransformation | None = None,
  keep_previous: bool = False,
) -> ClientState:
  """Returns a client before its first round; vmap it over stacked parameters for a group.

  Args:
    params: all parameters of the client's model.
    model_state: its non-trained collections.
    shared: as given to `fedavg`.
    optimizer: as given to `fedavg` if it keeps the optimiser state, else None.
    keep_previous: whether `fedavg` has a penalty.

  >>> client = jm.federated.init_client(linear, shared=lambda path: path != "bias")
  >>> sorted(client.params)
  ['bias']
  """
  local = trees.split(params, shared)[1]
  opt_state = optimizer.init(params) if optimizer else ()
  return ClientState(local, model_state, opt_state, params if keep_previous else ())


def fedavg(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  shared: trees.Predicate = trees.everything,
  proximal: float = 0.0,
  penalty: Penalty | None = None,
  weighted: bool = True,
  local_epochs: int = 1,
  server_optimizer: optax.GradientTransformation | None = None,
  keep_optimizer: bool = False,
  batches: Batching = prebatched,
  unroll: int | bool = 1,
) -> FederatedAlgorithm:
  """Averages the shared parameters after local training of every client.

  Args:
    loss: (params, model_state, batch, key) -> (scalar, (model_state, metrics)); honours the sample
      mask in `batch`.
    optimizer: of the clients.
    shared: which parameters are exchanged, by path "a/b/c"; the others never leave the client.
    proximal: mu of FedProx: adds (mu / 2) ||w - w_server||^2 over the shared parameters to the loss.
    penalty: added to the loss; the client then keeps its parameters for the next round
      (`init_client(keep_previous=True)`).
    weighted: average by example counts; False: every participating client counts the same.
    local_epochs: passes over a client's batches per round.
    server_optimizer: applied to the pseudo-gradient w_server - mean(w_client); None puts the mean
      in place.
    keep_optimizer: keep each client's optimiser state from round to round (it then includes the
      moments of the shared parameters); False starts it anew.
    batches: (data, epoch key) -> Batches; `prebatched` or `batching.shuffled(batch_size)`.
    unroll: of the loop over steps; more compiles longer and may run faster.

  >>> algorithm = jm.federated.fedavg(loss, optax.sgd(0.1), batches=jm.federated.shuffled(4))
  >>> server, clients, metrics = train(algorithm)  # three rounds of `federated_round`
  >>> bool(metrics["loss"].mean() < 1)
  True
  """

  def init(params: Params, key: Key) -> ServerState:
    del key
    start = trees.split(params, shared)[0]
    return ServerState(start, server_optimizer.init(start) if server_optimizer else ())

  def download(server: ServerState, index: jax.Array) -> Params:
    del index
    return server.params

  def local(message, client: ClientState, data, key):
    start = trees.merge(message, client.params)
    opt_state = client.opt_state if keep_optimizer else optimizer.init(start)

    def objective(params, model_state, batch, key):
      value, aux = loss(params, model_state, batch, key)
      if proximal:
        value += proximal_term(trees.split(params, shared)[0], message, proximal)
      if penalty:
        value += penalty(params, start, client.previous, batch)
      return value, aux

    state, metrics = local_sgd(
      objective,
      optimizer,
      (start, client.model_state, opt_state),
      data,
      key,
      epochs=local_epochs,
      batches=batches,
      unroll=unroll,
    )
    upload, kept = trees.split(state[0], shared)
    client = ClientState(
      kept, state[1], state[2] if keep_optimizer else (), state[0] if penalty else ()
    )
    return client, upload, metrics

  def server(state: ServerState, uploads, weights) -> ServerState:
    counts = weights if weighted else (weights > 0).astype(weights.dtype)
    mean = weighted_mean(uploads, counts)
    # A round in which nobody took part leaves the server as it was.
    someone = counts.sum() > 0
    if server_optimizer is None:
      return ServerState(_where(someone, mean, state.params), ())
    gradient = jax.tree.map(jnp.subtract, state.params, mean)
    updates, opt_state = server_optimizer.update(gradient, state.opt_state, state.params)
    new = ServerState(optax.apply_updates(state.params, updates), opt_state)
    return _where(someone, new, state)

  def params(message, client: ClientState) -> Params:
    return trees.merge(message, client.params)

  return FederatedAlgorithm(init, download, local, server, params)


def proximal_term(params: Params, received: Params, mu: float) -> jax.Array:
  """Returns (mu / 2) ||w - w_server||^2 over all parameters (FedProx).

  Args:
    params: w, of the client.
    received: w_server, the same tree.
    mu: weight of the term.

  Raises:
    ValueError: the trees differ.
  """
  trees.check_alike(params=params, received=received)
  drift = jax.tree.map(jnp.subtract, params, received)
  return 0.5 * mu * optax.tree.norm(drift, squared=True)


def fedprox(
  loss: Loss, optimizer: optax.GradientTransformation, mu: float = 0.01, **options
) -> FederatedAlgorithm:
  """FedAvg with the proximal term (mu / 2) ||w - w_server||^2 in every client's loss.

  >>> algorithm = jm.federated.fedprox(loss, optax.sgd(0.1), mu=0.1, batches=jm.federated.shuffled(4))
  >>> server, clients, metrics = train(algorithm)
  >>> metrics["loss"].shape
  (3,)
  """
  return fedavg(loss, optimizer, proximal=mu, **options)


def fedper(
  loss: Loss, optimizer: optax.GradientTransformation, local: tuple[str, ...], **options
) -> FederatedAlgorithm:
  """FedAvg whose layers named in `local` (any part of the path) stay with the client.

  >>> algorithm = jm.federated.fedper(loss, optax.sgd(0.1), ("bias",))
  >>> sorted(algorithm.init(linear, key).params)  # what is shared
  ['w']
  """
  return fedavg(loss, optimizer, shared=trees.all_but(*local), **options)


def local_only(
  loss: Loss, optimizer: optax.GradientTransformation, **options
) -> FederatedAlgorithm:
  """No exchange at all: every client trains alone and keeps its optimiser state.

  >>> algorithm = jm.federated.local_only(loss, optax.sgd(0.1))
  >>> sorted(algorithm.init(linear, key).params)  # nothing is shared
  []
  """
  return fedavg(loss, optimizer, shared=trees.nothing, **{"keep_optimizer": True, **options})


def fedavgm(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  server_rate: float = 1.0,
  momentum: float = 0.9,
  **options,
) -> FederatedAlgorithm:
  """FedAvg with momentum on the server (Hsu et al. 2019).

  >>> algorithm = jm.federated.fedavgm(loss, optax.sgd(0.1), batches=jm.federated.shuffled(4))
  >>> server, clients, metrics = train(algorithm)
  >>> metrics["loss"].shape
  (3,)
  """
  return fedavg(loss, optimizer, server_optimizer=optax.sgd(server_rate, momentum), **options)


def fedadam(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  server_rate: float = 0.01,
  tau: float = 1e-3,
  **options,
) -> FederatedAlgorithm:
  """FedAvg with Adam on the server; `tau` is its adaptivity (eps), b1 0.9 and b2 0.99 as published.

  >>> algorithm = jm.federated.fedadam(loss, optax.sgd(0.1), batches=jm.federated.shuffled(4))
  >>> server, clients, metrics = train(algorithm)
  >>> metrics["loss"].shape
  (3,)
  """
  adam = optax.adam(server_rate, b1=0.9, b2=0.99, eps=tau)
  return fedavg(loss, optimizer, server_optimizer=adam, **options)


def fedyogi(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  server_rate: float = 0.01,
  tau: float = 1e-3,
  **options,
) -> FederatedAlgorithm:
  """FedAvg with Yogi on the server, settings as in `fedadam`.

  >>> algorithm = jm.federated.fedyogi(loss, optax.sgd(0.1), batches=jm.federated.shuffled(4))
  >>> server, clients, metrics = train(algorithm)
  >>> metrics["loss"].shape
  (3,)
  """
  yogi = optax.yogi(server_rate, b1=0.9, b2=0.99, eps=tau)
  return fedavg(loss, optimizer, server_optimizer=yogi, **options)


def local_sgd(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  state: tuple[Params, ModelState, PyTree],
  data: ClientData,
  key: Key,
  *,
  epochs: int = 1,
  batches: Batching = prebatched,
  unroll: int | bool = 1,
) -> tuple[tuple[Params, ModelState, PyTree], Metrics]:
  """Trains one client for some epochs over its batches.

  Args:
    loss: as in `fedavg`.
    optimizer: an optax transformation.
    state: (params, model_state, opt_state).
    data: what `batches` reads.
    key: split into an order key and a step key per epoch; step i gets `fold_in(step key, i)`, so
      padding steps leave the other steps' numbers alone.
    epochs: passes over the data.
    batches: (data, epoch key) -> Batches.
    unroll: of the loop over steps.

  Returns:
    The new state, and the metrics of the loss averaged over all real steps, "loss" among them.
  """

  def train(state, batch, key):
    params, model_state, opt_state = state
    (value, (model_state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
      params, model_state, batch, key
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), model_state, opt_state), metrics | {"loss": value}

  def skip(state, batch, key):
    _, metrics = jax.eval_shape(train, state, batch, key)
    return state, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics)

  def epoch(state, keys):
    order_key, step_key = keys
    steps = batches(data, order_key)

    def step(state, xs):
      batch, real, i = xs
      return jax.lax.cond(real, train, skip, state, batch, jax.random.fold_in(step_key, i))

    numbers = jnp.arange(steps.real.shape[0])
    state, metrics = jax.lax.scan(step, state, (*steps, numbers), unroll=unroll)
    return state, (jax.tree.map(lambda m: m.sum(0), metrics), steps.real.sum())

  state, (totals, steps) = jax.lax.scan(epoch, state, jax.random.split(key, (epochs, 2)))
  return state, jax.tree.map(lambda m: m.sum(0) / jnp.maximum(steps.sum(), 1), totals)


def _where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
