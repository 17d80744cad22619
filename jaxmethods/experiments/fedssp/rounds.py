"""Rounds and evaluations of all clients: as one pure function, or as a program for every group."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.experiments.fedssp.algorithms import Setup
from jaxmethods.experiments.fedssp.backbones import Backbone, Batch, graphs_of, target_of
from jaxmethods.experiments.fedssp.clients import TEST, VALIDATION, Clients
from jaxmethods.experiments.fedssp.state import State
from jaxmethods.federated import engine
from jaxmethods.federated.batching import Batches
from jaxmethods.methods import fedssp as method
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Metrics
from jaxmethods.trees import Key, Params, PyTree

Hits: TypeAlias = tuple[Int[Array, "... 2"], Int[Array, "... 2"]]  # right and all, by split


class Federation(NamedTuple):
  """Training data, on the device for the whole run; one entry per group of clients.

  Attributes:
    train: batches of the group.
    weights: (clients,) numbers of training graphs.
  """

  train: tuple[PyTree, ...]
  weights: tuple[jax.Array, ...]


class Roster(NamedTuple):
  """Who the clients are, and how a round and an evaluation run.

  Attributes:
    setup: algorithm.
    backbone: network.
    names: one per client, in the order of their numbers.
    ids: per group, numbers of its clients.
    participation: share of the clients drawn for each round.
    client_map: of the rounds; None: the default of the backend.
    mesh: with an axis "clients", or None.
  """

  setup: Setup
  backbone: Backbone
  names: tuple[str, ...]
  ids: tuple[np.ndarray, ...]
  participation: float
  client_map: engine.ClientMap | None
  mesh: jax.sharding.Mesh | None

  @property
  def order(self) -> np.ndarray:
    """Number of each client, group after group."""
    return np.concatenate(self.ids)


class Functions(NamedTuple):
  """What the loop runs.

  Attributes:
    step: (state, federation) -> (state, metrics).
    evaluate: (state, held-out batches of every group) -> metrics.
  """

  step: Callable[[State, Federation], tuple[State, Metrics]]
  evaluate: Callable[[State, tuple[Batch, ...]], Metrics]


def federation_of(groups: Sequence[Clients], prebatched: bool) -> Federation:
  """Collects the training data of all groups.

  Args:
    groups: clients on the device.
    prebatched: whether the algorithm reads `Batches`, where one without a real graph is no step.
  """
  wrap = lambda batch: Batches(batch, target_of(batch)[1].any(-1)) if prebatched else batch
  return Federation(
    tuple(wrap(group.train) for group in groups),
    tuple(jnp.asarray(group.counts) for group in groups),
  )


def as_one(roster: Roster, groups: Sequence[Clients]) -> Functions:
  """Returns pure functions over all groups, which the caller jits."""
  count = functools.partial(count_hits, roster.setup, roster.backbone)
  run_round: Callable[..., Any] = engine.federated_round
  map_clients: Callable[..., Any] = engine.map_clients
  counting = [count] * len(groups)
  if roster.mesh:
    spans = _spans(groups)
    run_round = functools.partial(_round_apart, spans)
    map_clients = functools.partial(_map_apart, spans)
    counting = [count] * sum(map(len, spans))
  count_map: engine.ClientMap = "shard" if roster.mesh else "scan"
  return _compose(
    roster,
    functools.partial(
      run_round, roster.setup.algorithm, client_map=roster.client_map, mesh=roster.mesh
    ),
    functools.partial(map_clients, counting, client_map=count_map, mesh=roster.mesh),
    jit=lambda part: part,
  )


def as_programs(roster: Roster) -> Functions:
  """Returns functions of jitted programs, one for every group and a few beside them."""
  count = functools.partial(count_hits, roster.setup, roster.backbone)
  groups = len(roster.ids)
  return _compose(
    roster,
    engine.round_programs(
      [roster.setup.algorithm] * groups, jit=compiler.jit, client_map=roster.client_map
    ),
    engine.map_programs([count] * groups, jit=compiler.jit, client_map="scan"),
    jit=compiler.jit,
  )


class _Parts(NamedTuple):
  """Parts of a step and of an evaluation: of all clients, and of what stands beside them."""

  run_round: Callable[..., Any]
  count_all: Callable[..., list[Hits]]
  begin: Callable[[Key, jax.Array], tuple[Key, jax.Array | None]]
  end: Callable[[Metrics, jax.Array | None], Metrics]
  summary: Callable[[list[Hits]], Metrics]
  norm: Callable[[tuple[PyTree, ...]], Metrics]


def _compose(
  roster: Roster,
  run_round: Callable[..., Any],
  count_all: Callable[..., list[Hits]],
  jit: Callable[[Callable], Callable],
) -> Functions:
  """Puts step and evaluation together; `jit` is for the parts that stand beside the clients."""
  parts = _Parts(
    run_round,
    count_all,
    begin=jit(functools.partial(draw, roster)),
    end=jit(functools.partial(mean_metrics, len(roster.names))),
    summary=jit(functools.partial(accuracies, roster)),
    norm=jit(preference_norm),
  )
  index = jnp.split(jnp.arange(len(roster.names)), np.cumsum(list(map(len, roster.ids)))[:-1])
  return Functions(
    functools.partial(_step, parts, roster.ids), functools.partial(_evaluate, parts, index)
  )


def _step(
  parts: _Parts, ids: tuple[np.ndarray, ...], state: State, federation: Federation
) -> tuple[State, Metrics]:
  """Runs a round."""
  key, taking_part = parts.begin(state.key, state.round)
  server, clients, metrics = parts.run_round(
    state.server, state.clients, federation.train, federation.weights, key,
    taking_part=taking_part, ids=ids,
  )  # fmt: skip
  return State(server, clients, state.key, state.round + 1), parts.end(metrics, taking_part)


def _evaluate(
  parts: _Parts, index: list[jax.Array], state: State, held_out: tuple[Batch, ...]
) -> Metrics:
  """Evaluates every client on its own held-out graphs."""
  groups = list(zip(index, state.clients, held_out, strict=True))
  summary = parts.summary(parts.count_all(state.server, groups))
  return OrderedDict(summary, **parts.norm(state.clients))


# --- beside the clients ---------------------------------------------------------------------------


def draw(
  roster: Roster, key: Key, round_: Int[Array, ""]
) -> tuple[Key, Bool[Array, " clients"] | None]:
  """Returns the key of a round, and who takes part in it (None: all)."""
  work_key, cohort_key = jax.random.split(jax.random.fold_in(key, round_))
  if roster.participation == 1:
    return work_key, None
  drawn = max(1, round(roster.participation * len(roster.names)))
  taking_part = engine.sample_participants(cohort_key, len(roster.names), drawn)
  return work_key, taking_part[roster.order]


def mean_metrics(
  num_clients: int, metrics: Metrics, taking_part: Bool[Array, " clients"] | None
) -> dict[str, Float[Array, ""]]:
  """Averages the metrics of the clients that took part; bytes are those of the whole round."""
  share = jnp.ones(num_clients) if taking_part is None else taking_part.astype(jnp.float32)
  sums = {name: value @ share for name, value in metrics.items()}
  return {
    name: total if name.startswith("bytes") else total / share.sum() for name, total in sums.items()
  }


def accuracies(roster: Roster, counts: list[Hits]) -> OrderedDict[str, Float[Array, ""]]:
  """Averages accuracies over clients without weights, the metric of comparisons first."""
  # nan where a client has no validation graphs
  by_group = jnp.concatenate([hits / totals for hits, totals in counts])
  validation, test = by_group[np.argsort(roster.order)].T
  return OrderedDict(
    {"test_accuracy": test.mean(), "validation_accuracy": jnp.nanmean(validation)},
    **{f"test_accuracy/{name}": test[i] for i, name in enumerate(roster.names)},
  )


def preference_norm(clients: tuple[PyTree, ...]) -> dict[str, Float[Array, ""]]:
  """Measures the mean length of the clients' preferences; nothing where they have none."""
  if not all(isinstance(group, method.Client) for group in clients):
    return {}
  each = [jnp.linalg.norm(group.preference, axis=-1) for group in clients]
  return {"preference_norm": jnp.concatenate(each).mean()}


# --- one client -----------------------------------------------------------------------------------


def count_hits(
  setup: Setup,
  backbone: Backbone,
  server: PyTree,
  index: Int[Array, ""],
  client: PyTree,
  batches: Batch,
) -> Hits:
  """Counts right and all answers of one client on (validation, test), (2,) each."""
  params = _params(setup, server, index, client)

  def score(batch: Batch) -> Hits:
    representation, _ = backbone.features(params, client.model_state, batch, None)
    logits = backbone.classify(params, representation + setup.offset(client))
    about = graphs_of(batch).globals
    part = about["split"][:, None] == jnp.array([VALIDATION, TEST])
    right = logits.argmax(-1) == about["label"]
    return (part & right[:, None]).sum(0), part.sum(0)

  def one(batch: Batch) -> Hits:
    # In a conditional, as in training, for the reason in `methods.fedssp`.
    nothing = jnp.zeros(2, jnp.int32)
    return jax.lax.cond(target_of(batch)[1].any(), score, lambda _: (nothing, nothing), batch)

  hits, totals = jax.lax.map(one, batches)
  return hits.sum(0), totals.sum(0)


def decode(
  setup: Setup,
  decoded: Callable[..., jax.Array],
  server: PyTree,
  index: Int[Array, ""],
  client: PyTree,
  batch: Batch,
) -> Float[Array, "N M"]:
  """Applies the decoder of the network that a client predicts with."""
  return decoded(_params(setup, server, index, client), client.model_state, batch)


def _params(setup: Setup, server: PyTree, index: Int[Array, ""], client: PyTree) -> Params:
  """Joins a client's own parameters and those that it downloads."""
  return setup.algorithm.params(setup.algorithm.download(server, index), client)


# --- on a mesh ------------------------------------------------------------------------------------

# Every data set is a group of its own there: clients of one data set are about equally large and can be
# spread over the mesh, single ones are dealt to its devices by their size.

Spans: TypeAlias = list[list[slice]]  # per group, the rows of each of its data sets


def _spans(groups: Sequence[Clients]) -> Spans:
  """Finds the rows of each data set."""
  spans = []
  for group in groups:
    cuts = np.flatnonzero(np.diff(group.sets)) + 1
    spans.append([slice(*cut) for cut in itertools.pairwise([0, *cuts, len(group.sets)])])
  return spans


def _apart(spans: Spans, groups: Sequence[PyTree]) -> list[PyTree]:
  """Cuts trees stacked by group into trees stacked by data set."""
  return [
    jax.tree.map(lambda x, span=span: x[span], tree)
    for tree, within in zip(groups, spans, strict=True)
    for span in within
  ]


def _together(spans: Spans, sets: Sequence[PyTree]) -> tuple[PyTree, ...]:
  """Joins trees stacked by data set into trees stacked by group; the inverse of `_apart`."""
  left: Iterator[PyTree] = iter(sets)
  join = lambda *xs: jnp.concatenate(xs)
  return tuple(jax.tree.map(join, *itertools.islice(left, len(within))) for within in spans)


def _round_apart(
  spans: Spans, algorithm, server, clients, data, weights, key, *, ids, **options
) -> tuple[PyTree, tuple[PyTree, ...], Metrics]:
  """Runs `engine.federated_round` with every data set as a group."""
  apart = functools.partial(_apart, spans)
  server, sets, metrics = engine.federated_round(
    algorithm, server, apart(clients), apart(data), apart(weights), key, ids=apart(ids), **options
  )
  return server, _together(spans, sets), metrics


def _map_apart(spans: Spans, functions, shared, groups, **options) -> tuple[PyTree, ...]:
  """Runs `engine.map_clients` with every data set as a group."""
  return _together(spans, engine.map_clients(functions, shared, _apart(spans, groups), **options))
