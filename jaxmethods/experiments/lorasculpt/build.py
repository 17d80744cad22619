"""Composes the LoRASculpt experiment and its rivals."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxmethods.experiments.lorasculpt.config import BORROWED, Config
from jaxmethods.experiments.lorasculpt.figures import figures
from jaxmethods.methods import lorasculpt as method
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import suite
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.testbeds.multimodal.suite_settings import borrowed
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner


def build(
  config: Config, mesh: Mesh | None = None, benchmark: Benchmark | None = None
) -> Experiment:
  """Composes the experiment; the benchmark is by default the one of the config."""
  if config.row in BORROWED:
    update = {"rank": config.rank, "alpha": config.alpha, "dropout": config.dropout}
    return suite.build(borrowed(config, config.row, **update), mesh, benchmark)
  experiment = suite.compose(config, lambda model: tuner_of(config), mesh, benchmark)
  if config.row != "lorasculpt":
    return experiment
  return experiment._replace(figures=lambda state: {**experiment.figures(state), **figures(state)})


def tuner_of(config: Config) -> Tuner:
  """Makes the tuner of a row that is not borrowed."""
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
