"""Pictures of a federated graph classification run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmethods.runtime.pictures import COLOURS, bars, open_frame


class Spectrum(NamedTuple):
  """Eigenvalues of one domain's held-out graphs, before and after the decoder.

  Attributes:
    eigenvalues: (n,) of the Laplacian.
    decoded: (n, M), one new spectrum per head.
  """

  eigenvalues: np.ndarray
  decoded: np.ndarray


def draw(
  accuracy: Mapping[str, float], majority: Sequence[float], spectra: Mapping[str, Spectrum]
) -> dict[str, Figure]:
  """Draws all pictures of a run.

  Args:
    accuracy: test accuracy of every client.
    majority: share of the most frequent class, in the order of the clients.
    spectra: of one client per domain; empty for a network without a decoder.
  """
  figures = {
    "accuracy": bars(
      {"test accuracy": accuracy},
      f"test accuracy (mean over clients {np.mean(list(accuracy.values())):.3f})",
      marks={"most frequent class": majority},
    )
  }
  if spectra:
    figures["spectra"] = learned_spectra(spectra)
  return figures


def learned_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
  """Draws each head's new eigenvalue against the graph's own, one panel per domain.

  The filters are learned on the spectrum alone, so the same encoder serves every domain; the local
  transformer and decoder make the difference.
  """
  columns = min(4, len(spectra))
  rows = -(-len(spectra) // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(2.9 * columns, 2.6 * rows + 0.3), squeeze=False, layout="constrained"
  )
  for panel, (name, spectrum) in zip(axes.flat, spectra.items(), strict=False):
    _heads(panel, name, spectrum)
  for panel in axes.flat[len(spectra) :]:
    panel.set_axis_off()
  figure.supxlabel("eigenvalue of the graph Laplacian", fontsize=10)
  figure.supylabel("decoded eigenvalue", fontsize=10)
  handles, labels = axes.flat[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9
  )
  return figure


def _heads(panel: Axes, name: str, spectrum: Spectrum) -> None:
  """Draws one domain, a colour for each head."""
  for head, decoded in enumerate(spectrum.decoded.T):
    colour = COLOURS[head % len(COLOURS)]
    panel.plot(
      spectrum.eigenvalues, decoded, ".", ms=2, alpha=0.35, color=colour, rasterized=True
    )  # fmt: skip
    panel.plot([], [], "o", ms=5, color=colour, label=f"head {head + 1}")
  panel.set_title(name, fontsize=10)
  open_frame(panel)
  panel.grid(alpha=0.25)
