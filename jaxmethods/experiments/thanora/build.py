"""Composes the experiment: on the small model, or on a checkpoint from disk."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxmethods.experiments.thanora import checkpoint, desk
from jaxmethods.experiments.thanora.config import Config
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Loads the benchmark or the checkpoint and composes the experiment.

  Raises:
    InputError: a mesh for the small model.
  """
  if config.checkpoint.model:
    return checkpoint.build(config, mesh)
  checks.no_mesh("the small model", mesh)
  return desk.build(config)
