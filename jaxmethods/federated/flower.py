"""A federated algorithm deployed over a network with Flower (extra `flower`).

`engine.federated_round` maps the clients inside one program. Here every client is a machine of its own,
Flower carries the messages, and the five functions of the algorithm are the same: with the same key and
clients the numbers are those of the simulation. A client sends its upload, its metrics and, once, its
number and how many examples it has; what it keeps from round to round lies in Flower's context on its
own machine.

An app is two lines in a module that both sides have:

  server = server_app(algorithm, params, num_clients=8, num_rounds=50, key=jax.random.key(1))
  client = client_app(algorithm, params, load)

Client i is the node that was started with `--node-config partition-id=i`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import (
  Array,
  ArrayRecord,
  ConfigRecord,
  Context,
  Message,
  MessageType,
  MetricRecord,
  RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from jaxmethods.errors import InputError
from jaxmethods.federated.algorithm import (
  ClientData,
  ClientState,
  FederatedAlgorithm,
  Params,
  ServerState,
)
from jaxmethods.federated.engine import finite_rows, sample_participants
from jaxmethods.trees import Key, PyTree

# (round from 0, server state, metrics as (clients,) arrays) -> None
Report = Callable[[int, ServerState, dict[str, np.ndarray]], None]

_POLL_SECONDS = 0.5


class Site(NamedTuple):
  """What a client has on its own machine.

  Attributes:
    client: its state before the first round, as `federated_round` takes it for one client.
    data: its examples, padded and masked in the form that the algorithm's batching reads.
    weight: example count.
  """

  client: ClientState
  data: ClientData
  weight: float


class _Node(NamedTuple):
  id: int
  weight: float


def client_app(
  algorithm: FederatedAlgorithm, params: Params, load: Callable[[int], Site]
) -> ClientApp:
  """The clients' side.

  Args:
    algorithm: the method.
    params: parameters to start from; only their shapes are read.
    load: number of a client -> what it has. Called on that client's machine alone, once per process.
  """
  app = ClientApp()
  site = functools.cache(load)
  work = jax.jit(algorithm.local)

  def first_order():
    key = jax.random.key(0)
    return _order(algorithm, algorithm.init(params, key), 0, key)

  order_like = jax.eval_shape(first_order)

  @app.query()
  def introduce(message: Message, context: Context) -> Message:
    index = _partition(context)
    answer = ConfigRecord({"index": index, "weight": float(site(index).weight)})
    return Message(RecordDict({"client": answer}), reply_to=message)

  @app.train()
  def train(message: Message, context: Context) -> Message:
    here = site(_partition(context))
    received, key = unpack(message.content["order"], order_like)
    client = here.client
    if "client" in context.state:
      client = unpack(context.state["client"], client)
    new, upload, metrics = work(received, client, here.data, key)
    if _is_finite(upload):  # else the server will not count it, and this round leaves no trace here
      context.state["client"] = pack(new)
    answer = {
      "upload": pack(upload),
      "metrics": MetricRecord({name: float(value) for name, value in metrics.items()}),
    }
    return Message(RecordDict(answer), reply_to=message)

  return app


def server_app(
  algorithm: FederatedAlgorithm,
  params: Params,
  *,
  num_clients: int,
  num_rounds: int,
  key: Key,
  upload: PyTree = None,
  taking_part: int | None = None,
  timeout: float | None = None,
  report: Report | None = None,
) -> ServerApp:
  """The server's side: waits for all clients, then runs the rounds.

  A client that is away, answers with an error or too late, or uploads NaN or infinity counts nothing
  in that round; whoever comes back joins at the next one.

  Args:
    algorithm: the method.
    params: parameters to start from.
    num_clients: clients there are, numbered from 0.
    num_rounds: communication rounds.
    key: of the run. `algorithm.init` gets it; round r is `federated_round` with `fold_in(key, r)`.
    upload: arrays, or their shapes, in the form of one client's upload. None: that of the message, as
      in FedAvg and its relatives.
    taking_part: clients drawn for every round; None: all.
    timeout: seconds that a round may take; None: no limit.
    report: called after every round. Metrics are those of `algorithm.local`, NaN for clients without
      an answer, and "counted", whether a client's upload was.

  Raises:
    InputError: while the app runs: before the first round a client that cannot say what it has, or
      whose number is taken or not below `num_clients`; in any round an upload of another form.
  """
  app = ServerApp()
  step = jax.jit(algorithm.server)

  @app.main()
  def main(grid: Grid, context: Context) -> None:
    del context
    server = algorithm.init(params, key)
    like = upload
    if upload is None:
      like = jax.eval_shape(algorithm.download, server, jnp.int32(0))
    nodes: dict[int, _Node] = {}
    while len(nodes) < num_clients:
      time.sleep(_POLL_SECONDS)
      if refused := _meet(grid, nodes, num_clients):
        raise InputError(refused[0])

    for r in range(num_rounds):
      _meet(grid, nodes, num_clients)
      round_key = jax.random.fold_in(key, r)
      chosen = sorted(nodes)
      if taking_part is not None:
        draw = sample_participants(
          jax.random.fold_in(round_key, num_clients), num_clients, taking_part
        )
        chosen = [i for i in chosen if draw[i]]
      orders = {}
      for i in chosen:
        order = _order(algorithm, server, i, jax.random.fold_in(round_key, i))
        orders[nodes[i].id] = RecordDict({"order": pack(order)})
      answers = _ask(grid, MessageType.TRAIN, orders, group=str(r + 1), timeout=timeout)
      uploads, weights, metrics = _collect(answers, nodes, num_clients, like)
      server = step(server, uploads, weights)
      if report:
        report(r, server, metrics)

  return app


def pack(tree: PyTree) -> ArrayRecord:
  """A pytree of arrays as a record of Flower, by path."""
  named, _ = jax.tree_util.tree_flatten_with_path(tree)
  return ArrayRecord({jax.tree_util.keystr(path): Array(_to_numpy(x)) for path, x in named})


def unpack(record: ArrayRecord, like: PyTree) -> PyTree:
  """The pytree that was packed.

  Args:
    record: from `pack`.
    like: arrays, or their shapes, in the form that is expected.

  Raises:
    InputError: naming an array that is missing, left over, or of another shape or type.
  """
  named, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: like))
  forms = {jax.tree_util.keystr(path): form for path, form in named}
  if odd := set(record) ^ set(forms):
    what = "is missing" if min(odd) in forms else "was not expected"
    raise InputError(f"message: array '{min(odd)}' {what}; do both sides run the same algorithm?")
  leaves = []
  for name, form in forms.items():
    leaf = _from_numpy(record[name].numpy(), form)
    if (leaf.shape, leaf.dtype) != (form.shape, form.dtype):
      raise InputError(
        f"message: array '{name}' is {leaf.dtype}{list(leaf.shape)}, "
        f"expected {form.dtype}{list(form.shape)}"
      )
    leaves.append(leaf)
  return jax.tree.unflatten(structure, leaves)


def _order(algorithm: FederatedAlgorithm, server: ServerState, index: int, key: Key) -> PyTree:
  """What a client is sent in a round: its message, and the key to work with."""
  return algorithm.download(server, jnp.int32(index)), key


def _meet(grid: Grid, nodes: dict[int, _Node], num_clients: int) -> list[str]:
  """Brings `nodes` (by client) up to date with who is there; says who was refused, and why."""
  online = set(grid.get_node_ids())
  for index in [i for i, node in nodes.items() if node.id not in online]:
    del nodes[index]
  unknown = online - {node.id for node in nodes.values()}
  refused: list[str] = []
  questions = {node_id: RecordDict() for node_id in unknown}
  for node_id, answer in _ask(grid, MessageType.QUERY, questions, refused=refused).items():
    index, weight = answer["client"]["index"], answer["client"]["weight"]
    if not 0 <= index < num_clients:
      refused.append(f"partition-id={index}: there are {num_clients} clients, numbered from 0")
    elif index in nodes:
      refused.append(f"partition-id={index}: two nodes say they are this client")
    else:
      nodes[index] = _Node(node_id, weight)
  return refused


def _ask(
  grid: Grid,
  kind: str,
  contents: dict[int, RecordDict],
  *,
  group: str = "0",
  timeout: float | None = None,
  refused: list[str] | None = None,
) -> dict[int, RecordDict]:
  """Answers by node id; an error counts as none, and its reason joins `refused`."""
  messages = [
    Message(content, dst_node_id=node_id, message_type=kind, group_id=group)
    for node_id, content in contents.items()
  ]
  answers = {}
  for reply in grid.send_and_receive(messages, timeout=timeout):
    if not reply.has_error():
      answers[reply.metadata.src_node_id] = reply.content
    elif refused is not None:
      refused.append(f"node {reply.metadata.src_node_id} cannot take part: {reply.error.reason}")
  return answers


def _collect(
  answers: dict[int, RecordDict], nodes: dict[int, _Node], num_clients: int, like: PyTree
):
  """Uploads stacked in client order, their weights, and the metrics."""
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  uploads, weights = [nothing] * num_clients, np.zeros(num_clients, np.float32)
  measured: list[dict[str, float]] = [{} for _ in range(num_clients)]
  for index, node in nodes.items():
    if node.id not in answers:
      continue
    measured[index] = dict(answers[node.id]["metrics"])
    upload = unpack(answers[node.id]["upload"], like)
    if _is_finite(upload):
      uploads[index], weights[index] = upload, node.weight
  names = {name for metrics in measured for name in metrics}
  metrics = {name: np.array([m.get(name, np.nan) for m in measured]) for name in sorted(names)}
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *uploads)
  return stacked, jnp.asarray(weights), metrics | {"counted": weights > 0}


def _is_finite(upload: PyTree) -> bool:
  return bool(finite_rows(jax.tree.map(lambda x: x[None], upload), 1)[0])


def _partition(context: Context) -> int:
  try:
    return int(context.node_config["partition-id"])
  except KeyError:
    raise InputError(
      "partition-id: not set; start every node with --node-config partition-id=NUMBER"
    ) from None


def _to_numpy(x: jax.Array) -> np.ndarray:
  """An array as numpy knows it: keys as their data, bfloat16 and its like as unsigned integers."""
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  plain = np.asarray(jax.random.key_data(x) if is_key else x)
  return plain.view(f"u{plain.dtype.itemsize}") if plain.dtype.kind == "V" else plain


def _from_numpy(x: np.ndarray, form: jax.ShapeDtypeStruct) -> jax.Array:
  """`_to_numpy` undone, if `x` can have been of this form."""
  if jnp.issubdtype(form.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(jnp.asarray(x))
  if form.dtype.kind == "V" and x.dtype == f"u{form.dtype.itemsize}":
    x = x.view(form.dtype)
  return jnp.asarray(x)
