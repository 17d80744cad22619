"""One round of any federated algorithm as one pure function, for the caller to jit.

`federated_round` maps `algorithm.local` over all clients and hands their stacked uploads to
`algorithm.server`. Clients are kept in groups: a group is a pytree stacked on a leading client axis,
so its clients share shapes, and groups may differ (size buckets, feature widths, architectures; only
messages and uploads must look alike). How a group is mapped over changes the speed, never the result:

  vmap   all clients of a group in one batched program. Best on GPU and TPU; on CPU only for dense nets
         so small that the overhead of a step counts (8-16-4: half the time of scan; 64-128-64-10:
         1.4 times).
  scan   one client after the other (`lax.map`). Best on CPU otherwise: one client's weights stay in the
         cache, its padding steps are skipped, and batched weights would turn convolutions into grouped
         ones (3 times slower).
  shard  clients spread over the mesh axis "clients", several per device. Clients that share their
         shapes with no other cannot be spread: they are dealt to the devices whole, the heaviest first.

`round_programs` is the same round as a program for every group and one for the server. It pays on one
device where groups are few and their steps large: XLA compiles the programs side by side, needs the
memory of those at work alone, and on CPU runs them side by side too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Literal, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.federated.algorithm import (
  ClientData,
  ClientState,
  FederatedAlgorithm,
  Metrics,
  ServerState,
  Upload,
)
from jaxmethods.federated.padding import repeat_first
from jaxmethods.stats import shapes
from jaxmethods.trees import Key, PyTree

ClientMap = Literal["vmap", "scan", "shard"]
CLIENT_MAPS = ("vmap", "scan", "shard")
CLIENTS_AXIS = "clients"


class Cohort(NamedTuple):
  """The clients of one round, few among many; see `sample_cohort`.

  Attributes:
    rows: for each group the rows that take part, (capacity,) int32 without repetition.
    taking_part: (sum of capacities,) bool, False for rows that only fill a group's capacity.
  """

  rows: tuple[Int[Array, " capacity"], ...]
  taking_part: Bool[Array, " rows"]


class Traffic(NamedTuple):
  """Bytes that each client receives and sends in one round, (clients,) int64 each."""

  down: Int[np.ndarray, " clients"]
  up: Int[np.ndarray, " clients"]


def default_client_map(platform: str | None = None) -> ClientMap:
  """Returns the client map for a backend (the default one if None): "scan" on CPU, else "vmap"."""
  return "scan" if (platform or jax.default_backend()) == "cpu" else "vmap"


def federated_round(
  algorithm: FederatedAlgorithm | Sequence[FederatedAlgorithm],
  server: ServerState,
  clients: Sequence[ClientState],
  data: Sequence[ClientData],
  weights: Sequence[Float[Array, " group"]],
  key: Key,
  *,
  taking_part: Bool[Array, " clients"] | None = None,
  cohort: Cohort | None = None,
  ids: Sequence[Int[Array, " group"]] | None = None,
  client_map: ClientMap | None = None,
  mesh: jax.sharding.Mesh | None = None,
  drop_nonfinite: bool = False,
) -> tuple[ServerState, tuple[ClientState, ...], Metrics]:
  """Runs one round: download, local work of every client, upload, server.

  Clients are numbered through the groups in order; that position is the `index` of
  `algorithm.download` and the row of the uploads.

  Args:
    algorithm: the method; or one for each group, which differ in `local` alone: groups of different
      architectures.
    server: server state.
    clients: per group, client states stacked on a leading axis (group size, ...).
    data: per group, client data stacked the same way.
    weights: per group, (group size,) example counts; 0 marks a padding client.
    key: the round's key. Client i works with `fold_in(key, ids[i])`.
    taking_part: (clients,) bool; the others get weight 0 and keep their state. None: all.
    cohort: runs only these clients, at the cost of these clients. The server then sees uploads and
      weights of the cohort alone (a server with per-client state cannot follow: GCFL needs
      `taking_part`), and the metrics are the cohort's.
    ids: per group, (group size,) integers: who a client is whatever row it sits in, so that
      bucketing and padding leave its random numbers alone. Default: its position.
    client_map: "vmap", "scan" or "shard"; None takes `default_client_map()`.
    mesh: for "shard": a mesh with an axis "clients". Groups are padded up to a multiple of it (pad
      beforehand with `padding.pad_clients` to save that copy).
    drop_nonfinite: give a client whose upload holds NaN or infinity weight 0, let it keep its
      earlier state, and report it in metrics["rejected"].

  Returns:
    The new server state, the new client states, and metrics as a dict of (clients,) arrays: those of
    `algorithm.local`, and "bytes_up" and "bytes_down", what a client sends and receives.

  >>> algorithm = jm.federated.fedavg(loss, optax.sgd(0.1), batches=jm.federated.shuffled(4))
  >>> data = jm.federated.bucket_clients(clients_data, max_buckets=1)
  >>> states = [jax.vmap(lambda _: jm.federated.init_client(linear))(jnp.arange(3))]
  >>> server = algorithm.init(linear, key)
  >>> server, states, metrics = jm.federated.federated_round(
  ...   algorithm, server, states, data.data, data.weights, key
  ... )
  >>> metrics["loss"].shape
  (3,)
  """
  sizes = _check_groups(clients, data, weights, client_map, mesh)
  if cohort is not None and taking_part is not None:
    raise ValueError("give either taking_part or cohort, not both")
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  index = [jnp.arange(o, o + n, dtype=jnp.int32) for o, n in zip(offsets, sizes, strict=False)]
  groups = list(zip(clients, data, weights, index, index if ids is None else ids, strict=True))
  if cohort is not None:
    taking_part = cohort.taking_part
    groups = [_take(g, rows) for g, rows in zip(groups, cohort.rows, strict=True)]

  if isinstance(algorithm, FederatedAlgorithm):
    algorithm = [algorithm] * len(groups)
  outcome = map_clients(
    [_one_client(each) for each in algorithm],
    server,
    [(i, _keys(key, ident), c, d) for c, d, _, i, ident in groups],
    client_map=client_map,
    mesh=mesh,
  )
  before, worked = [state for state, *_ in groups], [weight for _, _, weight, *_ in groups]
  server, states, metrics = _meet(
    algorithm[0], server, before, outcome, worked, taking_part, drop_nonfinite=drop_nonfinite
  )
  if cohort is not None:
    states = [
      jax.tree.map(lambda whole, part, rows=rows: whole.at[rows].set(part), whole, part)
      for whole, part, rows in zip(clients, states, cohort.rows, strict=True)
    ]
  return server, tuple(states), metrics


def round_programs(
  algorithms: Sequence[FederatedAlgorithm],
  *,
  jit: Callable,
  client_map: ClientMap | None = None,
  drop_nonfinite: bool = False,
) -> Callable:
  """Returns `federated_round` in several programs, to be called as it is: not inside jit or vmap.

  Args:
    algorithms: one for each group.
    jit: what the programs are compiled with, such as `jax.jit` with options.
    client_map: "vmap" or "scan"; None takes `default_client_map()`.
    drop_nonfinite: as of `federated_round`.

  Returns:
    (server, clients, data, weights, key, taking_part=None, ids=None) -> what `federated_round` returns.
  """
  work = map_programs(list(map(_one_client, algorithms)), jit=jit, client_map=client_map)
  meet = jit(functools.partial(_meet, algorithms[0], drop_nonfinite=drop_nonfinite))

  @functools.partial(jit, static_argnums=1)
  def begin(key, sizes, ids):
    cuts = np.cumsum(sizes)[:-1]
    index = jnp.arange(sum(sizes), dtype=jnp.int32)
    keys = _keys(key, index if ids is None else jnp.concatenate(ids))
    return jnp.split(index, cuts), jnp.split(keys, cuts)

  def run(server, clients, data, weights, key, taking_part=None, ids=None):
    sizes = _check_groups(clients, data, weights, client_map, None)
    groups = list(zip(*begin(key, tuple(sizes), ids), clients, data, strict=True))
    server, states, metrics = meet(
      server, list(clients), work(server, groups), list(weights), taking_part
    )
    return server, tuple(states), metrics

  return run


def map_clients(
  functions: Sequence[Callable],
  shared: PyTree,
  groups: Sequence[tuple[PyTree, ...]],
  *,
  client_map: ClientMap | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> list[PyTree]:
  """Applies a function to every client of every group.

  Args:
    functions: per group, (shared, *one client) -> a pytree of arrays.
    shared: what all clients get alike.
    groups: per group, pytrees stacked on the client axis.
    client_map: see the module's text; None takes `default_client_map()`.
    mesh: for "shard".

  Returns:
    Per group, the results stacked on the client axis.
  """
  how = client_map or default_client_map()
  outcome: dict[int, PyTree] = {}
  alone = [i for i, group in enumerate(groups) if _leading(group) == 1]
  if how == "shard" and len(alone) > 1:
    assert mesh is not None
    dealt = _deal([functions[i] for i in alone], shared, [groups[i] for i in alone], mesh)
    outcome = dict(zip(alone, dealt, strict=True))
  for i, (function, group) in enumerate(zip(functions, groups, strict=True)):
    if i not in outcome:
      outcome[i] = _client_map(function, how, mesh)(shared, *group)
  return [outcome[i] for i in range(len(groups))]


def map_programs(
  functions: Sequence[Callable],
  *,
  jit: Callable,
  client_map: ClientMap | None = None,
) -> Callable:
  """Returns (shared, groups) -> what `map_clients` returns, in a program for every group.

  Args:
    functions: per group, as of `map_clients`.
    jit: what the programs are compiled with.
    client_map: "vmap" or "scan"; None takes `default_client_map()`.
  """
  how = client_map or default_client_map()
  programs = [jit(_client_map(function, how, None)) for function in functions]

  def run(shared, groups):
    def work(g):
      # Waited for: as many at work as there are cores, or the memory of all were needed at once.
      return jax.block_until_ready(programs[g](shared, *groups[g]))

    # The heaviest first: it takes longest.
    order = sorted(range(len(groups)), key=lambda g: -_nbytes(groups[g]))
    with futures.ThreadPoolExecutor(min(len(groups), os.cpu_count() or 1)) as threads:
      begun = {g: threads.submit(work, g) for g in order}
    return [begun[g].result() for g in range(len(groups))]

  return run


def sample_participants(key: Key, num_clients: int, num: int) -> Bool[Array, " num_clients"]:
  """Draws `num` of `num_clients` clients uniformly without replacement; (num_clients,) bool.

  >>> int(jm.federated.sample_participants(key, 10, 3).sum())
  3
  """
  _check_sample(num_clients, num)
  return jnp.zeros(num_clients, bool).at[jax.random.permutation(key, num_clients)[:num]].set(True)


def sample_cohort(key: Key, sizes: Sequence[int], num: int) -> Cohort:
  """Draws `num` clients without replacement, spread evenly over the groups.

  Systematic sampling over the groups, uniform inside a group: each client is drawn with probability
  num / sum(sizes) exactly, and a group of n clients gives floor or ceil of its share
  num * n / sum(sizes), so shapes are fixed and a round costs num clients, plus at most one
  masked row per group.

  Args:
    key: random key.
    sizes: clients per group (padding clients not included).
    num: clients to draw.

  >>> cohort = jm.federated.sample_cohort(key, [6, 4], 5)
  >>> [len(rows) for rows in cohort.rows]
  [3, 2]
  """
  total = sum(sizes)
  _check_sample(total, num)
  offset_key, *keys = jax.random.split(key, len(sizes) + 1)
  # floor(cumulated share + u) with one u in [0, 1), in integer units of 1 / total.
  whole, rest = np.divmod(num * np.cumsum([0, *sizes]), total)
  carried = rest.astype(np.int32) + jax.random.randint(offset_key, (), 0, total) >= total
  drawn = jnp.diff(whole.astype(np.int32) + carried)
  rows, taking_part = [], []
  for group, (n, group_key) in enumerate(zip(sizes, keys, strict=True)):
    capacity = -(-num * n // total)
    rows.append(jax.random.permutation(group_key, n)[:capacity].astype(jnp.int32))
    taking_part.append(jnp.arange(capacity) < drawn[group])
  return Cohort(tuple(rows), jnp.concatenate(taking_part))


def weighted_mean(uploads: Upload, weights: Float[Array, " clients"]) -> PyTree:
  """Averages stacked uploads, sum_i w_i u_i / sum_i w_i.

  Args:
    uploads: pytree of (clients, ...) floating-point arrays.
    weights: (clients,), not negative. If all are zero the result is zero.

  Raises:
    ValueError: the number of clients differs.

  >>> jm.federated.weighted_mean({"w": jnp.array([1.0, 4.0])}, jnp.array([2.0, 1.0]))
  {'w': Array(2., dtype=float32)}
  """
  shapes.check(weights=(weights, "clients"))
  shapes.check_leading(len(weights), uploads=uploads)
  share = weights / jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)

  def mean(u):
    # bfloat16 uploads are summed in float32.
    dtype = jnp.promote_types(u.dtype, share.dtype)
    return jnp.tensordot(share.astype(dtype), u.astype(dtype), 1).astype(u.dtype)

  return jax.tree.map(mean, uploads)


def finite_rows(tree: PyTree, size: int) -> Bool[Array, " size"]:
  """Marks the clients whose rows of stacked arrays hold no NaN and no infinity.

  Args:
    tree: pytree of (size, ...) arrays.
    size: number of clients.

  Raises:
    ValueError: an array has another number of rows.
  """
  shapes.check_leading(size, tree=tree)
  finite = jnp.ones(size, bool)
  for x in jax.tree.leaves(tree):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      finite &= jnp.isfinite(x).reshape(size, -1).all(1)
  return finite


def client_params(
  algorithm: FederatedAlgorithm,
  server: ServerState,
  clients: Sequence[ClientState],
  sizes: Sequence[int],
) -> tuple[PyTree, ...]:
  """Collects the parameters that every client predicts with, per group stacked on the client axis.

  Args:
    algorithm: the method.
    server: server state.
    clients: per group, stacked client states.
    sizes: clients per group (a client state may hold no array that tells).

  >>> algorithm = jm.federated.fedavg(loss, optax.sgd(0.1))
  >>> states = [jax.vmap(lambda _: jm.federated.init_client(linear))(jnp.arange(3))]
  >>> (params,) = jm.federated.client_params(algorithm, algorithm.init(linear, key), states, [3])
  >>> params["w"].shape
  (3, 3)
  """

  def predict_with(index, client):
    return algorithm.params(algorithm.download(server, index), client)

  starts = np.cumsum([0, *sizes[:-1]])
  return tuple(
    jax.vmap(predict_with)(jnp.arange(start, start + size, dtype=jnp.int32), group)
    for start, size, group in zip(starts, sizes, clients, strict=True)
  )


def traffic(
  algorithm: FederatedAlgorithm,
  server: ServerState,
  clients: Sequence[ClientState],
  data: Sequence[ClientData],
) -> Traffic:
  """Counts the bytes of message and upload per client and round, without running anything.

  >>> algorithm = jm.federated.fedavg(loss, optax.sgd(0.1), batches=jm.federated.shuffled(4))
  >>> data = jm.federated.bucket_clients(clients_data, max_buckets=1)
  >>> states = [jax.vmap(lambda _: jm.federated.init_client(linear))(jnp.arange(3))]
  >>> jm.federated.traffic(algorithm, algorithm.init(linear, key), states, data.data)
  Traffic(down=array([16, 16, 16]), up=array([16, 16, 16]))
  """
  down, up = [], []
  for client, examples in zip(clients, data, strict=True):
    size = _leading((client, examples))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (client, examples))
    message = jax.eval_shape(algorithm.download, server, jnp.int32(0))
    _, upload, _ = jax.eval_shape(algorithm.local, message, *one, jax.random.key(0))
    down += [_nbytes(message)] * size
    up += [_nbytes(upload)] * size
  return Traffic(np.array(down, np.int64), np.array(up, np.int64))


def _traffic_metrics(algorithm, server, uploads, size: int) -> Metrics:
  message = jax.eval_shape(algorithm.download, server, jax.ShapeDtypeStruct((), jnp.int32))
  sent = {"bytes_up": _nbytes(uploads) // size, "bytes_down": _nbytes(message)}
  return {name: jnp.full(size, count, jnp.float32) for name, count in sent.items()}


def _keys(key: jax.Array, ids: jax.Array) -> jax.Array:
  """All clients' keys at once: in a sequential map one `fold_in` costs as much as a small layer."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)


def _meet(
  algorithm: FederatedAlgorithm,
  server: ServerState,
  clients: Sequence[ClientState],
  outcome: Sequence[tuple[ClientState, Upload, Metrics]],
  weights: Sequence[jax.Array],
  taking_part: jax.Array | None,
  *,
  drop_nonfinite: bool,
) -> tuple[ServerState, list[ClientState], Metrics]:
  """The round after the clients' work: whose counts, what the server makes of it, the metrics."""
  states = [state for state, _, _ in outcome]
  uploads = _concatenate([upload for _, upload, _ in outcome])
  metrics = _concatenate([metric for _, _, metric in outcome])
  counts = jnp.concatenate(weights)
  metrics |= _traffic_metrics(algorithm, server, uploads, counts.shape[0])

  counted = taking_part
  if drop_nonfinite:
    finite = finite_rows(uploads, counts.shape[0])
    counted = finite if taking_part is None else finite & taking_part
    metrics["rejected"] = ~finite & (counts > 0) & (True if taking_part is None else taking_part)
  if counted is not None:
    counts = jnp.where(counted, counts, 0)
    # A weight of zero does not silence NaN, so what does not count is not passed on either.
    uploads = jax.tree.map(lambda x: jnp.where(_column(counted, x), x, 0), uploads)
    cuts = np.cumsum([len(weight) for weight in weights])[:-1]
    states = [
      jax.tree.map(lambda new, old, keep=keep: jnp.where(_column(keep, new), new, old), state, old)
      for state, old, keep in zip(states, clients, jnp.split(counted, cuts), strict=True)
    ]
  return algorithm.server(server, uploads, counts), states, metrics


def _one_client(algorithm: FederatedAlgorithm) -> Callable:
  def one_client(server, index, key, client, data):
    return algorithm.local(algorithm.download(server, index), client, data, key)

  return one_client


def _client_map(one_client: Callable, how: ClientMap, mesh: jax.sharding.Mesh | None) -> Callable:
  """Lifts (server, *one client) to (server, *stacked clients)."""
  if how == "vmap":
    return lambda server, *stacked: jax.vmap(functools.partial(one_client, server))(*stacked)
  if how == "scan":
    return lambda server, *stacked: jax.lax.map(lambda args: one_client(server, *args), stacked)
  assert mesh is not None
  spread = jax.P(CLIENTS_AXIS)

  def padded(server, *stacked):
    size = _leading(stacked)
    extra = -size % mesh.shape[CLIENTS_AXIS]
    stacked = repeat_first(stacked, extra)
    one_device = _client_map(one_client, default_client_map(mesh.devices.flat[0].platform), None)
    in_specs = (jax.P(), *[spread] * len(stacked))
    outcome = _on_devices(one_device, mesh, in_specs)(server, *stacked)
    return jax.tree.map(lambda x: x[:size], outcome) if extra else outcome

  return padded


def _deal(
  functions: Sequence[Callable],
  server: ServerState,
  groups: Sequence[tuple],
  mesh: jax.sharding.Mesh,
) -> list[PyTree]:
  """Runs groups of one client, each on one device: on every device a program of its own."""
  load = [0] * mesh.shape[CLIENTS_AXIS]
  owner = [0] * len(groups)
  for group in sorted(range(len(groups)), key=lambda g: -_nbytes(groups[g])):
    owner[group] = load.index(min(load))
    load[owner[group]] += _nbytes(groups[group])

  def program(device: int, traced: list[tuple[Callable, PyTree]]) -> Callable:
    def run(server, groups):
      return [
        work(server, *group)
        if owner[g] == device
        else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form)
        for g, ((work, form), group) in enumerate(zip(traced, groups, strict=True))
      ]

    return run

  def one_device(server, groups):
    works = [_client_map(function, "scan", None) for function in functions]
    traced = [_traced(work, server, *g) for work, g in zip(works, groups, strict=True)]
    programs = [program(device, traced) for device in range(len(load))]
    return jax.lax.switch(jax.lax.axis_index(CLIENTS_AXIS), programs, server, groups)

  outcome = _on_devices(one_device, mesh, jax.P())(server, groups)
  # Every device has written rows for all groups; those of its owner are a group's.
  return [
    jax.tree.map(lambda x, row=row: x[row : row + 1], rows)
    for row, rows in zip(owner, outcome, strict=True)
  ]


def _traced(function: Callable, *args: PyTree) -> tuple[Callable, PyTree]:
  """Traces a function once, for its work on such arguments and for the shapes of its results."""
  closed, forms = jax.make_jaxpr(function, return_shape=True)(*args)
  work, structure = jax.extend.core.jaxpr_as_fun(closed), jax.tree.structure(forms)
  return lambda *args: jax.tree.unflatten(structure, work(*jax.tree.leaves(args))), forms


def _on_devices(function: Callable, mesh: jax.sharding.Mesh, in_specs) -> Callable:
  """`function` on every device of the clients' axis, its results stacked along it."""
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=jax.P(CLIENTS_AXIS),
    # Replicated parameters meet local data here: with the check on, differentiating inside `local`
    # would sum the gradients of the clients of different devices.
    check_vma=False,
  )


def _check_groups(clients, data, weights, client_map, mesh) -> list[int]:
  if not len(clients) == len(data) == len(weights) > 0:
    raise ValueError(
      "clients, data and weights need the same number of groups, at least one; got "
      f"{len(clients)}, {len(data)} and {len(weights)}"
    )
  if client_map is not None and client_map not in CLIENT_MAPS:
    raise ValueError(f"client_map: {client_map!r} is none of {', '.join(CLIENT_MAPS)}")
  if client_map == "shard" and (mesh is None or CLIENTS_AXIS not in mesh.shape):
    raise ValueError(f"client_map 'shard' needs a mesh with an axis {CLIENTS_AXIS!r}")
  sizes = []
  for group, (client, examples, weight) in enumerate(zip(clients, data, weights, strict=True)):
    size = weight.shape[0]
    for x in jax.tree.leaves((client, examples)):
      if x.ndim == 0 or x.shape[0] != size:
        raise ValueError(f"group {group}: {size} weights, but an array of shape {x.shape}")
    sizes.append(size)
  return sizes


def _check_sample(num_clients: int, num: int) -> None:
  if not 1 <= num <= num_clients:
    raise ValueError(f"cannot draw {num} of {num_clients} clients")


def _take(tree: PyTree, rows: jax.Array) -> PyTree:
  return jax.tree.map(lambda x: x[rows], tree)


def _concatenate(trees: Sequence[PyTree]) -> PyTree:
  return jax.tree.map(lambda *xs: jnp.concatenate(xs) if len(xs) > 1 else xs[0], *trees)


def _column(rows: jax.Array, like: jax.Array) -> jax.Array:
  return rows.reshape(rows.shape + (1,) * (like.ndim - 1))


def _leading(tree: PyTree) -> int:
  return jax.tree.leaves(tree)[0].shape[0]


def _nbytes(tree: PyTree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
