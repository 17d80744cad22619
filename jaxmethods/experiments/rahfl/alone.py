"""The epochs alone, which all rows of a comparison share: computed once a seed, then cached."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmethods.data.array_cache import cached_tree
from jaxmethods.experiments.rahfl import rounds
from jaxmethods.experiments.rahfl.rounds import Parts, State
from jaxmethods.runtime import compiler, loop
from jaxmethods.trees import PyTree

_FORMAT = b"trained alone 1"  # changes when training alone changes
# Settings that training alone depends on, beside the clients' images and the key.
_SETTINGS = (
  "pretrain", "architectures", "clients_per_architecture", "narrow", "stages", "batch_size",
  "learning_rate", "flip",
)  # fmt: skip


def pretrained(parts: Parts, key: Array) -> State:
  """Returns the state after the epochs alone, in which all rows agree."""
  config = parts.config
  state, step = rounds.init(parts, key), functools.partial(rounds.step, parts)
  reached = jnp.int32(config.pretrain)
  if isinstance(key, jax.core.Tracer):  # traced, there is nothing to look up
    batch = {"pool": parts.data.pool}
    trained = jax.lax.fori_loop(0, config.pretrain, lambda i, s: step(s, batch)[0], state)
    return with_learned(state, learned(trained))._replace(round=reached)

  def compute() -> PyTree:
    batches, program = rounds.batches(parts, 0), compiler.jit(step)
    return learned(loop.advance(program, state, batches, config.pretrain, "training alone"))

  settings = [repr((name, getattr(config, name))).encode() for name in _SETTINGS]
  arrays = [np.asarray(x) for x in (parts.data.pool, state.held.rows, state.held.y)]
  arrays.append(np.asarray(jax.random.key_data(key)))
  structure = jax.tree.structure(learned(state))
  nets = cached_tree("trained_alone", [_FORMAT, *settings, *arrays], structure, compute)
  return with_learned(state, nets)._replace(round=reached)


def learned(state: State) -> list[tuple[PyTree, PyTree]]:
  """Returns the networks and the batch statistics of every group."""
  return [(peer.params["net"], peer.model_state) for peer in state.peers]


def with_learned(state: State, nets: list[tuple[PyTree, PyTree]]) -> State:
  """Puts the networks of `learned` into a state that is otherwise as it starts."""
  peers = tuple(
    peer._replace(params={**peer.params, "net": net}, model_state=model_state)
    for peer, (net, model_state) in zip(state.peers, nets, strict=True)
  )
  return state._replace(peers=peers)
