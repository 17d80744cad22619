"""Pictures of a backdoor: attention and its entropies, and the removed images."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmethods.experiments.bye.detection import Judgement
from jaxmethods.runtime.pictures import COLOURS

SHOWN = 4  # images whose attention is drawn
_REMOVED = 40  # removed images that are drawn
_MANY = 0.4  # a defence that removes more should be distrusted
_POISON, _CLEAN = COLOURS[1], COLOURS[0]


def entropies(judgement: Judgement, poisoned: np.ndarray, tau: float, index: str) -> Figure:
  """Histograms of every layer with the fitted groups, and of the score that decides."""
  profile, verdict = judgement.profile, judgement.verdict
  layers = judgement.entropies.shape[1]
  columns = min(4, layers + 1)
  rows = -(-(layers + 1) // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(3 * columns, 2.6 * rows + 0.4), squeeze=False, layout="constrained"
  )
  for layer, axis in enumerate(axes.flat[:layers]):
    values = np.asarray(judgement.entropies[:, layer])
    bins = _histogram(axis, values, poisoned)
    x = np.linspace(bins[0], bins[-1], 200)
    parts = zip(*(part[layer] for part in profile.mixture), strict=True)
    for weight, mean, std in parts:
      height = weight * np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
      axis.plot(x, height * len(values) * (bins[1] - bins[0]), color="#333333", lw=1)
    use = "used" if profile.kept[layer] else "not used"
    turned = ", rarer group above" if profile.reversed[layer] else ""
    separation = profile.separation[layer]
    axis.set_title(f"layer {layer}: separation {separation:.2f}, {use}{turned}", fontsize=9)
  last = axes.flat[layers]
  _histogram(last, np.asarray(verdict.score), poisoned)
  last.set_title("score: mean of the layers used" if verdict.found else "no layer used", fontsize=9)
  for axis in axes.flat[layers + 1 :]:
    axis.set_axis_off()
  axes[0, 0].legend(frameon=False, fontsize=8)
  figure.suptitle(
    f"Entropy of the attention over image tokens; used from {tau:g} on ({index} index)", fontsize=11
  )
  return figure


def _histogram(axis: Axes, values: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
  """Draws values of clean and of poisoned examples; returns the edges of the bins."""
  bins = np.histogram_bin_edges(values, 40)
  edges = bins.tolist()
  axis.hist(values[~poisoned], edges, color=_CLEAN, alpha=0.7, label="clean")
  axis.hist(values[poisoned], edges, color=_POISON, alpha=0.8, label="poisoned")
  axis.set(xlabel="nats", yticks=[])
  axis.spines[["top", "right", "left"]].set_visible(False)
  return bins


def attention(images: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> Figure:
  """Images, clean and triggered, beside where the last token of the prompt looks in every layer.

  Args:
    images: clean and triggered (n, height, width, 3), uint8.
    maps: likewise (L, n, T), T a square number.
  """
  count, layers = len(images[0]), len(maps[0])
  side = int(np.sqrt(maps[0].shape[-1]))
  figure, axes = plt.subplots(
    count, 2 * (layers + 1), figsize=(1.5 * 2 * (layers + 1), 1.6 * count + 0.5), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for i, row in enumerate(axes):
    for half, (kind, image, weights) in enumerate(
      zip(("clean", "triggered"), images, maps, strict=True)
    ):
      own = row[half * (layers + 1) :]
      own[0].imshow(image[i])
      for layer in range(layers):
        share = weights[layer, i] / weights[layer, i].sum()
        own[layer + 1].imshow(share.reshape(side, side), cmap="magma", vmin=0)
      if i == 0:
        own[0].set_title(kind, fontsize=10)
        for layer in range(layers):
          own[layer + 1].set_title(f"layer {layer}", fontsize=9)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
  figure.suptitle("Where the tuned model looks before it answers", fontsize=11)
  return figure


def removed(images: np.ndarray, poisoned: np.ndarray, kept: np.ndarray) -> Figure:
  """Some of the removed images, framed by whether they were poisoned; a large share is said."""
  chosen = np.flatnonzero(~kept)
  shown = chosen[np.linspace(0, len(chosen) - 1, min(_REMOVED, len(chosen))).astype(int)]
  columns = 10
  rows = -(-len(shown) // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(columns, rows + 0.7), squeeze=False, layout="constrained"
  )
  for axis, i in zip(axes.flat, shown, strict=False):
    axis.imshow(images[i])
    for spine in axis.spines.values():
      spine.set(color=_POISON if poisoned[i] else _CLEAN, linewidth=3)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
  for axis in axes.flat[len(shown) :]:
    axis.set_axis_off()
  wrong = int((~poisoned[chosen]).sum())
  text = (
    f"Removed: {len(chosen)} of {len(kept)} ({1 - kept.mean():.1%}), {wrong} of them clean (other "
    f"frame); {int((poisoned & kept).sum())} poisoned ones stayed"
  )
  if 1 - kept.mean() > _MANY:
    text += f"\nWarning: more than {_MANY:.0%} removed; the groups are hardly poison and the rest"
  figure.suptitle(text, fontsize=10)
  return figure
