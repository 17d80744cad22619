"""State, first state, round and evaluation of one row, as functions of the parts it is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Int

from jaxmethods import trees
from jaxmethods.experiments.fpl import deal as dealing
from jaxmethods.experiments.fpl.config import Config
from jaxmethods.experiments.fpl.data import Data
from jaxmethods.experiments.fpl.learner import Frozen, Learner
from jaxmethods.federated import algorithms, engine
from jaxmethods.federated.algorithm import FederatedAlgorithm, Params, Upload
from jaxmethods.federated.batching import shuffled
from jaxmethods.methods import fpl
from jaxmethods.methods.fpl import Drift
from jaxmethods.stats import losses
from jaxmethods.trees import PyTree

_CHUNK = 100  # test pictures at once


class Parts(NamedTuple):
  """Everything that a row is made of.

  Attributes:
    config: of the row.
    data: its pictures.
    names: of the clients.
    learner: its model.
    optimizer: of the clients.
    work: what every step reads.
    test: what every evaluation reads.
    size: examples of a client at most.
    mesh: devices that the clients are spread over, if any.
  """

  config: Config
  data: Data
  names: list[str]
  learner: Learner
  optimizer: optax.GradientTransformation
  work: Work
  test: Work
  size: int
  mesh: Mesh | None


class Work(NamedTuple):
  """Frozen model and examples.

  Attributes:
    frozen: the model.
    x: images uint8 (n, h, w, 3), or their embeddings (n, E).
    y: labels, (n,); -1 where there is none.
  """

  frozen: Frozen
  x: Array
  y: Int[Array, " n"]


class Server(NamedTuple):
  """The state of the algorithm, and the drift of the last round by the prompts' names."""

  inner: PyTree  # as the algorithm has it
  drift: dict[str, Drift]


class State(NamedTuple):
  """Everything a checkpoint needs; `deal` and `weights` are fixed once drawn.

  Attributes:
    server: of the algorithm.
    clients: of the algorithm, stacked.
    moments: that go from client to client with `carry_momentum`, else ().
    deal: who holds what.
    weights: (K,) examples.
    key: of the rounds.
    round: rounds completed.
  """

  server: Server
  clients: PyTree  # as the algorithm has them
  moments: PyTree  # as the optimiser has them
  deal: dealing.Deal
  weights: Array
  key: Array
  round: Array


def sgd(rate: float | Array, momentum: float, decay: float) -> optax.GradientTransformation:
  """SGD as PyTorch does it: decay joins the gradient before the momentum."""
  return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum or None))


def make_loss(parts: Parts, work: Work) -> algorithms.Loss:
  """Returns the cross-entropy over a batch of rows of `work`, {"rows", "mask"} (B,)."""

  def loss(params, model_state, batch, key):
    x = parts.learner.read(work.x[batch["rows"]], key if parts.config.augment else None)
    logits = parts.learner.logits(params, work.frozen, x)
    value = losses.cross_entropy(logits, work.y[batch["rows"]], batch["mask"])
    return value, (model_state, {})

  return loss


def make_algorithm(parts: Parts, work: Work) -> FederatedAlgorithm:
  """Federated averaging of what the row trains, with the drift of every round beside it."""
  config = parts.config
  inner = algorithms.fedavg(
    make_loss(parts, work),
    parts.optimizer,
    shared=trees.nothing if config.training == "local" else trees.everything,
    proximal=config.fedprox_mu,
    weighted=config.weighted,
    local_epochs=config.local_epochs,
    batches=shuffled(config.batch_size),
    keep_optimizer=config.training == "local",
  )
  return FederatedAlgorithm(
    init=lambda params, key: Server(inner.init(params, key), {}),
    download=lambda server, index: inner.download(server.inner, index),
    local=inner.local,
    server=functools.partial(_watched, inner),
    params=inner.params,
  )


def init(parts: Parts, key: Array, first: Callable[[Array, Work], State] | None = None) -> State:
  """Draws who holds what, and the first prompts.

  Args:
    parts: of the row.
    key: of the run.
    first: `first_state` of these parts, compiled.

  Raises:
    InputError: a client with too few examples.
  """
  state = (first or functools.partial(first_state, parts))(key, parts.work)
  held, config = state.deal.mask, parts.config
  # Traced, there is no draw to look at.
  if config.training != "centralised" and not isinstance(held, jax.core.Tracer):
    dealing.check(state.deal, parts.names, config.min_examples)
  return state


def first_state(parts: Parts, key: Array, work: Work) -> State:
  """The state before the first round; drawing a deal has many small steps, so compile it."""
  config, num_classes = parts.config, len(parts.data.classes)
  deal_key, start_key, round_key = jax.random.split(key, 3)
  deal = dealing.draw(
    deal_key, jnp.asarray(parts.data.train.y), jnp.asarray(parts.data.test.y), num_classes, config,
    size=parts.size, min_examples=config.min_examples,
  )  # fmt: skip
  if config.training == "centralised":
    rows = jnp.arange(len(work.y), dtype=jnp.int32)[None]
    deal = dealing.Deal(rows, work.y[rows] >= 0, deal.own.any(0, keepdims=True))
  start = parts.learner.start(start_key, work.frozen.params)
  algorithm = make_algorithm(parts, work)
  local, optimizer = config.training == "local", parts.optimizer
  client = algorithms.init_client(
    start,
    shared=trees.nothing if local else trees.everything,
    optimizer=optimizer if local else None,
  )
  clients = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(deal.rows), *x.shape)), client)
  server = algorithm.init(start, round_key)
  count = len(deal.rows) if config.training != "federated" else participants(config, len(deal.rows))
  prompts = {} if local else start.get("prompts", {})
  calm = Drift(jnp.zeros(count), jnp.zeros((count, count)))
  return State(
    Server(server.inner, dict.fromkeys(prompts, calm)), clients,
    optimizer.init(start) if config.carry_momentum else (),
    deal, deal.mask.sum(1).astype(jnp.float32), round_key, jnp.zeros((), jnp.int32),
  )  # fmt: skip


def participants(config: Config, clients: int) -> int:
  """Clients in a round: max(int(share * K), 1)."""
  return max(int(config.participation * clients), 1)


def step(parts: Parts, state: State, work: Work) -> tuple[State, dict[str, Array]]:
  """One round."""
  key = jax.random.fold_in(state.key, state.round)
  server, clients, moments, metrics = (
    _carried_round(parts, state, work, key)
    if parts.config.carry_momentum
    else _round(parts, state, work, key)
  )
  summed = ("bytes_up", "bytes_down", "rejected")
  shown = {k: v.sum() if k in summed else v.mean() for k, v in metrics.items()}
  state = state._replace(server=server, clients=clients, moments=moments, round=state.round + 1)
  return state, shown | agreement(server)


def agreement(server: Server) -> dict[str, Array]:
  """Mean over clients of the cosine between their change of a kind of prompts and the average's."""
  return {f"agreement/{name}": drift.to_global.mean() for name, drift in server.drift.items()}


def evaluate(parts: Parts, state: State, test: Work) -> dict[str, Array]:
  """Accuracy on every domain; where clients differ, their mean.

  `own_accuracy`: every client on the tests with its own domain and labels. `agreement`: see above, the
  mean over the kinds of prompts.
  """
  config, size = parts.config, state.weights.shape[0]
  algorithm = make_algorithm(parts, test)
  params = engine.client_params(algorithm, state.server, (state.clients,), (size,))[0]
  if config.training != "local":  # all have the same
    params = jax.tree.map(lambda x: x[:1], params)
  count = 1 if config.training != "local" else size
  guess = lambda params: _predicted(parts, params, test)
  guesses = jax.lax.map(guess, params) if params else guess({})[None]
  real = test.y >= 0
  right = (guesses == test.y) & real  # (1 or K, n)
  domains = lambda x: x.reshape(len(x), len(parts.data.domains), -1).sum(-1)
  per_domain = (domains(right) / domains(real[None])).mean(0)
  own = state.deal.own & real
  own_right = jnp.broadcast_to(right, own.shape) & own
  own_each = own_right.sum(1) / jnp.maximum(own.sum(1), 1)
  has_own = own.any(1)
  together = agreement(state.server)
  return {
    "test_accuracy": per_domain.mean(),
    "worst_domain": per_domain.min(),
    "macro_f1": jnp.stack([_macro_f1(g, test.y, parts) for g in guesses[:count]]).mean(),
    "own_accuracy": jnp.where(has_own, own_each, 0).sum() / jnp.maximum(has_own.sum(), 1),
    **({"agreement": jnp.stack(list(together.values())).mean()} if together else {}),
    **{f"test_accuracy/{name}": per_domain[i] for i, name in enumerate(parts.data.domains)},
  }


def _round(
  parts: Parts, state: State, work: Work, key: Array
) -> tuple[Server, PyTree, PyTree, dict[str, Array]]:
  config, size = parts.config, state.weights.shape[0]
  count = size if config.training != "federated" else participants(config, size)
  cohort = None
  if count < size:
    cohort = (
      engine.sample_cohort(jax.random.fold_in(key, 1), [size], count)
      if config.random_participation
      else engine.Cohort((jnp.arange(count, dtype=jnp.int32),), jnp.ones(count, bool))
    )
  data = {"rows": state.deal.rows, "mask": state.deal.mask}
  server, (clients,), metrics = engine.federated_round(
    make_algorithm(parts, work), state.server, (state.clients,), (data,), (state.weights,), key,
    cohort=cohort, client_map="shard" if parts.mesh else None, mesh=parts.mesh, drop_nonfinite=True,
  )  # fmt: skip
  return server, clients, state.moments, metrics


def _carried_round(
  parts: Parts, state: State, work: Work, key: Array
) -> tuple[Server, PyTree, PyTree, dict[str, Array]]:
  """A round in which momentum goes from client to client, as in the published code."""
  config, loss, optimizer = parts.config, make_loss(parts, work), parts.optimizer

  def train(prompts: Params, moments: PyTree, client: tuple) -> tuple:
    data, key = client
    (prompts, _, moments), metrics = algorithms.local_sgd(
      loss, optimizer, (prompts, (), moments), data, key,
      epochs=config.local_epochs, batches=shuffled(config.batch_size),
    )  # fmt: skip
    return prompts, moments, metrics

  keys = jax.random.split(key, state.weights.shape[0])
  data = {"rows": state.deal.rows, "mask": state.deal.mask}
  start = state.server.inner.params
  uploads, moments, metrics = fpl.carried(train, start, state.moments, (data, keys))
  server = make_algorithm(parts, work).server(state.server, uploads, state.weights)
  sent = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(start))
  metrics |= {name: jnp.full(len(keys), sent, jnp.float32) for name in ("bytes_up", "bytes_down")}
  return server, state.clients, moments, metrics


def _watched(inner: FederatedAlgorithm, server: Server, uploads: Upload, weights: Array) -> Server:
  """The server's part of a round, and how far the clients' changes of the prompts agree."""
  after = inner.server(server.inner, uploads, weights)
  taking_part = weights > 0

  def drift(name: str) -> Drift:
    old, new = server.inner.params["prompts"][name], after.params["prompts"][name]
    updates = uploads["prompts"][name] - old
    updates = jnp.where(taking_part.reshape(-1, *[1] * old.ndim), updates, 0)
    return fpl.drift(updates, new - old)

  return Server(after, {name: drift(name) for name in server.drift})


def _predicted(parts: Parts, params: Params, test: Work) -> Array:
  """Classes that the model gives the tests, (n,)."""
  learner = parts.learner
  if learner.reads_embeddings:
    return learner.logits(params, test.frozen, test.x).argmax(-1)
  part = lambda x: learner.logits(params, test.frozen, learner.read(x, None)).argmax(-1)
  size = min(_CHUNK, len(test.x))
  chunks = jnp.pad(test.x, ((0, -len(test.x) % size), *[(0, 0)] * (test.x.ndim - 1)))
  guesses = jax.lax.map(part, chunks.reshape(-1, size, *test.x.shape[1:]))
  return guesses.reshape(-1)[: len(test.x)]


def _macro_f1(guesses: Array, y: Array, parts: Parts) -> Array:
  """Mean over classes of 2 TP / (2 TP + FP + FN); 0 for a class that is neither there nor guessed."""
  classes = jnp.arange(len(parts.data.classes))
  guessed = (guesses[:, None] == classes) & (y >= 0)[:, None]
  there = y[:, None] == classes
  both = (guessed & there).sum(0)
  return (2 * both / jnp.maximum(guessed.sum(0) + there.sum(0), 1)).mean()
