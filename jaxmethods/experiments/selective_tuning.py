"""Tuners and pictures of the SPIDER experiment: its heavy half."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.adapters.targets import flatten
from jaxmethods.experiments import multimodal, tuning
from jaxmethods.experiments.multimodal import Benchmark
from jaxmethods.methods import spider as method
from jaxmethods.methods.mllm_tuning import tuner as tuners
from jaxmethods.methods.mllm_tuning.tuner import Tuner, TuningState
from jaxmethods.runtime.experiment import Experiment

if TYPE_CHECKING:
  from jaxmethods.experiments.spider import Config


def build(config: Config, benchmark: Benchmark | None = None) -> Experiment:
  """Composes the experiment; the benchmark is by default the one of the config."""
  benchmark = benchmark or multimodal.load(config.desk, (config.target,))
  experiment = tuning.build(config, tuner_of(config), benchmark=benchmark)
  spider = config.row in ("spider", "spider_hard")
  return experiment._replace(figures=figures) if spider else experiment


def tuner_of(config: Config) -> Tuner:
  """The row that a config names."""
  targets = trained(config)
  if config.row == "full":
    return tuners.selected(targets)
  if config.row == "half":
    return method.half(targets, max(1, config.steps // config.half_rounds))
  rules = {
    "spider": method.soft,
    "spider_hard": method.hard,
    "grad_mask": method.by_gradient(config.ratio),
  }
  return method.tuner(
    targets,
    rule=rules[config.row],
    accumulate=config.accumulate,
    update_every=config.update_every,
    recompute_importance=config.recompute_importance,
  )


def trained(config: Config) -> str:
  """Paths of the projector and of the last layers."""
  layers = config.desk.num_layers
  last = "|".join(str(i) for i in range(layers - config.last_layers, layers))
  return rf"{tuners.PROJECTOR}|^language/layers_({last})/" if last else tuners.PROJECTOR


def figures(state: TuningState) -> dict[str, Figure]:
  """How much of every tensor moved, and how far the two importances differ."""
  anchor = flatten(jax.device_get(state.tuner.extra["anchor"]))
  now = flatten(jax.device_get(state.tuner.trainable))
  changed = [float(np.mean(now[path] != anchor[path])) for path in anchor]
  figure, axes = plt.subplots(figsize=(7, 1.2 + 0.22 * len(anchor)), layout="constrained")
  axes.barh(list(anchor), changed, height=0.6, color="#1f6f8b")
  axes.set(xlabel="share of entries that differ from the pretrained value", xlim=(0, 1))
  axes.invert_yaxis()
  axes.tick_params(axis="y", labelsize=7)
  axes.spines[["top", "right"]].set_visible(False)
  return {"changed_entries": figure, "importances": _importances(state)}


def _importances(state: TuningState, shown: int = 4000) -> Figure:
  """P against G of the largest tensor; what lies above the diagonal is updated."""
  anchor, accumulated = (flatten(state.tuner.extra[name]) for name in ("anchor", "accumulated"))
  path = max(anchor, key=lambda path: anchor[path].size)
  p = np.asarray(method.pretrained_importance(anchor[path])).ravel()
  g = np.asarray(method.task_importance(accumulated[path])).ravel()
  chosen = np.random.default_rng(0).permutation(len(p))[:shown]
  figure, axes = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
  above = np.asarray(method.selected(jnp.asarray(p), jnp.asarray(g)))
  for mask, name, colour in ((above, "updated", "#d1495b"), (~above, "kept", "0.6")):
    rows = chosen[mask[chosen]]
    axes.plot(p[rows], g[rows], ".", markersize=2, color=colour, label=f"{name} {mask.mean():.0%}")
  axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
  axes.set(xlabel="P, pretrained importance", ylabel="G, task importance", title=path)
  axes.legend(frameon=False, fontsize=8, markerscale=4)
  axes.spines[["top", "right"]].set_visible(False)
  return figure
