"""The floor of every table: ridge regression on raw pixels, each client alone, no network."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmethods.experiments.rahfl import rounds
from jaxmethods.experiments.rahfl.clients import Clients
from jaxmethods.experiments.rahfl.rounds import Batch, Metrics, Parts

PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)  # each client's own validation images choose


class State(NamedTuple):
  """Everything a checkpoint needs.

  Attributes:
    weights: (K, pixels + 1, C), the last row a constant.
    held: the clients' images, the same as in every other row of the seed.
    round: steps done, one is all.
  """

  weights: Array
  held: Clients[Array]
  round: Array


def init(parts: Parts, key: Array) -> State:
  """Deals the images as the other rows do; weights are zero."""
  pool, clients = parts.data.pool, len(parts.names)
  size = pool[0].size + 1
  held = rounds.init(parts, key).held
  return State(jnp.zeros((clients, size, parts.data.num_classes)), held, jnp.zeros((), jnp.int32))


def step(parts: Parts, state: State, batch: Batch) -> tuple[State, Metrics]:
  """Solves the regression of every client, one after the other."""
  fit = functools.partial(_fit, parts, batch["pool"])
  weights, loss = jax.lax.map(fit, state.held)
  return state._replace(weights=weights, round=state.round + 1), {"loss": loss.mean()}


def _fit(parts: Parts, pool: Array, held: Clients[Array]) -> tuple[Array, Array]:
  """Weights of one client at the penalty that its validation images choose, and their squared error."""
  x = _pixels(parts, pool[held.rows]) * (held.y >= 0)[:, None]
  target = jax.nn.one_hot(held.y, parts.data.num_classes)  # no image: zeros
  gram, moment = x.T @ x, x.T @ target
  kept = _pixels(parts, pool[held.validation])
  solved = jnp.stack(
    [jnp.linalg.solve(gram + penalty * jnp.eye(len(gram)), moment) for penalty in PENALTIES]
  )
  right = jnp.stack([_accuracy(kept @ weights, held.validation_y) for weights in solved])
  weights = solved[jnp.argmax(right)]
  count = jnp.maximum((held.y >= 0).sum(), 1)
  return weights, ((x @ weights - target) ** 2).sum() / count


def evaluate(parts: Parts, state: State, test: dict[str, Array]) -> Metrics:
  """The metrics of the other rows."""

  def reached(images: Array) -> Array:
    x = _pixels(parts, images)
    return jax.lax.map(lambda weights: _accuracy(x @ weights, test["y"]), state.weights)

  scores = {kind: reached(test[kind]) for kind in ("corrupted", "clean")}
  held, own = state.held, {}
  for name, rows, y in (
    ("validation", held.validation, held.validation_y), ("training", held.rows, held.y),
  ):  # fmt: skip
    each = jax.lax.map(
      lambda a: _accuracy(_pixels(parts, test["pool"][a[0]]) @ a[2], a[1]), (rows, y, state.weights)
    )
    own[f"{name}_accuracy"] = each.mean()
  return {
    **{f"{kind}_accuracy": of.mean() for kind, of in scores.items()},
    **own,
    **{
      f"{kind}_accuracy/{name}": of[k]
      for kind, of in scores.items()
      for k, name in enumerate(parts.names)
    },
  }


def _pixels(parts: Parts, images: Array) -> Array:
  """Images (n, s, s, 3) uint8 as rows of normalised pixels and a constant."""
  x = rounds.normalise(parts, images).reshape(len(images), -1)
  return jnp.concatenate([x, jnp.ones((len(x), 1))], 1)


def _accuracy(scores: Array, y: Array) -> Array:
  return (scores.argmax(-1) == y).sum() / jnp.maximum((y >= 0).sum(), 1)
