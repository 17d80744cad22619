"""Pictures of generated embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.runtime import pictures


def generated_embeddings(
  own: np.ndarray,
  x: np.ndarray,
  y: np.ndarray,
  mask: np.ndarray,
  unseen: tuple[np.ndarray, np.ndarray],
  names: Sequence[str],
  panels: int = 4,
) -> Figure:
  """Draws own, generated and unseen test embeddings of one class, in its two main directions.

  The class is the one that the clients share out most unevenly.

  Args:
    own: own examples of every class, (K, C).
    x: embeddings, own ones of a class first, (K, n, d).
    y: labels, (K, n).
    mask: (K, n) bool.
    unseen: test embeddings (..., d), labels (...).
    names: of the clients.
    panels: clients shown, the first ones.
  """
  label = int((own.max(0) - own.min(0)).argmax())
  test = unseen[0][unseen[1] == label]
  centre = test.mean(0)
  directions = np.linalg.svd(test - centre, full_matrices=False)[2][:2].T
  shown = min(panels, len(own))
  figure, axes = plt.subplots(
    1, shown, figsize=(3 * shown, 3.2), sharex=True, sharey=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for client, axis in enumerate(axes.flat):
    mine = x[client][(y[client] == label) & mask[client]]
    count = own[client, label]
    for points, name, style in (
      (test, "test, all domains", {"color": pictures.GREY, "s": 8}),
      (mine[count:], "generated", {"color": pictures.COLOURS[2], "s": 10, "alpha": 0.7}),
      (mine[:count], "own", {"color": pictures.COLOURS[0], "s": 16}),
    ):
      flat = (points - centre) @ directions
      axis.scatter(flat[:, 0], flat[:, 1], label=name, linewidths=0, **style)
    axis.set(title=f"{names[client]}: {count} own", xticks=[], yticks=[])
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  figure.suptitle(f"embeddings of class {label}, two main directions", fontsize=10)
  return figure
