"""How clients are mapped, grouped, padded, sampled and dropped must not change what they do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from jaxmethods import trees
from jaxmethods.federated import algorithms, engine, padding
from jaxmethods.federated.batching import Batches, prebatched, shuffled


def close(a, b, tolerance=2e-6):
  chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def test_vmap_and_scan_agree_and_default_is_one_of_them():
  buckets = problems.bucketed(2)
  fed = problems.algorithm()
  vmapped = problems.run(fed, buckets, client_map="vmap")
  close(vmapped, problems.run(fed, buckets, client_map="scan"))
  close(vmapped, problems.run(fed, buckets))
  assert engine.default_client_map("cpu") == "scan"
  assert engine.default_client_map("tpu") == engine.default_client_map("gpu") == "vmap"


def test_round_runs_without_jit():
  buckets = problems.bucketed()
  close(
    problems.run(problems.algorithm(), buckets, rounds=1),
    problems.run(problems.algorithm(), buckets, rounds=1, jit=False),
  )


@pytest.mark.parametrize("client_map", ["vmap", "scan"])
def test_bucketing_changes_nothing(client_map):
  fed = problems.algorithm()
  one, many = problems.bucketed(1), problems.bucketed(3)
  assert len(many.data) == 3
  a = problems.run(fed, one, client_map=client_map)
  b = problems.run(fed, many, client_map=client_map)
  close(a[0], b[0])

  def by_id(buckets, metric):
    return metric[np.argsort(np.concatenate(buckets.ids))]

  close(by_id(one, a[2]["loss"]), by_id(many, b[2]["loss"]))


@pytest.mark.parametrize("client_map", ["vmap", "scan"])
def test_padding_examples_steps_and_clients_changes_nothing(client_map):
  fed = problems.algorithm()
  tight = problems.bucketed()
  longer = tuple(
    {k: np.pad(x, [(0, 0), (0, 8)] + [(0, 0)] * (x.ndim - 2)) for k, x in d.items()}
    for d in tight.data
  )
  more = [
    padding.pad_clients((d, i), w, 8)
    for d, i, w in zip(longer, tight.ids, tight.weights, strict=True)
  ]
  padded = padding.Buckets(
    tuple(group[0] for group, _ in more),
    tuple(w for _, w in more),
    tuple(group[1] for group, _ in more),
  )
  assert padded.weights[0].shape == (8,) and padded.data[0]["mask"].shape[1] == 20
  a = problems.run(fed, tight, client_map=client_map)
  b = problems.run(fed, padded, client_map=client_map)
  close(a[0], b[0])
  close(a[2]["loss"], b[2]["loss"][:6])


def test_order_of_clients_changes_rounding_only():
  buckets = problems.bucketed()
  turned = jax.tree.map(lambda x: x[::-1], buckets)
  close(
    problems.run(problems.algorithm(), buckets)[0], problems.run(problems.algorithm(), turned)[0]
  )


def test_identical_clients_average_to_themselves():
  client = problems.clients((6,))[0]
  fed = problems.algorithm(batches=shuffled(8))  # one batch: the order inside it is rounding
  alone = problems.run(fed, padding.bucket_clients([client]))
  crowd = problems.run(fed, padding.bucket_clients([client] * 5))
  close(alone[0], crowd[0])


def test_clients_of_weight_zero_are_ignored():
  buckets = problems.bucketed()
  weights = buckets.weights[0].at[2].set(0)
  keep = np.array([0, 1, 3, 4, 5])
  without = jax.tree.map(lambda x: x[keep], buckets)
  close(
    problems.run(problems.algorithm(), buckets._replace(weights=(weights,)))[0],
    problems.run(problems.algorithm(), without)[0],
  )


def test_taking_part():
  buckets = problems.bucketed(2)
  fed = problems.algorithm(shared=lambda path: "head" not in path)
  clients = problems.states(buckets, shared=lambda path: "head" not in path)
  order = np.concatenate(buckets.ids)
  here = jnp.asarray(np.isin(order, [0, 2, 5]))
  server, after, _ = problems.run(fed, buckets, 1, clients=clients, taking_part=here)
  moved = np.concatenate(
    [
      np.asarray((a != b).any((1, 2)))
      for a, b in zip(*(_heads(c) for c in (after, clients)), strict=True)
    ]
  )
  np.testing.assert_array_equal(moved, here)
  only = jax.tree.map(lambda x: x[jnp.array([0, 2, 5])], _by_id(problems.bucketed(1)))
  alone = problems.run(
    fed, only, 1, clients=problems.states(only, shared=lambda p: "head" not in p)
  )
  close(server, alone[0])


def test_nobody_taking_part_leaves_the_server_alone():
  buckets = problems.bucketed()
  for make in (algorithms.fedavg, algorithms.fedadam):
    fed = problems.algorithm(make)
    server = fed.init(problems.params(), jax.random.key(0))
    after, *_ = problems.run(fed, buckets, 1, taking_part=jnp.zeros(6, bool))
    chex.assert_trees_all_equal(server, after)


def test_cohort_equals_taking_part_and_costs_its_size():
  buckets = problems.bucketed(2)

  def shared(path):
    return "head" not in path

  fed = problems.algorithm(shared=shared)
  clients = problems.states(buckets, shared=shared)
  sizes = [len(w) for w in buckets.weights]
  cohort = engine.sample_cohort(jax.random.key(3), sizes, 3)
  mask, start = np.zeros(6, bool), 0
  flags = iter(np.asarray(cohort.taking_part))
  for rows, size in zip(cohort.rows, sizes, strict=True):
    for row in np.asarray(rows):
      mask[start + row] = next(flags)
    start += size
  assert mask.sum() == 3
  compact = problems.run(fed, buckets, 1, clients=clients, cohort=cohort)
  full = problems.run(fed, buckets, 1, clients=clients, taking_part=jnp.asarray(mask))
  close(compact[:2], full[:2])
  assert compact[2]["loss"].shape == cohort.taking_part.shape
  with pytest.raises(ValueError, match="not both"):
    problems.run(fed, buckets, 1, cohort=cohort, taking_part=jnp.asarray(mask))


def test_cohort_gives_every_client_the_same_chance():
  sizes, num, draws = (3, 7, 20), 7, 3000
  keys = jax.random.split(jax.random.key(0), draws)
  cohorts = jax.vmap(lambda key: engine.sample_cohort(key, sizes, num))(keys)
  assert (np.asarray(cohorts.taking_part).sum(1) == num).all()
  assert cohorts.taking_part.shape[1] <= num + len(sizes)
  flags = np.split(
    np.asarray(cohorts.taking_part), np.cumsum([r.shape[1] for r in cohorts.rows])[:-1], 1
  )
  for rows, flag, size in zip(cohorts.rows, flags, sizes, strict=True):
    hits = np.bincount(np.asarray(rows)[flag], minlength=size)
    assert abs(hits / draws - num / sum(sizes)).max() < 0.04
    assert all(len(set(r)) == len(r) for r in np.asarray(rows)[:50])
  everyone = engine.sample_cohort(keys[0], sizes, sum(sizes))
  assert everyone.taking_part.all() and everyone.taking_part.shape == (30,)


def test_sample_participants():
  masks = jax.vmap(lambda key: engine.sample_participants(key, 10, 4))(
    jax.random.split(jax.random.key(0), 500)
  )
  assert (masks.sum(1) == 4).all() and abs(masks.mean(0) - 0.4).max() < 0.08
  for num in (0, 11):
    with pytest.raises(ValueError, match=f"cannot draw {num} of 10"):
      engine.sample_participants(jax.random.key(0), 10, num)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_client_with_nonfinite_upload_is_dropped_and_named(bad):
  buckets = problems.bucketed()
  broken = buckets._replace(
    data=({**buckets.data[0], "x": buckets.data[0]["x"].at[2, 0].set(bad)},)
  )

  def shared(path):
    return "head" not in path

  fed = problems.algorithm(shared=shared)
  start = problems.states(buckets, shared=shared)
  server, clients, metrics = problems.run(fed, broken, 2, clients=start, drop_nonfinite=True)
  np.testing.assert_array_equal(metrics["rejected"], np.arange(6) == 2)
  chex.assert_tree_all_finite((server, clients))
  keep = jnp.array([0, 1, 3, 4, 5])
  without = jax.tree.map(lambda x: x[keep], buckets)
  close(server, problems.run(fed, without, 2, clients=problems.states(without, shared=shared))[0])
  undropped = problems.run(fed, broken, 1, clients=start)[0]
  assert not np.isfinite(undropped.params["dense_0"]["kernel"]).all()


def test_groups_may_differ_in_shape():
  """Two feature widths; only what has the same shape is shared."""

  def shared(path):
    return "dense_0/kernel" not in path

  rng = np.random.default_rng(0)
  data, clients, weights = [], [], []
  for width in (4, 5):
    x = jnp.asarray(rng.normal(size=(2, 4, width)), jnp.float32)
    data.append({"x": x, "y": jnp.zeros((2, 4), jnp.int32), "mask": jnp.ones((2, 4), bool)})
    full = problems.NET.init(jax.random.key(width), x[0])["params"]
    client = algorithms.init_client(full, shared=shared)
    clients.append(jax.tree.map(lambda x: jnp.stack([x, x]), client))
    weights.append(jnp.full(2, 4.0))
  fed = problems.algorithm(shared=shared)
  server = fed.init(problems.params(), jax.random.key(0))
  server, after, metrics = engine.federated_round(
    fed, server, clients, data, weights, jax.random.key(1)
  )
  assert metrics["loss"].shape == (4,)
  assert [c.params["dense_0"]["kernel"].shape for c in after] == [(2, 4, 6), (2, 5, 6)]
  assert "kernel" not in server.params["dense_0"]


def test_client_params_are_those_a_client_predicts_with():
  buckets = problems.bucketed(2)
  shared = trees.all_but("head")
  fed = problems.algorithm(shared=shared)
  clients = problems.states(buckets, shared=shared)
  server, clients, _ = problems.run(fed, buckets, 1, clients=clients)
  groups = engine.client_params(fed, server, clients, [len(w) for w in buckets.weights])
  for params, client in zip(groups, clients, strict=True):
    assert set(params) == {"dense_0", "head"}
    chex.assert_trees_all_equal(params["head"], client.params["head"])
    for kernel in params["dense_0"]["kernel"]:
      np.testing.assert_array_equal(kernel, server.params["dense_0"]["kernel"])
  plain = problems.algorithm()
  server = plain.init(problems.params(), jax.random.key(0))
  (params,) = engine.client_params(plain, server, (algorithms.ClientState({}, (), ()),), [3])
  assert params["head"]["bias"].shape == (3, 3)


def test_traffic_counts_bytes_without_running():
  buckets = problems.bucketed(2)
  number = {True: 4 * 6 + 6, False: 6 * 3 + 3}  # hidden layer, head
  for shared, expected in (
    (lambda path: True, number[True] + number[False]),
    (lambda path: "head" not in path, number[True]),
    (lambda path: False, 0),
  ):
    fed = problems.algorithm(shared=shared)
    server = fed.init(problems.params(), jax.random.key(0))
    traffic = engine.traffic(fed, server, problems.states(buckets, shared=shared), buckets.data)
    np.testing.assert_array_equal(traffic.up, [4 * expected] * 6)
    np.testing.assert_array_equal(traffic.down, [4 * expected] * 6)


def test_a_step_without_examples_changes_nothing():
  """Neither momentum nor batch-norm statistics nor parameters."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(5, 2, 4)), jnp.float32)

  def loss(params, model_state, batch, key):
    value = ((batch @ params["w"]) ** 2).mean() + 0.1 * jax.random.normal(key)
    return value, ({"mean": 0.9 * model_state["mean"] + 0.1 * batch.mean()}, {})

  optimizer = optax.adam(0.1)
  params = {"w": jnp.ones(4)}
  state = (params, {"mean": jnp.zeros(())}, optimizer.init(params))

  def train(data):
    return algorithms.local_sgd(
      loss, optimizer, state, data, jax.random.key(0), epochs=2, batches=prebatched
    )

  tight = train(Batches(x[:3], jnp.ones(3, bool)))
  padded = train(Batches(x.at[3:].set(jnp.nan), jnp.arange(5) < 3))
  chex.assert_trees_all_equal(tight, padded)


def test_rounds_do_not_recompile():
  buckets = problems.bucketed(3)
  fed = problems.algorithm()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def one(server, clients, data, weights, key):
    return engine.federated_round(fed, server, clients, data, weights, key)

  server, clients = fed.init(problems.params(), jax.random.key(0)), problems.states(buckets)
  for r in range(3):
    server, clients, _ = one(server, clients, buckets.data, buckets.weights, jax.random.key(r))


@pytest.mark.parametrize("client_map", ["vmap", "scan"])
@pytest.mark.parametrize("drop_nonfinite", [False, True])
def test_programs_of_groups_make_the_same_round(client_map, drop_nonfinite):
  buckets = problems.bucketed(3)
  shared = trees.all_but("head")
  fed = problems.algorithm(shared=shared)
  options = {"client_map": client_map, "drop_nonfinite": drop_nonfinite}

  traced = []

  def jit(function, **of):
    return jax.jit(lambda *args: traced.append(function) or function(*args), **of)

  whole = jax.jit(functools.partial(engine.federated_round, fed, **options))
  parts = engine.round_programs([fed] * len(buckets.data), jit=jit, **options)
  start = fed.init(problems.params(), jax.random.key(0)), problems.states(buckets, shared=shared)
  expected = found = start
  for r in range(3):
    key = jax.random.key(r)
    here = jnp.arange(6) % 3 != r
    *expected, metrics = whole(*expected, buckets.data, buckets.weights, key, taking_part=here)
    *found, reported = parts(*found, buckets.data, buckets.weights, key, here)
    chex.assert_trees_all_close((found, reported), (expected, metrics), rtol=1e-5, atol=1e-6)
  assert drop_nonfinite == ("rejected" in reported)
  assert len(traced) == 3 + 2  # the groups, and what stands before and after them: once each


@pytest.mark.parametrize(
  "change, message",
  [
    ({"client_map": "loop"}, "'loop' is none of"),
    ({"client_map": "shard"}, "needs a mesh"),
  ],
)
def test_bad_options(change, message):
  with pytest.raises(ValueError, match=message):
    problems.run(problems.algorithm(), problems.bucketed(), 1, **change)


def test_groups_that_disagree_are_refused():
  buckets = problems.bucketed()
  fed = problems.algorithm()
  server = fed.init(problems.params(), jax.random.key(0))
  clients = problems.states(buckets)
  with pytest.raises(ValueError, match="same number of groups"):
    engine.federated_round(fed, server, clients, buckets.data, (), jax.random.key(0))
  with pytest.raises(ValueError, match="group 0: 5 weights"):
    engine.federated_round(fed, server, clients, buckets.data, (jnp.ones(5),), jax.random.key(0))


def _heads(groups):
  return [g.params["head"]["kernel"] for g in groups]


def _by_id(buckets):
  return jax.tree.map(lambda x: x[np.argsort(buckets.ids[0])], buckets)
