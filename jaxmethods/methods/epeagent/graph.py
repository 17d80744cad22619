"""Who speaks to whom: directed graphs of a round, their order, their cycles, nodes that come and go."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

CYCLIC = -1


def present(adjacency: Bool[Array, "N N"], active: Bool[Array, " N"]) -> Bool[Array, "N N"]:
  """Keeps edges between agents that take part in the round: an absent one neither sends nor receives."""
  chex.assert_equal_shape_prefix([adjacency, active], 1)
  return adjacency & active[:, None] & active[None]


def levels(adjacency: Bool[Array, "N N"]) -> Int[Array, " N"]:
  """Finds the place of every agent in topological order; agents of one level may run side by side.

  Args:
    adjacency: (N, N), [i, j]: i speaks to j in the same round (spatial edges, eq. 2).

  Returns:
    (N,), length of the longest path that ends there; `CYCLIC` for agents on or behind a cycle.
  """
  count = adjacency.shape[0]
  chex.assert_shape(adjacency, (count, count))
  level = jnp.full(count, CYCLIC, jnp.int32)
  for depth in range(count):
    waiting = jnp.any(adjacency & (level == CYCLIC)[:, None], 0)
    level = jnp.where((level == CYCLIC) & ~waiting, depth, level)
  return level


def is_dag(adjacency: Bool[Array, "N N"]) -> Bool[Array, ""]:
  """Tells whether a graph (N, N) has no cycle, self-loops included (eqs. 2, 3)."""
  return jnp.all(levels(adjacency) != CYCLIC)


def from_edges(edges: Sequence[tuple[int, int]], agents: Sequence[int]) -> np.ndarray:
  """Makes the matrix of edges between numbered agents.

  Args:
    edges: (from, to).
    agents: numbers of the agents.

  Returns:
    (N, N) bool.

  Raises:
    ValueError: an edge names no agent, or leads from an agent to itself.
  """
  matrix = np.zeros((len(agents), len(agents)), bool)
  place = {agent: i for i, agent in enumerate(agents)}
  for source, target in edges:
    for end in (source, target):
      if end not in place:
        raise ValueError(f"{source}->{target}: {end} is no agent, agents are {list(agents)}")
    if source == target:
      raise ValueError(f"{source}->{target}: an agent cannot speak to itself")
    matrix[place[source], place[target]] = True
  return matrix


def check_dag(matrix: np.ndarray, agents: Sequence[int]) -> None:
  """Refuses a graph with a cycle.

  Raises:
    ValueError: with the agents of a cycle.
  """
  behind = np.asarray(levels(jnp.asarray(matrix))) == CYCLIC
  # What is behind a cycle but on none has no way back: peel it off from the other end.
  ahead = np.asarray(levels(jnp.asarray(matrix.T))) == CYCLIC
  if behind.any():
    named = [agent for agent, on in zip(agents, behind & ahead, strict=True) if on]
    raise ValueError(f"the graph has a cycle through agents {', '.join(map(str, named))}")
