"""Federated algorithms that correct the drift of local training by a term per client.

scaffold  Karimireddy et al. 2020. SCAFFOLD: stochastic controlled averaging for federated learning.
feddyn    Acar et al. 2021. Federated learning based on dynamic regularization.

Both add a linear term to the local loss, so every local step stays plain `local_sgd`. Where only some
clients take part in a round, what the server keeps of all of them moves by their share: pass
`population`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmethods import trees
from jaxmethods.federated.algorithm import FederatedAlgorithm, Params
from jaxmethods.federated.algorithms import Loss, ModelState, local_sgd, proximal_term
from jaxmethods.federated.batching import Batching, prebatched
from jaxmethods.federated.engine import weighted_mean
from jaxmethods.trees import PyTree


class Client(NamedTuple):
  """What a client keeps: its correction (like the parameters) and its non-trained collections."""

  correction: Params
  model_state: ModelState


class Server(NamedTuple):
  """Global parameters, and the correction that belongs to them, () where it is not sent."""

  params: Params
  correction: PyTree


class ScaffoldUpload(NamedTuple):
  """All that leaves a client in SCAFFOLD."""

  params: Params
  change: Params


def init_client(params: Params, model_state: ModelState = ()) -> Client:
  """Returns a client before its first round."""
  return Client(jax.tree.map(jnp.zeros_like, params), model_state)


def scaffold(
  loss: Loss,
  learning_rate: float,
  *,
  server_rate: float = 1.0,
  population: int | None = None,
  local_epochs: int = 1,
  batches: Batching = prebatched,
) -> FederatedAlgorithm:
  """SCAFFOLD with its second rule for the controls; local steps are SGD.

  w <- w - lr (g - c_k + c); after S steps c_k' = c_k - c + (w_g - w_k) / (S lr); then
  w_g += server_rate * mean(w_k - w_g) and c += |S| / N mean(c_k' - c_k) over the clients S of the round,
  without weights, so that c stays the mean of all N controls. With adaptive local steps the controls
  would lose their meaning, so the optimiser is not an option.

  Args:
    loss: as in `algorithms.fedavg`.
    learning_rate: lr of the local steps.
    server_rate: of the server's step; 1 puts the mean in place.
    population: N, all clients that there are; None: all take part in every round.
    local_epochs: passes over a client's batches per round.
    batches: as in `algorithms.fedavg`.

  >>> jm.federated.scaffold(loss, 0.1, batches=jm.federated.shuffled(4)).init(linear, key)._fields
  ('params', 'correction')
  """

  def local(message: Server, client: Client, data, key):
    tilt = jax.tree.map(jnp.subtract, message.correction, client.correction)

    def objective(params, model_state, batch, key):
      value, aux = loss(params, model_state, batch, key)
      return value + optax.tree.vdot(tilt, params), aux

    optimizer = optax.sgd(learning_rate)
    start = (message.params, client.model_state, optimizer.init(message.params))
    (params, model_state, _), metrics = local_sgd(
      objective, optimizer, start, data, key, epochs=local_epochs, batches=batches
    )
    steps = local_epochs * batches(data, key).real.sum()
    control = scaffold_control(
      client.correction, message.correction, message.params, params, steps, learning_rate
    )
    change = jax.tree.map(jnp.subtract, control, client.correction)
    return Client(control, model_state), ScaffoldUpload(params, change), metrics

  def server(state: Server, uploads: ScaffoldUpload, weights):
    part = (weights > 0).astype(weights.dtype)
    mean = weighted_mean(uploads, part)
    params = jax.tree.map(lambda w, m: w + server_rate * (m - w), state.params, mean.params)
    share = _share(part, population)
    control = jax.tree.map(lambda c, m: c + share * m, state.correction, mean.change)
    return _if_any(part, Server(params, control), state)

  return FederatedAlgorithm(_init, _download, local, server, _params)


def scaffold_control(
  control: Params,
  global_control: Params,
  start: Params,
  end: Params,
  steps: jax.Array | int,
  learning_rate: jax.Array | float,
) -> Params:
  """Computes the new control of a client, c_k - c + (w_g - w_k) / (S lr).

  Args:
    control: c_k, of the client.
    global_control: c, of the server; the same tree.
    start: w_g, the parameters received.
    end: w_k, the parameters after the local steps.
    steps: S, local steps done; 0 counts as 1.
    learning_rate: lr of the local steps.

  Raises:
    ValueError: the trees differ.
  """
  trees.check_alike(control=control, global_control=global_control, start=start, end=end)
  scale = 1 / (jnp.maximum(steps, 1) * learning_rate)
  return jax.tree.map(
    lambda c_k, c, w_g, w_k: c_k - c + scale * (w_g - w_k), control, global_control, start, end
  )


def feddyn(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  alpha: float = 0.5,
  *,
  population: int | None = None,
  local_epochs: int = 1,
  batches: Batching = prebatched,
) -> FederatedAlgorithm:
  """FedDyn: local loss - <g_k, w> + (alpha / 2) ||w - w_g||^2.

  g_k <- g_k - alpha (w_k - w_g); h <- h - alpha |S| / N mean(w_k - w_g); w_g = mean(w_k) - h / alpha.
  The means are over the clients S of the round, without weights.

  Args:
    loss: as in `algorithms.fedavg`.
    optimizer: of the clients, started anew every round.
    alpha: strength of the regulariser.
    population: N, all clients that there are; None: all take part in every round.
    local_epochs: passes over a client's batches per round.
    batches: as in `algorithms.fedavg`.

  >>> jm.federated.feddyn(loss, optax.sgd(0.1)).init(linear, key)._fields
  ('params', 'correction')
  """

  def local(message: Server, client: Client, data, key):
    def objective(params, model_state, batch, key):
      value, aux = loss(params, model_state, batch, key)
      value += proximal_term(params, message.params, alpha)
      return value - optax.tree.vdot(client.correction, params), aux

    start = (message.params, client.model_state, optimizer.init(message.params))
    (params, model_state, _), metrics = local_sgd(
      objective, optimizer, start, data, key, epochs=local_epochs, batches=batches
    )
    gradient = jax.tree.map(
      lambda g, w, w_g: g - alpha * (w - w_g), client.correction, params, message.params
    )
    return Client(gradient, model_state), params, metrics

  def server(state: Server, uploads: Params, weights):
    part = (weights > 0).astype(weights.dtype)
    mean = weighted_mean(uploads, part)
    step = alpha * _share(part, population)
    h = jax.tree.map(lambda h, m, w: h - step * (m - w), state.correction, mean, state.params)
    params = jax.tree.map(lambda m, h: m - h / alpha, mean, h)
    return _if_any(part, Server(params, h), state)

  return FederatedAlgorithm(_init, lambda s, i: Server(s.params, ()), local, server, _params)


def _init(params: Params, key: jax.Array) -> Server:
  del key
  return Server(params, jax.tree.map(jnp.zeros_like, params))


def _download(server: Server, index: jax.Array) -> Server:
  del index
  return server


def _params(message: Server, client: Client) -> Params:
  del client
  return message.params


def _share(part: jax.Array, population: int | None) -> jax.Array | float:
  """Returns which share of all clients takes part, |S| / N."""
  return part.sum() / population if population else 1.0


def _if_any(part: jax.Array, new: Server, old: Server) -> Server:
  """A round in which nobody took part leaves the server as it was."""
  return jax.tree.map(lambda a, b: jnp.where(part.any(), a, b), new, old)
