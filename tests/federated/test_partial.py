"""Some clients in a round: SCAFFOLD, FedDyn, MOON and FedProto against a loop with a dict of clients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods import trees
from jaxmethods.federated import algorithms, corrections, engine, guidance, prototypes
from jaxmethods.federated.batching import shuffled

K, N, D, C, RATE, EPOCHS = 5, 7, 4, 3, 0.3, 3
RNG = np.random.default_rng(0)
SIZES = np.array([7, 3, 5, 6, 2])
X = RNG.normal(size=(K, N, D)).astype(np.float32)
Y = RNG.integers(0, C, (K, N))
MASK = np.arange(N) < SIZES[:, None]
DATA = {"x": jnp.asarray(X), "y": jnp.asarray(Y), "mask": jnp.asarray(MASK)}
WEIGHTS = jnp.asarray(SIZES, jnp.float32)
START = RNG.normal(size=(D, C)).astype(np.float32)
ROUNDS = [(0, 3), (1, 3), (4,), (0, 1, 2), ()]
# One batch an epoch: the order of the examples does not matter, so a loop can follow.
LOCAL = {"local_epochs": EPOCHS, "batches": shuffled(N)}


def outputs(params, batch):
  return batch["x"] @ params["w"]


def loss(params, model_state, batch, key):
  del key
  errors = optax.softmax_cross_entropy_with_integer_labels(outputs(params, batch), batch["y"])
  return (errors * batch["mask"]).sum() / batch["mask"].sum(), (model_state, {})


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def gradient(w, k):
  """Of the cross-entropy of client k's examples, by hand."""
  x, y = X[k, : SIZES[k]], Y[k, : SIZES[k]]
  return x.T @ (softmax(x @ w) - np.eye(C)[y]) / len(y)


def engine_run(algorithm, client, rounds=ROUNDS):
  """Every round by `taking_part` and by `cohort` alike; yields (server, clients)."""
  clients = jax.tree.map(lambda a: jnp.broadcast_to(a, (K, *jnp.shape(a))), client)
  server = algorithm.init({"w": jnp.asarray(START)}, jax.random.key(0))

  @jax.jit
  def both(server, clients, key, part, rows):
    cohort = engine.Cohort((rows,), part[rows])
    data = (clients,), (DATA,), (WEIGHTS,), key
    whole = engine.federated_round(algorithm, server, *data, taking_part=part)[:2]
    return whole, engine.federated_round(algorithm, server, *data, cohort=cohort)[:2]

  for r, part in enumerate(rounds):
    chosen = np.isin(np.arange(K), part)
    rows = np.argsort(~chosen, kind="stable")[:3].astype(np.int32)  # the last may only fill up
    found = both(server, clients, jax.random.key(r), chosen, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)
    server, (clients,) = found[0]
    yield server, clients


def test_scaffold():
  server_rate = 0.7
  algorithm = corrections.scaffold(loss, RATE, server_rate=server_rate, population=K, **LOCAL)
  client = corrections.init_client({"w": jnp.asarray(START)})
  w, c = START.copy(), np.zeros_like(START)
  own = {k: np.zeros_like(START) for k in range(K)}
  for part, (server, clients) in zip(ROUNDS, engine_run(algorithm, client), strict=True):
    ends, changes = [], []
    for k in part:
      end = w.copy()
      for _ in range(EPOCHS):
        end -= RATE * (gradient(end, k) - own[k] + c)
      control = own[k] - c + (w - end) / (EPOCHS * RATE)
      changes.append(control - own[k])
      ends.append(end)
      own[k] = control
    if part:
      w = w + server_rate * (np.mean(ends, 0) - w)
      c = c + sum(changes) / K
    np.testing.assert_allclose(server.params["w"], w, atol=2e-5)
    np.testing.assert_allclose(server.correction["w"], c, atol=2e-5)
    np.testing.assert_allclose(clients.correction["w"], [own[k] for k in range(K)], atol=2e-5)
    # c is the mean of the controls of all clients, those that never took part included.
    np.testing.assert_allclose(c, np.mean(list(own.values()), 0), atol=1e-5)


def test_feddyn():
  alpha = 0.4
  algorithm = corrections.feddyn(loss, optax.sgd(RATE), alpha, population=K, **LOCAL)
  client = corrections.init_client({"w": jnp.asarray(START)})
  w, h = START.copy(), np.zeros_like(START)
  own = {k: np.zeros_like(START) for k in range(K)}
  for part, (server, clients) in zip(ROUNDS, engine_run(algorithm, client), strict=True):
    ends = []
    for k in part:
      end = w.copy()
      for _ in range(EPOCHS):
        end -= RATE * (gradient(end, k) - own[k] + alpha * (end - w))
      own[k] = own[k] - alpha * (end - w)
      ends.append(end)
    if part:
      h = h - alpha / K * sum(end - w for end in ends)
      w = np.mean(ends, 0) - h / alpha
    np.testing.assert_allclose(server.params["w"], w, atol=2e-5)
    np.testing.assert_allclose(server.correction["w"], h, atol=2e-5)
    np.testing.assert_allclose(clients.correction["w"], [own[k] for k in range(K)], atol=2e-5)


def test_moon():
  mu, tau = 2.0, 0.5
  algorithm = guidance.moon(loss, optax.sgd(RATE), outputs, mu, tau, **LOCAL)
  client = algorithms.init_client({"w": jnp.asarray(START)}, keep_previous=True)

  def contrast(w, before, previous, k):
    x = X[k, : SIZES[k]]
    cosine = lambda a, b: (a * b).sum(-1) / jnp.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    near, far = (jnp.exp(cosine(x @ w, x @ other) / tau) for other in (before, previous))
    return -mu * jnp.log(near / (near + far)).mean()

  slope = jax.jit(jax.grad(contrast), static_argnums=3)
  w, own = START.copy(), dict.fromkeys(range(K), START)
  for part, (server, clients) in zip(ROUNDS, engine_run(algorithm, client), strict=True):
    ends = {}
    for k in part:
      end = w.copy()
      for _ in range(EPOCHS):
        end = end - RATE * (gradient(end, k) + np.asarray(slope(end, w, own[k], k)))
      ends[k] = end
    own |= ends
    if part:
      w = np.average(list(ends.values()), 0, SIZES[list(ends)]).astype(np.float32)
    np.testing.assert_allclose(server.params["w"], w, atol=5e-5)
    np.testing.assert_allclose(clients.previous["w"], [own[k] for k in range(K)], atol=5e-5)


def test_fedproto():
  weight = 0.8
  algorithm = prototypes.fedproto(loss, optax.sgd(RATE), outputs, C, C, weight, **LOCAL)
  client = algorithms.init_client(
    {"w": jnp.asarray(START)}, shared=trees.nothing, optimizer=optax.sgd(RATE)
  )
  own = dict.fromkeys(range(K), START)
  known: dict[int, np.ndarray] = {}
  for part, (server, clients) in zip(ROUNDS, engine_run(algorithm, client), strict=True):
    sums, counts = np.zeros((C, C)), np.zeros(C)
    for k in part:
      x, y = X[k, : SIZES[k]], Y[k, : SIZES[k]]
      for _ in range(EPOCHS):
        far = np.array(
          [
            z - known[int(c)] if int(c) in known else 0 * z
            for z, c in zip(x @ own[k], y, strict=True)
          ]
        )
        pull = x.T @ (2 * weight * far / C) / len(y)
        own[k] = own[k] - RATE * (gradient(own[k], k) + pull)
      np.add.at(sums, y, x @ own[k])
      np.add.at(counts, y, 1)
    known |= {c: sums[c] / counts[c] for c in np.flatnonzero(counts)}
    np.testing.assert_allclose(clients.params["w"], [own[k] for k in range(K)], atol=2e-5)
    for c in range(C):
      np.testing.assert_allclose(server.means[c], known.get(c, np.zeros(C)), atol=2e-5)


def test_prototypes_are_all_that_leaves_a_client():
  algorithm = prototypes.fedproto(loss, optax.sgd(RATE), outputs, C, C, **LOCAL)
  client = algorithms.init_client(
    {"w": jnp.asarray(START)}, shared=trees.nothing, optimizer=optax.sgd(RATE)
  )
  states = (jax.tree.map(lambda a: jnp.broadcast_to(a, (K, *jnp.shape(a))), client),)
  server = algorithm.init({"w": jnp.asarray(START)}, jax.random.key(0))
  sent = engine.traffic(algorithm, server, states, (DATA,))
  assert set(sent.up) == set(sent.down) == {4 * (C * C + C)}
