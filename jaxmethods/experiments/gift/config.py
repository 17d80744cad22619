"""GIFT and its rivals: one vision-language model that learns task after task.

python -m train.run --method gift --config configs/gift.yaml

Steps are shared out evenly among the tasks. Every row starts from the same pretrained model and sees the
same images; rows differ in the losses beside that of the task, in the pull to earlier weights, and in
which weights are kept at the end of a task.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxmethods.errors import InputError
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig
from jaxmethods.testbeds.vision_language.settings import SmallClip, TaskSize

TASKS = (
  "backgrounds", "colours", "counts", "glyph-digits", "mnist", "pairs", "places", "sketched-shapes",
)  # fmt: skip

# "zero_shot" trains nothing; "finetune" has L_CE alone, and so have "l2", "ewc" and "wise_ft" but for
# the weights.
Learner = Literal[
  "gift", "zero_shot", "finetune", "l2", "ewc", "lwf", "lwf_vr", "icarl", "wise_ft", "zscl"
]
Order = Literal["given", "alphabetic", "mixed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Painter:
  """The small text-conditional denoiser that paints synthetic images (ours), trained once."""

  width: int = 64
  layers: int = 2
  heads: int = 4
  patch: int = 4
  pairs: int = 12_000  # rendered; pretraining's, and other ones beyond their number
  steps: int = 4000
  batch_size: int = 32
  learning_rate: float = 2e-3
  unconditional: float = 0.1  # share of captions that are hidden in training
  guidance: float = 2.0
  denoising_steps: int = 20
  seed: int = 0

  def __post_init__(self) -> None:
    sizes = ("width", "layers", "heads", "patch", "pairs", "steps", "batch_size", "denoising_steps")
    checks.at_least(self, 1, *sizes, prefix="painter.")
    checks.positive(self, "learning_rate", prefix="painter.")
    checks.within(self, "[0, 1)", "unconditional", prefix="painter.")
    checks.at_least(self, 1, "guidance", prefix="painter.")
    if self.width % (2 * self.heads):
      raise InputError("painter.width: must be an even multiple of painter.heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Defaults are the published settings (code) unless a comment says otherwise."""

  steps: int = 240  # of all tasks together; published: 1000 a task
  log_every: int = 10
  eval_every: int = 1_000_000  # the matrix is complete at the end only
  checkpoint_every: int = 50

  model: str = "small"  # or hf:PATH, a real CLIP
  clip: SmallClip = dataclasses.field(default_factory=SmallClip)
  tasks: list[str] = dataclasses.field(default_factory=lambda: list(TASKS))
  # I: alphabetic; II: a fixed shuffle, in which neighbours differ
  order: Order = "alphabetic"
  size: TaskSize = dataclasses.field(default_factory=TaskSize)
  # class: the classes of one task come in `pieces`; no task identity at test
  incremental: Literal["task", "class"] = "task"
  pieces: int = 5
  batch_size: int = 16  # published: 64
  learning_rate: float = 5e-4  # published: 1e-5 for ViT-B/16
  warmup: float = 0.1  # share of a task's steps
  smoothing: float = 0.2
  smallest_crop: float = 0.9

  learner: Learner = "gift"
  temperature: float = 2.0
  # --- GIFT
  distillation: float = 1.0  # a
  alignment: float = 0.25  # b
  consolidation: float = 1.0  # l
  # what S compares: both of the student's, or one of them with the teacher's other; mse: features
  compared: Literal["both", "image", "text", "mse"] = "both"
  divergence: Literal["cross_entropy", "kl", "reverse_kl"] = "cross_entropy"
  # adaptive: of every batch; static: running mean, then frozen; once: before the task (EWC); ones: L2
  fisher: Literal["adaptive", "static", "once", "ones"] = "adaptive"
  static_steps: int = 5  # of the running mean
  per_tensor: bool = False  # normalise q, k and v apart
  teacher: Literal["previous", "pretrained", "merge"] = "previous"
  teacher_share: float = 0.5  # of the pretrained weights, for `merge`
  # painter; renderer: what rendered the pretraining pairs, right but for a share of its pictures; or
  # folder:PATH of images and image_text.csv
  synthetic: str = "painter"
  renderer_noise: float = 0.1
  synthetic_images: int = 96  # N, a task; published: 1000
  synthetic_batch: int = 16  # published: 64
  synthetic_last: Literal["keep", "drop"] = "keep"  # the ragged last batch of a pass
  synthetic_seed: int = 0
  painter: Painter = dataclasses.field(default_factory=Painter)
  # --- rivals
  random_length: int = 10  # tokens of LwF-VR's random texts
  random_texts: int = 64
  reference_images: int = 500  # of ZSCL; published: 100,000
  ensemble_every: int = 3  # steps between two terms of ZSCL's mean; published: 100 of 1000
  memory: int = 400  # images that iCaRL keeps; published: 10,000
  wise_share: float = 0.8  # of the tuned weights

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`."""
    return "order and crops of the batches"

  def __post_init__(self) -> None:
    super().__post_init__()
    counts = (
      "batch_size", "synthetic_images", "synthetic_batch", "random_length", "random_texts",
      "reference_images", "ensemble_every", "memory", "static_steps",
    )  # fmt: skip
    checks.at_least(self, 1, *counts)
    checks.at_least(self, 2, "pieces")
    checks.positive(self, "learning_rate", "temperature")
    checks.at_least(self, 0, "distillation", "alignment", "consolidation")
    checks.within(self, "[0, 1)", "warmup", "smoothing")
    checks.within(self, "(0, 1]", "smallest_crop")
    checks.within(self, "[0, 1]", "teacher_share", "wise_share", "renderer_noise")
    uses_pairs = self.distillation > 0 or self.alignment > 0
    if (
      self.learner == "gift" and self.consolidation > 0 and not uses_pairs and self.fisher != "ones"
    ):
      raise InputError("consolidation: needs distillation or alignment: no loss has no Fisher")
    if self.incremental == "class" and len(self.tasks) != 1:
      raise InputError("incremental: class needs one task in tasks, whose classes come in pieces")
    if self.steps % self.stages:
      raise InputError(f"steps: must be a multiple of {self.stages} tasks, got {self.steps}")

  @property
  def stages(self) -> int:
    """Number of tasks, or of pieces of one."""
    return self.pieces if self.incremental == "class" else max(len(self.tasks), 1)


def rows(config: Config) -> dict[str, Config]:
  """GIFT, its baselines, and every ablation."""

  def row(learner: Any = "gift", **changes: Any) -> Config:
    return dataclasses.replace(config, learner=learner, **changes)

  baselines = {
    "zero_shot": row("zero_shot"),
    "finetune": row("finetune"),
    "l2": row("l2"),
    "ewc": row("ewc"),
    "lwf": row("lwf"),
    "lwf_vr": row("lwf_vr"),
    "icarl": row("icarl"),
    "wise_ft": row("wise_ft"),
    "zscl": row("zscl"),
  }
  ablations = {
    "gift_cd": row(alignment=0.0, consolidation=0.0),
    "gift_cd_ita": row(consolidation=0.0),
    "gift_ita": row(distillation=0.0, consolidation=0.0),
    "gift_no_ita": row(alignment=0.0),
    "gift_no_cd": row(distillation=0.0),
    "gift_static": row(fisher="static"),
    "gift_ewc": row(fisher="once"),
    "gift_l2": row(fisher="ones"),
    "gift_per_tensor": row(per_tensor=True),
    "gift_mse": row(compared="mse"),
    "gift_image_only": row(compared="image"),
    "gift_text_only": row(compared="text"),
    "gift_kl": row(divergence="kl"),
    "gift_reverse_kl": row(divergence="reverse_kl"),
    "gift_pretrained_teacher": row(teacher="pretrained"),
    "gift_merged_teacher": row(teacher="merge"),
    "gift_drop_last": row(synthetic_last="drop"),
  }
  return {"gift": row()} | baselines | ablations


def untrained(config: Config) -> bool:
  """Tells whether there is nothing to train."""
  return config.learner == "zero_shot"
