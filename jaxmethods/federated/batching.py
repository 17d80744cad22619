"""From one client's padded examples to the batches of one epoch, inside the compiled round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Batches(NamedTuple):
  """One client's local steps.

  Attributes:
    batch: pytree of (steps, ...) arrays; row i is what the loss sees in step i, sample mask included.
    real: (steps,) bool; a step that is not real changes nothing.
  """

  batch: Any
  real: jax.Array


Batching = Callable[[Any, jax.Array], Batches]


def prebatched(data: Batches, key: jax.Array) -> Batches:
  """Batches formed once, the same in every epoch."""
  del key
  return data


def shuffled(batch_size: int, *, drop_last: bool = False) -> Batching:
  """Batches of a fresh permutation in every epoch, the remainder batch kept unless `drop_last`.

  The returned function takes {"mask": (n,) bool, name: (n, ...)}, with n a multiple of nothing in
  particular, and gives batches with the same names. Real examples come first, so padding only adds steps
  that are not real, and the order of the real ones depends on the key alone, not on n.
  """

  def batches(data: dict[str, jax.Array], key: jax.Array) -> Batches:
    mask = data["mask"]
    steps = -(-mask.shape[0] // batch_size)
    # Threefry's i-th number does not depend on how many are drawn, so padding cannot change the order.
    draw = jax.random.bits(key, mask.shape) >> 1
    order = jnp.argsort(jnp.where(mask, draw, jnp.uint32(2**32 - 1)))
    order = jnp.pad(order, (0, steps * batch_size - mask.shape[0]), constant_values=-1)
    order = order.reshape(steps, batch_size)
    batch = {name: x[order] for name, x in data.items()}
    batch["mask"] &= order >= 0
    return Batches(batch, batch["mask"].all(1) if drop_last else batch["mask"].any(1))

  return batches
