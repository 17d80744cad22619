"""Pictures of images, clean, corrupted and public."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure


def sample_images(sets: Mapping[str, ArrayLike], shown: int = 10) -> Figure:
  """Draws the first images of every set, a row each: name -> images (n, s, s, 3) uint8."""
  figure, axes = plt.subplots(
    len(sets), shown, figsize=(shown, 0.2 + len(sets)), layout="constrained"
  )
  for line, (name, images) in zip(axes, sets.items(), strict=True):
    for axis, image in zip(line, np.asarray(images)[:shown], strict=False):
      axis.imshow(image)
    for axis in line:
      axis.set(xticks=[], yticks=[])
      axis.spines[:].set_visible(False)
    line[0].set_ylabel(name)
  return figure
