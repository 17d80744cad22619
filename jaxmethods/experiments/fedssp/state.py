"""The state of a run, and how its clients begin."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.experiments.fedssp import clients as client_data
from jaxmethods.experiments.fedssp.algorithms import Setup
from jaxmethods.experiments.fedssp.backbones import Backbone, ModelState
from jaxmethods.experiments.fedssp.clients import Clients
from jaxmethods.trees import Key, PyTree, Tree


class State(NamedTuple):
  """Everything a checkpoint needs.

  Attributes:
    server: of the algorithm.
    clients: per group, client states stacked on the client axis.
    key: of all rounds.
    round: rounds done, int32.
  """

  server: PyTree
  clients: tuple[PyTree, ...]
  key: Key
  round: jax.Array


def init_state(backbone: Backbone, setup: Setup, groups: Sequence[Clients], key: Key) -> State:
  """Draws every client's parameters; the server begins with those of client 0."""
  model_key, round_key = jax.random.split(key)
  first, clients = None, []
  for group in groups:
    members = []
    for number, width in zip(group.ids.tolist(), group.widths, strict=True):
      model = _init_model(backbone, jax.random.fold_in(model_key, number), group, width)
      members.append(setup.client(*model))
      first = model[0] if number == 0 else first
    clients.append(jax.tree.map(_stacked, *members))
  assert first is not None
  server = setup.algorithm.init(first, round_key)
  return State(server, tuple(clients), round_key, jnp.zeros((), jnp.int32))


def _init_model(
  backbone: Backbone, key: Key, group: Clients, width: int
) -> tuple[Tree, ModelState]:
  """Draws parameters for a client's own number of features, and model state.

  Where the batches of the group have more, the input layer gets rows of zeros: nothing reaches them, so
  they have no gradient and stay zero.
  """

  def init(features: int) -> tuple[Tree, ModelState]:
    # Shapes alone: the parameters are drawn without compiling or running a forward pass.
    return backbone.init(key, client_data.example_of(group, features), group.num_classes)

  model, widest = init(width), max(group.widths)
  if width == widest:
    return model
  return jax.tree.map(_widened, model, jax.eval_shape(lambda: init(widest)))


def _widened(x: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
  """Appends zeros up to a shape."""
  return _host(x).pad(x, [(0, m - n) for n, m in zip(x.shape, to.shape, strict=True)])


def _stacked(*leaves: jax.Array) -> jax.Array:
  """Stacks the clients of a group."""
  host = _host(leaves[0])
  return host.stack(leaves) if host is jnp else jax.device_put(host.stack(leaves))


def _host(x: jax.Array) -> ModuleType:
  """Returns numpy, since jnp would compile a program for every shape, or jnp for traced values."""
  return jnp if isinstance(x, jax.core.Tracer) else np
