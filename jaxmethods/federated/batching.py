"""From one client's padded examples to the batches of one epoch, inside the compiled round."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxmethods.federated.algorithm import ClientData
from jaxmethods.trees import Key, PyTree

Batch: TypeAlias = PyTree  # what one step's loss sees, sample mask included


class Batches(NamedTuple):
  """One client's local steps.

  Attributes:
    batch: pytree of (steps, ...) arrays; row i is what the loss sees in step i, sample mask included.
    real: (steps,) bool; a step that is not real changes nothing.
  """

  batch: PyTree
  real: Bool[Array, " steps"]


Batching: TypeAlias = Callable[[ClientData, Key], Batches]


def prebatched(data: Batches, key: Key) -> Batches:
  """Returns batches that were formed once, the same in every epoch.

  >>> batches = {"x": jnp.ones((2, 4, 3)), "mask": jnp.ones((2, 4), bool)}
  >>> jm.federated.prebatched(batches, key) is batches
  True
  """
  del key
  return data


def shuffled(batch_size: int, *, drop_last: bool = False) -> Batching:
  """Cuts a fresh permutation into batches in every epoch.

  Args:
    batch_size: examples in a batch.
    drop_last: whether a last batch that is not full is left out.

  Returns:
    Function of {"mask": (n,) bool, name: (n, ...)}, any n, that gives batches with the same names. Real
    examples come first: padding only adds steps that are not real, and the order of the real examples
    depends on the key alone, not on n.

  >>> data = {"x": jnp.arange(6), "mask": jnp.ones(6, bool)}
  >>> batches = jm.federated.shuffled(4)(data, key)
  >>> jax.tree.map(jnp.shape, batches)
  Batches(batch={'mask': (2, 4), 'x': (2, 4)}, real=(2,))
  """

  def batches(data: dict[str, jax.Array], key: Key) -> Batches:
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
