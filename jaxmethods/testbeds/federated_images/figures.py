"""Pictures of what clients hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxmethods.runtime import pictures


def own_examples(counts: np.ndarray, clients: Sequence[str], title: str) -> Figure:
  """Draws how many examples of each class every client holds.

  Args:
    counts: (K, C) int.
    clients: K names.
    title: name of the examples.
  """
  classes = [str(c) for c in range(counts.shape[1])]
  return pictures.heat_table(counts, clients, classes, title, label="class")
