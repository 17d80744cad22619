"""Pictures of sparse low-rank updates."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.adapters.adapter import layers_of
from jaxmethods.methods.lorasculpt import product_density, update_density
from jaxmethods.runtime import pictures
from jaxmethods.tuning.tuner import TuningState


def figures(state: TuningState) -> dict[str, Figure]:
  """Draws the density of the update of every layer, beside the density that random masks would give."""
  factors = layers_of(jax.device_get(state.tuner.trainable["adapter"]))
  names = [path.removeprefix("language/") for path in factors]
  measured = [float(update_density({"x": f})) for f in factors.values()]
  expected = [_by_chance(f["a"], f["b"]) for f in factors.values()]
  figure = pictures.bars(
    {"measured": dict(zip(names, measured, strict=True))},
    "share of entries of BA that are not zero",
    marks={"random masks (paper)": expected},
    limit=max([*measured, *expected, 1e-3]),
  )
  return {"update_density": figure}


def _by_chance(a: jax.Array, b: jax.Array) -> float:
  """Expected density of a product whose factors (..., rank, n) have masks of their own densities."""
  share = lambda x: np.count_nonzero(x) / x.size
  return product_density(share(a), share(b), a.shape[-2])
