"""Composes the SPIDER experiment and its rivals."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax.sharding import Mesh

from jaxmethods.adapters import selective as masks
from jaxmethods.errors import InputError
from jaxmethods.experiments.spider.config import Config
from jaxmethods.experiments.spider.figures import figures
from jaxmethods.methods import spider as method
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import suite as rows
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.tuning import posterior, suite, tuner as tuners
from jaxmethods.tuning.tuner import Tuner


def build(
  config: Config, mesh: Mesh | None = None, benchmark: Benchmark | None = None
) -> Experiment:
  """Composes the experiment; the benchmark is by default the one of the config."""
  make = lambda model: tuner_of(config, model.config.language.num_layers)
  experiment = rows.compose(config, make, mesh, benchmark)
  if config.row not in ("spider", "spider_hard"):
    return experiment
  return experiment._replace(figures=lambda state: {**experiment.figures(state), **figures(state)})


def tuner_of(config: Config, layers: int) -> Tuner:
  """Makes the tuner of a row; every row trains the same projector and last layers.

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
  """Tunes the `share` of every tensor with the highest scores, in the projector too."""
  base = tuners.adapted(masks.tuned(share, score), targets, None)
  rates = lambda tree: {"adapter": tuners.own_rates(tree["adapter"]), "params": {}}
  return base._replace(rates=rates)
