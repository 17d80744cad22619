"""Splitting one data set over clients: one index array per client (or how many of each class)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes

Array = TypeVar("Array", np.ndarray, jax.Array)


def iid(
  num_examples: int, num_clients: int, seed: int, *, min_examples: int = 1
) -> list[np.ndarray]:
  """Deals a permutation of the examples out evenly; sizes differ by at most one.

  >>> [len(part) for part in jm.federated.iid(10, 3, seed=0)]
  [4, 3, 3]
  """
  _check_request(num_examples, num_clients, min_examples)
  order = np.random.default_rng(seed).permutation(num_examples)
  return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet(
  labels: Sequence[int] | np.ndarray,
  num_clients: int,
  seed: int,
  *,
  alpha: float = 0.5,
  min_examples: int = 1,
) -> list[np.ndarray]:
  """Label skew: the shares of each class over the clients are drawn from Dirichlet(alpha).

  Hsu, Qi, Brown 2019, arXiv 1909.06335. Clients left with fewer than `min_examples` are topped up one
  example at a time from the currently largest client.

  Args:
    labels: (n,) integers.
    num_clients: number of clients.
    seed: of the split.
    alpha: concentration; small is skewed, large is iid.
    min_examples: every client gets at least this many.

  Raises:
    InputError: if the request cannot be met.

  >>> parts = jm.federated.dirichlet([0, 0, 0, 1, 1, 1], 2, seed=0, alpha=0.1)
  >>> sorted(np.concatenate(parts).tolist())
  [0, 1, 2, 3, 4, 5]
  """
  labels = _check_labels(labels, "labels")
  _check_request(len(labels), num_clients, min_examples)
  if not 0 < alpha < np.inf:
    raise InputError(f"alpha: must be positive and finite, got {alpha}")
  rng = np.random.default_rng(seed)
  parts: list[list[int]] = [[] for _ in range(num_clients)]
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    cuts = (np.cumsum(rng.dirichlet([alpha] * num_clients))[:-1] * len(members)).astype(int)
    for part, share in zip(parts, np.split(members, cuts), strict=True):
      part.extend(share.tolist())
  sizes = np.array([len(part) for part in parts])
  for k in np.flatnonzero(sizes < min_examples):
    while sizes[k] < min_examples:
      largest = sizes.argmax()
      parts[k].append(parts[largest].pop())
      sizes[k] += 1
      sizes[largest] -= 1
  return [np.sort(part) for part in parts]


def owner_by_proportions(
  labels: Int[jax.Array, " n"],
  proportions: Float[jax.Array, "C clients"],
  shuffled: Int[jax.Array, " n"],
  *,
  min_per_class: int = 1,
  cumulative: bool = False,
) -> Int[jax.Array, " n"]:
  """Label skew with a floor: the single-domain partition of GGEUR (code), to be traced.

  Of every class each client first gets `min_per_class` examples, in order; the rest is cut by the
  class's proportions, rounded, the last client taking the remainder. A class with fewer examples than
  the floor needs goes to the first clients.

  Args:
    labels: (n,) integers; other labels than 0..C-1 go to nobody.
    proportions: share of each client, (C, clients), rows sum to 1.
    shuffled: examples in random order, (n,).
    min_per_class: examples of each class for each client.
    cumulative: round the cumulated shares, so that a client without a share gets nothing of the rest.

  Returns:
    Client of every example, (n,) int32; -1 for nobody.

  Raises:
    ValueError: a wrong shape.
  """
  shapes.check(
    labels=(labels, "n"), proportions=(proportions, "C clients"), shuffled=(shuffled, "n")
  )
  num_classes, num_clients = proportions.shape
  floor = num_clients * min_per_class
  known = (labels >= 0) & (labels < num_classes)
  label = jnp.where(known, labels, 0)
  rest = jnp.maximum(jnp.bincount(label, known.astype(jnp.int32), length=num_classes) - floor, 0)
  if cumulative:
    ends = jnp.rint(jnp.cumsum(proportions, 1) * rest[:, None])[:, :-1]
  else:
    ends = jnp.cumsum(jnp.rint(proportions * rest[:, None]), 1)[:, :-1]
  # Rounding up can ask for more than there is; the published code then counts below zero.
  ends = jnp.minimum(ends.astype(jnp.int32), rest[:, None])
  rank = class_rank(shuffled, labels)
  owner = (ends[label] <= (rank - floor)[:, None]).sum(1)
  if min_per_class:
    owner = jnp.where(rank < floor, rank // min_per_class, owner)
  return jnp.where(known, owner, -1).astype(jnp.int32)


def class_rank(order: Int[jax.Array, " n"], labels: Int[jax.Array, " n"]) -> Int[jax.Array, " n"]:
  """Returns every example's place among those of its label in the given order."""
  by_class = order[jnp.argsort(labels[order], stable=True)]
  ordered = labels[by_class]
  start = jnp.searchsorted(ordered, ordered, side="left")
  rank = jnp.arange(len(labels), dtype=jnp.int32) - start.astype(jnp.int32)
  return jnp.zeros(labels.shape, jnp.int32).at[by_class].set(rank)


def deal_below_even_share(
  labels: Int[np.ndarray, " n"],
  proportions: Float[np.ndarray, "C clients"],
  shuffled: Sequence[Int[np.ndarray, " class"]],
) -> list[np.ndarray]:
  """Label skew in which no client that has its even share gets more: the partition of RAHFL (code).

  Args:
    labels: (n,) integers 0..C-1.
    proportions: share of each client, (C, clients), rows sum to 1.
    shuffled: the examples of each class in random order.

  Returns:
    One index array per client; they may be empty, the published code then draws again.

  Raises:
    ValueError: a wrong shape.
  """
  shapes.check(labels=(labels, "n"), proportions=(proportions, "C clients"))
  num_clients = proportions.shape[1]
  parts: list[list[int]] = [[] for _ in range(num_clients)]
  for shares, members in zip(proportions, shuffled, strict=True):
    below = np.array([len(part) < len(labels) / num_clients for part in parts])
    shares = shares * below
    cuts = (np.cumsum(shares / shares.sum()) * len(members)).astype(int)[:-1]
    for part, share in zip(parts, np.split(members, cuts), strict=True):
      part.extend(share.tolist())
  return [np.array(part, int) for part in parts]


def owner_below_even_share(
  labels: Int[jax.Array, " n"],
  proportions: Float[jax.Array, "C clients"],
  shuffled: Int[jax.Array, " n"],
) -> tuple[Int[jax.Array, " n"], Float[jax.Array, "C clients"]]:
  """Label skew in which no client that has its even share gets more, to be traced (FPL, code).

  Args:
    labels: (n,) integers; other labels than 0..C-1 go to nobody and do not count.
    proportions: share of each client, (C, clients), rows sum to 1.
    shuffled: examples in random order, (n,).

  Returns:
    Client of every example, (n,) int32, -1 for nobody; and the shares by which they were dealt, for a
    test split.

  Raises:
    ValueError: a wrong shape.
  """
  shapes.check(
    labels=(labels, "n"), proportions=(proportions, "C clients"), shuffled=(shuffled, "n")
  )
  num_classes, num_clients = proportions.shape
  counts = _class_counts(jnp.asarray(labels), num_classes)

  def deal(held: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    share, count = xs
    below = share * (held * num_clients < counts.sum())
    # All that are below may have a share of 0 in float32: then they share evenly.
    below = jnp.where(below.sum() > 0, below, 1.0 * (held * num_clients < counts.sum()))
    share = below / below.sum()
    ends = _ends(share, count)
    return held + jnp.diff(ends, prepend=0), share

  start = jnp.zeros(num_clients, jnp.int32)
  _, dealt = jax.lax.scan(deal, start, (proportions, counts))
  return owner_by_shares(labels, dealt, shuffled), dealt


def owner_by_shares(
  labels: Int[jax.Array, " n"],
  shares: Float[jax.Array, "C clients"],
  shuffled: Int[jax.Array, " n"],
) -> Int[jax.Array, " n"]:
  """Cuts every class at the cumulated shares, rounded down; (n,) int32, -1 for nobody, to be traced."""
  shapes.check(labels=(labels, "n"), shares=(shares, "C clients"), shuffled=(shuffled, "n"))
  labels = jnp.asarray(labels)
  num_classes = len(shares)
  known = (labels >= 0) & (labels < num_classes)
  ends = jax.vmap(_ends)(shares, _class_counts(labels, num_classes))[:, :-1]
  rank = class_rank(jnp.asarray(shuffled), labels)
  owner = (ends[jnp.where(known, labels, 0)] <= rank[:, None]).sum(1)
  return jnp.where(known, owner, -1).astype(jnp.int32)


def owner_evenly(
  labels: Int[jax.Array, " n"], num_classes: int, num_clients: int, shuffled: Int[jax.Array, " n"]
) -> Int[jax.Array, " n"]:
  """Splits every class in even parts, the first clients with one more; (n,) int32, -1 for nobody.

  Args:
    labels: (n,) integers; other labels than 0..C-1 go to nobody.
    num_classes: C.
    num_clients: number of clients.
    shuffled: examples in random order, (n,).
  """
  labels = jnp.asarray(labels)
  shapes.check(labels=(labels, "n"), shuffled=(shuffled, "n"))
  known = (labels >= 0) & (labels < num_classes)
  counts = _class_counts(labels, num_classes)[jnp.where(known, labels, 0)]
  rank = class_rank(jnp.asarray(shuffled), labels)
  size, more = counts // num_clients, counts % num_clients
  behind = rank - more * (size + 1)
  owner = jnp.where(behind < 0, rank // (size + 1), more + behind // jnp.maximum(size, 1))
  return jnp.where(known, owner, -1).astype(jnp.int32)


def _ends(share: jax.Array, count: jax.Array) -> jax.Array:
  """Cumulated examples of a class's clients, (clients,) int32; the last takes the remainder."""
  ends = jnp.floor(jnp.cumsum(share) * count).astype(jnp.int32)
  return ends.at[-1].set(count)


def _class_counts(labels: jax.Array, num_classes: int) -> jax.Array:
  return (labels[:, None] == jnp.arange(num_classes)).sum(0, dtype=jnp.int32)


def domain_label_counts(proportions: Array, counts: Array) -> Array:
  """Label skew on top of domain skew (Office-Home-LDS): share of each class for the client of a domain.

  Args:
    proportions: (domains, C), columns sum to 1.
    counts: training examples of each domain and class, (domains, C).

  Returns:
    int(proportions * counts), (domains, C).

  Raises:
    ValueError: the shapes differ.
  """
  shapes.check(proportions=(proportions, "domains C"), counts=(counts, "domains C"))
  return (proportions * counts).astype(int)


def shards(
  labels: Sequence[int] | np.ndarray,
  num_clients: int,
  seed: int,
  *,
  shards_per_client: int = 2,
  min_examples: int = 1,
) -> list[np.ndarray]:
  """Pathological skew: examples sorted by label, cut into equal shards, dealt out at random.

  McMahan et al. 2017: with two shards most clients see two classes.

  Args:
    labels: (n,) integers.
    num_clients: number of clients.
    seed: of the deal.
    shards_per_client: shards that each client gets.
    min_examples: every client gets at least this many.

  Raises:
    InputError: if the request cannot be met.

  >>> [len(part) for part in jm.federated.shards([0, 1, 0, 1, 0, 1, 0, 1], 2, seed=0)]
  [4, 4]
  """
  labels = _check_labels(labels, "labels")
  _check_request(len(labels), num_clients, min_examples)
  num_shards = num_clients * shards_per_client
  if shards_per_client < 1 or num_shards > len(labels):
    raise InputError(
      f"shards_per_client: {num_clients} clients with {shards_per_client} shards each need at least "
      f"{num_shards} examples and one shard, got {len(labels)} examples"
    )
  pieces = np.array_split(np.argsort(labels, kind="stable"), num_shards)
  deal = np.random.default_rng(seed).permutation(num_shards).reshape(num_clients, shards_per_client)
  return _checked([np.sort(np.concatenate([pieces[i] for i in d])) for d in deal], min_examples)


def by_domain(
  domains: Sequence[int] | np.ndarray, num_clients: int, seed: int, *, min_examples: int = 1
) -> list[np.ndarray]:
  """Feature skew: every client holds examples of one domain only.

  Client k belongs to the (k mod number of domains)-th domain; the clients of one domain share it evenly.

  Args:
    domains: (n,) integers.
    num_clients: number of clients, at least one per domain.
    seed: of the split inside a domain.
    min_examples: every client gets at least this many.

  Raises:
    InputError: if the request cannot be met.

  >>> [part.tolist() for part in jm.federated.by_domain([0, 1, 0, 1], 2, seed=0)]
  [[0, 2], [1, 3]]
  """
  domains = _check_labels(domains, "domains")
  _check_request(len(domains), num_clients, min_examples)
  names = np.unique(domains)
  if num_clients < len(names):
    raise InputError(f"num_clients: {len(names)} domains need as many clients, got {num_clients}")
  rng = np.random.default_rng(seed)
  parts = [np.empty(0, int)] * num_clients
  for d, name in enumerate(names):
    clients = range(d, num_clients, len(names))
    order = rng.permutation(np.flatnonzero(domains == name))
    for k, part in zip(clients, np.array_split(order, len(clients)), strict=True):
      parts[k] = np.sort(part)
  return _checked(parts, min_examples)


def _check_request(num_examples: int, num_clients: int, min_examples: int) -> None:
  if num_clients < 1:
    raise InputError(f"num_clients: must be at least 1, got {num_clients}")
  if min_examples < 1:
    raise InputError(f"min_examples: must be at least 1, got {min_examples}")
  if num_clients * min_examples > num_examples:
    raise InputError(
      f"num_clients: {num_clients} clients with at least {min_examples} examples each need "
      f"{num_clients * min_examples}, got {num_examples}"
    )


def _check_labels(labels: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise InputError(f"{name}: expected (n,) integers, got {labels.dtype} of shape {labels.shape}")
  return labels


def _checked(parts: list[np.ndarray], min_examples: int) -> list[np.ndarray]:
  for k, part in enumerate(parts):
    if len(part) < min_examples:
      raise InputError(
        f"client {k} would get {len(part)} examples, fewer than min_examples {min_examples}"
      )
  return parts
