"""The suite of the survey "Keeping Yourself is Important": every way of tuning, one model, one budget.

The model is pretrained on easy-VQA (four families of questions) and tuned on one target. A row is a way
of tuning; all rows of a seed see the same batches in the same order. Of the survey itself the abstract
and the list of methods could be read: the rows are the definitions of the cited methods.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxmethods.testbeds.multimodal.settings import TuningConfig, at_their_rates

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
class Config(TuningConfig):
  """Defaults are those of the spec's desk recipe; (orig): of the cited method."""

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
    for name in (
      "last", "bottleneck", "prompt_length", "rank", "vera_rank", "experts", "prune_at",
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
    if not self.checkpoint.model and self.last > self.desk.num_layers:
      raise ValueError(f"last: must be at most the {self.desk.num_layers} layers, got {self.last}")
    for name in ("share", "graft_share", "half_share", "wise_weight", "ties_share", "keep_ratio"):
      if not 0 < getattr(self, name) <= 1:
        raise ValueError(f"{name}: must be in (0, 1], got {getattr(self, name)}")
    for name in ("dare_rate", "tailor_sparsity", "dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name}: must be in [0, 1), got {getattr(self, name)}")
    for name in ("l2_weight", "ewc_weight", "adalora_weight", "cmr_weight"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
    if self.oft_block < 2:
      raise ValueError(f"oft_block: must be at least 2, got {self.oft_block}")
    if unknown := sorted(set(self.rates) - set(PARADIGMS)):
      raise ValueError(f"rates: {unknown[0]!r} is no row; rows are {', '.join(PARADIGMS)}")


def borrowed(config: TuningConfig, row: Any, **options: Any) -> Config:
  """A row of the suite under the budget, target and model of another method's config."""
  shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(TuningConfig)}
  options = {"last": min(Config.last, config.desk.num_layers), **options}
  return Config(row=row, **shared, **options)


def rows(config: Config) -> dict[str, Config]:
  """All rows; learning rates are those of `rates`. `base` has one step, which changes nothing.

  The rate of `projector` is that of the projector, which the other rows train at `projector_rate`.
  """
  changes: dict[str, dict[str, Any]] = {name: {"row": name} for name in PARADIGMS}
  if "projector" in config.rates:
    changes["projector"]["projector_rate"] = config.rates["projector"]
  result = at_their_rates(config, changes)
  base = dataclasses.replace(result["base"], steps=1, eval_every=1, log_every=1)
  return result | {"base": base}
