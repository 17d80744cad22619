"""Rights: an access matrix, grants with scope and expiry, and the events that change them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

ANY_TASK = -1
NEVER = -1

# Kinds of events of `step`.
GRANT, REVOKE, VIEW, SEND, NEXT_ROUND, NEXT_TASK = range(6)


class Grants(NamedTuple):
  """Permissions that users gave beyond the access matrix (M4).

  Attributes:
    last: (U, F, N), last round in which the grant holds; `NEVER`: there is none.
    task: (U, F, N), the task it holds for, or `ANY_TASK`.
  """

  last: Int[Array, "U F N"]
  task: Int[Array, "U F N"]


class Event(NamedTuple):
  """Something that happens in a conversation; integers, so that a sequence of events is an array.

  Attributes:
    kind: one of `GRANT`, `REVOKE`, `VIEW` (the server hands `agent` its view of `user`), `SEND`
      (`agent` tells `peer` all it knows of `user`, through the server), `NEXT_ROUND`, `NEXT_TASK`.
    user, field, agent, peer: whom it is about.
    rounds: of a grant: number of rounds it holds, the present one included.
  """

  kind: Int[Array, ""]
  user: Int[Array, ""]
  field: Int[Array, ""]
  agent: Int[Array, ""]
  peer: Int[Array, ""]
  rounds: Int[Array, ""]


class Protocol(NamedTuple):
  """State of a protocol.

  Attributes:
    access: (F, N) or (U, F, N), rights by role.
    grants: permissions beyond.
    known: (U, F, N), what an agent has been told.
    ever: (U, F, N), what an agent was allowed to know at some time of which it was told something.
    task, round: counters.
  """

  access: Bool[Array, "*U F N"]
  grants: Grants
  known: Bool[Array, "U F N"]
  ever: Bool[Array, "U F N"]
  task: Int[Array, ""]
  round: Int[Array, ""]


def access_matrix(labels: Sequence[Collection[int]], agents: Sequence[int]) -> np.ndarray:
  """Reads the labels of fields as an access matrix (the set L_u of the paper).

  Args:
    labels: for every field, numbers of the agents that may see it; none: hidden from everybody.
    agents: numbers of the agents.

  Returns:
    (F, N) bool.

  Raises:
    ValueError: a label names no agent.
  """
  for place, label in enumerate(labels):
    if unknown := sorted(set(label) - set(agents)):
      raise ValueError(f"labels[{place}]: {unknown[0]!r} is no agent, agents are {list(agents)}")
  return np.array([[agent in label for agent in agents] for label in labels], bool).reshape(
    len(labels), len(agents)
  )


def no_grants(users: int, fields: int, agents: int) -> Grants:
  """Makes the grants of a start: none (default deny)."""
  shape = (users, fields, agents)
  return Grants(jnp.full(shape, NEVER, jnp.int32), jnp.full(shape, ANY_TASK, jnp.int32))


def grant(
  grants: Grants,
  where: Bool[Array, "U F N"],
  *,
  last: Int[Array, ""] | int,
  task: Int[Array, ""] | int = ANY_TASK,
) -> Grants:
  """Grants cells, and no others.

  Args:
    grants: those there are.
    where: (U, F, N), cells to grant; a new grant replaces the one of its cell.
    last: last round in which they hold.
    task: the only task they hold for.
  """
  chex.assert_equal_shape([grants.last, where])
  return Grants(jnp.where(where, last, grants.last), jnp.where(where, task, grants.task))


def revoke(grants: Grants, where: Bool[Array, "U F N"]) -> Grants:
  """Takes cells (U, F, N) back."""
  chex.assert_equal_shape([grants.last, where])
  return Grants(jnp.where(where, NEVER, grants.last), jnp.where(where, ANY_TASK, grants.task))


def allowed(
  access: Bool[Array, "*U F N"],
  grants: Grants,
  *,
  round: Int[Array, ""] | int,
  task: Int[Array, ""] | int = ANY_TASK,
) -> Bool[Array, "U F N"]:
  """Returns who may see what now: `A[f, i] or G[u, f, i]` with grants that are in force."""
  chex.assert_equal_shape_suffix([access, grants.last], 2)
  scope = (grants.task == ANY_TASK) | (grants.task == task)
  return access | ((grants.last >= round) & scope)


def servers(fields: int, count: int) -> np.ndarray:
  """Splits the fields over n server agents in turn (3 + n architecture; inferred): (n, F) bool.

  Raises:
    ValueError: `count` is not positive.
  """
  if count < 1:
    raise ValueError(f"count: must be at least 1, got {count}")
  return np.arange(fields) % count == np.arange(count)[:, None]


def start(access: Bool[Array, "*U F N"], users: int) -> Protocol:
  """Begins a protocol: no grants, nothing known."""
  fields, agents = access.shape[-2:]
  nothing = jnp.zeros((users, fields, agents), bool)
  zero = jnp.int32(0)
  grants = no_grants(users, fields, agents)
  return Protocol(jnp.asarray(access), grants, nothing, nothing, zero, zero)


def step(state: Protocol, event: Event) -> Protocol:
  """Applies an event; pure, without text and without randomness.

  What is told is always cut to the rights of the one who is told, at the time of telling.
  """
  users, fields, agents = state.known.shape
  user = jnp.arange(users)[:, None, None] == event.user
  field = jnp.arange(fields)[None, :, None] == event.field
  agent = jnp.arange(agents)[None, None] == event.agent
  peer = jnp.arange(agents)[None, None] == event.peer
  cell = user & field & agent

  last = state.round + event.rounds - 1
  given = grant(state.grants, cell & (event.kind == GRANT), last=last, task=state.task)
  grants = revoke(given, cell & (event.kind == REVOKE))
  allow = allowed(state.access, grants, round=state.round, task=state.task)
  sender = jnp.any(state.known & agent, -1, keepdims=True)
  told = jnp.where(event.kind == VIEW, user & agent, (event.kind == SEND) & user & peer & sender)
  reader = jnp.where(event.kind == SEND, user & peer, (event.kind == VIEW) & user & agent)
  next_task = event.kind == NEXT_TASK
  later = state.round + (event.kind == NEXT_ROUND)
  return Protocol(
    state.access,
    grants,
    state.known | (told & allow),
    state.ever | (reader & allow),
    state.task + next_task,
    jnp.where(next_task, 0, later).astype(jnp.int32),
  )


def run(state: Protocol, events: Event) -> Protocol:
  """Applies events that are stacked along a leading axis."""
  return jax.lax.scan(lambda state, event: (step(state, event), None), state, events)[0]
