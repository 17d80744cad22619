"""SPIDER and its rivals on the desk benchmark of multimodal tuning.

The projector and the last layers of the language model are trained; see `experiments.lorasculpt` for the
same benchmark under low-rank updates.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxmethods.testbeds.multimodal.settings import TuningConfig, at_their_rates

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
    if self.last_layers < 0:
      raise ValueError(f"last_layers: must not be negative, got {self.last_layers}")
    for name in ("update_every", "half_rounds"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
    for name in ("ratio", "graft_share"):
      if not 0 < getattr(self, name) < 1:
        raise ValueError(f"{name}: must be between 0 and 1, got {getattr(self, name)}")
    if not 0 <= self.dare_rate < 1:
      raise ValueError(f"dare_rate: must be in [0, 1), got {self.dare_rate}")
    if self.l2_weight < 0:
      raise ValueError(f"l2_weight: must not be negative, got {self.l2_weight}")


def rows(config: Config) -> dict[str, Config]:
  """SPIDER, its ablation, and its rivals on the same layers; learning rates are those of `rates`."""
  return at_their_rates(config, {name: {"row": name} for name in ROWS})
