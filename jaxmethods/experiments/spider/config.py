"""SPIDER and its rivals on a small multimodal model.

The projector and the last layers of the language model are trained; see `experiments.lorasculpt` for the
same benchmark under low-rank updates.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Selection
from jaxmethods.testbeds.multimodal.settings import TuningConfig, at_their_rates, selected_by

Row = Literal[
  "spider", "spider_hard", "full", "half", "magnitude_mask", "random_mask", "grad_mask", "l2_sp", "dare",
  "grafting",
]  # fmt: skip
ROWS: tuple[Row, ...] = get_args(Row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
  """Defaults are the published settings (audit) unless a comment says otherwise."""

  row: Row = "spider"
  rates: dict[str, float] = dataclasses.field(
    default_factory=dict
  )  # learning_rate by row, for compare
  learning_rate: float = 2e-4  # of the decoder layers
  projector_rate: float = 2e-5
  last_layers: int = 2  # decoder layers that are trained; code: 0, the projector alone
  accumulate: Literal["pre_clip", "post_clip"] = "post_clip"  # (inferred)
  update_every: int = 1  # steps between two masks (inferred)
  recompute_importance: bool = False  # keep no copy of P
  ratio: float = 0.5  # frozen by the mask rows, updated by grad_mask
  half_rounds: int = 10  # rounds of half fine-tuning (inferred)
  l2_weight: float = 1e-3  # (inferred)
  dare_rate: float = 0.9
  graft_share: float = 0.1

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(self, 0, "last_layers", "l2_weight")
    checks.at_least(self, 1, "update_every", "half_rounds")
    checks.within(self, "(0, 1)", "ratio", "graft_share")
    checks.within(self, "[0, 1)", "dare_rate")


def rows(config: Config) -> dict[str, Config]:
  """Lists SPIDER, its ablation and its rivals on the same layers, at their learning rates."""
  return at_their_rates(config, config.rates, {name: {"row": name} for name in ROWS})


def selection(config: Config) -> Selection | None:
  """Chooses settings by H on validation; see `testbeds.multimodal.settings`."""
  return selected_by(config, "H", "Target")
