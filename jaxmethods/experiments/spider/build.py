"""Tuners and pictures of the SPIDER experiment: its heavy half."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.adapters import selective as masks
from jaxmethods.errors import InputError
from jaxmethods.methods import spider as method
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import suite as tuning_rows
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.trees import flatten
from jaxmethods.tuning import posterior, suite
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TuningState

if TYPE_CHECKING:
  from jaxmethods.experiments.spider.config import Config


def build(config: Config, mesh: Any = None, benchmark: Benchmark | None = None) -> Experiment:
  """Composes the experiment; the benchmark is by default the one of the config."""
  make = lambda model: tuner_of(config, model.config.language.num_layers)
  experiment = tuning_rows.compose(config, make, mesh, benchmark)
  if config.row not in ("spider", "spider_hard"):
    return experiment
  return experiment._replace(figures=lambda state: {**experiment.figures(state), **figures(state)})


def tuner_of(config: Config, layers: int) -> Tuner:
  """The row that a config names; every one trains the same projector and last layers.

  Raises:
    InputError: the model has fewer layers.
  """
  c = config
  if c.last_layers > layers:
    raise InputError(f"last_layers: {c.last_layers} of a model of {layers}")
  targets = suite.last_layers(c.last_layers, layers) if c.last_layers else tuners.PROJECTOR
  ours = functools.partial(
    method.tuner,
    targets,
    accumulate=c.accumulate,
    update_every=c.update_every,
    recompute_importance=c.recompute_importance,
  )
  graft = lambda before, after, key: posterior.grafting(before, after, c.graft_share)
  make: dict[str, Callable[[], Tuner]] = {
    "spider": ours,
    "spider_hard": lambda: ours(rule=method.hard),
    "grad_mask": lambda: ours(rule=method.by_gradient(c.ratio)),
    "full": lambda: tuners.selected(targets),
    "half": lambda: method.half(targets, max(1, c.steps // c.half_rounds)),
    "magnitude_mask": lambda: fixed_mask(targets, 1 - c.ratio, masks.by_magnitude),
    "random_mask": lambda: fixed_mask(targets, 1 - c.ratio, masks.at_random),
    "l2_sp": lambda: suite.l2_sp(c.l2_weight, targets),
    "dare": lambda: suite.dare(c.dare_rate, targets),
    "grafting": lambda: suite.posterior_edit(graft, targets),
  }
  return make[c.row]()


def fixed_mask(targets: str, share: float, score: masks.Score) -> Tuner:
  """Only the `share` of every tensor with the highest scores is tuned, the projector's too."""
  base = tuners.adapted(masks.tuned(share, score), targets, None)
  rates = lambda tree: {"adapter": tuners.own_rates(tree["adapter"]), "params": {}}
  return base._replace(rates=rates)


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
