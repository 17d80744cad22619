"""The shape of a federated algorithm: five small pure functions."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax

from jaxmethods.trees import Key, PyTree

# The engine moves these without a look inside.
Params: TypeAlias = PyTree
ServerState: TypeAlias = PyTree
Message: TypeAlias = PyTree
ClientState: TypeAlias = PyTree
ClientData: TypeAlias = PyTree
Upload: TypeAlias = PyTree
Metrics: TypeAlias = dict[str, jax.Array]


class FederatedAlgorithm(NamedTuple):
  """A federated method; `engine.federated_round` does the rest.

  Attributes:
    init: (params, key) -> server state, before the first round.
    download: (server, client index) -> message. Exactly what that client receives.
    local: (message, client, data, key) -> (client, upload, metrics). One client's work in one round:
      `client` is what it keeps (the server never sees it), `data` its padded and masked examples,
      `upload` exactly what leaves it, `metrics` a dict of scalars with at least "loss".
    server: (server, uploads, weights) -> server. `uploads` are stacked over all clients, in client
      order; `weights` (clients,) are example counts, zero for padding clients and for those that did
      not take part in this round.
    params: (message, client) -> the parameters that this client predicts with.
  """

  init: Callable[[Params, Key], ServerState]
  download: Callable[[ServerState, jax.Array], Message]
  local: Callable[
    [Message, ClientState, ClientData, Key],
    tuple[ClientState, Upload, Metrics],
  ]
  server: Callable[[ServerState, Upload, jax.Array], ServerState]
  params: Callable[[Message, ClientState], Params]
