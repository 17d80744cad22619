"""Partitions cover every example once; impossible requests name what is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.errors import InputError
from jaxmethods.federated import padding, partition

requests = st.tuples(
  st.integers(1, 12),
  st.integers(1, 3),
  st.integers(0, 60),
  st.integers(0, 2**31),
  st.integers(1, 5),
)


def check(parts, num_examples, num_clients, min_examples):
  assert len(parts) == num_clients
  assert min(len(p) for p in parts) >= min_examples
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


@settings(max_examples=60, deadline=None)
@given(requests)
def test_iid_dirichlet_and_shards_cover_everything_once(request):
  num_clients, least, extra, seed, classes = request
  n = num_clients * least + extra
  labels = np.random.default_rng(seed).integers(0, classes, n)
  check(partition.iid(n, num_clients, seed, min_examples=least), n, num_clients, least)
  for alpha in (0.05, 0.5, 100.0):
    parts = partition.dirichlet(labels, num_clients, seed, alpha=alpha, min_examples=least)
    check(parts, n, num_clients, least)
  if n >= 2 * num_clients:
    parts = partition.shards(labels, num_clients, seed, shards_per_client=2)
    check(parts, n, num_clients, 1)
    runs = [len(np.unique(labels[p])) for p in parts]
    assert max(runs) <= max(2 * classes, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 8), st.integers(0, 2**31))
def test_by_domain_is_pure(domains, extra, seed):
  num_clients = domains + extra
  labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(domains) * 3, num_clients))
  parts = partition.by_domain(labels, num_clients, seed)
  check(parts, len(labels), num_clients, 1)
  assert all(len(np.unique(labels[p])) == 1 for p in parts)


def test_seed_decides_and_alpha_skews():
  labels = np.repeat(np.arange(10), 100)
  one, same, other = (partition.dirichlet(labels, 10, s) for s in (0, 0, 1))
  assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
  assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

  def classes(alpha):
    return np.mean(
      [
        (np.bincount(labels[p], minlength=10) > 0).sum()
        for p in partition.dirichlet(labels, 10, 0, alpha=alpha)
      ]
    )

  assert classes(0.05) < 5 < classes(100.0)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: partition.iid(5, 6, 0), "num_clients: 6 clients with at least 1 examples each need 6"),
    (lambda: partition.iid(5, 0, 0), "num_clients: must be at least 1, got 0"),
    (lambda: partition.dirichlet([0, 1], 1, 0, alpha=0.0), "alpha: must be positive"),
    (lambda: partition.dirichlet([0.5], 1, 0), "labels: expected"),
    (lambda: partition.dirichlet([0] * 9, 5, 0, min_examples=2), "need 10, got 9"),
    (lambda: partition.dirichlet([0], 1, 0, min_examples=0), "min_examples: must be at least 1"),
    (lambda: partition.shards([0] * 5, 3, 0), "need at least 6 examples"),
    (lambda: partition.shards([0] * 5, 3, 0, shards_per_client=0), "shards_per_client"),
    (lambda: partition.by_domain([0, 1, 2], 2, 0), "3 domains need as many clients, got 2"),
    (lambda: partition.by_domain([0, 1, 1, 1], 3, 0), "client 2 would get 0 examples"),
  ],
)
def test_impossible_requests(call, message):
  with pytest.raises(InputError, match=message):
    call()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 5))
def test_buckets_hold_every_client_once(sizes, max_buckets, multiple):
  clients = [{"x": np.full((n, 2), k, np.float32)} for k, n in enumerate(sizes)]
  buckets = padding.bucket_clients(clients, max_buckets=max_buckets, multiple=multiple)
  assert 1 <= len(buckets.data) <= max_buckets
  seen = []
  for data, weights, ids in zip(*buckets, strict=True):
    assert data["mask"].shape[1] % multiple == 0
    for x, mask, weight, k in zip(data["x"], data["mask"], weights, ids, strict=True):
      assert mask.sum() == weight == sizes[k]
      assert (np.asarray(x)[np.asarray(mask)] == k).all() and not np.asarray(x)[
        ~np.asarray(mask)
      ].any()
      seen.append(int(k))
  assert sorted(seen) == list(range(len(sizes)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4))
def test_bucket_cuts_are_the_best_there_are(lengths, max_buckets):
  lengths = np.sort(lengths)

  def cost(cuts):
    return sum(len(p) * p.max() for p in np.split(lengths, list(cuts)) if len(p))

  from itertools import combinations

  best = min(
    cost(cuts) for k in range(max_buckets) for cuts in combinations(range(1, len(lengths)), k)
  )
  cuts = padding.bucket_cuts(lengths, max_buckets)
  assert len(cuts) < max_buckets and cost(cuts) == best


def test_shapes_are_merged_while_that_is_cheap():
  lengths = [10, 24, 11, 25, 100]

  def cost(members):
    if 4 in members and len(members) > 1:
      return np.inf
    return len(members) * max(lengths[i] for i in members)

  # 1 each for {0, 2} and {1, 3}, 29 more for their union; 170 on their own.
  for slack, expected in (
    (0.0, [(0,), (1,), (2,), (3,), (4,)]),
    (1 / 170, [(0, 2), (1,), (3,), (4,)]),
    (2 / 170, [(0, 2), (1, 3), (4,)]),
    (30 / 170, [(0, 1, 2, 3), (4,)]),
    (99.0, [(0, 1, 2, 3), (4,)]),
  ):
    assert padding.merge_shapes(5, cost, slack) == expected


@pytest.mark.parametrize(
  "clients, message",
  [
    ([], "no clients"),
    ([{"x": np.zeros(2)}, {"x": np.zeros(0)}], "client 1 is empty"),
    ([{"x": np.zeros(2)}, {"y": np.zeros(2)}], "client 1 has arrays"),
    ([{"x": np.zeros(2), "y": np.zeros(3)}], "client 0: arrays of different lengths"),
    ([{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}], "client 1: x has shape"),
    ([{"x": np.zeros(2), "mask": np.zeros(2)}], "'mask' is taken"),
  ],
)
def test_bad_clients_are_named(clients, message):
  with pytest.raises(InputError, match=message):
    padding.bucket_clients(clients)
