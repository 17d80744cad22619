"""Minimum cuts against networkx, and clusters that form where updates oppose each other."""

import chex
import jax
import jax.numpy as jnp
import networkx
import numpy as np
import optax
import problems
import pytest

from jaxmethods.federated import gcfl
from jaxmethods.federated.batching import Batches


@pytest.mark.parametrize("seed", range(12))
def test_minimum_cut_against_networkx(seed):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(2, 11))
  weights = np.triu(rng.random((n, n)), 1)
  weights = (weights + weights.T).astype(np.float32)
  member = np.zeros(n + 3, bool)
  member[rng.choice(n + 3, n, replace=False)] = True
  padded = np.full((n + 3, n + 3), 7.0, np.float32)
  padded[np.ix_(member, member)] = weights
  side, value = jax.jit(gcfl.minimum_cut)(padded, member)
  expected, _ = networkx.stoer_wagner(networkx.from_numpy_array(weights.astype(float)))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  side = np.asarray(side)
  assert not side[~member].any() and 0 < side.sum() < n
  np.testing.assert_allclose(padded[np.ix_(side, member & ~side)].sum(), expected, rtol=1e-5)


def test_split_only_where_both_bounds_say_so():
  opposed = jnp.array([[1.0, 0.1], [-1.0, 0.0], [1.0, -0.1], [-1.0, 0.0]])
  everyone = jnp.ones(4, bool)
  zeros = jnp.zeros(4, jnp.int32)

  def split(updates, cluster=zeros, present=everyone, **o):
    return np.asarray(
      jax.jit(lambda u: gcfl.split_clusters(cluster, {"w": u}, present, **o))(updates)
    )

  np.testing.assert_array_equal(split(opposed), [0, 1, 0, 1])
  np.testing.assert_array_equal(split(opposed + 0.5), [0] * 4)  # the mean is not small
  np.testing.assert_array_equal(split(opposed * 0.05), [0] * 4)  # no update is large
  np.testing.assert_array_equal(split(opposed, min_size=5), [0] * 4)
  np.testing.assert_array_equal(split(jnp.zeros((4, 2))), [0] * 4)
  # An absent client neither votes nor moves; clusters already apart are left alone.
  eight = jnp.concatenate([opposed, jnp.array([[3.0, 0], [3.0, 0], [3.0, 0], [1e9, 0]])])
  cluster = jnp.array([0, 0, 0, 0, 4, 4, 4, 0], jnp.int32)
  present = jnp.arange(8) < 7
  np.testing.assert_array_equal(split(eight, cluster, present), [0, 1, 0, 1, 4, 4, 4, 0])
  # The half that loses the first client of the cluster is named after its own first member.
  turned = jnp.concatenate([jnp.array([[1e9, 0]]), opposed])
  np.testing.assert_array_equal(
    split(turned, jnp.zeros(5, jnp.int32), jnp.arange(5) > 0), [0, 0, 2, 0, 2]
  )


def test_before_any_split_gcfl_is_fedavg():
  buckets = problems.bucketed(2)

  def make(loss, optimizer, **options):
    return gcfl.gcfl(loss, optimizer, 6, **options)

  clustered = problems.run(problems.algorithm(make), buckets, 3)[0]
  plain = problems.run(problems.algorithm(), buckets, 3)[0]
  assert not clustered.cluster.any() and clustered.round == 3
  for k in range(6):
    mine = jax.tree.map(lambda x, k=k: x[k], clustered.params)
    chex.assert_trees_all_close(mine, plain.params, rtol=1e-5, atol=1e-6)


def test_opposed_clients_part_and_then_average_apart():
  """Clients 0, 2 want w = +1 and 1, 3 want w = -1; after the first rounds they part."""
  target = jnp.array([1.0, -1.0, 1.0, -1.0])
  data = ({"x": target[:, None], "mask": jnp.ones((4, 1), bool)},)

  def loss(params, model_state, batch, key):
    return ((params["w"] - batch["x"]) ** 2).sum(), (model_state, {})

  fed = gcfl.gcfl(
    loss,
    optax.sgd(0.25),
    4,
    first_rounds=2,
    batches=lambda d, k: Batches(jax.tree.map(lambda x: x[None], d), jnp.ones(1, bool)),
  )
  server = fed.init({"w": jnp.zeros(())}, jax.random.key(0))
  buckets = problems.padding.Buckets(data, (jnp.ones(4),), (jnp.arange(4),))
  clients = problems.states(buckets, start={"w": jnp.zeros(())})
  early = problems.run(fed, buckets, 2, clients=clients, server=server)[0]
  np.testing.assert_array_equal(early.cluster, [0, 0, 0, 0])
  late = problems.run(fed, buckets, 8, clients=clients, server=server)[0]
  np.testing.assert_array_equal(late.cluster, [0, 1, 0, 1])
  np.testing.assert_allclose(late.params["w"], target, atol=0.05)


def test_compact_cohort_is_refused():
  fed = gcfl.gcfl(problems.loss, optax.sgd(0.1), 6)
  state = fed.init(problems.params(), jax.random.key(0))
  some = jax.tree.map(lambda x: x[:3], state.params)
  with pytest.raises(ValueError, match="made for 6 clients"):
    fed.server(state, some, jnp.ones(3))
