"""The matched-target reading of a comparison: what each row has lost where all have learnt as much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmethods.runtime import seeds
from jaxmethods.runtime.experiment import Values
from jaxmethods.stats.matched import lost_at


def reading(results: Sequence[Values], trade: tuple[str, str], reference: str) -> Values | None:
  """Reads off what was lost at one level of what was learnt, seed by seed, interpolated along the run.

  Args:
    results: rows of a comparison; those without "along" are left out.
    trade: (metric that is gained, metric that may be lost).
    reference: row that sets the level: the highest that every seed of it reaches. The first row where
      there is none of this name.

  Returns:
    {"gained", "lost", "level", "steps", "rows": name -> {"reached": seeds, "lost": summary over those
    seeds}}; None where no row has both metrics.
  """
  gained, kept = trade
  paths = {
    row["name"]: [np.asarray(row["along"]["metrics"][name]) for name in trade]
    for row in results
    if "along" in row and all(name in row["along"]["metrics"] for name in trade)
  }
  if not paths:
    return None
  steps = next(row["along"]["steps"] for row in results if row["name"] in paths)
  level = float(paths.get(reference, next(iter(paths.values())))[0].max(0).min())
  rows: Values = {}
  for name, (up, down) in paths.items():
    lost = [float(lost_at(a, b, level)) for a, b in zip(up.T, down.T, strict=True)]
    reached = [value for value in lost if np.isfinite(value)]
    rows[name] = {"reached": len(reached), "lost": seeds.summarize(reached) if reached else None}
  return {"gained": gained, "lost": kept, "level": level, "steps": steps, "rows": rows}


def table(read: Values) -> tuple[str, list[str], list[list[str]]]:
  """Returns title, header and lines of a reading."""
  title = f"{read['lost']} lost where {read['gained']} first is {read['level']:.4g}"
  lines = []
  for name, row in read["rows"].items():
    lost = row["lost"]
    if lost is None:
      lines.append([name, "0", "-"])
      continue
    spread = "" if lost["ci95"] is None else f" ± {lost['ci95']:.2g}"
    lines.append([name, str(row["reached"]), f"{lost['mean']:.4g}{spread}"])
  return title, ["", "seeds that reach it", f"{read['lost']} lost"], lines
