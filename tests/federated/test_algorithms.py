"""Each algorithm against what it reduces to, or a computation by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from sklearn.datasets import load_digits

from jaxmethods import trees
from jaxmethods.federated import algorithms, engine, padding, partition
from jaxmethods.federated.batching import shuffled
from jaxmethods.models.mlp import MLP


def close(a, b, tolerance=2e-6):
  chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def test_one_client_is_local_sgd():
  client = problems.clients((8,))[0]
  buckets = padding.bucket_clients([client])
  server, _, _ = problems.run(problems.algorithm(batches=shuffled(8)), buckets, rounds=2)
  params = problems.params()
  batch = {"mask": jnp.ones(8, bool), **client}
  for _ in range(4):  # two rounds of two epochs of one full batch
    grads = jax.grad(lambda p: problems.loss(p, (), batch, None)[0])(params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
  close(server.params, params)


def test_average_by_counts_and_plain():
  """One step from the same start: the mean of models is the start minus the mean gradient."""
  buckets = problems.bucketed(multiple=16)
  start = problems.params()

  def step(data):
    return jax.tree.map(
      lambda p, g: p - 0.1 * g,
      start,
      jax.grad(lambda p: problems.loss(p, (), data, None)[0])(start),
    )

  each = jax.vmap(step)(buckets.data[0])
  for weighted in (True, False):
    fed = problems.algorithm(batches=shuffled(16), local_epochs=1, weighted=weighted)
    weights = np.asarray(buckets.weights[0]) if weighted else np.ones(6)
    expected = jax.tree.map(lambda x, w=weights: np.average(x, axis=0, weights=w), each)
    close(problems.run(fed, buckets, 1)[0].params, expected)


def test_fedprox_without_mu_is_fedavg_and_with_mu_stays_nearer():
  buckets = problems.bucketed()
  plain = problems.run(problems.algorithm(), buckets, 1)[0].params
  zero = problems.run(problems.algorithm(algorithms.fedprox, mu=0.0), buckets, 1)[0].params
  held = problems.run(problems.algorithm(algorithms.fedprox, mu=5.0), buckets, 1)[0].params
  chex.assert_trees_all_equal(plain, zero)
  start = problems.params()

  def move(params):
    return optax.tree.norm(optax.tree.sub(params, start))

  assert move(held) < 0.9 * move(plain)


def test_fedprox_gradient_by_hand():
  """Two full-batch steps of one client: the second feels mu (w - w_server)."""
  client = problems.clients((8,))[0]
  fed = problems.algorithm(algorithms.fedprox, mu=0.7, batches=shuffled(8))
  server, _, _ = problems.run(fed, padding.bucket_clients([client]), rounds=1)
  start = params = problems.params()
  batch = {"mask": jnp.ones(8, bool), **client}
  for _ in range(2):
    grads = jax.grad(lambda p: problems.loss(p, (), batch, None)[0])(params)
    params = jax.tree.map(lambda p, g, s: p - 0.1 * (g + 0.7 * (p - s)), params, grads, start)
  close(server.params, params)


def test_fedper_keeps_the_head_at_home():
  buckets = problems.bucketed()
  shared = trees.all_but("head")
  fed = problems.algorithm(algorithms.fedper, local=("head",))
  clients = problems.states(buckets, shared=shared)
  server, clients, _ = problems.run(fed, buckets, clients=clients)
  assert set(server.params) == {"dense_0"}
  assert set(clients[0].params) == {"head"}
  heads = np.asarray(clients[0].params["head"]["kernel"])
  assert len(np.unique(heads.reshape(6, -1), axis=0)) == 6
  _, upload, _ = jax.eval_shape(
    fed.local,
    server.params,
    jax.tree.map(lambda x: x[0], clients[0]),
    jax.tree.map(lambda x: x[0], buckets.data[0]),
    jax.random.key(0),
  )
  assert set(upload) == {"dense_0"}
  full = fed.params(server.params, jax.tree.map(lambda x: x[0], clients[0]))
  chex.assert_trees_all_equal_shapes(full, problems.params())


def test_local_only_equals_training_alone():
  buckets = problems.bucketed()
  fed = problems.algorithm(algorithms.local_only)
  optimizer = optax.sgd(0.1)
  clients = problems.states(buckets, optimizer, trees.nothing)
  _, together, _ = problems.run(fed, buckets, clients=clients)

  def one(tree):
    return jax.tree.map(lambda x: x[2:3], tree)

  _, alone, _ = problems.run(fed, one(buckets), clients=one(clients))
  close(jax.tree.map(lambda x: x[2:3], together), alone)


@pytest.mark.parametrize("make", [algorithms.fedavgm, algorithms.fedadam, algorithms.fedyogi])
def test_server_optimizers_by_hand(make):
  fed = problems.algorithm(make, server_rate=0.5)
  rng = np.random.default_rng(0)
  w = rng.normal(size=3)
  state = fed.init({"w": jnp.asarray(w, jnp.float32)}, jax.random.key(0))
  # optax starts both of Yogi's accumulators at 1e-6.
  m = v = np.full(3, 1e-6 if make is algorithms.fedyogi else 0.0)
  weights = np.array([1.0, 3.0, 0.0])
  for r in range(1, 4):
    uploads = rng.normal(size=(3, 3)).astype(np.float32)
    state = fed.server(state, {"w": jnp.asarray(uploads)}, jnp.asarray(weights, jnp.float32))
    g = w - weights @ uploads / 4
    if make is algorithms.fedavgm:
      m = 0.9 * m + g
      w = w - 0.5 * m
    else:
      m = 0.9 * m + 0.1 * g
      v = (
        0.99 * v + 0.01 * g**2
        if make is algorithms.fedadam
        else v - 0.01 * np.sign(v - g**2) * g**2
      )
      w = w - 0.5 * (m / (1 - 0.9**r)) / (np.sqrt(v / (1 - 0.99**r)) + 1e-3)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-4)


def test_kept_optimizer_state_matters_and_is_kept():
  buckets = problems.bucketed()
  optimizer = optax.adam(0.01)

  def make(keep):
    return algorithms.fedavg(problems.loss, optimizer, batches=shuffled(4), keep_optimizer=keep)

  fresh = problems.run(make(False), buckets)[0]
  server, clients, _ = problems.run(
    make(True), buckets, clients=problems.states(buckets, optimizer)
  )
  np.testing.assert_array_equal(
    clients[0].opt_state[0].count, 2 * -(-np.array(problems.SIZES) // 4)[np.asarray(buckets.ids[0])]
  )
  assert not np.allclose(fresh.params["head"]["kernel"], server.params["head"]["kernel"])


def test_unrolling_changes_nothing():
  buckets = problems.bucketed()
  close(
    problems.run(problems.algorithm(unroll=3), buckets)[0],
    problems.run(problems.algorithm(), buckets)[0],
  )


def test_shuffled_batches():
  data = {"x": jnp.arange(11), "mask": jnp.arange(11) < 9}

  def epoch(e):
    return shuffled(4)(data, jax.random.key(e))

  batch, real = epoch(0)
  np.testing.assert_array_equal(batch["mask"].sum(1), [4, 4, 1])  # the remainder is kept
  assert sorted(np.asarray(batch["x"])[np.asarray(batch["mask"])]) == list(range(9))
  assert real.all() and not np.array_equal(batch["x"], epoch(1).batch["x"])
  # Padding adds steps that are not real; the real ones stay as they are.
  more = jax.tree.map(lambda x: jnp.pad(x, (0, 30)), data)
  padded = shuffled(4)(more, jax.random.key(0))
  np.testing.assert_array_equal(padded.real, np.arange(11) < 3)
  np.testing.assert_array_equal(padded.batch["x"][:2], batch["x"][:2])
  np.testing.assert_array_equal(padded.batch["x"][2, 0], batch["x"][2, 0])


def test_paths_split_and_merge():
  tree = {"a": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 3}}, "d": 4}
  shared, local = trees.split(tree, lambda path: path in ("a/kernel", "b/c/kernel"))
  assert shared == {"a": {"kernel": 1}, "b": {"c": {"kernel": 3}}}
  assert local == {"a": {"bias": 2}, "d": 4}
  assert trees.merge(shared, local) == tree == trees.merge(local, shared)
  with pytest.raises(ValueError, match="both parts hold 'd'"):
    trees.merge(tree, {"d": 5})


def test_learns_digits():
  """40 label-skewed clients, 15 rounds of 10 sampled ones: 85 % from a fixed seed."""
  x, y = load_digits(return_X_y=True)
  x, y = (x / 16).astype(np.float32), y.astype(np.int32)
  parts = partition.dirichlet(y[:1437], 40, seed=0)
  buckets = padding.bucket_clients([{"x": x[p], "y": y[p]} for p in parts], multiple=8)
  net = MLP((64,), 10)
  params = net.init(jax.random.key(0), x[:1])["params"]

  def loss(params, model_state, batch, key):
    errors = optax.softmax_cross_entropy_with_integer_labels(
      net.apply({"params": params}, batch["x"]), batch["y"]
    )
    return (errors * batch["mask"]).sum() / jnp.maximum(batch["mask"].sum(), 1), (model_state, {})

  fed = algorithms.fedavg(loss, optax.sgd(0.2), batches=shuffled(8), local_epochs=3)
  server = fed.init(params, jax.random.key(0))
  clients = problems.states(buckets, start=params)
  sizes = [len(w) for w in buckets.weights]

  @jax.jit
  def one(server, clients, key):
    sample_key, round_key = jax.random.split(key)
    cohort = engine.sample_cohort(sample_key, sizes, 10)
    return engine.federated_round(
      fed, server, clients, buckets.data, buckets.weights, round_key, cohort=cohort, ids=buckets.ids
    )

  for r in range(15):
    server, clients, metrics = one(server, clients, jax.random.key(r))
  accuracy = (net.apply({"params": server.params}, x[1437:]).argmax(-1) == y[1437:]).mean()
  assert accuracy > 0.85, accuracy
  assert metrics["loss"].shape == (10,)
