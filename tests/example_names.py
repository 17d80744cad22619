"""What the examples of public docstrings stand on: a tiny net, three clients, two triangles."""

import functools

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax

import jaxmethods as jm


def names() -> dict:
  """Returns what an example may use without saying so."""
  key = jax.random.key(0)
  net = jm.models.MLP((16,), 2)
  x = jnp.ones((8, 4))
  rng = np.random.default_rng(0)
  linear = {"w": jnp.zeros(3), "bias": jnp.zeros(())}
  xs = [rng.normal(size=(8, 3)).astype("f4") for _ in range(3)]
  corner = np.array([0, 0, 1, 1, 2, 2], np.int32)
  other = np.array([1, 2, 0, 2, 0, 1], np.int32)
  both = lambda ids: np.concatenate([ids, ids + 3])
  graphs = jraph.GraphsTuple(
    nodes=np.eye(3, dtype="f4")[[0, 1, 2, 0, 1, 2]], edges=None, globals=None,
    senders=both(corner), receivers=both(other),
    n_node=np.array([3, 3], np.int32), n_edge=np.array([6, 6], np.int32),
  )  # fmt: skip
  source = jm.data.Source("triangles", "two triangles", "none", "none", real=False)
  return {
    "jm": jm, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "key": key, "net": net, "x": x,
    "params": net.init(key, x)["params"], "lora": jm.adapters.lora(rank=2, alpha=4, dropout=0.0),
    "linear": linear, "loss": squared_error, "train": functools.partial(train, linear, xs),
    "clients_data": [{"x": own, "y": own.sum(1)} for own in xs],
    "triangles": jm.data.GraphData(graphs, np.array([0, 1], np.int32), 2, source),
    "tiny": jm.models.CausalLMConfig(
      vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16
    ),
  }  # fmt: skip


def squared_error(params, state, batch, key):
  """The loss of a linear model, for the federated algorithms."""
  error = (batch["x"] @ params["w"] + params["bias"] - batch["y"]) ** 2
  return error.mean(where=batch["mask"]), (state, {"count": batch["mask"].sum()})


def train(linear, xs, algorithm):
  """Three rounds of three clients."""
  data = jm.federated.bucket_clients([{"x": own, "y": own.sum(1)} for own in xs], max_buckets=1)
  server = algorithm.init(linear, jax.random.key(0))
  one = jm.federated.init_client(linear)
  clients = [jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)]
  for k in range(3):
    server, clients, metrics = jm.federated.federated_round(
      algorithm, server, clients, data.data, data.weights, jax.random.key(k)
    )
  return server, clients, metrics
