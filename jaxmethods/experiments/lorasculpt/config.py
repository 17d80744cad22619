"""LoRASculpt and its rivals on a small multimodal model.

The model is pretrained on easy-VQA and tuned on one target; its accuracy on easy-VQA shows how much it
forgot. See `testbeds.multimodal.benchmark` for the tasks, `testbeds.multimodal.tuning` for the columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Selection
from jaxmethods.testbeds.multimodal.settings import TuningConfig, at_their_rates, selected_by

Row = Literal[
  "lorasculpt",
  "post_pruned",
  "orth_reg",
  "lora",
  "dora",
  "l2_sp",
  "ewc",
  "dare",
  "grafting",
  "tailor",
]
# Rows of the suite `mllm_tuning`, on the same model and budget.
Borrowed = Literal["lora", "dora", "l2_sp", "ewc", "dare", "grafting", "tailor"]
BORROWED: tuple[Borrowed, ...] = get_args(Borrowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
  """Defaults are the published settings (code) unless a comment says otherwise."""

  row: Row = "lorasculpt"
  rates: dict[str, float] = dataclasses.field(
    default_factory=dict
  )  # learning_rate by row, for compare
  learning_rate: float = 2e-4
  projector_rate: float = 2e-5
  rank: int = 32
  alpha: float = 64.0
  dropout: float = 0.05
  targets: str = ""  # regular expression on kernel paths; empty: all linear layers of the LM
  keep_ratio: float = 0.1  # rho, of every factor
  prune_at: int = 100  # t_p, optimiser steps
  cmr_weight: float = 1e-3  # lambda
  omega: float = 1.0
  regularised: str = ""  # regular expression on kernel paths; empty: query, key and value
  connector: Literal["full", "lora_cmr", "frozen"] = "full"  # lora_cmr: paper
  connector_weight: float = 1e-3  # beta (inferred)
  official_final: bool = False  # code: True, the last step leaks into what was pruned
  orth_weight: float = 1e-3  # of orth_reg (inferred)

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(self, 1, "rank", "prune_at")
    checks.within(self, "(0, 1]", "keep_ratio")
    checks.within(self, "[0, 1)", "dropout")
    checks.positive(self, "alpha", "omega")
    checks.at_least(self, 0, "cmr_weight", "connector_weight", "orth_weight")


def rows(config: Config) -> dict[str, Config]:
  """Lists LoRASculpt, its ablations and its rivals, at their learning rates.

  L2-SP, EWC, DARE, Grafting and Model Tailor tune all layers themselves, as in the suite.
  """
  changes: dict[str, dict[str, Any]] = {
    "lorasculpt": {"row": "lorasculpt"},
    "no_cmr": {"row": "lorasculpt", "cmr_weight": 0.0},
    "no_prune": {"row": "lorasculpt", "keep_ratio": 1.0},
    "frozen_projector": {"row": "lorasculpt", "connector": "frozen"},
    # The control: how much of LoRA's forgetting is the projector's.
    "lora_frozen_projector": {"row": "lora", "projector_rate": 0.0},
    "keep_fifth": {"row": "lorasculpt", "keep_ratio": 0.2},
    **{name: {"row": name} for name in (*BORROWED, "post_pruned", "orth_reg")},
  }
  return at_their_rates(config, config.rates, changes)


def selection(config: Config) -> Selection | None:
  """Chooses settings by H on validation; see `testbeds.multimodal.settings`."""
  return selected_by(config, "H", "Target")
