"""Two runs compared where they have learnt equally much, not where they stop."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods.stats import shapes


def lost_at(
  gained: Float[Array, " n"], kept: Float[Array, " n"], level: float | Float[Array, ""]
) -> Float[Array, ""]:
  """Reads off how much of `kept` was lost when `gained` first reached a level (ours).

  Both are linear between two points of the run.

  Args:
    gained: (n,) what is learnt, along a run; the first point is the start.
    kept: (n,) what may be forgotten, at the same points.
    level: of `gained`.

  Returns:
    (), the start of `kept` minus its value at the level, in its unit; 0 where the run starts at the
    level or above, NaN where it never reaches it.

  Raises:
    ValueError: the lengths differ.

  >>> float(jm.stats.lost_at(jnp.array([0.0, 50, 70]), jnp.array([90.0, 80, 40]), 60))
  30.0
  """
  shapes.check(gained=(gained, "n"), kept=(kept, "n"))
  gained, kept = jnp.asarray(gained, float), jnp.asarray(kept, float)
  there = gained >= level
  after = jnp.argmax(there)
  before = jnp.maximum(after - 1, 0)
  rise = gained[after] - gained[before]
  share = jnp.where(rise > 0, (level - gained[before]) / jnp.where(rise > 0, rise, 1), 1)
  here = kept[before] + share * (kept[after] - kept[before])
  return jnp.where(there.any(), kept[0] - here, jnp.nan)
