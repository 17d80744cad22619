"""Rows of the suite and their settings, which other methods borrow as rivals. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxmethods.runtime import checks
from jaxmethods.testbeds.multimodal.settings import TuningConfig

# The rows, by paradigm of the survey.
Reference = Literal["base", "joint", "full"]
Selective = Literal[
  "full_no_head", "last_layers", "projector", "bitfit", "attention", "gate_up", "magnitude_mask",
  "gradient_mask", "random_mask", "l2_sp", "ewc", "spider",
]  # fmt: skip
Posterior = Literal["dare", "grafting", "half", "wise", "ties", "tailor"]
Additive = Literal["serial_adapter", "parallel_adapter", "ia3", "prompt", "prefix"]
Reparameterised = Literal[
  "lora", "lora_plus", "rslora", "dora", "vera", "moslora", "pissa", "milora", "corda", "adalora",
  "oft", "loramoe", "lorasculpt",
]  # fmt: skip
Row = Literal[Reference, Selective, Posterior, Additive, Reparameterised]
PARADIGMS: dict[Row, str] = {
  row: paradigm
  for paradigm, rows in {
    "reference": Reference,
    "selective": Selective,
    "posterior": Posterior,
    "additive": Additive,
    "reparameterised": Reparameterised,
  }.items()
  for row in get_args(rows)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteConfig(TuningConfig):
  """One row under one budget; defaults are those of the verified recipe; (orig): of the cited method."""

  row: Row = "lora"
  rates: dict[str, float] = dataclasses.field(
    default_factory=dict
  )  # learning_rate by row, for compare
  last: int = 2  # decoder layers of last_layers and spider
  share: float = 0.5  # of the entries that magnitude, gradient and random masks leave free (orig)
  l2_weight: float = 1e-3  # (inferred)
  ewc_weight: float = 100.0  # (inferred)
  dare_rate: float = 0.9  # (orig)
  graft_share: float = 0.1  # (inferred)
  half_share: float = 0.5
  wise_weight: float = 0.5
  ties_share: float = 0.2  # (orig)
  ties_scale: float = 1.0  # (orig)
  tailor_sparsity: float = 0.9  # (orig)
  tailor_sign: Literal["plus", "minus"] = "plus"  # (code)
  bottleneck: int = 64
  prompt_length: int = 20
  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.05
  vera_rank: int = 64
  adalora_weight: float = 1e-3  # of the orthogonality (inferred)
  oft_block: int = 32
  experts: int = 4
  keep_ratio: float = 0.08  # LoRASculpt; 5 % of the product at rank 8
  prune_at: int = 18  # LoRASculpt
  cmr_weight: float = 1e-3  # LoRASculpt

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(
      self, 1, "last", "bottleneck", "prompt_length", "rank", "vera_rank", "experts", "prune_at"
    )
    checks.at_least(self, 2, "oft_block")
    checks.at_least(self, 0, "l2_weight", "ewc_weight", "adalora_weight", "cmr_weight")
    checks.within(
      self,
      "(0, 1]",
      "share",
      "graft_share",
      "half_share",
      "wise_weight",
      "ties_share",
      "keep_ratio",
    )
    checks.within(self, "[0, 1)", "dare_rate", "tailor_sparsity", "dropout")
    checks.require(
      bool(self.checkpoint.model) or self.last <= self.desk.num_layers,
      "last",
      f"must be at most the {self.desk.num_layers} layers, got {self.last}",
    )
    if unknown := sorted(set(self.rates) - set(PARADIGMS)):
      raise ValueError(f"rates: {unknown[0]!r} is no row; rows are {', '.join(PARADIGMS)}")


def borrowed(config: TuningConfig, row: Row, **options: Any) -> SuiteConfig:
  """Returns a row of the suite under the budget, target and model of another method.

  Args:
    config: settings of the other method.
    row: name of the row.
    **options: fields of `SuiteConfig` that differ from its defaults.
  """
  shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(TuningConfig)}
  options = {"last": min(SuiteConfig.last, config.desk.num_layers), **options}
  return SuiteConfig(row=row, **shared, **options)
