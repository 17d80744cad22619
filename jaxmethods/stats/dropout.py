"""Dropout whose mask costs nothing to store and next to nothing to draw on a CPU.

Measured (three layers Dense(128)-ReLU-dropout on 4368 rows, jitted forward + backward, one thread):
no dropout 15.6 ms and 9 MB of temporaries, hash 15.7 ms and 9 MB, threefry 33.5 ms and 22 MB.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxmethods.trees import Key

Generator = Literal["hash", "threefry"]


def _mix(x: jax.Array) -> jax.Array:
  """Spreads a uint32 over all its bits (the 'lowbias32' constants of C. Wellons)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _two_seeds(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two scalars, each depending on every word of the key."""
  first, second = jnp.uint32(0x9E3779B9), jnp.uint32(0x85EBCA6B)
  for word in jax.random.key_data(key).ravel():
    first, second = _mix(first ^ word), _mix(second + word * jnp.uint32(0xC2B2AE35))
  return first, second


def hash_bits(key: Key, shape: tuple[int, ...]) -> UInt32[Array, " ..."]:
  """Hashes the position of each entry to uint32 bits, two multiply-xorshift rounds.

  Good enough for dropout, not for anything that needs a random number generator proper.

  Args:
    key: typed key.
    shape: shape of the result, fewer than 2^32 entries.

  Returns:
    uint32 of that shape.
  """
  first, second = _two_seeds(key)
  size = 1
  for dim in shape:
    size *= dim
  x = jax.lax.iota(jnp.uint32, size).reshape(shape) ^ first
  # One seed before each round: with a single seed the masks of two keys would be shifts (or
  # XOR-permutations) of each other.
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) ^ second
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _apply(x: jax.Array, keep: jax.Array, rate: float) -> jax.Array:
  return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


def hash_dropout(x: Float[Array, " ..."], rate: float, key: Key) -> Float[Array, " ..."]:
  """Dropout by a counter hash: fuses into its neighbours, and the gradient hashes again.

  Args:
    x: any shape.
    rate: share of entries set to zero, in [0, 1).
    key: typed key.

  Returns:
    `x / (1 - rate)` with a `rate` share of zeros, the shape and dtype of `x`.
  """
  threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))

  def drop(x, key):
    return _apply(x, hash_bits(key, x.shape) >= threshold, rate)

  # Only the key is kept for the backward pass, also inside a scan.
  return jax.checkpoint(drop, prevent_cse=False)(x, key)


def dropout(
  x: Float[Array, " ..."], rate: float, key: Key, generator: Generator | None = None
) -> Float[Array, " ..."]:
  """Sets a `rate` share of the entries to zero and scales the rest by 1 / (1 - rate).

  Args:
    x: any shape.
    rate: in [0, 1); 0 returns `x`.
    key: typed key; one mask per key.
    generator: "hash" or "threefry" (`jax.random.bernoulli`); default hash on CPU, threefry elsewhere.

  Returns:
    The shape and dtype of `x`.

  Raises:
    ValueError: if `rate` is outside [0, 1) or the generator is unknown.
  """
  if not 0.0 <= rate < 1.0:
    raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
  if rate == 0.0:
    return x
  if generator is None:
    generator = "hash" if jax.default_backend() == "cpu" else "threefry"
  if generator == "hash":
    return hash_dropout(x, rate, key)
  if generator == "threefry":
    return _apply(x, jax.random.bernoulli(key, 1.0 - rate, x.shape), rate)
  raise ValueError(f"dropout generator must be 'hash' or 'threefry', got {generator!r}")
