"""A search for leaks: graphs, rights, grants, injections and coalitions drawn by the thousand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.methods.epeagent import policy, taint

AGENTS, FIELDS, ROUNDS = 4, 7, 3


@functools.lru_cache(maxsize=2)
def draw(count):
  """Access (n, F, N), grants of one user (n, 1, F, N), networks and conducts of conversations."""
  random = np.random.default_rng(29)
  flip = lambda share, *shape: random.random((count, *shape)) < share
  cells = (count, 1, FIELDS, AGENTS)
  given = flip(0.2, 1, FIELDS, AGENTS)
  last = np.where(given, random.integers(-1, ROUNDS, cells), policy.NEVER)
  grants = policy.Grants(last, random.integers(-1, 2, cells))
  # A permutation, so that edges lead both ways; what is drawn has no cycle.
  order = random.permuted(np.tile(np.arange(AGENTS), (count, 1)), axis=1)
  later = (order[:, :, None] < order[:, None])[:, None]
  network = taint.Network(
    flip(0.6, ROUNDS, AGENTS, AGENTS) & later,
    flip(0.4, ROUNDS, AGENTS, AGENTS) & ~np.eye(AGENTS, dtype=bool),
    flip(0.8, ROUNDS, AGENTS),
  )
  parts = (flip(0.5, ROUNDS, AGENTS, FIELDS), flip(0.4, ROUNDS, AGENTS, FIELDS), flip(0.3, AGENTS))
  return flip(0.4, FIELDS, AGENTS), grants, network, taint.Conduct(*parts)


def rights(access, grants):
  """Rights in every round of task 0, (R, F, N)."""
  now = lambda t: policy.allowed(access, grants, round=t, task=0)[0]
  return jax.vmap(now)(jnp.arange(ROUNDS))


def search(protection, draws, expires=True):
  """Counts, by channel, the (conversation, field) pairs that leak, in one mapped program.

  Args:
    protection: what the server does.
    draws: number of conversations.
    expires: whether the server lets grants expire.
  """

  @jax.jit
  @jax.vmap
  def leaking(access, grants, network, conduct):
    true = rights(access, grants)
    stale = grants._replace(last=jnp.where(grants.last >= 0, ROUNDS, grants.last))
    seen = true if expires else rights(access, stale)
    return taint.leaks(taint.flow(seen, network, conduct, protection), true)

  found = leaking(*draw(draws))
  return {channel: int(leaked.sum()) for channel, leaked in found.items()}
