"""Pictures of a run: accuracies, who holds what, and how far the clients agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.methods.fpl import Drift


def agreement(drift: Mapping[str, Drift], clients: Sequence[str]) -> Figure:
  """Draws the cosines between the changes of every two clients in the last round, a panel a kind.

  Args:
    drift: kind of prompts -> cosines.
    clients: names of those that took part, or fewer names than clients where they were drawn.
  """
  count = len(drift)
  figure, axes = plt.subplots(
    1, count, figsize=(4.4 * count, 4), squeeze=False, layout="constrained"
  )
  for axis, (name, each) in zip(axes.flat, drift.items(), strict=True):
    pairs = np.asarray(each.pairwise)
    image = axis.imshow(pairs, cmap="RdBu", vmin=-1, vmax=1)
    names = list(clients) if len(clients) == len(pairs) else [str(k) for k in range(len(pairs))]
    if len(pairs) <= 12:
      axis.set_yticks(range(len(pairs)), names, fontsize=7)
      for (row, column), value in np.ndenumerate(pairs):
        if row != column:
          axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6)
    mean = float(np.asarray(each.to_global).mean())
    title = f"{name.replace('_', ' ')} prompts: with the average {mean:.2f}"
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
  figure.colorbar(image, ax=axes, shrink=0.7, label="cosine")
  figure.suptitle("changes of the prompts in the last round, client by client", fontsize=10)
  return figure
