"""Metrics of a ranked gallery that is never held against all queries at once.

A metric needs only the ranks of a query's own matches, and these are few: the gallery goes by in blocks,
and each block counts how many of its images are nearer than each match. What is excluded (the query
itself, images of its own camera or sighting) shares the identity of the query, so it is among the few
as well and is taken off the counts at the end.

Features have length 1 and are compared by their product; for such, Euclidean distance ranks alike.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmethods.stats import shapes

_QUERIES, _GALLERY = 256, 4096  # rows and columns that are compared at once


class Matches(NamedTuple):
  """Gallery images of the identity of each query, (Q, M) each; M is the size of the largest identity.

  Attributes:
    place: in the gallery.
    real: whether the entry is one; rows are padded.
    excluded: whether it is left out of the ranking.
  """

  place: Array
  real: Array
  excluded: Array


class Retrieval(NamedTuple):
  """Metrics over the queries that have a match, () each unless said; NaN if none has.

  Attributes:
    mean_ap: mean average precision.
    mean_inp: mean of matches / rank of the last match.
    map_at_r: mean of the average precision within the first R, R the number of matches.
    cmc: share of queries with a match among the first 1, 2, ..., (K,).
    top1: share with a match in front, of all queries: one without a match is wrong.
    answerable: number of queries that have a match.
  """

  mean_ap: Array
  mean_inp: Array
  map_at_r: Array
  cmc: Array
  top1: Array
  answerable: Array


class Neighbours(NamedTuple):
  """Nearest gallery images of each query, best first, (Q, k): places, and products of the features."""

  place: Array
  similarity: Array


def matches(
  labels: Int[Array, " q"],
  gallery_labels: Int[Array, " g"],
  most: int,
  *,
  itself: Int[Array, " q"] | None = None,
  groups: tuple[Int[Array, " q"], Int[Array, " g"]] | None = None,
) -> Matches:
  """Finds the images of each query's identity.

  Args:
    labels: identities of the queries.
    gallery_labels: of the gallery.
    most: images of the largest identity of the gallery; more are not seen.
    itself: place of the query in the gallery, -1 where it is not there.
    groups: camera or sighting of queries and gallery: matches of the query's own are excluded.
  """
  shapes.check(labels=(labels, "q"), gallery_labels=(gallery_labels, "g"))
  order = jnp.argsort(gallery_labels, stable=True)
  ranked = gallery_labels[order]
  first = jnp.searchsorted(ranked, labels, side="left")
  end = jnp.searchsorted(ranked, labels, side="right")
  column = first[:, None] + jnp.arange(most)
  real = column < end[:, None]
  place = order[jnp.minimum(column, len(gallery_labels) - 1)]
  excluded = jnp.zeros(place.shape, bool)
  if itself is not None:
    excluded |= place == itself[:, None]
  if groups is not None:
    own, others = groups
    shapes.check(labels=(labels, "q"), own=(own, "q"))
    excluded |= others[place] == own[:, None]
  return Matches(place, real, real & excluded)


def ranks(
  queries: Float[Array, "q d"],
  gallery: Float[Array, "g d"],
  found: Matches,
  *,
  block: tuple[int, int] = (_QUERIES, _GALLERY),
) -> Float[Array, "q m"]:
  """Ranks every match among what is not excluded; the nearest image has rank 1.

  Args:
    queries: features of length 1.
    gallery: likewise.
    found: see `matches`.
    block: queries and gallery images that are compared at once: the memory is their product.

  Returns:
    Ranks, infinite where there is no match. Equally near images are ranked by place.
  """
  shapes.check(queries=(queries, "q d"), gallery=(gallery, "g d"), place=(found.place, "q m"))
  rows, columns = min(block[0], len(queries)), min(block[1], len(gallery))
  blocks = _padded(gallery, columns)

  def one(part: tuple[Array, Matches]) -> Array:
    mine, these = part
    return _ranks(mine, blocks, len(gallery), these)

  parts = jax.tree.map(lambda x: _padded(x, rows), (queries, found))
  return jax.lax.map(one, parts).reshape(-1, found.place.shape[1])[: len(queries)]


def _ranks(queries: Array, blocks: Array, size: int, found: Matches) -> Array:
  """`ranks` of few queries against (blocks, columns, d)."""
  columns = blocks.shape[1]
  starts = columns * jnp.arange(len(blocks))

  def nearness(part: Array, start: Array) -> Array:
    similarity = jnp.matmul(queries, part.T, precision="highest")
    return jnp.where(start + jnp.arange(columns) < size, similarity, -jnp.inf)

  def find(own: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
    part, start = block
    here = found.place - start
    value = jnp.take_along_axis(nearness(part, start), jnp.clip(here, 0, columns - 1), axis=1)
    return jnp.where((here >= 0) & (here < columns), value, own), None

  def count(before: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
    part, start = block
    near, place = nearness(part, start), start + jnp.arange(columns)

    def match(one: tuple[Array, Array]) -> Array:
      value, own = (x[:, None] for x in one)
      return ((near > value) | ((near == value) & (place < own))).sum(1)

    return before + jax.lax.map(match, (own.T, found.place.T)).T, None

  # The same product twice instead of once and kept; it is made alike, so a match finds itself in it.
  own, _ = jax.lax.scan(find, jnp.full(found.place.shape, -jnp.inf), (blocks, starts))
  before, _ = jax.lax.scan(count, jnp.zeros(found.place.shape, jnp.int32), (blocks, starts))
  rank = before + 1 - _nearer(own, found, found.excluded)
  return jnp.where(found.real & ~found.excluded, rank, jnp.inf)


def _nearer(own: Array, found: Matches, counted: Bool[Array, "q m"]) -> Array:
  """Counts the matches of `counted` in front of each match."""
  mine, other = own[:, :, None], own[:, None, :]
  earlier = found.place[:, None, :] < found.place[:, :, None]
  return (counted[:, None, :] & ((other > mine) | ((other == mine) & earlier))).sum(2)


def summary(rank: Float[Array, "q m"], top: int = 10) -> Retrieval:
  """Computes the metrics from the ranks of the matches.

  Args:
    rank: see `ranks`.
    top: K, the last rank of the CMC.
  """
  shapes.check(rank=(rank, "q m"))
  rank = jnp.sort(rank, axis=1)
  real = jnp.isfinite(rank)
  total = real.sum(1)
  has = total > 0
  precision = jnp.where(real, jnp.arange(1, rank.shape[1] + 1) / jnp.where(real, rank, 1), 0)
  some = jnp.maximum(total, 1)
  answerable = has.sum()
  mean = lambda each: jnp.where(has, each, 0).sum() / jnp.where(answerable > 0, answerable, jnp.nan)
  last = jnp.where(real, rank, 0).max(1)
  within = jnp.where(rank <= some[:, None], precision, 0)
  cmc = rank[:, :1] <= jnp.arange(1, top + 1)
  return Retrieval(
    mean_ap=mean(precision.sum(1) / some),
    mean_inp=mean(total / jnp.maximum(last, 1)),
    map_at_r=mean(within.sum(1) / some),
    cmc=jax.vmap(mean, 1)(cmc),
    top1=(rank[:, 0] == 1).mean(),
    answerable=answerable,
  )


def neighbours(
  queries: Float[Array, "q d"],
  gallery: Float[Array, "g d"],
  count: int,
  *,
  itself: Int[Array, " q"] | None = None,
  block: tuple[int, int] = (_QUERIES, _GALLERY),
) -> Neighbours:
  """Finds the nearest images of a gallery that goes by in blocks.

  Args:
    queries: features of length 1.
    gallery: likewise.
    count: how many, at most the size of the gallery (less one with `itself`).
    itself: place of the query in the gallery, which is left out; -1 where it is not there.
    block: as in `ranks`.

  Raises:
    ValueError: the gallery is smaller than `count`.
  """
  shapes.check(queries=(queries, "q d"), gallery=(gallery, "g d"))
  if not 1 <= count <= len(gallery) - (itself is not None):
    raise ValueError(f"count: {count} of a gallery of {len(gallery)}")
  rows, columns = min(block[0], len(queries)), min(block[1], len(gallery))
  itself = jnp.full(len(queries), -1) if itself is None else itself
  blocks = _padded(gallery, columns)
  places = jnp.arange(blocks.shape[0] * columns).reshape(-1, columns)

  def one(part: tuple[Array, Array]) -> Neighbours:
    mine, left_out = part

    def nearer(best: Neighbours, block: tuple[Array, Array]) -> tuple[Neighbours, None]:
      images, place = block
      similarity = jnp.matmul(mine, images.T, precision="highest")
      allowed = (place < len(gallery)) & (place != left_out[:, None])
      both = jnp.concatenate([best.similarity, jnp.where(allowed, similarity, -jnp.inf)], axis=1)
      where = jnp.concatenate([best.place, jnp.broadcast_to(place, similarity.shape)], axis=1)
      value, which = jax.lax.top_k(both, count)
      return Neighbours(jnp.take_along_axis(where, which, axis=1), value), None

    start = Neighbours(
      jnp.zeros((rows, count), places.dtype), jnp.full((rows, count), -jnp.inf, mine.dtype)
    )
    return jax.lax.scan(nearer, start, (blocks, places))[0]

  found = jax.lax.map(one, (_padded(queries, rows), _padded(itself, rows)))
  return jax.tree.map(lambda x: x.reshape(-1, count)[: len(queries)], found)


def _padded(x: Array, rows: int) -> Array:
  """Cuts (n, ...) into (blocks, rows, ...), zeros behind the last."""
  missing = -len(x) % rows
  return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))).reshape(-1, rows, *x.shape[1:])
