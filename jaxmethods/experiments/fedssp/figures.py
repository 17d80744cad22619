"""Pictures of a federated graph classification run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.runtime.pictures import COLOURS


class Spectrum(NamedTuple):
  """Eigenvalues of one domain's held-out graphs and what the decoder makes of them.

  Attributes:
    eigenvalues: (n,) of the Laplacian.
    decoded: (n, M), one new spectrum per head.
  """

  eigenvalues: np.ndarray
  decoded: np.ndarray


def accuracy_bars(accuracy: Mapping[str, float], majority: Sequence[float]) -> Figure:
  """Test accuracy of every client, with the share of its most frequent class as a mark."""
  names = list(accuracy)
  values = np.array([accuracy[name] for name in names])
  figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.32 * len(names)), layout="constrained")
  rows = np.arange(len(names))
  axes.barh(rows, values, height=0.62, color=COLOURS[0], label="test accuracy")
  axes.scatter(
    majority, rows, marker="|", s=220, linewidths=2.5, color=COLOURS[1], label="most frequent class",
    zorder=3,
  )  # fmt: skip
  for row, (value, mark) in enumerate(zip(values, majority, strict=True)):
    axes.text(max(value, mark) + 0.015, row, f"{value:.2f}", va="center", fontsize=9)
  axes.set_yticks(rows, names)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.08)
  axes.set_xlabel(f"test accuracy (mean over clients {values.mean():.3f})")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.5 / (1 + 0.32 * len(names))), ncols=2,
              frameon=False, fontsize=9)  # fmt: skip
  return figure


def learned_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
  """Each head's new eigenvalue against the graph's own, one panel per domain.

  The filters are learned on the spectrum alone, so the same encoder serves every domain; what differs
  is the local transformer and decoder.
  """
  columns = min(4, len(spectra))
  rows = -(-len(spectra) // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(2.9 * columns, 2.6 * rows + 0.3), squeeze=False, layout="constrained"
  )
  for panel, (name, spectrum) in zip(axes.flat, spectra.items(), strict=False):
    for head, decoded in enumerate(spectrum.decoded.T):
      panel.plot(
        spectrum.eigenvalues, decoded, ".", ms=2, alpha=0.35, color=COLOURS[head % len(COLOURS)],
        rasterized=True,
      )  # fmt: skip
      panel.plot([], [], "o", ms=5, color=COLOURS[head % len(COLOURS)], label=f"head {head + 1}")
    panel.set_title(name, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
  for panel in axes.flat[len(spectra) :]:
    panel.set_axis_off()
  figure.supxlabel("eigenvalue of the graph Laplacian", fontsize=10)
  figure.supylabel("decoded eigenvalue", fontsize=10)
  handles, labels = axes.flat[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9
  )
  return figure
