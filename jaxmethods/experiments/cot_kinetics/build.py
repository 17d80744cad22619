"""Composes the experiment: a small model trained here, or a given one that is only read."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxmethods.experiments.cot_kinetics import given, trained
from jaxmethods.experiments.cot_kinetics.config import Config, untrained
from jaxmethods.runtime.experiment import Experiment


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment of the model that `config` names."""
  return (given if untrained(config) else trained).build(config, mesh)
