"""Clients that share no architecture learn from each other's answers on public examples.

One public batch is two rounds of the engine. In the first, every client answers: its upload is its
predictions, nothing else. The server makes a teacher for each client out of them. In the second, every
client takes one step towards its teacher. All answers precede all steps, so the order of clients does
not matter. How teachers come about is the method's: FedMD, FedDF, RAHFL and its relatives differ in that
function alone.

Clients are kept in groups of one architecture (`engine.federated_round`); a group has a `Network`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxmethods.federated import engine
from jaxmethods.federated.algorithm import FederatedAlgorithm, Metrics, Params
from jaxmethods.federated.algorithms import ModelState
from jaxmethods.stats import shapes
from jaxmethods.trees import Key, PyTree

# (params, model state, images (B, ...), train) -> features (B, d), logits (B, C), new model state
Network: TypeAlias = Callable[
  [Params, ModelState, Float[Array, "B ..."], bool],
  tuple[Float[Array, "B d"], Float[Array, "B C"], ModelState],
]


class Peer(NamedTuple):
  """What a client keeps, all of it: nothing of this is ever uploaded.

  Attributes:
    params: of its network.
    model_state: its batch statistics.
    opt_state: of its optimiser.
  """

  params: Params
  model_state: ModelState
  opt_state: PyTree


class Teachers(NamedTuple):
  """What the server makes of the answers to one public batch.

  Attributes:
    probabilities: (K, B, C), targets of every client.
    present: (K,) bool, clients that have a teacher; the others are left exactly as they are.
  """

  probabilities: Float[Array, "K B C"]
  present: Bool[Array, " K"]


class Board(NamedTuple):
  """What the server holds: teachers of the last public batch, and what clients said of themselves."""

  teachers: Teachers
  standing: PyTree


class Options(TypedDict, total=False):
  """Options of `engine.federated_round` that an exchange passes on."""

  client_map: engine.ClientMap | None
  mesh: Mesh | None


# (standing, log-probabilities (K, views, B, C), present (K,) bool) -> teachers of all K clients
Teach: TypeAlias = Callable[[PyTree, Float[Array, "K V B C"], Bool[Array, " K"]], Teachers]


def exchange(
  networks: Sequence[Network],
  teach: Teach,
  optimizer: optax.GradientTransformation,
  standing: PyTree,
  clients: Sequence[Peer],
  weights: Sequence[Float[Array, " clients"]],
  batches: Float[Array, "steps V B ..."],
  key: Key,
  *,
  keep_optimizer: bool = False,
  **options: Unpack[Options],
) -> tuple[tuple[Peer, ...], Metrics]:
  """All clients answer and learn, public batch after public batch.

  Args:
    networks: one for each group.
    teach: the method.
    optimizer: of the clients.
    standing: what the server knows of the clients, for `teach`.
    clients: per group, stacked.
    weights: per group, (group size,); 0 for padding clients.
    batches: images, (steps, views, B, ...); clients answer every view and learn on the first.
    key: of the rounds.
    keep_optimizer: keep the optimiser's state from step to step; False starts it anew at each.
    **options: of `engine.federated_round`: client_map, mesh.

  Returns:
    The clients, and per client "distillation" (mean loss over the steps), "rejected" (whether an answer
    was not finite), "bytes_up", "bytes_down" of the whole exchange, (K,) each.

  Raises:
    ValueError: the groups do not fit each other, or `batches` has no axes of steps, views and images.
  """
  if not len(networks) == len(clients) == len(weights):
    raise ValueError(
      "networks, clients and weights need the same number of groups, got "
      f"{len(networks)}, {len(clients)} and {len(weights)}"
    )
  if jnp.ndim(batches) < 3:
    raise ValueError(f"batches: expected shape (steps, V, B, ...), got {jnp.shape(batches)}")
  count = sum(w.shape[0] for w in weights)
  nothing = [()] * len(clients)

  def run(algorithms, board, clients, key, **how):
    return engine.federated_round(
      algorithms, board, clients, nothing, weights, key, **options, **how
    )

  def step(clients, xs):
    views, key = xs
    answer_key, learn_key = jax.random.split(key)
    answers = [_answering(network, views, teach) for network in networks]
    board = Board(Teachers(jnp.zeros((count, 0, 0)), jnp.zeros(count, bool)), standing)
    board, clients, asked = run(answers, board, clients, answer_key, drop_nonfinite=True)
    lessons = [_learning(network, views[0], optimizer, keep_optimizer) for network in networks]
    present = board.teachers.present & ~asked["rejected"]
    _, clients, taught = run(lessons, board, clients, learn_key, taking_part=present)
    learned = {
      "distillation": jnp.where(present, taught["distillation"], 0),
      "rejected": asked["rejected"],
      "bytes_up": asked["bytes_up"],
      "bytes_down": taught["bytes_down"],
    }
    return clients, learned

  keys = jax.random.split(key, batches.shape[0])
  taught, metrics = jax.lax.scan(step, tuple(clients), (batches, keys))
  total = {name: value.sum(0) for name, value in metrics.items() if name.startswith("bytes")}
  return taught, total | {
    "distillation": metrics["distillation"].mean(0),
    "rejected": metrics["rejected"].any(0),
  }


def _answering(network: Network, views: Array, teach: Teach) -> FederatedAlgorithm:
  """A client's answer to all views (V, B, ...); its running statistics stay as they are."""

  def local(message, client: Peer, data, key):
    del message, data, key
    x = views.reshape(-1, *views.shape[2:])
    _, logits, _ = network(client.params, client.model_state, x, True)
    answer = jax.nn.log_softmax(logits).reshape(*views.shape[:2], -1)
    return client, answer, {}

  def server(board: Board, answers: Array, weights: Array) -> Board:
    return board._replace(teachers=teach(board.standing, answers, weights > 0))

  return FederatedAlgorithm(_nothing, lambda board, index: (), local, server, _params)


def _learning(
  network: Network, x: Array, optimizer: optax.GradientTransformation, keep_optimizer: bool
) -> FederatedAlgorithm:
  """One step towards the teacher on (B, ...); nothing is uploaded."""

  def local(teacher: Array, client: Peer, data, key):
    del data, key

    def loss(params):
      _, logits, model_state = network(params, client.model_state, x, True)
      return divergence(teacher, logits), model_state

    (value, model_state), gradient = jax.value_and_grad(loss, has_aux=True)(client.params)
    start = client.opt_state if keep_optimizer else optimizer.init(client.params)
    updates, opt_state = optimizer.update(gradient, start, client.params)
    params = optax.apply_updates(client.params, updates)
    kept = opt_state if keep_optimizer else client.opt_state
    return Peer(params, model_state, kept), (), {"distillation": value}

  download = lambda board, index: board.teachers.probabilities[index]
  return FederatedAlgorithm(
    _nothing, download, local, lambda board, uploads, weights: board, _params
  )


def divergence(teacher: Float[Array, "B C"], logits: Float[Array, "B C"]) -> Float[Array, ""]:
  """Computes KL(teacher || softmax(logits)), averaged over the batch.

  Learning from a mixture sum_i w_i p_i of others has the gradient of sum_i w_i KL(p_i || p): the two
  differ by a constant, so one teacher of (B, C) is all that a client has to receive.

  Args:
    teacher: (B, C), probabilities.
    logits: (B, C).

  Raises:
    ValueError: the shapes differ.
  """
  shapes.check(teacher=(teacher, "B C"), logits=(logits, "B C"))
  log_teacher = jnp.log(jnp.maximum(teacher, jnp.finfo(teacher.dtype).tiny))
  return (teacher * (log_teacher - jax.nn.log_softmax(logits))).sum(-1).mean()


def _nothing(params: Params, key: Key) -> tuple[()]:
  del params, key
  return ()


def _params(message: PyTree, client: Peer) -> Params:
  del message
  return client.params
