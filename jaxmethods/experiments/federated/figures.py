"""Pictures and the table of the clients."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.runtime import pictures

_SHOWN = 20  # clients in the table of classes


class Clients(NamedTuple):
  """What a report says of the clients.

  Attributes:
    names: K.
    examples: (K,) trained on.
    tested: (K,) tested on.
    classes: (K, C) examples that are trained on of every class; None where there are no classes.
  """

  names: Sequence[str]
  examples: np.ndarray
  tested: np.ndarray
  classes: np.ndarray | None


def accuracies(clients: Clients, accuracy: np.ndarray, what: str) -> Figure:
  """Draws the clients' accuracies: how many have which, and against their examples.

  Args:
    clients: of the run.
    accuracy: (K,), NaN where nothing is tested.
    what: whose models these are.
  """
  known = np.isfinite(accuracy)
  figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
  left.hist(accuracy[known], bins=np.linspace(0, 1, 21), color=pictures.COLOURS[0])
  mean = accuracy[known].mean() if known.any() else np.nan
  left.axvline(mean, color=pictures.COLOURS[1], label=f"mean {mean:.3f}")
  left.set(xlabel="accuracy on a client's own test", ylabel="clients", xlim=(0, 1))
  left.legend(frameon=False, fontsize=9)
  right.scatter(
    clients.examples[known],
    accuracy[known],
    s=14,
    color=pictures.COLOURS[0],
    alpha=0.6,
    linewidths=0,
  )
  right.set(xlabel="examples that a client trains on", ylabel="accuracy", ylim=(-0.03, 1.03))
  figure.suptitle(what, fontsize=10)
  pictures.open_frame(left, right)
  return figure


def classes_held(clients: Clients) -> Figure:
  """Draws how many examples of each class the first clients train on."""
  assert clients.classes is not None
  counts = clients.classes[:_SHOWN]
  of = f", {len(counts)} of {len(clients.names)} clients" if len(clients.names) > _SHOWN else ""
  columns = [str(c) for c in range(counts.shape[1])]
  title = f"training examples{of}"
  return pictures.heat_table(counts, clients.names[:_SHOWN], columns, title, label="class")


def table(clients: Clients, accuracy: np.ndarray, loss: np.ndarray) -> str:
  """Writes clients.csv.

  Args:
    clients: of the run.
    accuracy: (K,), NaN where nothing is tested.
    loss: (K,) likewise.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["client", "train_examples", "test_examples", "test_accuracy", "test_loss"])
  number = lambda x: f"{x:.6g}" if np.isfinite(x) else ""
  for row in zip(clients.names, clients.examples, clients.tested, accuracy, loss, strict=True):
    writer.writerow([*row[:3], *map(number, row[3:])])
  return text.getvalue()
