"""Retrieval over profiles and memory: hashed n-gram embeddings; rights mask the scores before top-k."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.methods.epeagent.minimise import normalise

_FNV_OFFSET, _FNV_PRIME = 2166136261, 16777619
_COUNTED = 16  # rows up to which ranks are counted, pair by pair, which needs no sort


def embed(texts: Sequence[str], width: int = 256) -> np.ndarray:
  """Embeds texts by signed hashed character trigrams (ours; exact, offline, no learning).

  Args:
    texts: n of them.
    width: d.

  Returns:
    (n, d) float64, rows of length 1, or zero for an empty text.
  """
  vectors = np.zeros((len(texts), width))
  for row, text in zip(vectors, texts, strict=True):
    for word in normalise(text).split():
      for code in _trigrams(word):
        row[code % width] += -1 if code >> 31 else 1
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.where(lengths == 0, 1, lengths)


@functools.lru_cache(maxsize=65536)
def _trigrams(word: str) -> tuple[int, ...]:
  wrapped = f"#{word}#"
  return tuple(fnv1a(wrapped[i : i + 3]) for i in range(len(wrapped) - 2))


def fnv1a(text: str) -> int:
  """Hashes the UTF-8 bytes of a text to 32 bits (Fowler, Noll, Vo; variant 1a)."""
  code = _FNV_OFFSET
  for byte in text.encode():
    code = ((code ^ byte) * _FNV_PRIME) & 0xFFFFFFFF
  return code


def top_k(
  scores: Float[Array, " M"], mask: Bool[Array, " M"], k: int
) -> tuple[Int[Array, " k"], Bool[Array, " k"]]:
  """Chooses the k best rows among the permitted ones; the mask goes in before the choice.

  Args:
    scores: (M,); NaN counts as the lowest.
    mask: (M,), rows that may be returned.
    k: number of places.

  Returns:
    Row numbers (k,), best first, ties to the smaller number, -1 where none is left; and which are valid.

  Raises:
    ValueError: `k` is not positive.
  """
  chex.assert_rank([scores, mask], 1)
  chex.assert_equal_shape([scores, mask])
  if k < 1:
    raise ValueError(f"k: must be at least 1, got {k}")
  # Contents of masked rows must change nothing, not even an order among them.
  low = jnp.finfo(scores.dtype).min
  z = jnp.where(mask, jnp.maximum(jnp.where(jnp.isnan(scores), low, scores), low), -jnp.inf)
  valid = jnp.arange(k) < mask.sum()
  choose = _counted if z.shape[0] <= _COUNTED else _sorted
  return jnp.where(valid, choose(z, k), -1), valid


def _counted(z: jax.Array, k: int) -> jax.Array:
  """Ranks by counting who is ahead; elementwise over whatever axes are mapped."""
  rows = range(z.shape[0])
  ahead = lambda i, j: (z[j] > z[i]) if j > i else (z[j] >= z[i])
  zero = jnp.zeros_like(z[0], jnp.int32)
  ranks = [sum((ahead(i, j).astype(jnp.int32) for j in rows if j != i), zero) for i in rows]
  places = [
    sum((jnp.where(rank == r, i, 0) for i, rank in enumerate(ranks)), zero) for r in range(k)
  ]
  return jnp.stack(places)


def _sorted(z: jax.Array, k: int) -> jax.Array:
  count = min(k, z.shape[0])
  return jnp.pad(jax.lax.top_k(z, count)[1], (0, k - count)).astype(jnp.int32)


def retrieve(
  items: Float[Array, "M d"], queries: Float[Array, "Q d"], mask: Bool[Array, "N M"], k: int
) -> tuple[Int[Array, "N Q k"], Bool[Array, "N Q k"]]:
  """Finds the rows that each agent may see and each question needs.

  Args:
    items: (M, d), profile entries or memory items.
    queries: (Q, d).
    mask: (N, M), rights of the agents; owner and padding are parts of it.
    k: rows a question gets.

  Returns:
    Row numbers and validity, (N, Q, k).
  """
  chex.assert_equal_shape_suffix([items, queries], 1)
  chex.assert_equal_shape_prefix([items, mask.T], 1)
  # (M, Q): the questions lie side by side in memory, so that counting is one pass over them.
  scores = jnp.einsum("md,qd->mq", items, queries)
  questions = jax.vmap(functools.partial(top_k, k=k), (1, None), (-1, -1))
  found, valid = jax.vmap(questions, (None, 0))(scores, mask)
  return jnp.swapaxes(found, 1, 2), jnp.swapaxes(valid, 1, 2)


# (U, M, d), (Q, d) shared by all users, (U, N, M) -> (U, N, Q, k).
retrieve_users = jax.vmap(retrieve, (0, None, 0, None))


def match_roles(
  roles: Float[Array, "N d"], fields: Float[Array, "F d"], threshold: float = 0.3
) -> Bool[Array, "F N"]:
  """Matches self-descriptions to fields (M2, `embedding`; inferred): cosine at least `threshold`."""
  chex.assert_equal_shape_suffix([roles, fields], 1)
  return fields @ roles.T >= threshold


def precision_recall(
  matched: Bool[Array, "F N"], labels: Bool[Array, "F N"]
) -> tuple[jax.Array, jax.Array]:
  """Compares matched rights with labelled ones; 1 where there is nothing to be wrong about."""
  chex.assert_equal_shape([matched, labels])
  right, share = (
    (matched & labels).sum(),
    lambda n: jnp.where(n == 0, 1.0, right / jnp.maximum(n, 1)),
  )
  return share(matched.sum()), share(labels.sum())
