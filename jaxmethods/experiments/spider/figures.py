"""Pictures of selective tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.methods import spider as method
from jaxmethods.runtime import pictures
from jaxmethods.trees import flatten
from jaxmethods.tuning.tuner import TuningState


def figures(state: TuningState) -> dict[str, Figure]:
  """Draws the share of every tensor that moved, and how far the two importances differ."""
  anchor = flatten(jax.device_get(state.tuner.extra["anchor"]))
  now = flatten(jax.device_get(state.tuner.trainable))
  changed = {path: float(np.mean(now[path] != anchor[path])) for path in anchor}
  label = "share of entries that differ from the pretrained value"
  return {
    "changed_entries": pictures.bars({"changed": changed}, label),
    "importances": _importances(state),
  }


def _importances(state: TuningState, shown: int = 4000) -> Figure:
  """Draws P against G of the largest tensor; entries above the diagonal are updated."""
  anchor, accumulated = (flatten(state.tuner.extra[name]) for name in ("anchor", "accumulated"))
  path = max(anchor, key=lambda path: anchor[path].size)
  p = np.asarray(method.pretrained_importance(anchor[path])).ravel()
  g = np.asarray(method.task_importance(accumulated[path])).ravel()
  chosen = np.random.default_rng(0).permutation(len(p))[:shown]
  figure, axes = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
  above = np.asarray(method.selected(jnp.asarray(p), jnp.asarray(g)))
  for mask, name, colour in (
    (above, "updated", pictures.COLOURS[1]),
    (~above, "kept", pictures.GREY),
  ):
    rows = chosen[mask[chosen]]
    axes.plot(p[rows], g[rows], ".", markersize=2, color=colour, label=f"{name} {mask.mean():.0%}")
  axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
  axes.set(xlabel="P, pretrained importance", ylabel="G, task importance", title=path)
  axes.legend(frameon=False, fontsize=8, markerscale=4)
  pictures.open_frame(axes)
  return figure
