"""Pictures of answers: how they move through the layers, and how well scores rank them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmethods.experiments.cot_kinetics.config import Energy
from jaxmethods.experiments.cot_kinetics.evidence import SEGMENTS, Evidence
from jaxmethods.methods import cot_kinetics as method
from jaxmethods.runtime.pictures import COLOURS, open_frame

RIGHT, WRONG = COLOURS[0], "#c1553b"


def energy_picture(evidence: Evidence, energy: Energy, groups: Sequence[str]) -> Figure:
  """Momentum, turning angle and energy of every layer: right answers beside wrong ones."""
  segment = SEGMENTS.index(energy.segment)
  figure, axes = plt.subplots(
    len(groups), 3, figsize=(11, 3 * len(groups)), squeeze=False, layout="constrained"
  )
  for g, title in enumerate(groups):
    path = jax.tree.map(lambda x, g=g: x[g][:, segment], evidence.paths[energy.states])
    panels: dict[str, np.ndarray | jax.Array] = {
      "momentum": path.momentum[:, 1:],
      "turning angle, rad": path.turning,
      f"energy ({energy.form}, gamma {energy.gamma:g})": method.layer_energy(
        jax.tree.map(jnp.asarray, path), energy.gamma, energy.form
      ),
    }
    correct = np.asarray(evidence.facts.correct[g])
    for axis, (name, values) in zip(axes[g], panels.items(), strict=True):
      _layers(axis, np.asarray(values), correct)
      axis.set_title(f"{title}: {name}", fontsize=9)
      axis.set_xlabel("layer")
  axes[0, 0].legend(frameon=False, fontsize=9)
  return figure


def _layers(axis: Axes, values: np.ndarray, correct: np.ndarray) -> None:
  """Median and quartiles over answers, (N, L - 1)."""
  layer = np.arange(1, values.shape[1] + 1)
  for chosen, name, color in ((correct, "right", RIGHT), (~correct, "wrong", WRONG)):
    if not chosen.any():
      continue
    low, middle, high = np.percentile(values[chosen], (25, 50, 75), axis=0)
    axis.fill_between(layer, low, high, color=color, alpha=0.15, linewidth=0)
    axis.plot(layer, middle, color=color, label=f"{name} ({chosen.sum()}), median and quartiles")
  open_frame(axis)


def auroc_picture(
  auroc: np.ndarray, names: Sequence[str], score: str, groups: Sequence[str]
) -> Figure:
  """AUROC of every score with its bootstrap interval, (3, G, S); `score` stands out."""
  figure, axes = plt.subplots(
    1, len(groups), figsize=(1.5 + 4.5 * len(groups), 1 + 0.28 * len(names)), sharey=True,
    squeeze=False, layout="constrained",
  )  # fmt: skip
  order = np.argsort(np.nan_to_num(auroc[0].mean(0)))
  for g, (axis, title) in enumerate(zip(axes.flat, groups, strict=True)):
    for row, s in enumerate(order):
      color = WRONG if names[s] == score else RIGHT
      axis.plot(auroc[1:, g, s], [row, row], color=color, lw=2)
      axis.plot(auroc[0, g, s], row, "o", color=color)
    axis.axvline(0.5, color="0.7", lw=1, zorder=0)
    axis.set(title=title, xlabel="AUROC, 95 % bootstrap interval")
    open_frame(axis)
  axes[0, 0].set_yticks(range(len(order)), [names[s] for s in order])
  return figure
