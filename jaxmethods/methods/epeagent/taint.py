"""Taint: which fields a message carries, what the server lets through, the flow of a conversation.

A message of an agent carries fields in two ways. `plain` ones stand in it so that the server can find
and cut them. `hidden` ones are encoded, split or rephrased: no text filter sees them. The server knows
what an agent was told, never what it hides; a delivery is safe only if it forwards nothing of the
original text but what the receiver may know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxmethods.methods.epeagent import graph

# (plain (F,), hidden (F,), rights of the sender (F,), rights of the receiver (F,)) -> carried (F,).
Delivery: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Conduct(NamedTuple):
  """What agents try to do, whatever made them: carelessness, an injection, a plan of their own.

  Attributes:
    plain: (R, N, F), fields that an agent puts into its message as they are, if it knows them.
    hidden: (R, N, F), fields that it encodes, splits or rephrases into it.
    coalition: (N,), agents that share all they know behind the server's back.
  """

  plain: Bool[Array, "R N F"]
  hidden: Bool[Array, "R N F"]
  coalition: Bool[Array, " N"]


class Network(NamedTuple):
  """Rounds of a conversation.

  Attributes:
    spatial: (R, N, N), edges within a round.
    temporal: (R, N, N), edges from the round before.
    active: (R, N), who takes part.
  """

  spatial: Bool[Array, "R N N"]
  temporal: Bool[Array, "R N N"]
  active: Bool[Array, "R N"]


class Protection(NamedTuple):
  """What the server does; each part of EPE can be missing.

  Attributes:
    views: () bool, whether profiles are handed out cut to the rights of the agent (M2).
    messages: how a message passes from agent to agent (M3).
    memory: how it passes from the memory bank to who reads there.
  """

  views: Bool[Array, ""] | bool
  messages: Delivery
  memory: Delivery


class Flow(NamedTuple):
  """Taint of everything that reached an agent, by channel, and of what it knows in the end.

  Attributes:
    views: (R, N, F), profile entries handed to an agent.
    messages: (R, N, N, F), [t, i, j]: from i to j.
    memory: (R, N, F), read from the memory bank.
    known: (N, F), after the last round.
    ever: (N, F), what an agent had a right to in some round (a coalition: any of its members).
  """

  views: Bool[Array, "R N F"]
  messages: Bool[Array, "R N N F"]
  memory: Bool[Array, "R N F"]
  known: Bool[Array, "N F"]
  ever: Bool[Array, "N F"]


class _Round(NamedTuple):
  """What one round is made of: a slice of rights, network and conduct."""

  allow: Bool[Array, "F N"]
  spatial: Bool[Array, "N N"]
  temporal: Bool[Array, "N N"]
  active: Bool[Array, " N"]
  plain: Bool[Array, "N F"]
  hidden: Bool[Array, "N F"]


class _Carry(NamedTuple):
  """Between rounds: knowledge (N, F), last messages (plain and hidden, (N, F)), the memory bank (F,)."""

  known: jax.Array
  plain: jax.Array
  hidden: jax.Array
  bank_plain: jax.Array
  bank_hidden: jax.Array


def open_delivery(plain: jax.Array, hidden: jax.Array, sender: jax.Array, receiver: jax.Array):
  """Lets everything through: the unprotected system."""
  del sender, receiver
  return plain | hidden


def cut(plain: jax.Array, hidden: jax.Array, sender: jax.Array, receiver: jax.Array):
  """Cuts spans that are found; what is hidden passes (M3 as a text filter does it)."""
  del sender
  return (plain & receiver) | hidden


def compose(plain: jax.Array, hidden: jax.Array, sender: jax.Array, receiver: jax.Array):
  """Forwards none of the text: the server writes anew what was found and is permitted (ours)."""
  del hidden, sender
  return plain & receiver


def withhold(plain: jax.Array, hidden: jax.Array, sender: jax.Array, receiver: jax.Array):
  """Delivers a message only if all that its sender has a right to may be known to the receiver.

  The conservative rule: provenance stands for content (M6).
  """
  return (plain | hidden) & receiver & jnp.all(receiver | ~sender)


def by_servers(parts: Bool[Array, "n F"], honest: Bool[Array, " n"], deliver: Delivery) -> Delivery:
  """Passes a message through n servers, each of which filters its own fields (M5; inferred).

  Args:
    parts: (n, F), see `policy.servers`.
    honest: (n,), servers that do their part; the others let all of it pass.
    deliver: what an honest one does.
  """

  def delivery(plain, hidden, sender, receiver):
    free = jnp.any(parts & ~honest[:, None], 0)
    return deliver(plain, hidden, sender, receiver) | ((plain | hidden) & free)

  return delivery


def declassify(
  taint: Bool[Array, " F"], granted: Bool[Array, " F"], receiver: Bool[Array, " F"]
) -> Bool[Array, " F"]:
  """Removes taint (F,) by grant only: what is left may not reach the receiver."""
  chex.assert_equal_shape([taint, granted, receiver])
  return taint & ~granted & ~receiver


def flow(
  allow: Bool[Array, "R F N"], network: Network, conduct: Conduct, protection: Protection
) -> Flow:
  """Follows the fields of one user through a conversation.

  Agents of one level speak side by side, each after all who speak to it in the round; what they say
  goes to the memory bank, which every later level and round reads.

  Args:
    allow: (R, F, N), rights in every round: the access matrix and the grants in force.
    network: graphs; an agent on a cycle never speaks.
    conduct: what agents put into messages.
    protection: what the server does.
  """
  rounds, fields, agents = allow.shape
  chex.assert_shape(network.spatial, (rounds, agents, agents))
  chex.assert_shape(conduct.plain, (rounds, agents, fields))
  ever = jnp.any(allow, 0).T
  pooled = jnp.any(ever & conduct.coalition[:, None], 0)
  ever = ever | (conduct.coalition[:, None] & pooled)
  nothing = jnp.zeros((agents, fields), bool)
  bank = jnp.zeros(fields, bool)
  scanned = _Round(allow, *network, conduct.plain, conduct.hidden)

  def one(carry: _Carry, part: _Round):
    return _round(carry, part, conduct.coalition, protection)

  carry, (views, messages, memory) = jax.lax.scan(
    one, _Carry(nothing, nothing, nothing, bank, bank), scanned
  )
  return Flow(views, messages, memory, carry.known, ever)


class _Spoken(NamedTuple):
  """Within a round: the carry, and the taint that has arrived so far."""

  carry: _Carry
  messages: jax.Array  # (N, N, F)
  memory: jax.Array  # (N, F)


def _round(carry: _Carry, part: _Round, coalition: jax.Array, protection: Protection):
  """Runs the levels of one round; returns the carry and the taint by channel."""
  agents, fields = carry.known.shape
  rights = part.allow.T
  deliver = jax.vmap(jax.vmap(protection.messages, (None, None, None, 0)), (0, 0, 0, None))
  to_reader = jax.vmap(protection.memory, (None, None, None, 0))
  anybody = jnp.ones(fields, bool)  # who wrote to the bank is not kept
  spatial = graph.present(part.spatial, part.active)
  level = graph.levels(spatial)
  views = jnp.where(protection.views, rights, True) & part.active[:, None]
  # Messages of the round before: their senders need not take part in this one.
  late = deliver(carry.plain, carry.hidden, rights, rights)
  late = late & (part.temporal & part.active[None])[..., None]
  silent = jnp.zeros((agents, fields), bool)
  told = carry._replace(known=carry.known | views | jnp.any(late, 0), plain=silent, hidden=silent)

  def speak(spoken: _Spoken, depth: jax.Array):
    carry = spoken.carry
    now = ((level == depth) & part.active)[:, None]
    read = to_reader(carry.bank_plain, carry.bank_hidden, anybody, rights) & now
    known = carry.known | read
    known = known | (coalition[:, None] & jnp.any(known & coalition[:, None], 0))
    plain = jnp.where(now, known & part.plain, carry.plain)
    hidden = jnp.where(now, known & part.hidden, carry.hidden)
    sent = deliver(plain, hidden, rights, rights) & (spatial & now)[..., None]
    carry = _Carry(
      known | jnp.any(sent, 0),
      plain,
      hidden,
      carry.bank_plain | jnp.any(plain & now, 0),
      carry.bank_hidden | jnp.any(hidden & now, 0),
    )
    return _Spoken(carry, spoken.messages | sent, spoken.memory | read), None

  spoken, _ = jax.lax.scan(speak, _Spoken(told, late, silent), jnp.arange(agents))
  return spoken.carry, (views, spoken.messages, spoken.memory)


def leaks(found: Flow, allow: Bool[Array, "R F N"]) -> dict[str, Bool[Array, " F"]]:
  """Names the fields (F,) that reached somebody without the right, by channel.

  `known` counts what an agent knows in the end and never had a right to, a coalition as one.
  """
  rights = jnp.swapaxes(allow, 1, 2)
  return {
    "views": jnp.any(found.views & ~rights, (0, 1)),
    "messages": jnp.any(found.messages & ~rights[:, None], (0, 1, 2)),
    "memory": jnp.any(found.memory & ~rights, (0, 1)),
    "known": jnp.any(found.known & ~found.ever, 0),
  }
