"""Pictures of the ranks and of the complexity of every task along the layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.adapters.adapter import layers_of
from jaxmethods.methods import thanora as method
from jaxmethods.runtime import pictures
from jaxmethods.tuning.tuner import TuningState


def figures(tasks: Sequence[str], previewed: bool, state: TuningState) -> dict[str, Figure]:
  """Draws the ranks of all blocks and, after a preview, the entropies that they follow."""
  extra = jax.device_get(state.tuner.extra)
  names = [path.removeprefix("language/") for path in layers_of(state.tuner.trainable["adapter"])]
  whose = [*range(len(tasks)), method.COOPERATIVE]
  ranks = np.stack([(extra["owner"] == task).sum(1) for task in whose], axis=1)
  table = pictures.heat_table(ranks, names, [*tasks, "cooperative"], "rank of every block")
  if not previewed:
    return {"ranks": table}
  return {"ranks": table, "entropy": _curves(extra["entropy"], names, tasks)}


def _curves(entropy: np.ndarray, layers: Sequence[str], tasks: Sequence[str]) -> Figure:
  """Draws one panel for each kind of layer, depth along the x axis."""
  kinds = sorted({name.split("/")[-1] for name in layers})
  figure, axes = plt.subplots(
    1, len(kinds), figsize=(1.7 * len(kinds), 2.6), sharey=True, squeeze=False, layout="constrained"
  )
  for kind, axis in zip(kinds, axes.flat, strict=True):
    rows = [i for i, name in enumerate(layers) if name.split("/")[-1] == kind]
    for task, name in enumerate(tasks):
      axis.plot(range(len(rows)), entropy[rows, task], marker="o", markersize=3, label=name)
    axis.set_title(kind, fontsize=9)
    axis.set_xticks(range(len(rows)))
    pictures.open_frame(axis)
  axes[0, 0].set_ylabel("normalised spectral entropy")
  figure.supxlabel("layer", fontsize=9)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper center", ncols=len(tasks), frameon=False, fontsize=8
  )
  return figure
