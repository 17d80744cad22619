"""GIFT and its rivals: one vision-language model that learns task after task.

python -m train.run --method gift --config configs/gift.yaml

Steps are shared out evenly among the tasks. Every row starts from the same pretrained model and sees the
same images; rows differ in the losses beside that of the task, in the pull to earlier weights, and in
which weights are kept at the end of a task.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxmethods.errors import InputError, hint
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig, Selection
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

# Rows of a comparison: GIFT, its baselines, and every ablation.
ROWS: dict[str, dict[str, Any]] = {
  "gift": {},
  **{
    name: {"learner": name}
    for name in (
      "zero_shot", "finetune", "l2", "ewc", "lwf", "lwf_vr", "icarl", "wise_ft", "zscl",
    )
  },
  "gift_cd": {"alignment": 0.0, "consolidation": 0.0},
  "gift_cd_ita": {"consolidation": 0.0},
  "gift_ita": {"distillation": 0.0, "consolidation": 0.0},
  "gift_no_ita": {"alignment": 0.0},
  "gift_no_cd": {"distillation": 0.0},
  "gift_static": {"fisher": "static"},
  "gift_ewc": {"fisher": "once"},
  "gift_l2": {"fisher": "ones"},
  "gift_per_tensor": {"per_tensor": True},
  "gift_mse": {"compared": "mse"},
  "gift_image_only": {"compared": "image"},
  "gift_text_only": {"compared": "text"},
  "gift_kl": {"divergence": "kl"},
  "gift_reverse_kl": {"divergence": "reverse_kl"},
  "gift_pretrained_teacher": {"teacher": "pretrained"},
  "gift_merged_teacher": {"teacher": "merge"},
  "gift_drop_last": {"synthetic_last": "drop"},
}  # fmt: skip


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
  # of rows of `eval.compare`, by their names, in place of `learning_rate`
  rates: dict[str, float] = dataclasses.field(default_factory=dict)
  held_out: Literal["test", "validation"] = "test"  # validation: of `size.validation` (ours)
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
    if self.held_out == "validation" and not self.size.validation:
      raise InputError("held_out: validation needs size.validation of at least 1")
    for name, rate in self.rates.items():
      if name not in ROWS:
        raise InputError(f"rates: unknown row {name!r}; {hint(name, ROWS, 'rows')}")
      if not rate > 0:
        raise InputError(f"rates: {name} must be positive, got {rate}")
    if self.incremental == "class" and len(self.tasks) != 1:
      raise InputError("incremental: class needs one task in tasks, whose classes come in pieces")
    if self.steps % self.stages:
      raise InputError(f"steps: must be a multiple of {self.stages} tasks, got {self.steps}")

  @property
  def stages(self) -> int:
    """Number of tasks, or of pieces of one."""
    return self.pieces if self.incremental == "class" else max(len(self.tasks), 1)


def rows(config: Config) -> dict[str, Config]:
  """GIFT, its baselines, and every ablation, each at its own rate where `rates` has one."""
  found = {}
  for name, changes in ROWS.items():
    rate = config.rates.get(name, config.learning_rate)
    found[name] = dataclasses.replace(
      config, **{"learner": "gift", "learning_rate": rate, **changes}
    )
  return found


def selection(config: Config) -> Selection | None:
  """Chooses settings by Average on validation images; None for a row without training."""
  if untrained(config):
    return None
  size = dataclasses.replace(config.size, validation=config.size.validation or config.size.test)
  return Selection(dataclasses.replace(config, held_out="validation", size=size), "average")


def untrained(config: Config) -> bool:
  """Tells whether there is nothing to train."""
  return config.learner == "zero_shot"
