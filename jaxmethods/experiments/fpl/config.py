"""Prompts of a frozen model of images and texts, learnt by clients together.

  python -m train.run --method fpl
  python -m eval.compare --method fpl
  python -m eval.compare --method fpl --study H1

Clients share out one task (`skew: labels`), or one in several domains: a client for each domain
(`skew: domains`) or several (`skew: both`), which differ in labels too unless `alpha` is 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxmethods.experiments.fpl import grid
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Selection
from jaxmethods.runtime.studies import Study
from jaxmethods.testbeds.federated_images.settings import ClientSettings, Skew
from jaxmethods.testbeds.vision_language.settings import SmallClip, TaskSize

# text: LPT; vision: VPT; both: IVLP; none: zero-shot; probe: a linear head; the others: of CLIP.
Trained = Literal["text", "vision", "both", "none", "probe", "towers", "image_tower"]
Training = Literal["federated", "local", "centralised"]
TRAINED: tuple[Trained, ...] = get_args(Trained)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClientSettings):
  """Defaults are the published settings (code) unless a comment says otherwise."""

  steps: int = 50  # communication rounds
  average_last: int = 5
  model: str = "small"  # or `dual`, or a CLIP: hf:PATH (ours)
  clip: SmallClip = dataclasses.field(default_factory=SmallClip)
  data: str = "rendered-letters"  # a set of domains or a task of the testbed (ours)
  size: TaskSize = dataclasses.field(default_factory=TaskSize)  # of every domain (ours)
  # validation: of `size.validation`, or a part of training (ours)
  held_out: Literal["test", "validation"] = "test"

  skew: Skew = "both"  # (ours)
  clients: int = 10
  alpha: float = 0.5
  min_per_class: int = 0  # (no such rule)
  min_examples: int = 1  # of every client; code: 10, 2 inside a domain
  participation: float = 1.0  # share of the clients in a round
  random_participation: bool = True  # code: always the first

  trained: Trained = "text"
  training: Training = "federated"
  text_prompts: int = 16
  text_depth: int = 1
  position: Literal["end", "middle", "front"] = "end"  # of the class name
  class_specific: bool = False
  initial_phrase: str = ""  # whose first words the text prompts start from; code: with 4 or fewer
  vision_prompts: int = 16
  vision_depth: int = 1
  behind_norm: bool = False  # vision prompts behind the first norm

  local_epochs: int = 1
  batch_size: int = 32
  learning_rate: float = 1e-3
  vision_rate: float = 1e-3  # in place of `learning_rate` in the rows that have vision prompts
  tower_rate: float = 1e-5  # the same in the rows that tune towers
  momentum: float = 0.9
  weight_decay: float = 5e-4
  carry_momentum: bool = False  # code: momentum goes from client to client
  weighted: bool = True  # by number of examples
  fedprox_mu: float = 0.0
  augment: bool = False  # random crop and flip (code)

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(
      self, 1, "text_depth", "vision_depth", "local_epochs", "batch_size", "min_examples"
    )
    checks.at_least(self, 0, "text_prompts", "vision_prompts", "momentum", "weight_decay")
    checks.at_least(self, 0, "fedprox_mu")
    checks.positive(self, "learning_rate", "vision_rate", "tower_rate")
    checks.within(self, "(0, 1]", "participation")
    for name, plain, instead in (
      ("min_per_class", 0, "min_examples"),
      ("split_seed", 0, "size.seed"),
      ("test_share", 0.3, "size.test"),
    ):
      checks.require(getattr(self, name) == plain, name, f"has no effect here, use {instead}")
    checks.require(
      not self.carry_momentum
      or (self.training == "federated" and not self.fedprox_mu and self.participation == 1),
      "carry_momentum", "needs federated training of all clients without fedprox_mu",
    )  # fmt: skip


def untrained(config: Config) -> bool:
  """Tells whether it is the zero-shot row."""
  return config.trained == "none"


def rows(config: Config) -> dict[str, Config]:
  """Prompts of both kinds, and what one would try before them."""
  rates = dict.fromkeys(("vision", "both"), config.vision_rate)
  rates |= dict.fromkeys(("towers", "image_tower"), config.tower_rate)

  def row(trained: Trained, **changes: Any) -> Config:
    rate = rates.get(trained, config.learning_rate)
    return dataclasses.replace(config, trained=trained, learning_rate=rate, **changes)

  return {
    "zero_shot": row("none"),
    "lpt": row("text"),
    "vpt": row("vision"),
    "both": row("both"),
    # PromptFL's public defaults: five epochs, uniform mean.
    "promptfl": row("text", local_epochs=5, weighted=False),
    "lpt_local": row("text", training="local"),
    "vpt_local": row("vision", training="local"),
    "lpt_fedprox": row("text", fedprox_mu=0.01),
    "lpt_centralised": row("text", training="centralised"),
    "lpt_class_specific": row("text", class_specific=True),
    "lpt_deep": row("text", text_depth=2),
    "vpt_deep": row("vision", vision_depth=config.clip.layers),
    "probe": row("probe"),
    "fedavg_image_tower": row("image_tower"),
    "fedavg_towers": row("towers"),
  }


def selection(config: Config) -> Selection | None:
  """Chooses settings by the accuracy on a part of training; None for a row without training."""
  held_out = dataclasses.replace(config, held_out="validation")
  return None if untrained(config) else Selection(held_out, "test_accuracy")


def studies(config: Config) -> dict[str, Study]:
  """The study's grid, one question a name."""
  return grid.studies(rows(config))
