"""Clients of the testbed: what is dealt out, to whom, and in which shares."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.testbeds.federated_images import clients
from jaxmethods.testbeds.federated_images.settings import ClientSettings

C = 4


@pytest.fixture(scope="module")
def whole():
  """Three domains of 60, 50 and 40 examples of four classes."""
  rng = np.random.default_rng(0)
  sizes = {"a": 60, "b": 50, "c": 40}
  return clients.pool({k: (rng.normal(size=(n, 2)), np.arange(n) % C) for k, n in sizes.items()})


def settings(**changes):
  return ClientSettings(**({"clients": 6, "alpha": 0.3, "data": "npz:x"} | changes))


def dealt(whole, made, seed=0):
  """The counts (K, C), the deal and the pool it is a part of."""
  pool = clients.for_skew(whole, made.skew)
  clients.check(made, np.asarray(pool.y), C)
  deal = clients.draw_clients(jax.random.key(seed), pool.y, C, made)
  return clients.class_counts(pool.y[deal.domain], deal.mask, C), deal, pool


@pytest.mark.parametrize("skew", ["domains", "labels", "both"])
def test_clients_are_disjoint_and_skewed(whole, skew):
  made = settings(skew=skew)
  counts, deal, pool = dealt(whole, made)
  assert len(counts) == len(clients.client_names(made, "abc")) == (3 if skew == "domains" else 6)
  assert (counts >= 1).all()
  times = jnp.zeros(pool.y.shape, int).at[deal.domain].add(deal.mask)
  assert (times <= (pool.y >= 0)).all()
  if skew != "domains":  # there, what a domain does not keep is left out
    np.testing.assert_array_equal(times, pool.y >= 0)
  assert (counts.max(0) > 2 * counts.min(0)).any()
  if skew == "both":
    np.testing.assert_array_equal(deal.domain, [0, 0, 1, 1, 2, 2])
  even, *_ = dealt(whole, dataclasses.replace(made, alpha=0.0))
  within = even if skew != "domains" else even / even.sum(1, keepdims=True)
  for domain in range(len(pool.y)):
    assert (np.ptp(within[deal.domain == domain], axis=0) <= 2).all()


def test_the_draw_follows_the_key(whole):
  masks = [dealt(whole, settings(skew="labels"), seed)[1].mask for seed in (0, 0, 1)]
  np.testing.assert_array_equal(masks[0], masks[1])
  assert (masks[0] != masks[2]).any()


def test_a_traced_draw_is_the_same(whole):
  made = settings(skew="both", clients=5)
  draw = lambda key: clients.draw_clients(key, whole.y, C, made)
  key = jax.random.key(3)
  np.testing.assert_array_equal(jax.jit(draw)(key).mask, draw(key).mask)


def test_every_client_holds_some_classes_evenly(whole):
  counts, *_ = dealt(whole, settings(skew="labels", classes_per_client=2))
  np.testing.assert_array_equal((counts > 0).sum(1), 2)
  np.testing.assert_array_equal((counts > 0).sum(0), 6 * 2 // C)
  shared = np.where(counts > 0, counts, np.nan)
  assert (np.nanmax(shared, 0) - np.nanmin(shared, 0) <= 2).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"skew": "labels", "classes_per_client": 1}, "do not share 4 classes evenly"),
    ({"skew": "labels", "classes_per_client": 5}, "classes_per_client"),
    ({"skew": "labels", "min_per_class": 9}, "class 0 has 38 examples: 6 clients"),
    ({"skew": "both", "clients": 2}, "3 domains need as many, got 2"),
  ],
)
def test_impossible_deals(whole, changes, message):
  with pytest.raises(InputError, match=message):
    dealt(whole, settings(**changes))
