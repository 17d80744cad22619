"""Two small TU sets that a network can learn, for tests that run FedSSP's experiment.

RINGS: rings and stars, three node labels. TREES: sparse and dense graphs, no labels, so one-hot degrees.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = "tu:RINGS,TREES"


def write(folder: Path, count: int = 30) -> Path:
  """Writes both sets, `count` graphs each, as TU text below `folder`, and returns `folder`."""
  rng = np.random.default_rng(0)
  rings, densities = [], []
  for k in range(count):
    n = int(rng.integers(4, 9))
    label = k % 2
    ends = [(i, (i + 1) % n) for i in range(n)] if label else [(0, i) for i in range(1, n)]
    rings.append((n, ends, label))
    n, label = int(rng.integers(5, 8)), k % 3
    path = [(i, i + 1) for i in range(n - 1)]
    more = [(i, i + 2) for i in range(n - 2)] + [(i, i + 3) for i in range(n - 3)]
    densities.append((n, path + more[: label * n // 2], label))
  write_set(folder, "RINGS", rings, rng.integers(0, 3, sum(n for n, _, _ in rings)))
  write_set(folder, "TREES", densities)
  return folder


def write_set(folder: Path, name: str, graphs, node_labels=None) -> None:
  """Writes one set from (nodes, undirected edges, label) triples."""
  place = folder / "tudataset" / name
  place.mkdir(parents=True, exist_ok=True)
  start, edges, indicator = 1, [], []
  for k, (n, ends, _) in enumerate(graphs, 1):
    edges += [f"{start + a}, {start + b}" for i, j in ends for a, b in ((i, j), (j, i))]
    indicator += [k] * n
    start += n
  parts = {
    "A": edges,
    "graph_indicator": indicator,
    "graph_labels": [label for _, _, label in graphs],
  }
  if node_labels is not None:
    parts["node_labels"] = node_labels
  for part, lines in parts.items():
    text = "".join(f"{line}\n" for line in lines)
    (place / f"{name}_{part}.txt").write_text(text)
