"""Who holds what, as rows of the training examples: the partitions of the published code.

A client that has its even share gets no more (`federated.partition.owner_below_even_share`); the test
examples are dealt out by the same shares. A draw that leaves a client with too few is drawn again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from jaxmethods.errors import InputError
from jaxmethods.federated import partition
from jaxmethods.testbeds.federated_images import clients
from jaxmethods.testbeds.federated_images.settings import ClientSettings

_ATTEMPTS = 100


class Deal(NamedTuple):
  """The share of every client.

  Attributes:
    rows: training examples of all domains, one after the other, (K, n) int32.
    mask: which of them are real, (K, n); they come first.
    own: test examples with the client's own domain and labels, (K, D * n).
  """

  rows: Int[Array, "K n"]
  mask: Bool[Array, "K n"]
  own: Bool[Array, "K m"]


class _Part(NamedTuple):
  """A pool and the clients that share it out: `first` of all examples, and of the tests."""

  y: Array
  test_y: Array
  clients: int
  first: int
  first_test: int


def capacity(settings: ClientSettings, y: np.ndarray, num_classes: int) -> int:
  """Returns how many examples a client can have at most; y (D, n), -1 where there is none."""
  most = 0
  for part in _parts(settings, y, y):
    labels = np.asarray(part.y)
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    each = settings.classes_per_client
    if each:
      holders = part.clients * each // num_classes
      bound = each * -(-int(counts.max()) // holders) + each
    elif not settings.alpha:
      bound = sum(-(-int(count) // part.clients) for count in counts)
    else:
      # Below its even share, a client may get the whole of the next class.
      bound = -(-int(counts.sum()) // part.clients) + int(counts.max()) + num_classes
    most = max(most, min(bound, int(counts.sum())))
  return most


def draw(
  key: Array,
  y: Int[Array, "D n"],
  test_y: Int[Array, "D m"],
  num_classes: int,
  settings: ClientSettings,
  *,
  size: int,
  min_examples: int,
) -> Deal:
  """Deals the examples out to the clients.

  Args:
    key: of the draw.
    y: labels of the training examples, -1 where there is none.
    test_y: of the test examples, likewise.
    num_classes: C.
    settings: of the clients.
    size: of `capacity`.
    min_examples: draws with a client below it are repeated, 100 times at most.
  """
  parts = _parts(settings, y, test_y)
  keys = jax.random.split(key, len(parts))
  deals = [
    _deal_part(each, part, num_classes, settings, size=size, min_examples=min_examples)
    for each, part in zip(keys, parts, strict=True)
  ]
  rows = jnp.concatenate([deal.rows for deal in deals])
  mask = jnp.concatenate([deal.mask for deal in deals])
  own = jnp.zeros((len(rows), test_y.size), bool)
  first = 0
  for part, deal in zip(parts, deals, strict=True):
    held = slice(first, first := first + part.clients)
    own = own.at[held, part.first_test : part.first_test + part.test_y.size].set(deal.own)
  return Deal(rows, mask, own)


def check(deal: Deal, names: list[str], min_examples: int) -> None:
  """Checks a draw.

  Raises:
    InputError: a client with fewer examples than it must have, after all attempts; it is named.
  """
  sizes = np.asarray(deal.mask).sum(1)
  if (small := np.flatnonzero(sizes < min_examples)).size:
    k = int(small[0])
    raise InputError(
      f"min_examples: {names[k]} gets {sizes[k]} of at least {min_examples} examples; raise alpha, or "
      "have fewer clients"
    )


def _parts(settings: ClientSettings, y: np.ndarray | Array, test_y: np.ndarray | Array) -> list:
  """Pools of clients: all domains as one, or every domain by itself."""
  if settings.skew == "labels":
    return [_Part(y.reshape(-1), test_y.reshape(-1), settings.clients, 0, 0)]
  domains = len(y)
  sizes = (
    [1] * domains
    if settings.skew == "domains"
    else clients.clients_of_domains(settings.clients, domains)
  )
  n, m = y.shape[1], test_y.shape[1]
  return [_Part(y[d], test_y[d], sizes[d], d * n, d * m) for d in range(domains)]


def _deal_part(
  key: Array,
  part: _Part,
  num_classes: int,
  settings: ClientSettings,
  *,
  size: int,
  min_examples: int,
) -> Deal:
  """The deal of one pool, drawn until every client has enough."""
  owners = functools.partial(_owners, part, num_classes, settings)
  least = lambda owner: (owner == jnp.arange(part.clients)[:, None]).sum(1).min()

  def again(state: tuple) -> Array:
    attempt, owner, _ = state
    return (attempt < _ATTEMPTS) & (least(owner) < min_examples)

  def redraw(state: tuple) -> tuple:
    return state[0] + 1, *owners(jax.random.fold_in(key, state[0]))

  attempts = (jnp.int32(1), *owners(jax.random.fold_in(key, 0)))
  _, owner, test_owner = jax.lax.while_loop(again, redraw, attempts)
  held = owner == jnp.arange(part.clients)[:, None]
  rows = jnp.argsort(~held, axis=1, stable=True)[:, :size]
  rows = jnp.pad(rows, ((0, 0), (0, size - rows.shape[1])))
  held = jnp.arange(size) < held.sum(1, keepdims=True)
  own = test_owner == jnp.arange(part.clients)[:, None]
  return Deal(jnp.where(held, part.first + rows, 0).astype(jnp.int32), held, own)


def _owners(
  part: _Part, num_classes: int, settings: ClientSettings, key: Array
) -> tuple[Array, Array]:
  """Client of every training and test example, -1 for none."""
  share_key, order_key, test_key = jax.random.split(key, 3)
  order, test_order = (
    jax.random.permutation(k, labels.shape[0])
    for k, labels in ((order_key, part.y), (test_key, part.test_y))
  )
  if settings.classes_per_client:
    shares = clients.uniform_shares(
      share_key, num_classes, part.clients, settings.classes_per_client
    )
    owner = partition.owner_by_proportions(part.y, shares, order, min_per_class=0, cumulative=True)
  elif not settings.alpha:
    # Equal parts; in a domain, equal parts of every class (code).
    labels = [jnp.where(y < 0, -1, 0 if settings.skew == "labels" else y)
              for y in (part.y, part.test_y)]  # fmt: skip
    pairs = zip(labels, (order, test_order), strict=True)
    even = [partition.owner_evenly(y, num_classes, part.clients, o) for y, o in pairs]
    return even[0], even[1]
  else:
    shares = clients.dirichlet_shares(share_key, num_classes, part.clients, settings.alpha)
    owner, shares = partition.owner_below_even_share(part.y, shares, order)
  return owner, partition.owner_by_shares(part.test_y, shares, test_order)
