"""AdaFreq and its rivals: individuals are found again by their photographs.

Two protocols. `disjoint` (the paper's): training and test have different individuals, and every test
photograph searches the other ones. `closed` (MegaDescriptor's): the photographs of every individual are
dealt out to a database, which is trained on and searched, and to queries.

    python -m train.run --method adafreq
    python -m eval.run --method adafreq --query DIR --gallery DIR
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig, Values

# vit: from scratch, or `weights`; hybrid: a ViT on maps of frozen EfficientNet-Lite0; pooled: two
# layers on their moments; resnet: BoT. The others learn nothing; frozen: moments as they are.
Network = Literal["vit", "hybrid", "pooled", "resnet", "pixels", "histogram", "frozen"]
UNTRAINED = ("pixels", "histogram", "frozen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Defaults are the published settings (paper) unless a comment says otherwise."""

  steps: int = 600  # published: 150 epochs
  log_every: int = 10
  eval_every: int = 200
  checkpoint_every: int = 200

  # Sources, comma-separated: `embedded:coats`, `reid:PATH`; several: species trained together.
  data: str = "embedded:coats"
  test_data: str = ""  # searched in place of the test part of `data`: another species
  split: str = "split"  # column of a CSV with train and test; without one, drawn by `split_seed`
  protocol: Literal["disjoint", "closed"] = "disjoint"
  split_seed: int = 0
  test_share: float = 0.3  # of the individuals, or of the photographs of each
  individuals: int = 24  # of each generated species
  image_size: int = 64  # published: 256

  query: str = ""  # folder of the user, whose photographs are searched for in `gallery`
  gallery: str = ""
  top: int = 10  # neighbours that are shown

  network: Network = "vit"
  weights: str = ""  # of a ViT: hf:PATH
  patch: int = 8  # published: 16
  stride: int = 6  # code: 12
  width: int = 96
  layers: int = 4
  heads: int = 4
  drop_path: float = 0.1
  resolutions: tuple[int, ...] = (128, 224)  # at which EfficientNet-Lite0 sees; hybrid: the first
  drawn_views: int = (
    2  # copies of each photograph that a frozen network sees, all but one augmented
  )
  drop_rate: float = 0.2  # dropout on moments, network=pooled
  local_groups: int = 0  # of the jigsaw branch; TransReID: 4

  view: Literal["none", "plain", "mixed"] = "mixed"
  mix: Literal["paper", "code"] = "paper"
  area: float = 0.5
  deviation: float = 70.0  # D at 256 pixels, in proportion elsewhere (code)
  select: Literal["none", "paper", "code"] = "paper"
  share: float = 0.5  # mu
  loss: Literal["paper", "code"] = "paper"
  equilibrium: float = 0.1  # lambda
  reduce: Literal["sum", "mean"] = "sum"  # of L_F over the batch

  pad: int = 10  # pixels that a crop may be off, at 256
  rotation: float = 15.0
  jitter: float = 0.2  # of brightness and contrast
  flip: float = 0.0
  augment: bool = True

  identities: int = 8
  images: int = 4
  optimizer: Literal["adamw", "sgd"] = "adamw"  # published: sgd, on ImageNet weights
  learning_rate: float = 1e-3
  weight_decay: float = 1e-4
  warmup_epochs: int = 5

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`."""
    return "initialisation, order and views of the photographs"

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(
      self, 1, "individuals", "image_size", "top", "patch", "stride", "width", "layers", "heads",
      "drawn_views", "identities", "images",
    )  # fmt: skip
    checks.at_least(
      self, 0, "local_groups", "equilibrium", "pad", "rotation", "weight_decay", "warmup_epochs"
    )
    checks.positive(self, "deviation", "learning_rate")
    checks.within(self, "(0, 1)", "test_share")
    checks.within(self, "(0, 1]", "share")
    checks.within(self, "[0, 1]", "area", "flip")
    checks.within(self, "[0, 1)", "drop_path", "drop_rate", "jitter")
    checks.require(
      bool(self.resolutions) and all(side > 0 and side % 32 == 0 for side in self.resolutions),
      "resolutions", f"must be multiples of 32, got {self.resolutions}",
    )  # fmt: skip
    checks.require(self.image_size >= 8, "image_size", f"must be at least 8, got {self.image_size}")
    checks.require(
      self.network != "vit" or bool(self.weights) or self.patch <= self.image_size, "patch",
      f"must be at most image_size {self.image_size}, got {self.patch}",
    )  # fmt: skip
    checks.require(
      not (self.weights and self.network != "vit"), "weights", "is for network=vit only"
    )
    checks.require(
      not self.local_groups or (self.local_groups % 2 == 0 and self.view == "none"),
      "local_groups", "must be even, and is for view=none only",
    )  # fmt: skip
    checks.require(
      not self.local_groups or not self.weights, "local_groups", "is for networks without weights"
    )
    checks.require(
      self.network not in ("pooled", "resnet") or self.select == "none" or self.view == "none",
      "select", f"{self.network} has no patches; set select=none",
    )  # fmt: skip
    checks.require(
      bool(self.query) == bool(self.gallery), "query", "needs a gallery, and it a query"
    )


def untrained(config: Config) -> bool:
  """Tells whether a network learns nothing."""
  return config.network in UNTRAINED


def rows(config: Config) -> dict[str, Config]:
  """AdaFreq, its ablations, rivals, and floors that a trained network must beat."""

  def row(**changes: Any) -> Config:
    return dataclasses.replace(config, **changes)

  bare: Values = {"view": "none", "select": "none", "local_groups": 0}
  floor = bare | {"steps": 1, "weights": ""}
  flat = {"pooled", "resnet"} & {config.network}
  own: Values = {"view": "mixed", "select": "none" if flat else "paper", "local_groups": 0}
  table = {
    "adafreq": row(**own),
    "plain": row(**bare),
    "hf_plain": row(**own | {"view": "plain", "select": "none"}, equilibrium=0.0),
    "fma": row(**own | {"select": "none"}, equilibrium=0.0),
  }
  if not flat:
    table["fma_ods"] = row(**own, equilibrium=0.0)
    table["adafreq_code"] = row(**own | {"select": "code"}, mix="code", loss="code")
    if not config.weights:
      table["transreid"] = row(**bare | {"local_groups": 4})
  table["bot"] = row(**bare | {"network": "resnet", "weights": ""})
  floors = ("pixels", "histogram", *(("frozen",) if config.network in ("hybrid", "pooled") else ()))
  return table | {name: row(**floor | {"network": name}) for name in floors}
