"""Settings of what answers for an agent; starts without jax."""

from __future__ import annotations

import dataclasses
from typing import Literal
from urllib.parse import urlsplit

from jaxmethods.runtime import checks

RULE = "rule"
_SCHEMES = ("http://", "https://")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSettings:
  """An OpenAI-compatible endpoint, or a local model.

  The key is read from the environment when a request is made and is kept nowhere else.
  """

  model: str = "gpt-4o-mini"  # name the endpoint knows it by
  key_variable: str = "OPENAI_API_KEY"  # environment variable; unset: no key is sent
  temperature: float = 0.7  # (code)
  max_tokens: int = 512  # (code: 5500)
  timeout: float = 60.0  # seconds for one try, its body included
  tries: int = 6  # of one request; (code: without end)
  longest_wait: float = 60.0  # seconds between two tries, Retry-After included
  concurrency: int = 4  # requests under way at a time
  max_reply_bytes: int = 1 << 20
  batch_size: int = 8  # texts that a local model reads together

  def __post_init__(self) -> None:
    checks.positive(self, "timeout", prefix="chat.")
    checks.at_least(self, 0, "temperature", "longest_wait", prefix="chat.")
    names = ("max_tokens", "tries", "concurrency", "max_reply_bytes", "batch_size")
    checks.at_least(self, 1, *names, prefix="chat.")
    if not self.model or not self.key_variable:
      raise ValueError("chat.model and chat.key_variable must not be empty")


def check_backend(name: str) -> None:
  """Refuses an unknown kind of back end.

  Raises:
    ValueError: it is neither `rule`, an http address, nor a local model; or an address holds a password.
  """
  if name.startswith(_SCHEMES):
    parts = urlsplit(name)
    if not parts.hostname:
      raise ValueError("backend: the address names no host")
    if parts.username or parts.password or parts.query:
      raise ValueError(
        "backend: the address must hold no key; name its variable in chat.key_variable"
      )
  elif name != RULE and not name.startswith(("wheel:", "hf:", "gguf:", "tiny:", "random:")):
    raise ValueError(
      f"backend: {name!r} is none of rule, http://..., wheel:NAME, hf:PATH, gguf:PATH, tiny:stories260k"
    )


def is_endpoint(name: str) -> bool:
  """Whether a back end is asked over the network."""
  return name.startswith(_SCHEMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacySettings:
  """DP-SGD for a method's Config to inherit: off, or an epsilon, or a noise whose epsilon is stated."""

  dp_epsilon: float = (
    0.0  # of the whole run, the noise follows from it; 0: not private, or dp_noise
  )
  dp_noise: float = 0.0  # sigma; 0: not private, or dp_epsilon
  dp_delta: float = 0.0  # 0: n^-1.1 of n training examples (known: a common choice)
  dp_clip: float = 1.0  # C, of one example's gradient over all that is trained
  dp_microbatch: int = 0  # examples whose gradients are in memory at once; 0: all of a batch
  dp_accountant: Literal["rdp", "pld"] = "rdp"  # pld: dp-accounting, tighter; extra `privacy`

  def __post_init__(self) -> None:
    super().__post_init__()  # type: ignore[misc]  # that of RunConfig, which comes behind
    checks.at_least(self, 0, "dp_epsilon", "dp_noise", "dp_microbatch")
    checks.positive(self, "dp_clip")
    checks.within(self, "[0, 1)", "dp_delta")
    checks.require(
      not (self.dp_epsilon and self.dp_noise),
      "dp_noise",
      "follows from dp_epsilon: give one of them",
    )

  @property
  def is_private(self) -> bool:
    """Whether a run is private at all."""
    return bool(self.dp_epsilon or self.dp_noise)


Adapter = Literal[
  "lora", "lora_plus", "rslora", "dora", "vera", "moslora", "pissa", "milora", "adalora", "oft",
  "loramoe", "lorasculpt", "ia3", "serial_adapter", "parallel_adapter", "prompt", "prefix",
  "magnitude_mask", "gradient_mask", "random_mask",
  "base", "full", "layers", "last_layers", "bitfit", "attention", "gate_up", "l2_sp", "ewc", "spider",
  "dare", "grafting", "half", "wise", "ties",
]  # fmt: skip
# Their start, or what they keep, is computed from examples.
NEEDS_PROBE = ("gradient_mask", "ewc")
# Choose single layers: those must not be stacked.
BY_LAYER = ("last_layers", "spider")
# Train the model's own parameters.
OWN = (
  "full", "layers", "last_layers", "bitfit", "attention", "gate_up", "l2_sp", "ewc", "spider", "dare",
  "grafting", "half", "wise", "ties",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
  """What is trained of a causal LM, and how; the defaults are those of the multimodal suite."""

  targets: str = ""  # regular expression on kernel paths; "": the linear layers of all blocks
  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0
  last: int = 2  # decoder layers of last_layers and spider
  share: float = 0.5  # of the entries that masks leave free
  l2_weight: float = 1e-3
  ewc_weight: float = 100.0
  dare_rate: float = 0.9
  graft_share: float = 0.1
  half_share: float = 0.5
  wise_weight: float = 0.5
  ties_share: float = 0.2
  ties_scale: float = 1.0
  bottleneck: int = 64
  prompt_length: int = 20
  vera_rank: int = 64
  adalora_weight: float = 1e-3
  oft_block: int = 32
  experts: int = 4
  keep_ratio: float = 0.08  # LoRASculpt
  prune_at: int = 18  # LoRASculpt
  cmr_weight: float = 1e-3  # LoRASculpt

  def __post_init__(self) -> None:
    at_least = {"prefix": "tuner."}
    checks.at_least(
      self, 1, "last", "rank", "bottleneck", "prompt_length", "vera_rank", "experts", "prune_at",
      **at_least,
    )  # fmt: skip
    checks.at_least(self, 2, "oft_block", **at_least)
    checks.at_least(self, 0, "l2_weight", "ewc_weight", "adalora_weight", "cmr_weight", **at_least)
    checks.positive(self, "alpha", **at_least)
    for name in ("share", "graft_share", "half_share", "wise_weight", "ties_share", "keep_ratio"):
      checks.require(0 < getattr(self, name) <= 1, f"tuner.{name}", "must be in (0, 1]")
    for name in ("dare_rate", "dropout"):
      checks.require(0 <= getattr(self, name) < 1, f"tuner.{name}", "must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToySettings:
  """The small models of the toy world: base, then aligned (inferred)."""

  width: int = 64
  layers: int = 2
  heads: int = 4
  hidden: int = 256
  sequences: int = 4000  # of the base corpus
  base_steps: int = 400
  base_rate: float = 3e-3
  base_batch: int = 64
  aligned_steps: int = 300
  aligned_rate: float = 5e-4
  aligned_batch: int = 64
  aligned_examples: int = 512  # of each kind: refuse, benign, fact
  augment: float = (
    0.5  # share of chat whose fillers are any tokens, when a model is aligned; 0: off
  )
  prompts: int = 128  # of each score

  def __post_init__(self) -> None:
    sizes = (
      "width", "layers", "heads", "hidden", "sequences", "base_steps", "base_batch", "aligned_steps",
      "aligned_batch", "aligned_examples", "prompts",
    )  # fmt: skip
    checks.at_least(self, 1, *sizes, prefix="toy.")
    checks.positive(self, "base_rate", "aligned_rate", prefix="toy.")
    checks.within(self, "[0, 1]", "augment", prefix="toy.")
    checks.require(
      self.width % self.heads == 0,
      "toy.width",
      f"must be a multiple of the {self.heads} heads, got {self.width}",
    )
