"""A small federated problem that the tests of this folder share: ragged clients, an MLP, its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.federated import algorithms, engine, padding
from jaxmethods.federated.batching import shuffled
from jaxmethods.models.mlp import MLP

SIZES = (5, 3, 12, 7, 1, 9)
NET = MLP((6,), 3)


def clients(sizes=SIZES, seed=0):
  rng = np.random.default_rng(seed)

  def draw(n):
    return {
      "x": rng.normal(size=(n, 4)).astype(np.float32),
      "y": rng.integers(0, 3, n).astype(np.int32),
    }

  return [draw(n) for n in sizes]


def params(seed=0):
  return NET.init(jax.random.key(seed), jnp.zeros((1, 4)))["params"]


def loss(params, model_state, batch, key):
  del key
  errors = optax.softmax_cross_entropy_with_integer_labels(
    NET.apply({"params": params}, batch["x"]), batch["y"]
  )
  count = jnp.maximum(batch["mask"].sum(), 1)
  return (errors * batch["mask"]).sum() / count, (model_state, {"count": count})


def states(buckets, optimizer=None, shared=lambda path: True, model_state=(), start=None):
  start = params() if start is None else start
  client = algorithms.init_client(start, model_state, shared=shared, optimizer=optimizer)

  def stack(n):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), client)

  return tuple(stack(len(w)) for w in buckets.weights)


def algorithm(make=algorithms.fedavg, **options):
  options = {"batches": shuffled(4), "local_epochs": 2, **options}
  return make(loss, optax.sgd(0.1), **options)


def run(fed, buckets, rounds=2, key=7, clients=None, jit=True, server=None, **options):
  """Runs some rounds and returns (server, clients, metrics of the last one)."""
  server = fed.init(params(), jax.random.key(0)) if server is None else server
  clients = states(buckets) if clients is None else clients

  def one(s, c, k):
    return engine.federated_round(
      fed, s, c, buckets.data, buckets.weights, k, ids=buckets.ids, **options
    )

  one = jax.jit(one) if jit else one
  metrics = {}
  for r in range(rounds):
    server, clients, metrics = one(server, clients, jax.random.fold_in(jax.random.key(key), r))
  return server, clients, metrics


def bucketed(max_buckets=1, multiple=4, sizes=SIZES):
  return padding.bucket_clients(clients(sizes), max_buckets=max_buckets, multiple=multiple)


def buckets_of(kind):
  """Six clients for tests on several devices, which the engine spreads in different ways."""
  return {
    "spread": lambda: bucketed(2),  # groups of 2 and 4, padded up to the devices
    # Groups of 1, 3, 1 and 1; the single ones whole.
    "dealt": lambda: bucketed(4, sizes=(3, 5, 6, 12, 7, 18)),
  }[kind]()
