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

  y: Array | np.ndarray
  test_y: Array | np.ndarray
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
  one = functools.partial(_deal_part, num_classes, settings, size=size, min_examples=min_examples)
  deals: list[Deal] = []
  # Pools of as many clients are dealt out in one program; the larger ones come first.
  for count in sorted({part.clients for part in parts}, reverse=True):
    alike = [k for k, part in enumerate(parts) if part.clients == count]
    stack = lambda name, alike=alike: jnp.stack([getattr(parts[k], name) for k in alike])
    several = jax.vmap(functools.partial(one, count))(
      keys[jnp.array(alike)], stack("y"), stack("test_y")
    )
    deals += [jax.tree.map(lambda x, i=i: x[i], several) for i in range(len(alike))]
  rows = [part.first + deal.rows for part, deal in zip(parts, deals, strict=True)]
  mask = jnp.concatenate([deal.mask for deal in deals])
  own = jnp.zeros((len(mask), test_y.size), bool)
  first = 0
  for part, deal in zip(parts, deals, strict=True):
    held = slice(first, first := first + part.clients)
    own = own.at[held, part.first_test : part.first_test + part.test_y.size].set(deal.own)
  return Deal(jnp.where(mask, jnp.concatenate(rows), 0).astype(jnp.int32), mask, own)


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
  num_classes: int,
  settings: ClientSettings,
  count: int,
  key: Array,
  y: Array,
  test_y: Array,
  *,
  size: int,
  min_examples: int,
) -> Deal:
  """The deal of one pool to `count` clients, drawn until every client has enough."""
  owners = functools.partial(_owners, num_classes, settings, count, y, test_y)
  least = lambda owner: (owner == jnp.arange(count)[:, None]).sum(1).min()

  def again(state: tuple) -> Array:
    attempt, owner, _ = state
    return (attempt < _ATTEMPTS) & (least(owner) < min_examples)

  def redraw(state: tuple) -> tuple:
    return state[0] + 1, *owners(jax.random.fold_in(key, state[0]))

  attempts = (jnp.int32(1), *owners(jax.random.fold_in(key, 0)))
  _, owner, test_owner = jax.lax.while_loop(again, redraw, attempts)
  held = owner == jnp.arange(count)[:, None]
  rows = jnp.argsort(~held, axis=1, stable=True)[:, :size]
  rows = jnp.pad(rows, ((0, 0), (0, size - rows.shape[1])))
  own = test_owner == jnp.arange(count)[:, None]
  return Deal(rows, jnp.arange(size) < held.sum(1, keepdims=True), own)


def _owners(
  num_classes: int, settings: ClientSettings, count: int, y: Array, test_y: Array, key: Array
) -> tuple[Array, Array]:
  """Client of every training and test example, -1 for none."""
  share_key, order_key, test_key = jax.random.split(key, 3)
  order = jax.random.permutation(order_key, y.shape[0])
  test_order = jax.random.permutation(test_key, test_y.shape[0])
  each = settings.classes_per_client
  if each:
    shares = clients.uniform_shares(share_key, num_classes, count, each)
    owner = partition.owner_by_proportions(y, shares, order, min_per_class=0, cumulative=True)
  elif settings.alpha:
    shares = clients.dirichlet_shares(share_key, num_classes, count, settings.alpha)
    owner, shares = partition.owner_below_even_share(y, shares, order)
  else:
    # Equal parts; in a domain, equal parts of every class (code).
    alike = lambda labels: jnp.where(labels < 0, -1, 0) if settings.skew == "labels" else labels
    even = lambda labels, order: partition.owner_evenly(alike(labels), num_classes, count, order)
    return even(y, order), even(test_y, test_order)
  return owner, partition.owner_by_shares(test_y, shares, test_order)
