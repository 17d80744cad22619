"""Who holds what: clients of a source of arrays, each with a test of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmethods.data import records, sources
from jaxmethods.data.records import ArrayData
from jaxmethods.errors import InputError
from jaxmethods.federated import partition

Arrays = dict[str, np.ndarray]
# Splits of a source that are no domains.
_TRAINING = ("train", "training", "all")
_TESTING = ("test", "testing")
_ASIDE = ("validation", "val", "valid")
OWN = "client "  # how `local.load_npz` names the clients of an archive


class Deal(NamedTuple):
  """How examples are dealt out; see the config."""

  split: str
  clients: int
  alpha: float
  shards_per_client: int
  min_examples: int
  test_share: float
  seed: int


class Holdings(NamedTuple):
  """The clients.

  Attributes:
    names: K.
    train: per client, arrays that share their first axis.
    test: per client likewise, perhaps of length 0.
    published: test examples of the source itself, {} where it has none.
    num_classes: C.
    about: the line for reports.
  """

  names: list[str]
  train: list[Arrays]
  test: list[Arrays]
  published: Arrays
  num_classes: int
  about: str


class Pool(NamedTuple):
  """All examples of a source.

  Attributes:
    arrays: x (n, ...), y (n,).
    group: (n,) int, domain or client of each example.
    groups: their names.
    published: as in `Holdings`.
    num_classes: C.
    about: the line for reports.
  """

  arrays: Arrays
  group: np.ndarray
  groups: list[str]
  published: Arrays
  num_classes: int
  about: str


def load(name: str, image_size: int) -> Pool:
  """Reads a source of arrays.

  Raises:
    InputError: data that are missing or cannot be used.
  """
  if name == "embedded:digit-domains":
    splits, sets = sources.load_domains(name)
    classes = max(data.num_classes for data in sets)
  else:
    data: ArrayData = sources.load_arrays(name, image_size=image_size or None)
    splits, sets, classes = data.splits, [data], data.num_classes
  shapes = {x.shape[1:] for x, _ in splits.values()}
  if len(shapes) > 1:
    raise InputError(f"{name}: examples of different shapes {sorted(shapes)}")
  own = {k: v for k, v in splits.items() if k not in (*_TESTING, *_ASIDE)}
  if not own:
    raise InputError(f"{name}: has no training examples; its splits are {', '.join(splits)}")
  given = [splits[k] for k in _TESTING if k in splits]
  published = {"x": given[0][0], "y": given[0][1]} if given else {}
  x, y = (np.concatenate(parts) for parts in zip(*own.values(), strict=True))
  group = np.repeat(np.arange(len(own)), [len(labels) for _, labels in own.values()])
  about = records.describe(sets)
  if aside := [k for k in _ASIDE if k in splits]:
    about += f"; the split {aside[0]} is not used"
  return Pool({"x": x, "y": y}, group, list(own), published, classes, about)


def deal_out(pool: Pool, deal: Deal, name: str) -> Holdings:
  """Deals a pool out to clients, each with a part of its own set aside to be tested on.

  Args:
    pool: all examples.
    deal: how.
    name: of the source, for errors.

  Raises:
    InputError: a deal that the data do not allow.
  """
  how = deal.split if deal.split != "auto" else _natural(pool.groups)
  parts, names = _parts(pool, deal, how, name)
  train, test = zip(
    *(_held_out(part, deal.test_share, [deal.seed, k]) for k, part in enumerate(parts)), strict=True
  )
  said = {
    "clients": "its own clients", "domains": "by domain", "iid": "i.i.d.",
    "dirichlet": f"Dirichlet({deal.alpha:g}) label skew",
    "shards": f"{deal.shards_per_client} shards of sorted labels each",
  }[how]  # fmt: skip
  warn_of_short(names, [len(part) for part in parts])
  take = lambda rows: {key: x[rows] for key, x in pool.arrays.items()}
  about = (
    f"{pool.about}; {len(names)} clients ({said}) with {min(map(len, parts))} to "
    f"{max(map(len, parts))} examples, {sum(map(len, test))} of {sum(map(len, parts))} tested on"
  )
  return Holdings(
    names, list(map(take, train)), list(map(take, test)), pool.published, pool.num_classes, about
  )


def warn_of_short(names: Sequence[str], sizes: Sequence[int]) -> None:
  """Says which clients have one example, so that nothing of them is tested."""
  short = [name for name, size in zip(names, sizes, strict=True) if size < 2]
  if short:
    more = f" and {len(short) - 1} others have" if len(short) > 1 else " has"
    print(
      f"warning: {short[0]}{more} one example: trained on, with no test of its own",
      file=sys.stderr,
    )
  if len(names) == 1:
    print("warning: one client only: there is nobody to share with", file=sys.stderr)


def stacked(clients: Sequence[Mapping[str, np.ndarray]], multiple: int = 1) -> Arrays:
  """Pads clients to the largest: (K, n, ...) with "mask" (K, n); they may be empty.

  Args:
    clients: arrays that share their first axis.
    multiple: of which n is one.
  """
  sizes = np.array([len(next(iter(client.values()))) for client in clients])
  length = max(-(-int(sizes.max()) // multiple), 1) * multiple
  rows: Arrays = {"mask": np.arange(length) < sizes[:, None]}
  for key, first in clients[0].items():
    rows[key] = np.zeros((len(clients), length, *first.shape[1:]), first.dtype)
    for row, client in zip(rows[key], clients, strict=True):
      row[: len(client[key])] = client[key]
  return rows


def _natural(groups: Sequence[str]) -> str:
  if all(group.startswith(OWN) for group in groups):
    return "clients"
  return "domains" if len(groups) > 1 else "dirichlet"


def _parts(pool: Pool, deal: Deal, how: str, name: str) -> tuple[list[np.ndarray], list[str]]:
  """Returns the examples of every client, and the clients' names."""
  own = _natural(pool.groups) == "clients"
  if how == "clients":
    if not own:
      raise InputError(
        f"split: {name} does not say who its clients are: an npz with x, y and client (n,) does; "
        f"it has the splits {', '.join(pool.groups[:6])}"
      )
    return [np.flatnonzero(pool.group == k) for k in range(len(pool.groups))], pool.groups
  if how == "domains" and (own or len(pool.groups) < 2):
    raise InputError(f"split: {name} has no domains; it has {', '.join(pool.groups[:6])}")
  count, seed, labels = deal.clients, deal.seed, pool.arrays.get("y", pool.group)
  floor = {"min_examples": deal.min_examples}
  try:
    match how:
      case "domains":
        parts = partition.by_domain(pool.group, count, seed, **floor)
      case "dirichlet":
        parts = partition.dirichlet(labels, count, seed, alpha=deal.alpha, **floor)
      case "shards":
        each = deal.shards_per_client
        parts = partition.shards(labels, count, seed, shards_per_client=each, **floor)
      case _:
        parts = partition.iid(len(labels), count, seed, **floor)
  except InputError as error:
    raise InputError(str(error).replace("num_clients:", "clients:")) from None
  if how != "domains":
    return parts, [f"client {k}" for k in range(count)]
  domain = [pool.groups[pool.group[part[0]]] for part in parts]
  seen: dict[str, int] = {}
  names = []
  for each in domain:
    names.append(f"{each}.{seen.get(each, 0)}" if count > len(pool.groups) else each)
    seen[each] = seen.get(each, 0) + 1
  return parts, names


def _held_out(part: np.ndarray, share: float, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Splits a client's examples; at least one to train on, and one to test on where there are two."""
  order = np.random.default_rng(seed).permutation(part)
  count = min(max(round(share * len(part)), 1), len(part) - 1)
  return np.sort(order[count:]), np.sort(order[:count])
