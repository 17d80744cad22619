"""RAHFL and its rivals: clients of different architectures with partly corrupted images.

Every client has a network of its own and a share of the private images; all see the same unlabelled
public images. They train alone for some epochs, then rounds of learning from each other's answers and
from their own images follow.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig, Selection

Local = Literal["ce", "sce", "jsd", "supcon", "dcl", "ridge"]
Exchange = Literal["none", "hfl", "asym", "fedmd", "feddf", "rhfl", "aughfl", "fedproto"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Defaults are the published settings (code) unless a comment says otherwise."""

  steps: int = 40  # communication rounds; `pretrain` more steps come before them
  pretrain: int = 40  # epochs of plain cross-entropy, each a step of the run
  data: str = "embedded:mnist5k"  # private images; (code) 10,000 of CIFAR-10 for each client
  public: str = "digits"  # its labels are never read; (code) CIFAR-100
  image_size: int = 0  # side to which all images are brought; 0: as they come (ours)
  # Of the corruptions, the test split and the public subset; clients follow `seed`.
  split_seed: int = 0
  test_share: float = 0.3  # where the source has no split "test" (ours)
  private_examples: int = 10000  # of each client, validation part included
  public_examples: int = 5000  # fewer if the source has fewer
  overlap: bool = False  # code: True, clients draw independently of each other
  alpha: float = 0.0  # of a Dirichlet label skew in place of private_examples; 0: none
  validation_share: float = 0.1  # of a client's images, kept for its accuracy (ours)
  accuracy_from: Literal["validation", "test"] = "validation"  # code: test, a leak

  corruption: float = 0.5  # share xi of the private training images; published: 0, 0.5, 1
  kinds: list[str] = dataclasses.field(default_factory=lambda: ["all"])  # all: the 15 of CIFAR-10-C
  severities: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3, 4])  # code: never 5

  architectures: list[str] = dataclasses.field(
    default_factory=lambda: ["resnet10", "resnet12", "shufflenet", "mobilenet"]
  )
  clients_per_architecture: int = 1
  narrow: int = 1  # what all channels are divided by (ours)
  stages: int | None = None  # one block of each of the first stages; null: whole networks (ours)

  flip: bool = True  # mirror images half the time (code); False for digits, which it would change
  # jsd: AugMix without contrast; supcon: without matching; sce: RHFL's; ridge: no network (ours)
  local: Local = "dcl"
  exchange: Exchange = "asym"
  batch_size: int = 256  # private and public; incomplete batches are dropped
  learning_rate: float = 1e-3  # of Adam
  public_rate: float = 0.0  # of the public steps; 0: learning_rate (code: both 1e-3)
  public_steps: int = 0  # of a round, at most; 0: all (code: 19, beside 39 private ones)
  reuse: bool = False  # start after `pretrain`, from the cache: what eval.compare does
  adam_state: Literal["reset", "keep"] = "reset"  # reset: anew at each public step and local phase
  lambda_jsd: float = 12.0
  beta: float = 1.0  # of distribution matching
  temperature: float = 0.2
  base_temperature: float = 0.07
  ddm_temperature: float = 0.2
  ddm_form: Literal["code", "plain"] = "code"  # plain: the probable intent (inferred)
  rhfl_eta: float = 0.5
  fedproto_lambda: float = 1.0
  fedproto_width: int = 64  # common width of the projected features (ours)

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`."""
    return "initialisation, the clients' shares and their batches"

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(
      self, 1, "private_examples", "public_examples", "clients_per_architecture", "narrow",
      "batch_size", "fedproto_width",
    )  # fmt: skip
    checks.at_least(self, 0, "pretrain", "image_size", "alpha", "public_rate", "public_steps")
    checks.require(
      self.local != "ridge" or (self.exchange == "none" and not self.reuse),
      "local", "ridge goes with exchange none and without reuse",
    )  # fmt: skip
    checks.within(self, "(0, 1)", "test_share", "validation_share")
    checks.positive(self, "temperature", "base_temperature", "ddm_temperature", "learning_rate")
    checks.within(self, "[0, 1]", "corruption")
    checks.require(
      len(set(self.architectures)) == len(self.architectures),
      "architectures", "a name repeats; clients_per_architecture says how many",
    )  # fmt: skip
    checks.require(
      not self.reuse or self.adam_state == "reset",
      "reuse", "Adam's state of the time alone is not kept, adam_state must be reset",
    )  # fmt: skip
    clients = len(self.architectures) * self.clients_per_architecture
    checks.require(
      clients >= (1 if self.exchange == "none" else 2),
      "architectures", "one client has nobody to learn from",
    )  # fmt: skip


def rows(config: Config) -> dict[str, Config]:
  """RAHFL, its ablations, and its rivals; the epochs alone, equal in all rows, are done once a seed."""
  reuse = config.adam_state == "reset"

  def row(local: Local, exchange: Exchange) -> Config:
    return dataclasses.replace(config, local=local, exchange=exchange, reuse=reuse)

  return {
    "rahfl": row("dcl", "asym"),
    "rahfl_symmetric": row("dcl", "hfl"),
    "rahfl_local": row("dcl", "none"),  # no exchange
    "aughfl": row("jsd", "aughfl"),
    "local": row("ce", "none"),
    "local_augmix": row("jsd", "none"),
    "fedmd": row("ce", "fedmd"),
    "feddf": row("ce", "feddf"),
    "fedproto": row("ce", "fedproto"),
    "rhfl": row("sce", "rhfl"),
    "ridge": dataclasses.replace(config, local="ridge", exchange="none", reuse=False),
  }


def selection(config: Config) -> Selection:
  """Chooses settings by the clients' mean accuracy on their validation images."""
  return Selection(config, "validation_accuracy")
