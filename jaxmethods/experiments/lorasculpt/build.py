"""Tuners and pictures of the LoRASculpt experiment: its heavy half."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.adapters.adapter import layers_of
from jaxmethods.experiments.lorasculpt.config import BORROWED
from jaxmethods.experiments.mllm_tuning.config import borrowed
from jaxmethods.methods import lorasculpt as method
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import suite as tuning_rows
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TuningState

if TYPE_CHECKING:
  from jaxmethods.experiments.lorasculpt.config import Config


def build(config: Config, mesh: Any = None, benchmark: Benchmark | None = None) -> Experiment:
  """Composes the experiment; the benchmark is by default the one of the config."""
  if config.row in BORROWED:
    same = {name: getattr(config, name) for name in ("rank", "alpha", "dropout")}
    return tuning_rows.build(borrowed(config, config.row, **same), mesh, benchmark)
  experiment = tuning_rows.compose(config, lambda model: tuner_of(config), mesh, benchmark)
  if config.row != "lorasculpt":
    return experiment
  return experiment._replace(figures=lambda state: {**experiment.figures(state), **figures(state)})


def tuner_of(config: Config) -> Tuner:
  """The row that a config names, unless it is borrowed."""
  update = (config.rank, config.alpha, config.dropout)
  targets = config.targets or tuners.LINEARS
  if config.row == "lorasculpt":
    return method.tuner(
      *update,
      keep_ratio=config.keep_ratio,
      prune_at=config.prune_at,
      weight=config.cmr_weight,
      omega=config.omega,
      regularised=config.regularised or method.REGULARISED,
      connector=config.connector,
      connector_weight=config.connector_weight,
      official_final=config.official_final,
      targets=targets,
    )
  if config.row == "post_pruned":
    return method.post_pruned(*update, keep_ratio=config.keep_ratio, targets=targets)
  assert config.row == "orth_reg"
  return method.orthogonal(*update, weight=config.orth_weight, targets=targets)


def figures(state: TuningState) -> dict[str, Figure]:
  """Density of the update of every layer, beside that of random masks."""
  factors = layers_of(jax.device_get(state.tuner.trainable["adapter"]))
  names = [path.removeprefix("language/") for path in factors]
  measured = [float(method.update_density({"x": f})) for f in factors.values()]
  by_chance = []
  for f in factors.values():
    share = lambda x: np.count_nonzero(x) / x.size
    by_chance.append(method.product_density(share(f["a"]), share(f["b"]), f["a"].shape[-2]))
  figure, axes = plt.subplots(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
  axes.barh(names, measured, height=0.6, color="#1f6f8b", label="measured")
  axes.plot(by_chance, names, "|", color="#d1495b", markersize=9, label="random masks (paper)")
  axes.set(xlabel="share of entries of BA that are not zero", xlim=(0, None))
  axes.invert_yaxis()
  axes.tick_params(axis="y", labelsize=7)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
  return {"update_density": figure}
