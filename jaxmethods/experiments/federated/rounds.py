"""State, first state, round and evaluation, as functions of the parts a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxmethods.experiments.federated.algorithms import Method
from jaxmethods.experiments.federated.nets import Scores, Task
from jaxmethods.federated import engine
from jaxmethods.trees import PyTree

_LOW = 0.1  # quantile over clients that stands for the worst off
_LAST = ("drift", "bytes_up", "bytes_down")  # of the last round, beside the accuracies
_SUMMED = ("bytes_up", "bytes_down", "rejected")


class Parts(NamedTuple):
  """Everything that a run is made of.

  Attributes:
    task: model, loss, test.
    method: fixed part of the task -> the algorithm.
    sizes: clients of every group; () for a population, whose clients keep nothing.
    cohort: clients of a round; 0: all.
    personal: whether clients end with models of their own.
    mesh: devices that the clients are spread over, if any.
  """

  task: Task
  method: Callable[[PyTree], Method]
  sizes: tuple[int, ...]
  cohort: int
  personal: bool
  mesh: Mesh | None

  @property
  def how(self) -> dict:
    """Options of the engine's maps."""
    return {"client_map": "shard" if self.mesh else None, "mesh": self.mesh}


class Batch(NamedTuple):
  """Clients of a round, in groups of one shape.

  Attributes:
    data: per group, arrays (clients, n, ...) with "mask" (clients, n).
    weights: per group, (clients,) examples.
    ids: per group, (clients,) who they are.
  """

  data: Sequence[PyTree]
  weights: Sequence[PyTree]
  ids: Sequence[PyTree]


class Test(NamedTuple):
  """What is tested on.

  Attributes:
    own: per group, arrays (clients, m, ...) with "mask" (clients, m): each client's own examples.
    order: (K,) where the client that is k-th in the list of names stands among the groups.
    published: arrays (chunks, rows, ...) of a test that belongs to nobody; {} without.
  """

  own: Sequence[PyTree]
  order: PyTree
  published: PyTree


class State(NamedTuple):
  """Everything a checkpoint needs.

  Attributes:
    server: of the algorithm.
    clients: of the algorithm, per group, stacked; of a population, one client before its first round.
    fixed: of the task.
    key: of the rounds.
    round: rounds completed.
    last: drift and bytes of the last round.
  """

  server: PyTree
  clients: tuple[PyTree, ...]
  fixed: PyTree
  key: Array
  round: Array
  last: dict[str, Array]


def init(parts: Parts, key: Array) -> State:
  """Starts the model, alike at all clients."""
  model_key, algorithm_key, round_key = jax.random.split(key, 3)
  params, model_state = parts.task.init(model_key)
  method = parts.method(parts.task.fixed)
  client = method.client(params, model_state)
  clients = tuple(_repeated(client, size) for size in parts.sizes or (1,))
  server = method.algorithm.init(params, algorithm_key)
  last = {name: jnp.zeros(()) for name in _LAST}
  return State(server, clients, parts.task.fixed, round_key, jnp.zeros((), jnp.int32), last)


def step(parts: Parts, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
  """One round; who takes part and in which order examples come follows from the state's key."""
  key, cohort_key = jax.random.split(jax.random.fold_in(state.key, state.round))
  algorithm = parts.method(state.fixed).algorithm
  cohort, clients = None, state.clients
  if not parts.sizes:
    clients = tuple(
      _repeated(jax.tree.map(lambda x: x[0], clients[0]), len(w)) for w in batch.weights
    )
  elif 0 < parts.cohort < sum(parts.sizes):
    cohort = engine.sample_cohort(cohort_key, parts.sizes, parts.cohort)
  server, after, metrics = engine.federated_round(
    algorithm, state.server, clients, batch.data, batch.weights, key,
    cohort=cohort, ids=batch.ids, drop_nonfinite=True, **parts.how,
  )  # fmt: skip
  counted = jnp.ones(len(metrics["loss"]), bool) if cohort is None else cohort.taking_part
  kept = after if parts.sizes else state.clients
  told = _summarised(metrics, counted)
  last = {name: told[name].astype(jnp.float32) for name in _LAST}
  return State(server, kept, state.fixed, state.key, state.round + 1, last), told


def _summarised(metrics: Mapping[str, Array], counted: Array) -> dict[str, Array]:
  """Means over the clients that took part and were not rejected, sums of the bytes of all that did."""
  good = counted & ~metrics["rejected"]
  mean = lambda x: jnp.where(good, x, 0).sum() / good.sum()  # nobody: not finite, and the run stops
  return {
    name: jnp.where(counted, x, 0).sum() if name in _SUMMED else mean(x)
    for name, x in metrics.items()
  }


def client_scores(parts: Parts, state: State, test: Test) -> Scores:
  """Scores every client's model on its own test, (K,) each, in the order of the clients' names."""
  algorithm, scores = parts.method(state.fixed).algorithm, parts.task.scores

  def score(shared, index, client, rows) -> Scores:
    server, fixed = shared
    params = algorithm.params(algorithm.download(server, index), client)
    found = scores(fixed, params, client.model_state, rows)
    return jax.tree.map(lambda x: x.sum().astype(jnp.float32), found)

  sizes = [len(rows["mask"]) for rows in test.own]
  clients = state.clients
  if parts.sizes != tuple(sizes):  # one model that was trained for all of them
    one = jax.tree.map(lambda x: x[0], clients[0])
    clients = tuple(_repeated(one, size) for size in sizes)
  index = np.split(np.arange(sum(sizes), dtype=np.int32), np.cumsum(sizes)[:-1])
  found = engine.map_clients(
    [score] * len(sizes), (state.server, state.fixed),
    [(jnp.asarray(i), c, rows) for i, c, rows in zip(index, clients, test.own, strict=True)],
    **parts.how,
  )  # fmt: skip
  whole = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
  return jax.tree.map(lambda x: x[test.order], whole)


def evaluate(parts: Parts, state: State, test: Test) -> dict[str, Array]:
  """Accuracies on the clients' own tests, and of one model for all on the published one."""
  own = client_scores(parts, state, test)
  total = jnp.maximum(own.counted.sum(), 1)
  accuracy = jnp.where(own.counted > 0, own.right / jnp.maximum(own.counted, 1), jnp.nan)
  metrics = {parts.task.measure: own.right.sum() / total}
  if test.published and not parts.personal:
    metrics["published_accuracy"] = _published(parts, state, test.published)
  return metrics | {
    "client_accuracy": jnp.nanmean(accuracy),
    "spread": jnp.nanstd(accuracy),
    "low_accuracy": jnp.nanquantile(accuracy, _LOW),
    "client_loss": own.loss.sum() / total,
    **state.last,
  }


def _published(parts: Parts, state: State, chunks: Mapping[str, Array]) -> Array:
  """Share of a published test that the one model gets right; model state is the first client's."""
  algorithm = parts.method(state.fixed).algorithm
  client = jax.tree.map(lambda x: x[0], state.clients[0])
  params = algorithm.params(algorithm.download(state.server, jnp.int32(0)), client)
  score = lambda rows: parts.task.scores(state.fixed, params, client.model_state, rows)
  found = jax.lax.map(score, dict(chunks))
  return found.right.sum() / jnp.maximum(found.counted.sum(), 1)


def _repeated(tree: PyTree, size: int) -> PyTree:
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)
