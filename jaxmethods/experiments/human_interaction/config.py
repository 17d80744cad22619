"""Human interaction: motion of two persons, of one with an object, or of one in a scene, by diffusion.

    python -m train.run --method human_interaction
    python -m train.run --method human_interaction --data sbu --fold 2 --reaction true
    python -m train.run --method human_interaction --data cmu --task hoi --clips windows --frames 48
    python -m eval.run --method human_interaction --workdir DIR --generate 8 --label push --seed 3

Objects and scenes are synthetic: put round real or generated motion by rules. The survey that the method
is named after proposes none; the networks and losses are InterGen's, CHOIS' and AffordMotion's, reduced.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig, Values

Task = Literal["hhi", "hoi", "hsi"]
# diffusion is trained; real: the test clips themselves, in halves; the others draw from training clips.
Algorithm = Literal["diffusion", "real", "training_clip", "mean", "gaussian"]


CHOIS = 1000.0  # alpha of the published contact guidance


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSettings:
  """Which clips, and how they are cut."""

  data: str = "embedded:duets"  # or sbu, cmu, motion:PATH
  data_seed: int = 0  # of generated clips
  fps: float = 0.0  # of files that do not say theirs; 0: as their layout has it
  label_words: tuple[str, ...] = ()  # a clip has the first that its text contains as label
  folds: int = 5
  fold: int = 0  # that is held out, modulo `folds`: eval.compare counts it up
  clips: Literal["whole", "windows"] = "whole"  # whole: every clip is resampled to `frames`
  frames: int = 24  # of a clip or window
  stride: int = 48  # between windows
  smooth: float = 0.0  # deviation in frames, before resampling; Kinect wants 1
  augment: bool = True  # mirror training clips, and swap the persons


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntitySettings:
  """Synthetic objects and scenes (inferred)."""

  entity_seed: int = 0
  points: int = 64  # on the surface of an object
  scene_points: int = 126  # of a scene of at most 6 solids
  touch: float = 0.1  # m, hand to object, below which they are in contact


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSettings:
  """The frozen evaluator, trained once on real training clips, and what is measured with it."""

  evaluator_steps: int = 600
  evaluator_width: int = 64
  embedding: int = 16
  samples: int = 5  # motions drawn for each test clip
  replications: int = 20  # draws of one sample each, for the metrics of distributions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClipSettings, EntitySettings, JudgeSettings, RunConfig):
  """Settings of one row; the official values (InterGen, code) are in human_interaction_paper.yaml."""

  steps: int = 3000
  log_every: int = 50
  eval_every: int = 3000
  checkpoint_every: int = 500

  task: Task = "hhi"
  reaction: bool = False  # person 0 is given, person 1 answers
  algorithm: Algorithm = "diffusion"
  condition: Literal["label", "none", "shuffled"] = "label"
  interaction: bool = True  # the losses DM, JA and RO of two persons

  network: Literal["denoiser", "concat", "single"] = "denoiser"
  width: int = 64
  layers: int = 3
  heads: int = 4
  hidden: int = 128
  dropout: float = 0.1

  diffusion_steps: int = 1000  # N
  sampling_steps: int = 20
  scale: float = 2.0  # of classifier-free guidance
  contact_guidance: float = (
    0.0  # alpha of CHOIS' guidance at sampling, task=hoi; CHOIS: 1000, 0: none
  )
  drop: float = 0.1  # of the label, in training
  gate: float = 0.7  # losses of geometry count below this share of N

  batch_size: int = 32
  learning_rate: float = 1e-3
  warmup: float = 0.05  # share of the steps
  weight_decay: float = 2e-5
  clip: float = 0.5  # norm of the gradient
  average: float = 0.999  # of the parameters that are sampled with

  generate: int = (
    0  # motions that an evaluation leaves as npz, BVH, GIF and in the player; by `seed`
  )
  label: str = ""  # of these motions; empty: as the test clips come

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`."""
    return "initialisation, batches, samples and the fold held out"

  @property
  def counted(self) -> tuple[str, ...]:
    """See `RunConfig`."""
    return ("fold",)

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(
      self, 1, "stride", "points", "scene_points", "evaluator_steps", "evaluator_width", "embedding",
      "layers", "heads", "hidden", "diffusion_steps", "sampling_steps", "batch_size", "replications",
    )  # fmt: skip
    checks.at_least(self, 0, "generate", "contact_guidance")
    checks.at_least(self, 2, "folds", "frames", "samples", "width")
    checks.positive(self, "learning_rate", "clip", "touch", "scale")
    checks.within(self, "[0, 1)", "dropout", "drop", "average", "warmup")
    checks.within(self, "(0, 1]", "gate")
    checks.require(self.frames >= 3, "frames", f"must be at least 3, got {self.frames}")
    checks.require(
      self.sampling_steps <= self.diffusion_steps, "sampling_steps",
      f"must be at most diffusion_steps {self.diffusion_steps}, got {self.sampling_steps}",
    )  # fmt: skip
    for field in ("width", "evaluator_width"):
      value, heads = getattr(self, field), self.heads
      checks.require(
        value % (2 * heads) == 0, field, f"must be a multiple of twice heads {heads}, got {value}"
      )
    checks.require(
      not self.reaction or self.task == "hhi", "reaction", f"is for task=hhi only, got {self.task}"
    )
    checks.require(
      not self.contact_guidance or self.task == "hoi", "contact_guidance",
      f"is for task=hoi only, got {self.task}",
    )  # fmt: skip
    checks.require(
      self.network == "denoiser" or self.task == "hhi", "network",
      f"{self.network} is for task=hhi only, got {self.task}",
    )  # fmt: skip


def untrained(config: Config) -> bool:
  """Tells whether a row learns nothing."""
  return config.algorithm != "diffusion"


def rows(config: Config) -> dict[str, Config]:
  """The model, parts of it left out, rows that learn nothing, and real test clips."""

  def row(**changes: Any) -> Config:
    return dataclasses.replace(config, **changes)

  own: Values = {"algorithm": "diffusion", "condition": "label", "reaction": False}
  table = {
    "human_interaction": row(**own),
    "unconditioned": row(**own | {"condition": "none"}),
    "shuffled_labels": row(**own | {"condition": "shuffled"}),
  }
  if config.task == "hhi":
    table |= {
      "reaction": row(**own | {"reaction": True}),
      "no_interaction_losses": row(**own, interaction=False) if config.interaction else row(**own),
      "concatenated": row(**own | {"network": "concat"}),
      "no_guidance": row(**own, scale=1.0) if config.scale != 1 else row(**own),
    }
  if config.task == "hoi":
    table["contact_guidance"] = row(**own, contact_guidance=config.contact_guidance or CHOIS)
  flat: Values = own | {"steps": 1, "eval_every": 1}
  for algorithm in ("training_clip", "mean", "gaussian", "real"):
    table[algorithm] = row(**flat | {"algorithm": algorithm})
  return table
