"""Who holds what: a pool of examples of several domains, dealt out to clients.

A deal is a domain and a mask for every client, so that nothing is copied before a method needs it. All
shapes follow from the pool and the settings, never from the draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from jaxmethods.errors import InputError
from jaxmethods.federated import partition
from jaxmethods.runtime import checks
from jaxmethods.testbeds.federated_images.settings import ClientSettings


class Pool(NamedTuple):
  """Examples of several domains, padded to the largest.

  Attributes:
    x: embeddings or images, (D, n, ...).
    y: labels, (D, n) int32; -1 where there is none.
  """

  x: Shaped[Array, "D n ..."]
  y: Int[Array, "D n"]


class Deal(NamedTuple):
  """The share of every client.

  Attributes:
    domain: row of the pool, (K,) int32.
    mask: examples of that row, (K, n) bool.
  """

  domain: Int[Array, " K"]
  mask: Bool[Array, "K n"]


def pool(parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Pool:
  """Stacks the examples of several domains, float32 and int32.

  Args:
    parts: domain -> x (n, ...), y (n,).
  """
  longest = max(len(y) for _, y in parts.values())

  def padded(array: np.ndarray, value: int) -> np.ndarray:
    extra = [(0, longest - len(array)), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(array, extra, constant_values=value)

  x = np.stack([padded(x, 0) for x, _ in parts.values()])
  y = np.stack([padded(y, -1) for _, y in parts.values()])
  return Pool(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))


def for_skew(whole: Pool, skew: str) -> Pool:
  """Returns the pool that clients draw from: with `skew: labels` all domains as one."""
  if skew != "labels":
    return whole
  return Pool(whole.x.reshape(1, -1, *whole.x.shape[2:]), whole.y.reshape(1, -1))


def client_names(settings: ClientSettings, domains: Sequence[str]) -> list[str]:
  """Returns the clients' names in their order: the domains', numbered where one has several."""
  if settings.skew == "domains":
    return list(domains)
  if settings.skew == "labels":
    return [f"client {k}" for k in range(settings.clients)]
  sizes = clients_of_domains(settings.clients, len(domains))
  return [f"{name}.{k}" for name, size in zip(domains, sizes, strict=True) for k in range(size)]


def check(settings: ClientSettings, y: np.ndarray, num_classes: int) -> None:
  """Checks that the pool can be dealt out as the settings ask; warns of a single client.

  Args:
    settings: of the clients.
    y: labels of `for_skew`'s pool, (D, n).
    num_classes: C.

  Raises:
    InputError: a class with too few examples, fewer clients than domains, classes that do not come out.
  """
  checks.warn_alone(len(y) if settings.skew == "domains" else settings.clients)
  each = settings.classes_per_client
  if each and (each > num_classes or settings.clients * each % num_classes):
    raise InputError(
      f"classes_per_client: {settings.clients} clients with {each} classes each do not share "
      f"{num_classes} classes evenly"
    )
  if settings.skew == "domains" or each:
    return
  if settings.skew == "both" and settings.clients < len(y):
    raise InputError(f"clients: {len(y)} domains need as many, got {settings.clients}")
  for labels, size in zip(y, clients_of_domains(settings.clients, len(y)), strict=True):
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    floor = size * settings.min_per_class
    if (short := np.flatnonzero(counts < floor)).size and settings.skew == "labels":
      raise InputError(
        f"class {short[0]} has {counts[short[0]]} examples: {size} clients with at least "
        f"{settings.min_per_class} each need {floor}"
      )


def draw_clients(
  key: Array, y: Int[Array, "D n"], num_classes: int, settings: ClientSettings
) -> Deal:
  """Deals the examples of `for_skew`'s pool out to the clients.

  Args:
    key: of the draw.
    y: labels, (D, n); -1 where there is none.
    num_classes: C.
    settings: of the clients; see `check`.
  """
  alpha, floor = settings.alpha, settings.min_per_class
  match settings.skew:
    case "domains":
      return draw_domain_clients(key, y, num_classes, alpha=alpha, min_per_class=floor)
    case "labels":
      return draw_label_clients(
        key, y, num_classes, clients=settings.clients, alpha=alpha, min_per_class=floor,
        classes_per_client=settings.classes_per_client,
      )  # fmt: skip
  return draw_both_clients(
    key, y, num_classes, clients=settings.clients, alpha=alpha, min_per_class=floor
  )


def draw_domain_clients(
  key: Array, y: Int[Array, "D n"], num_classes: int, *, alpha: float, min_per_class: int
) -> Deal:
  """One client a domain; class c of domain g keeps int(P[g, c] n) examples, P[:, c] ~ Dir(alpha).

  Args:
    key: of the draw.
    y: labels, (D, n); -1 where there is none.
    num_classes: C.
    alpha: concentration; 0: every domain keeps all.
    min_per_class: examples of each class that a domain keeps at least, where it has them.
  """
  num_domains = len(y)
  share_key, order_key = jax.random.split(key)
  counts = jax.nn.one_hot(y, num_classes, dtype=jnp.int32).sum(1)  # (D, C)
  kept = counts
  if alpha:
    shares = jax.random.dirichlet(share_key, jnp.full(num_domains, alpha), (num_classes,)).T
    kept = jnp.minimum(
      jnp.maximum(partition.domain_label_counts(shares, counts), min_per_class), counts
    )
  keys = jax.random.split(order_key, num_domains)
  rank = jax.vmap(lambda k, labels: partition.class_rank(_order(k, labels), labels))(keys, y)
  limit = jnp.take_along_axis(kept, jnp.maximum(y, 0), 1)
  return Deal(jnp.arange(num_domains, dtype=jnp.int32), (y >= 0) & (rank < limit))


def draw_label_clients(
  key: Array,
  y: Int[Array, "1 n"],
  num_classes: int,
  *,
  clients: int,
  alpha: float,
  min_per_class: int,
  classes_per_client: int = 0,
) -> Deal:
  """Label skew over one pool: a floor per class, the rest cut by P[c] ~ Dir(alpha).

  Args:
    key: of the draw.
    y: labels, (1, n); -1 where there is none.
    num_classes: C.
    clients: K.
    alpha: concentration; 0: even parts.
    min_per_class: examples of each class for each client.
    classes_per_client: see `uniform_shares`; in place of `alpha` and `min_per_class` unless 0.
  """
  share_key, order_key = jax.random.split(key)
  if classes_per_client:
    shares = uniform_shares(share_key, num_classes, clients, classes_per_client)
    min_per_class = 0
  else:
    shares = dirichlet_shares(share_key, num_classes, clients, alpha)
  owner = partition.owner_by_proportions(
    y[0],
    shares,
    _order(order_key, y[0]),
    min_per_class=min_per_class,
    cumulative=classes_per_client > 0,
  )
  return Deal(jnp.zeros(clients, jnp.int32), owner == jnp.arange(clients)[:, None])


def draw_both_clients(
  key: Array,
  y: Int[Array, "D n"],
  num_classes: int,
  *,
  clients: int,
  alpha: float,
  min_per_class: int,
) -> Deal:
  """Several clients a domain, which they share out with label skew: `draw_label_clients` in each.

  The clients are spread evenly; the first domains have one more where they do not come out (inferred).

  Args:
    key: of the draw.
    y: labels, (D, n); -1 where there is none.
    num_classes: C.
    clients: K, at least D.
    alpha: concentration; 0: even parts.
    min_per_class: examples of each class for each client, where its domain has as many.
  """
  sizes = clients_of_domains(clients, len(y))
  masks = []
  for domain, (each, size) in enumerate(zip(jax.random.split(key, len(y)), sizes, strict=True)):
    deal = draw_label_clients(
      each, y[domain : domain + 1], num_classes, clients=size, alpha=alpha,
      min_per_class=min_per_class,
    )  # fmt: skip
    masks.append(deal.mask)
  return Deal(jnp.asarray(np.repeat(np.arange(len(y)), sizes), jnp.int32), jnp.concatenate(masks))


def dirichlet_shares(
  key: Array, num_classes: int, clients: int, alpha: float
) -> Float[Array, "C K"]:
  """Draws every class's shares of the clients from Dir(alpha); even ones with alpha 0: (C, K)."""
  if not alpha:
    return jnp.full((num_classes, clients), 1 / clients)
  return jax.random.dirichlet(key, jnp.full(clients, alpha), (num_classes,))


def uniform_shares(
  key: Array, num_classes: int, clients: int, classes_per_client: int
) -> Float[Array, "C K"]:
  """Draws `classes_per_client` different classes for every client; the holders share a class evenly.

  Returns:
    (C, K), rows sum to 1; `clients` * `classes_per_client` is a multiple of C.
  """
  holders = clients * classes_per_client // num_classes  # of every class
  # Consecutive places of a repeated permutation are different classes.
  places = jnp.tile(jax.random.permutation(key, num_classes), holders)
  held = jax.nn.one_hot(places.reshape(clients, classes_per_client), num_classes).sum(1)
  return held.T / holders


def class_counts(
  y: Int[Array, "K n"], mask: Bool[Array, "K n"], num_classes: int
) -> Int[Array, "K C"]:
  """Counts every client's examples of each class."""
  return (jax.nn.one_hot(y, num_classes, dtype=jnp.int32) * mask[..., None]).sum(1)


def _order(key: Array, y: Int[Array, " n"]) -> Int[Array, " n"]:
  return jax.random.permutation(key, y.shape[0])


def clients_of_domains(clients: int, domains: int) -> list[int]:
  """Clients of every domain, as even as can be."""
  return [clients // domains + (d < clients % domains) for d in range(domains)]
