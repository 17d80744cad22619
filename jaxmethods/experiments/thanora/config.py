"""ThanoRA-style tuning on mixtures of tasks, and its rivals, on a small model or a checkpoint.

No code of the paper was published and its body could not be read: what is marked (inferred) below is our
reading. One model, pretrained on easy-VQA, is tuned on several targets at once; compared is the mean of
their accuracies.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Selection
from jaxmethods.testbeds.multimodal.settings import BudgetConfig, at_their_rates, selected_by

Row = Literal[
  "thanora", "lora", "dora", "corda", "hydralora", "loramoe", "single", "average", "dare", "ties"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BudgetConfig):
  """Ranges are the paper's (reviews); values are (inferred) unless a comment says otherwise."""

  row: Row = "thanora"
  rates: dict[str, float] = dataclasses.field(
    default_factory=dict
  )  # learning_rate by row, for compare
  tasks: list[str] = dataclasses.field(default_factory=lambda: ["digits", "counting"])
  # Of a checkpoint: task -> file of its questions.
  train: dict[str, str] = dataclasses.field(default_factory=dict)
  test: dict[str, str] = dataclasses.field(default_factory=dict)
  sampler: Literal["proportional", "balanced"] = "proportional"  # to the size of the tasks, or not
  learning_rate: float = 2e-5  # corda's, for starts from data; the others: 2e-4
  projector_rate: float = 2e-5
  rank: int = 32  # r_total; 16 to 128 (reviews)
  alpha: float = 64.0
  dropout: float = 0.05
  targets: str = ""  # regular expression on kernel paths; empty: all linear layers of the LM
  train_projector: bool = True
  preview: int = 500  # training questions of each task (reviews)
  temperature: float = 0.1  # tau; .inf: uniform ranks
  gain: float = 0.0  # gamma; 0: by gain_form
  # tasks: 1 / T, which with s takes s W out of W; scaled: 1 / (T s), which takes out W once (as corda).
  gain_form: Literal["tasks", "scaled"] = "tasks"
  weights: Literal["softmax", "share"] = (
    "softmax"  # of tasks in the ranks; share: H / sum H, no tau
  )
  centred: bool = False  # second moments without the mean, which tasks share (ours)
  compensated_dropout: bool = (
    False  # dropout on a branch that holds pretrained weights (inferred: none)
  )
  spr_weight: float = 1e-3  # lambda
  spectrum: Literal["sv", "sv2"] = "sv"
  orth_on: Literal["both", "A", "B"] = "both"
  damping: float = 0.01  # of the covariance (corda)
  start: Literal["preview", "random"] = "preview"
  compensate: bool = True  # freeze W - s sum B_t A_t (corda), or start with B = 0
  cooperative: bool = True
  experts: int = 4  # of hydralora and loramoe
  source_floor: float = 20.0  # least Source, %, of a setting that --tune may choose (ours)
  drop: float = 0.9  # of dare
  keep: float = 0.2  # of ties

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.require(
      0 < len(self.tasks) == len(set(self.tasks)),
      "tasks",
      f"must be one or more different tasks, got {self.tasks}",
    )
    checks.require(
      bool(self.checkpoint.model) or not (self.train or self.test),
      "train, test",
      "files of questions need checkpoint.model",
    )
    checks.require(
      not (self.checkpoint.train or self.checkpoint.test),
      "checkpoint.train, checkpoint.test",
      "a mixture takes train and test, by task",
    )
    checks.require(
      self.rank > len(self.tasks),
      "rank",
      f"{self.rank} is too small for {len(self.tasks)} tasks and a cooperative block",
    )
    checks.at_least(self, 1, "preview", "experts")
    checks.positive(self, "alpha", "damping")
    # Not `positive`: infinite temperatures are meant.
    checks.require(self.temperature > 0, "temperature", f"must be positive, got {self.temperature}")
    checks.at_least(self, 0, "gain", "spr_weight", "source_floor")
    checks.within(self, "[0, 1)", "dropout", "drop")
    checks.within(self, "(0, 1]", "keep")


def rows(config: Config) -> dict[str, Config]:
  """Lists ThanoRA, its ablations and its rivals, at their learning rates."""
  infinite = float("inf")
  changes: dict[str, dict[str, Any]] = {
    "thanora": {"row": "thanora"},
    "uniform_ranks": {"row": "thanora", "temperature": infinite},
    "hasi_only": {"row": "thanora", "spr_weight": 0.0},
    "spr_only": {"row": "thanora", "start": "random", "temperature": infinite},
    "no_cooperative": {"row": "thanora", "cooperative": False},
    "scaled_gain": {"row": "thanora", "gain_form": "scaled"},
    "share_weights": {"row": "thanora", "weights": "share"},
    "centred": {"row": "thanora", "centred": True},
    **{
      name: {"row": name}
      for name in (
        "lora", "single", "dora", "corda", "hydralora", "loramoe", "average", "dare", "ties"
      )
    },
  }  # fmt: skip
  return at_their_rates(config, config.rates, changes)


def selection(config: Config) -> Selection | None:
  """Chooses settings by the mean over tasks on validation, Source being above its floor."""
  return selected_by(config, "Mean", "Mean", {"Source": config.source_floor})
