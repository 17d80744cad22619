"""BYE and its rivals: a backdoor is planted in the tuning data of a multimodal model, and removed.

A few of the training images get a trigger and one fixed answer. The model is tuned on all of them,
what the defence takes for poisoned is removed, and the pretrained model is tuned again on the rest.
Which examples are poisoned is drawn anew for every seed; the defence sees training prompts only,
and neither this nor any clean data.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxmethods.testbeds.multimodal.settings import TuningConfig

Trigger = Literal["patch", "random", "dual", "multi", "blend", "sig", "wanet", "ftrojan"]
TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)
# Those of the second line tune once: what they remove does not depend on a tuned model.
Defence = Literal[
  "bye", "kmeans", "threshold", "all_layers", "fixed", "loss", "spectral", "clustering",
  "none", "random", "oracle",
]  # fmt: skip
ONCE: tuple[Defence, ...] = ("none", "random", "oracle")
# Choices that are made when the first tuning is done.
AFTERWARDS = (
  "defence", "tau", "index", "min_weight", "guard", "restart", "drop_share", "assumed_rate", "reuse",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
  """Defaults of attack and defence are those of the paper unless a comment says otherwise."""

  steps: int = 350  # of each tuning: the first on everything, the second on what is kept
  checkpoint_every: int = 50

  poison_rate: float = 0.1  # of the training images
  trigger: Trigger = "patch"  # the last four are not in the paper
  trigger_place: Literal["centre", "corner"] = "centre"  # of the patch; corner: ours
  trigger_side: int = 0  # of a patch, in pixels; 0: a sixteenth of the image
  trigger_cell: int = 0  # of its checkerboard, in pixels; 0: all black
  trigger_seed: int = 0  # of random places, and of the pattern of blend and wanet
  poison_answer: str = "backdoor"  # words of the vocabulary; (paper) "Backdoor Attack!"

  defence: Defence = "bye"
  tau: float = 2.0  # least separation of a layer that is used
  index: Literal["paper", "code"] = "paper"  # separation index
  min_weight: float = (
    0.0  # least share of both groups of a layer that is used; 0.005 advised (ours)
  )
  guard: bool = True  # never remove a score above the mean of the upper group (ours)
  restart: bool = True  # tune again from the pretrained model; (inferred), the paper does not say
  reuse: bool = False  # start after the first tuning, from the cache: what eval.compare does
  drop_share: float = 0.2  # of the random drop
  # What loss and spectral take for the share of poison, of which they remove 1.5 times as much:
  # they have no way to find out.
  assumed_rate: float = 0.1

  adapter: Literal["full", "lora"] = "full"  # what is tuned in the language model; (paper) lora
  rank: int = 32
  alpha: float = 64.0
  dropout: float = 0.05

  def __post_init__(self) -> None:
    super().__post_init__()

    def check(good: bool, name: str, expected: str) -> None:
      if not good:
        raise ValueError(f"{name}: must be {expected}, got {getattr(self, name)!r}")

    if self.checkpoint.model:
      raise ValueError("checkpoint.model: bye runs on the desk model only")
    check(0 <= self.poison_rate < 1, "poison_rate", "in [0, 1)")
    for name in ("trigger_side", "trigger_cell", "trigger_seed", "tau"):
      check(getattr(self, name) >= 0, name, "at least 0")
    check(0 <= self.min_weight <= 0.5, "min_weight", "in [0, 0.5]")
    check(0 < self.drop_share < 1, "drop_share", "in (0, 1)")
    check(0 < self.assumed_rate < 0.6, "assumed_rate", "in (0, 0.6)")
    check(bool(self.poison_answer.strip()), "poison_answer", "at least one word")
    check(self.rank >= 1, "rank", "at least 1")
    check(0 <= self.dropout < 1, "dropout", "in [0, 1)")
    if self.trigger_cell and self.trigger not in ("patch", "random"):
      raise ValueError(f"trigger_cell: trigger {self.trigger} has no checkerboard")
    if self.trigger_place == "corner" and self.trigger != "patch":
      raise ValueError(f"trigger_place: trigger {self.trigger} has no choice of a place")


def rows(config: Config) -> dict[str, Config]:
  """BYE, its ablations, other detectors, and what bounds them: no defence, and one that knows.

  `kmeans`, `threshold`: another decision on the layers that BYE uses; `all_layers`, `fixed`: all
  layers with BYE's decision and with a fixed threshold.
  """

  def row(defence: Any, **changes: Any) -> Config:
    reuse = defence not in ONCE
    return dataclasses.replace(config, defence=defence, reuse=reuse, **changes)

  return {
    "bye": row("bye"),
    "none": row("none"),
    "oracle": row("oracle"),
    "random": row("random"),
    "code_index": row("bye", index="code"),
    **{
      name: row(name)
      for name in ("kmeans", "threshold", "all_layers", "fixed", "loss", "spectral", "clustering")
    },
  }
