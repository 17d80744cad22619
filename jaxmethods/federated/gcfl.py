"""GCFL: federated averaging inside clusters that the server finds from the updates.

Xie, Ma, Xiong, Yang. Federated graph classification over non-IID graphs. NeurIPS 2021.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.federated.algorithm import FederatedAlgorithm, Params
from jaxmethods.federated.algorithms import Loss, Options, fedavg
from jaxmethods.stats import shapes
from jaxmethods.trees import Key, PyTree


class ClusteredState(NamedTuple):
  """Server state.

  Attributes:
    params: shared parameters of every client, stacked (clients, ...); equal inside a cluster.
    cluster: (clients,) int32; a cluster is named after its first member.
    round: rounds done, int32.
  """

  params: Params
  cluster: Int[Array, " clients"]
  round: Int[Array, ""]


def gcfl(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  num_clients: int,
  *,
  mean_bound: float = 0.01,
  max_bound: float = 0.1,
  first_rounds: int = 20,
  min_size: int = 3,
  **options: Unpack[Options],
) -> FederatedAlgorithm:
  """FedAvg inside clusters; a cluster whose updates cancel while single ones stay large is cut in two.

  Each round a client sends its update dW_k; each member of a cluster then adds the mean update of its
  cluster, weighted by example counts. A client absent in the round of a cut stays in the first half.

  Args:
    loss: as in `fedavg`.
    optimizer: as in `fedavg`.
    num_clients: clients in all groups, padding clients included.
    mean_bound: eps1; a cluster is cut if ||mean dW|| is below it, ...
    max_bound: eps2; ... max ||dW|| above this, ...
    first_rounds: ... more rounds than this have come, the current one counted, ...
    min_size: ... and at least this many members took part.
    **options: of `fedavg` (shared, proximal, local_epochs, ...); not its penalty or server optimiser.
  """
  base = fedavg(loss, optimizer, **options)

  def init(params: Params, key: Key) -> ClusteredState:
    start = base.init(params, key).params
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), start)
    return ClusteredState(stacked, jnp.zeros(num_clients, jnp.int32), jnp.int32(0))

  def download(server: ClusteredState, index: jax.Array) -> Params:
    return jax.tree.map(lambda x: x[index], server.params)

  def local(message, client, data, key):
    client, trained, metrics = base.local(message, client, data, key)
    return client, jax.tree.map(jnp.subtract, trained, message), metrics

  def server(state: ClusteredState, updates: Params, weights: jax.Array) -> ClusteredState:
    if weights.shape != (num_clients,):
      raise ValueError(
        f"gcfl was made for {num_clients} clients, but got {weights.shape[0]} uploads "
        "(a compact cohort cannot be used: give taking_part instead)"
      )
    cluster = jax.lax.cond(
      state.round + 1 > first_rounds,
      lambda: split_clusters(state.cluster, updates, weights > 0, mean_bound, max_bound, min_size),
      lambda: state.cluster,
    )
    share = (cluster[:, None] == cluster) * weights
    share /= jnp.maximum(share.sum(1, keepdims=True), jnp.finfo(share.dtype).tiny)
    params = jax.tree.map(lambda w, dw: w + jnp.tensordot(share, dw, 1), state.params, updates)
    return ClusteredState(params, cluster, state.round + 1)

  return FederatedAlgorithm(init, download, local, server, base.params)


def split_clusters(
  cluster: Int[Array, " clients"],
  updates: PyTree,
  present: Bool[Array, " clients"],
  mean_bound: float = 0.01,
  max_bound: float = 0.1,
  min_size: int = 3,
) -> Int[Array, " clients"]:
  """Cuts every cluster that GCFL's two bounds mark, by minimum cut on similarity cos + 1.

  Args:
    cluster: (clients,) int32, each cluster named after its first member.
    updates: pytree of (clients, ...) arrays.
    present: (clients,) bool; the others neither count nor vote.
    mean_bound: cut if the norm of the mean update is below it,
    max_bound: and the largest norm of an update above this,
    min_size: and at least this many members are present.

  Returns:
    The new (clients,) cluster names.

  Raises:
    ValueError: the number of clients differs.
  """
  shapes.check(cluster=(cluster, "clients"), present=(present, "clients"))
  shapes.check_leading(len(cluster), updates=updates)
  flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(updates)], 1)
  names = jnp.arange(cluster.shape[0])
  members = (cluster == names[:, None]) & present  # row c: cluster c
  size = members.sum(1)
  norm = jnp.linalg.norm(flat, axis=1)
  mean_norm = jnp.linalg.norm(members.astype(flat.dtype) @ flat, axis=1) / jnp.maximum(size, 1)
  max_norm = jnp.where(members, norm, 0).max(1)
  marked = (mean_norm < mean_bound) & (max_norm > max_bound) & (size >= min_size)
  unit = flat / jnp.maximum(norm, jnp.finfo(flat.dtype).tiny)[:, None]
  similarity = unit @ unit.T + 1

  def cut(cluster, job):
    member, is_marked = job

    def halve():
      side, _ = minimum_cut(similarity, member)
      # The half with the first member keeps the name, the other one gets its own first member's.
      side = jnp.where(side[member.argmax()], member & ~side, side)
      return jnp.where(side, side.argmax().astype(cluster.dtype), cluster)

    return jax.lax.cond(is_marked, halve, lambda: cluster), None

  return jax.lax.scan(cut, cluster, (members, marked))[0]


def minimum_cut(
  weights: Float[Array, "n n"], member: Bool[Array, " n"] | None = None
) -> tuple[Bool[Array, " n"], Float[Array, ""]]:
  """Finds a minimum cut of a weighted graph (Stoer and Wagner 1997), with fixed loops so that it jits.

  Takes n^2 sequential steps of n operations: fine for hundreds of nodes.

  Args:
    weights: (n, n) symmetric, not negative; the diagonal is not read.
    member: (n,) bool, the nodes of the graph; None: all. At least two.

  Returns:
    One side of the cut as (n,) bool, and the weight of the cut.

  Raises:
    ValueError: `weights` is not square, or `member` has another length.
  """
  shapes.check(weights=(weights, "n n"))
  n = weights.shape[0]
  nodes = jnp.arange(n)
  member = jnp.ones(n, bool) if member is None else member
  shapes.check(member=(member, f"{n}"))
  weights = jnp.where(member[:, None] & member & ~jnp.eye(n, dtype=bool), weights, 0)

  def phase(_, state):
    weights, alive, merged, best_side, best = state

    def add(_, order):
      # Add the node that is most tightly connected to those added so far.
      tightness, added, last, _ = order
      node = jnp.where(alive & ~added, tightness, -jnp.inf).argmax().astype(jnp.int32)
      left = (alive & ~added).any()
      step = (tightness + weights[node], added.at[node].set(True), node, last)
      return jax.tree.map(lambda a, b: jnp.where(left, a, b), step, order)

    start = (jnp.zeros(n, weights.dtype), jnp.zeros(n, bool), jnp.int32(0), jnp.int32(0))
    _, _, last, before = jax.lax.fori_loop(0, n, add, start)
    value = weights[last].sum()
    possible = alive.sum() > 1
    better = possible & (value < best)
    best_side = jnp.where(better, merged[last], best_side)
    best = jnp.where(better, value, best)
    # Merge the last node into the one before it.
    joined = (weights[last] + weights[before]).at[before].set(0).at[last].set(0)
    contracted = weights.at[before].set(joined).at[:, before].set(joined)
    contracted = contracted.at[last].set(0).at[:, last].set(0)
    return (
      jnp.where(possible, contracted, weights),
      jnp.where(possible, alive & (nodes != last), alive),
      jnp.where(possible, merged.at[before].set(merged[before] | merged[last]), merged),
      best_side,
      best,
    )

  state = (
    weights,
    member,
    jnp.eye(n, dtype=bool),
    jnp.zeros(n, bool),
    jnp.asarray(jnp.inf, weights.dtype),
  )
  *_, side, value = jax.lax.fori_loop(0, n - 1, phase, state)
  return side, value
