"""Pictures of pseudo-graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.typing import ColorType

from jaxmethods.runtime.pictures import COLOURS, open_frame

SHOWN = 6


class Graphs(NamedTuple):
  """Final pseudo-graphs.

  Attributes:
    num_nodes, labels: (P,) int.
    source, target: (P, M) int, ends of the candidates.
    edges: (P, M), 0 or 1 at each candidate.
    features: (P, N, F).
    probabilities: (P, C) of the teacher.
  """

  num_nodes: np.ndarray
  labels: np.ndarray
  source: np.ndarray
  target: np.ndarray
  edges: np.ndarray
  features: np.ndarray
  probabilities: np.ndarray


def before_and_after(drawings: Mapping[str, Graphs], directed: bool) -> Figure:
  """Draws some pseudo-graphs at the start and at the end, in the order of their final edges.

  Args:
    drawings: title of a row -> the same graphs; the last row is the final one.
    directed: whether they are directed.
  """
  rows = list(drawings.items())
  order = np.argsort(rows[-1][1].edges.sum(1), kind="stable")
  shown = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int)]
  figure, axes = plt.subplots(
    len(rows), len(shown), figsize=(2.1 * len(shown), 2.5 * len(rows) + 0.6), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  kinds: set[int] = set()
  for row, (name, graphs) in zip(axes, rows, strict=True):
    for axis, graph in zip(row, shown, strict=True):
      kinds |= _draw(axis, graphs, int(graph))
    row[0].set_ylabel(name, fontsize=11)
  handles = [Patch(color=_colour(kind), label=f"feature {kind}") for kind in sorted(kinds)[:12]]
  figure.legend(
    handles=handles, loc="outside lower center", ncols=min(8, max(1, len(handles))), frameon=False,
    fontsize=9,
  )  # fmt: skip
  kind = "directed" if directed else "undirected"
  figure.suptitle(
    f"{len(order)} pseudo-graphs ({kind}), {len(shown)} of them from easy to hard", fontsize=11
  )
  return figure


def complexity(graphs: Graphs, real: np.ndarray) -> Figure:
  """Draws the edges of the pseudo-graphs in the order of the curriculum, beside real graphs.

  Args:
    graphs: final pseudo-graphs.
    real: edges of each real graph.
  """
  edges = np.sort(graphs.edges.sum(1))
  figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
  place = lambda values: np.linspace(0, 1, len(values))
  axis.plot(place(edges), edges, color=COLOURS[0], label="pseudo-graphs, easy to hard")
  axis.plot(place(real), np.sort(real), color=COLOURS[1], label="real test graphs (not used)")
  axis.set(xlabel="share of the graphs", ylabel="edges", ylim=(0, None))
  axis.legend(frameon=False, fontsize=9)
  open_frame(axis)
  return figure


def _draw(axis: Axes, graphs: Graphs, i: int) -> set[int]:
  """Draws graph i on a circle; returns the features of its nodes."""
  n = int(graphs.num_nodes[i])
  angle = 2 * np.pi * np.arange(n) / n
  place = np.stack([np.cos(angle), np.sin(angle)], 1)
  there = graphs.edges[i] > 0
  ends = np.stack([place[graphs.source[i][there]], place[graphs.target[i][there]]])
  axis.plot(ends[..., 0], ends[..., 1], color="#999999", lw=0.5, alpha=0.6, zorder=1)
  kinds = graphs.features[i, :n].argmax(-1)
  axis.scatter(place[:, 0], place[:, 1], s=34, c=[_colour(int(k)) for k in kinds], zorder=2, lw=0)
  wanted = int(graphs.labels[i])
  sure = graphs.probabilities[i, wanted]
  axis.set_title(f"{int(there.sum())} edges\nclass {wanted}: {sure:.2f}", fontsize=9)
  axis.set(xticks=[], yticks=[], aspect="equal")
  axis.spines[:].set_visible(False)
  return set(kinds.tolist())


def _colour(kind: int) -> ColorType:
  """Returns the colour of a feature."""
  return COLOURS[kind] if kind < len(COLOURS) else plt.get_cmap("tab20")(kind % 20)
