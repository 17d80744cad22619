"""Composes the experiment of one row of the suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.experiments.mllm_tuning.config import Config
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import figures, suite
from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Loads the benchmark and composes the experiment of `config.row`."""
  return suite.build(config, mesh)


def comparison(results: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
  """Draws the trade-off: gain on the target against loss of what was known before."""
  mean = lambda row: tuple(row["metrics"][metric]["mean"] for metric in ("E", "F"))
  points = {row["name"]: mean(row) for row in results if None not in mean(row)}
  return {"tradeoff": figures.tradeoff(points, PARADIGMS)}
