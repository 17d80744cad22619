"""Measures of the survey: specialisation E, stabilisation F, and their summaries."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods.stats import shapes


def summary(
  source_before: Float[Array, " U"],
  source_after: Float[Array, " U"],
  target_before: Float[Array, ""],
  target_after: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
  """Computes the scores of one tuned model.

  Args:
    source_before: (U,) scores of the pretrained model on the tasks that are not tuned.
    source_after: (U,) of the tuned model.
    target_before: score of the pretrained model on the target.
    target_after: of the tuned one.

  Returns:
    "Source", mean over the U tasks; "Target"; "E", gain on the target (paper); "F", mean change on
    the U tasks, negative where it forgets (inferred sign); "O" = E + F (paper); "Avg", mean of
    Source and Target; "H", their harmonic mean, 0 where both are.

  Raises:
    ValueError: without any task, or for wrong shapes.
  """
  shapes.check(
    source_before=(source_before, "U"),
    source_after=(source_after, "U"),
    target_before=(target_before, ""),
    target_after=(target_after, ""),
  )
  if source_before.size == 0:
    raise ValueError("no upstream task: nothing says what was forgotten")
  source = source_after.mean()
  gain, change = target_after - target_before, (source_after - source_before).mean()
  total = source + target_after
  harmonic = jnp.where(total > 0, 2 * source * target_after / jnp.where(total > 0, total, 1), 0.0)
  return {
    "Source": source,
    "Target": target_after,
    "E": gain,
    "F": change,
    "O": gain + change,
    "Avg": total / 2,
    "H": harmonic,
  }
