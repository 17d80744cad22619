"""BYE and its rivals: a backdoor is planted in the tuning data of a multimodal model, and removed.

A few of the training images get a trigger and one fixed answer. The model is tuned on all of them,
what the defence takes for poisoned is removed, and the pretrained model is tuned again on the rest.
Which examples are poisoned is drawn anew for every seed; the defence sees training prompts only,
and neither this nor any clean data.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Selection
from jaxmethods.testbeds.multimodal.settings import TuningConfig

Trigger = Literal["patch", "random", "dual", "multi", "blend", "sig", "wanet", "ftrojan"]
TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)
Place = Literal["centre", "corner"]
Index = Literal["paper", "code"]
# Those of the second line tune once: what they remove does not depend on a tuned model.
Defence = Literal[
  "bye", "kmeans", "threshold", "all_layers", "fixed", "loss", "spectral", "clustering",
  "none", "random", "oracle",
]  # fmt: skip
ONCE: tuple[Defence, ...] = ("none", "random", "oracle")
_RIVALS: tuple[Defence, ...] = (
  "kmeans", "threshold", "all_layers", "fixed", "loss", "spectral", "clustering",
)  # fmt: skip
# Choices that are made when the first tuning is done.
AFTERWARDS = (
  "defence", "tau", "index", "null_draws", "min_weight", "guard", "restart", "drop_share",
  "assumed_rate", "reuse",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
  """Defaults of attack and defence are those of the paper unless a comment says otherwise."""

  steps: int = 350  # of each tuning: the first on everything, the second on what is kept
  checkpoint_every: int = 50

  poison_rate: float = 0.1  # of the training images
  trigger: Trigger = "patch"  # the last four are not in the paper
  trigger_place: Place = "centre"  # of the patch; corner: ours
  trigger_side: int = 0  # of a patch, in pixels; 0: a sixteenth of the image
  trigger_cell: int = 0  # of its checkerboard, in pixels; 0: all black
  trigger_seed: int = 0  # of random places, and of the pattern of blend and wanet
  poison_answer: str = "backdoor"  # words of the vocabulary; (paper) "Backdoor Attack!"

  defence: Defence = "bye"
  # Least separation of a layer that is used. By `paper`, layers without poison came to 2.45 here and
  # layers that found it had 2.66 to 5.19; `code` is smaller by up to the square root of 2.
  tau: float = 2.0
  index: Index = "code"  # (code); paper: eq. 6 with its root inferred, which uniform entropies pass
  # Draws of the separation without poison; a layer is used above 95 % of them only (ours). 0: no check.
  null_draws: int = 40
  min_weight: float = (
    0.0  # least share of both groups of a layer that is used; 0.005 advised (ours)
  )
  guard: bool = True  # never remove a score above the mean of the upper group (ours)
  restart: bool = True  # tune again from the pretrained model; (inferred), the paper does not say
  reuse: bool = False  # start after the first tuning, from the cache, as eval.compare does
  drop_share: float = 0.2  # of the random drop
  # The share of poison that loss and spectral assume, for they cannot find out; they remove 1.5 times
  # as much.
  assumed_rate: float = 0.1

  adapter: Literal["full", "lora"] = "full"  # what is tuned in the language model; (paper) lora
  rank: int = 32
  alpha: float = 64.0
  dropout: float = 0.05

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`."""
    return "poisoned examples, initialisation and order of the data"

  def __post_init__(self) -> None:
    super().__post_init__()
    need = checks.require
    need(not self.checkpoint.model, "checkpoint.model", "bye runs on the desk model only")
    checks.within(self, "[0, 1)", "poison_rate", "dropout")
    checks.at_least(self, 0, "trigger_side", "trigger_cell", "trigger_seed", "tau")
    checks.within(self, "[0, 0.5]", "min_weight")
    checks.at_least(self, 0, "null_draws")
    checks.within(self, "(0, 1)", "drop_share")
    checks.within(self, "(0, 0.6)", "assumed_rate")
    checks.at_least(self, 1, "rank")
    checks.positive(self, "alpha")
    need(
      bool(self.poison_answer.strip()),
      "poison_answer",
      f"must be at least one word, got {self.poison_answer!r}",
    )
    need(
      not self.trigger_cell or self.trigger in ("patch", "random"),
      "trigger_cell",
      f"trigger {self.trigger} has no checkerboard",
    )
    need(
      self.trigger_place == "centre" or self.trigger == "patch",
      "trigger_place",
      f"trigger {self.trigger} has no choice of a place",
    )


class Attack(NamedTuple):
  """A backdoor: trigger and false answer, the share of images that get them, and their sizes."""

  trigger: Trigger
  place: Place
  side: int
  cell: int
  seed: int
  answer: str
  rate: float


class Criteria(NamedTuple):
  """The settings of the detectors; see `Config`. `null`: separation that no poison needs."""

  tau: float
  separation: Index
  min_weight: float
  guard: bool
  assumed_rate: float
  null: float = 0.0


def attack(config: Config) -> Attack:
  """Returns the backdoor of a config."""
  return Attack(
    config.trigger, config.trigger_place, config.trigger_side, config.trigger_cell,
    config.trigger_seed, config.poison_answer, config.poison_rate,
  )  # fmt: skip


def criteria(config: Config) -> Criteria:
  """Returns the settings of the detectors."""
  return Criteria(config.tau, config.index, config.min_weight, config.guard, config.assumed_rate)


def rows(config: Config) -> dict[str, Config]:
  """BYE, its ablations, other detectors, and what bounds them: no defence, and one that knows.

  `kmeans`, `threshold`: another decision on the layers that BYE uses; `all_layers`, `fixed`: all
  layers with BYE's decision and with a fixed threshold.
  """

  def row(defence: Defence, index: Index = config.index) -> Config:
    reuse = defence not in ONCE
    return dataclasses.replace(config, defence=defence, reuse=reuse, index=index)

  return {
    "bye": row("bye"),
    "none": row("none"),
    "oracle": row("oracle"),
    "random": row("random"),
    "paper_index": row("bye", index="paper"),
    "no_null": dataclasses.replace(row("bye"), null_draws=0),
    **{name: row(name) for name in _RIVALS},
  }


def selection(config: Config) -> Selection:
  """Chooses settings by the accuracy of the last model on clean validation images, poison unknown."""
  return Selection(dataclasses.replace(config, split="validation"), "clean_accuracy")
