"""Ragged clients -> at most a few size buckets of equal shape, with sample masks.

Padding costs work, shapes cost compilation. Where all clients of a group step together (vmap), sorting
them by size and cutting the order into at most four buckets halves the padded work on skewed
clients; more buckets compile longer for little. Where clients run one after the other (CPU) steps
that hold only padding are skipped, and one bucket is as fast and compiles four times faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes
from jaxmethods.trees import PyTree

MASK = "mask"


class Buckets(NamedTuple):
  """Padded clients in groups, ready for `engine.federated_round`.

  Attributes:
    data: per bucket a dict of (clients, length, ...) arrays, "mask" (clients, length) bool among them;
      padded entries are zero.
    weights: per bucket the example counts, (clients,) float32.
    ids: per bucket the position of each client in the list it came from, (clients,) int32.
  """

  data: tuple[dict[str, jax.Array], ...]
  weights: tuple[Float[Array, " clients"], ...]
  ids: tuple[Int[Array, " clients"], ...]


def bucket_clients(
  clients: Sequence[Mapping[str, np.ndarray]], *, max_buckets: int | None = None, multiple: int = 1
) -> Buckets:
  """Sorts clients by size into buckets, pads each to its largest client and puts them on the device.

  Args:
    clients: for each client, arrays that share their first axis (its examples); all clients have
      the same names and trailing shapes.
    max_buckets: the most buckets, so the most shapes that the round compiles; None: 1 on CPU, else 4.
    multiple: bucket lengths are multiples of this, normally the batch size.

  Returns:
    Buckets from small to large clients; fewer than the most where sizes coincide.

  Raises:
    InputError: naming the client, if one is empty or its arrays disagree.

  >>> buckets = jm.federated.bucket_clients([{"x": np.ones(3)}, {"x": np.ones(5)}], max_buckets=1)
  >>> buckets.data[0]["x"].shape, buckets.data[0]["mask"].sum(1).tolist()
  ((2, 5), [3, 5])
  """
  sizes = _client_sizes(clients)
  if max_buckets is None:
    max_buckets = 1 if jax.default_backend() == "cpu" else 4
  lengths = -(-sizes // multiple) * multiple
  order = np.argsort(lengths, kind="stable")
  data, weights, ids = [], [], []
  for members in np.split(order, bucket_cuts(lengths[order], max_buckets)):
    length = lengths[members].max()
    rows = {
      name: np.stack([_pad(np.asarray(clients[k][name]), length) for k in members])
      for name in clients[0]
    }
    rows[MASK] = np.arange(length) < sizes[members, None]
    data.append(jax.device_put(rows))
    weights.append(jnp.asarray(sizes[members], jnp.float32))
    ids.append(jnp.asarray(members, jnp.int32))
  return Buckets(tuple(data), tuple(weights), tuple(ids))


def bucket_cuts(lengths: Int[np.ndarray, " n"], max_buckets: int) -> Int[np.ndarray, " cuts"]:
  """Cuts sorted lengths so that padding each part to its maximum costs least.

  Exact, by dynamic programming over the distinct lengths.

  Args:
    lengths: (n,) ascending integers.
    max_buckets: the most parts.

  Returns:
    Cut positions as for `np.split`, at most max_buckets - 1 of them.

  Raises:
    ValueError: `lengths` has another rank, or there may be no part.
  """
  shapes.check(lengths=(lengths, "n"))
  if max_buckets < 1:
    raise ValueError(f"max_buckets: must be at least 1, got {max_buckets}")
  values, counts = np.unique(lengths, return_counts=True)
  ends = np.concatenate([[0], np.cumsum(counts)])
  # cost[j]: cheapest total padded length of the first j distinct values, with the parts allowed so far.
  cost = np.concatenate([[0.0], np.full(len(values), np.inf)])
  origins = []
  for _ in range(min(max_buckets, len(values))):
    # Row j, column i: values i..j-1 form the last part, padded to the largest of them.
    span = (ends[1:, None] - ends[None, :-1]) * values[:, None].astype(float)
    total = np.where(span > 0, cost[None, :-1] + span, np.inf)
    origins.append(total.argmin(1))
    cost = np.concatenate([[0.0], total.min(1)])
  cuts, end = [], len(values)
  for origin in reversed(origins):
    end = origin[end - 1]
    if end == 0:
      break
    cuts.append(ends[end])
  return np.array(cuts[::-1], int)


def merge_shapes(
  num: int, cost: Callable[[tuple[int, ...]], float], slack: float
) -> list[tuple[int, ...]]:
  """Groups items that are to share one shape: as few groups as padding allows.

  For shapes that sizes alone do not order, such as those of graph batches. Greedy: the two groups whose
  union adds least are merged, while all groups cost at most (1 + slack) times the items by themselves.

  Args:
    num: number of items.
    cost: ascending members of a group -> what they cost in one shape; infinity forbids it.
    slack: how much more the whole may cost, >= 0.

  Returns:
    The ascending members of each group, groups in the order of their first members.
  """
  groups: list[tuple[int, ...]] = [(i,) for i in range(num)]
  costs = {group: cost(group) for group in groups}
  room = slack * sum(costs.values())
  while len(groups) > 1:
    added = {}
    for a, b in itertools.combinations(groups, 2):
      union = tuple(sorted(a + b))
      if union not in costs:
        costs[union] = cost(union)
      added[a, b] = costs[union] - costs[a] - costs[b]
    (a, b), extra = min(added.items(), key=lambda item: item[1])
    if extra > room:
      break
    room -= extra
    groups = sorted([group for group in groups if group not in (a, b)] + [tuple(sorted(a + b))])
  return groups


def pad_clients(
  groups: PyTree, weights: Float[Array, " clients"], multiple: int
) -> tuple[PyTree, Float[Array, " padded"]]:
  """Appends padding clients of weight 0 until a group's size is a multiple of `multiple`.

  Args:
    groups: pytree stacked over the clients of one group, e.g. (client states, data, ids).
    weights: (clients,) example counts.
    multiple: the devices on the mesh axis "clients".

  Returns:
    Both, padded; padding clients repeat the rows of the first.

  Raises:
    ValueError: the number of clients differs.

  >>> _, weights = jm.federated.pad_clients({"x": jnp.ones((3, 2))}, jnp.ones(3), 4)
  >>> weights.tolist()
  [1.0, 1.0, 1.0, 0.0]
  """
  shapes.check(weights=(weights, "clients"))
  shapes.check_leading(len(weights), groups=groups)
  extra = -weights.shape[0] % multiple
  return repeat_first(groups, extra), jnp.pad(weights, (0, extra))


def repeat_first(tree: PyTree, extra: int) -> PyTree:
  """Appends `extra` copies of the first row: unlike zeros that is a client which surely works."""
  if not extra:
    return tree
  return jax.tree.map(lambda x: jnp.concatenate([x, *[x[:1]] * extra]), tree)


def _client_sizes(clients: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
  if not clients:
    raise InputError("no clients")
  names, sizes = set(clients[0]), []
  for k, client in enumerate(clients):
    if set(client) != names:
      raise InputError(f"client {k} has arrays {sorted(client)}, client 0 has {sorted(names)}")
    if MASK in client:
      raise InputError(f"client {k}: the name {MASK!r} is taken by the sample mask")
    size = {len(x) for x in client.values()}
    if len(size) != 1:
      raise InputError(f"client {k}: arrays of different lengths {sorted(size)}")
    for name, x in client.items():
      if np.shape(x)[1:] != np.shape(clients[0][name])[1:]:
        raise InputError(
          f"client {k}: {name} has shape {np.shape(x)[1:]} per example, client 0 has "
          f"{np.shape(clients[0][name])[1:]}"
        )
    if not (n := size.pop()):
      raise InputError(f"client {k} is empty: every client needs at least one example")
    sizes.append(n)
  return np.array(sizes)


def _pad(x: np.ndarray, length: int) -> np.ndarray:
  return np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)])
