"""Retrieval metrics against a plain ranking of everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.stats import retrieval


def slow(queries, gallery, labels, others, excluded):
  """Metrics by sorting each row; (AP, INP, AP@R, first rank) of queries with a match."""
  out = []
  for query, label, leave in zip(queries, labels, excluded, strict=True):
    order = np.argsort(-(gallery @ query), kind="stable")
    right = (others[order] == label)[~leave[order]]
    places = np.flatnonzero(right) + 1
    if len(places):
      precision = np.arange(1, len(places) + 1) / places
      near = places <= len(places)
      total = len(places)
      out.append((precision.mean(), total / places[-1], precision[near].sum() / total, places[0]))
  return np.array(out)


def whole(seed, count, width=4):
  """Whole numbers, whose products are exact: ties are ties in any order of adding."""
  return np.random.default_rng(seed).integers(-3, 4, (count, width)).astype(np.float32)


@given(st.integers(0, 10_000), st.sampled_from([(4, 3), (64, 64)]))
@settings(max_examples=10, deadline=None)
def test_like_sorting(seed, block):
  rng = np.random.default_rng(seed)
  gallery = whole(seed, 23)
  gallery[5] = gallery[11]  # equally near to everything
  labels, groups = rng.integers(0, 6, 23), rng.integers(0, 3, 23)
  place = np.arange(23)
  excluded = np.eye(23, dtype=bool) | ((labels[:, None] == labels) & (groups[:, None] == groups))
  found = retrieval.matches(
    *map(jnp.asarray, (labels, labels)), 23, itself=jnp.asarray(place),
    groups=(jnp.asarray(groups), jnp.asarray(groups)),
  )  # fmt: skip
  got = retrieval.summary(
    retrieval.ranks(jnp.asarray(gallery), jnp.asarray(gallery), found, block=block), 5
  )
  want = slow(gallery, gallery, labels, labels, excluded)
  assert got.answerable == len(want)
  if len(want):
    np.testing.assert_allclose(
      [got.mean_ap, got.mean_inp, got.map_at_r], want.mean(0)[:3], atol=1e-6
    )
    np.testing.assert_allclose(got.cmc[-1], (want[:, 3] <= 5).mean(), atol=1e-6)
  assert (jnp.diff(got.cmc) >= 0).all() or not len(want)


def test_perfect_and_unanswerable():
  features, labels = jnp.repeat(jnp.eye(3), 2, 0), jnp.repeat(jnp.arange(3), 2)
  found = retrieval.matches(labels, labels, 2, itself=jnp.arange(6))
  got = retrieval.summary(retrieval.ranks(features, features, found), 3)
  np.testing.assert_allclose([got.mean_ap, got.mean_inp, got.map_at_r, got.top1], 1)
  nobody = retrieval.matches(labels + 10, labels, 2)
  got = retrieval.summary(retrieval.ranks(features, features, nobody), 3)
  assert got.answerable == 0 and got.top1 == 0 and jnp.isnan(got.mean_ap)


def test_top1_counts_queries_without_a_match():
  gallery = jnp.eye(2)
  found = retrieval.matches(jnp.array([0, 7]), jnp.array([0, 1]), 1)
  got = retrieval.summary(retrieval.ranks(gallery, gallery, found), 1)
  assert got.cmc[0] == 1 and got.top1 == 0.5 and got.answerable == 1


@pytest.mark.parametrize("block", [(2, 3), (64, 64)])
def test_neighbours(block):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(17, 5)), jnp.float32)
  near = retrieval.neighbours(x, x, 4, itself=jnp.arange(17), block=block)
  product = np.array(x @ x.T)
  np.fill_diagonal(product, -np.inf)
  np.testing.assert_array_equal(near.place, np.argsort(-product, axis=1)[:, :4])
  np.testing.assert_allclose(near.similarity, -np.sort(-product, axis=1)[:, :4], rtol=1e-5)
  with pytest.raises(ValueError, match="count: 18 of a gallery of 17"):
    retrieval.neighbours(x, x, 18)


def test_memory_of_a_large_gallery_is_that_of_its_blocks():
  count = 100_000
  features = jax.ShapeDtypeStruct((count, 32), jnp.float32)
  labels = jax.ShapeDtypeStruct((count,), jnp.int32)

  def metrics(queries, gallery, labels):
    found = retrieval.matches(labels, labels, 10, itself=jnp.arange(len(labels)))
    return retrieval.summary(retrieval.ranks(queries, gallery, found))

  memory = jax.jit(metrics).lower(features, features, labels).compile().memory_analysis()
  # All products at once would be 40 GB.
  assert memory.temp_size_in_bytes < 100e6
