"""GGEUR and its rivals on embeddings of a frozen encoder.

A client holds one domain, with label skew on top (`skew: domains`), a label-skewed part of all the data
(`skew: labels`), or of one domain (`skew: both`). Embeddings come as they are (a source of feature
vectors) or from a small convnet that is trained on a part of every domain which is then set aside:
neither clients nor tests see it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxmethods.runtime import checks
from jaxmethods.testbeds.federated_images.settings import ClientSettings

Algorithm = Literal[
  "fedavg", "fedprox", "scaffold", "moon", "feddyn", "fedadam", "fedntd", "local", "centralised"
]
# own: step 1 alone; repeat: own examples repeated, as many as full makes (a control, ours)
Enlarge = Literal["none", "own", "full", "repeat"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClientSettings):
  """Defaults are the published settings (code) unless a comment says otherwise."""

  steps: int = 50  # communication rounds
  # `split_seed` is that of the encoder's part as well.
  encoder_share: float = 0.3  # of every domain, for images only (ours)
  image_size: int = 16  # side to which images are brought before the encoder (ours)
  encoder_epochs: int = 20  # (ours)
  # Root mean square length to which embeddings are scaled; 0: as they come (ours).
  norm: float = 10.0

  algorithm: Algorithm = "fedavg"
  local_epochs: int = 10
  batch_size: int = 16
  learning_rate: float = 1e-2  # of Adam
  sgd_rate: float = 0.03  # of SCAFFOLD, whose local steps are SGD (ours)
  weighted: bool = False
  double_softmax: bool = False  # code: True
  fedprox_mu: float = 0.01
  moon_mu: float = 1.0
  moon_temperature: float = 0.5
  feddyn_alpha: float = 0.5
  server_rate: float = 0.5  # of fedadam
  fedntd_beta: float = 0.5
  fedntd_temperature: float = 1.0

  enlarge: Enlarge = "full"
  target: int = 60  # T; published: 2000 for digits, 50 for Office-Home (the paper's T per data set)
  own_per_anchor: int = 12  # m1
  own_samples: int = 500  # n1
  prototype_samples: int = 500  # n2
  scale: Literal["sqrt", "lambda"] = "sqrt"
  geometry: Literal["global", "isotropic", "none"] = "global"  # the latter two are ablations
  top_scaling: Literal["none", "code", "intended"] = "none"
  guided_threshold: float = 1.0  # with `skew: labels`; code: 0.8
  min_count_to_share: int = 2  # code: 1
  moment_noise: float = 0.0  # standard deviation of noise on the shared moments

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(
      self, 1, "local_epochs", "batch_size", "target", "own_per_anchor", "own_samples",
      "prototype_samples", "image_size", "encoder_epochs", "min_count_to_share",
    )  # fmt: skip
    checks.at_least(self, 0, "norm", "moment_noise")
    checks.within(self, "(0, 1)", "encoder_share")
    checks.within(self, "(0, 1]", "guided_threshold")


def rows(config: Config) -> dict[str, Config]:
  """GGEUR on FedAvg, its ablations, and every federated algorithm with and without it."""

  def row(algorithm: Algorithm = "fedavg", enlarge: Enlarge = "none", **changes: Any) -> Config:
    return dataclasses.replace(config, algorithm=algorithm, enlarge=enlarge, **changes)

  ablations = {
    "ggeur": row(enlarge="full"),
    "ggeur_step1": row(enlarge="own"),
    "ggeur_lambda": row(enlarge="full", scale="lambda"),
    "ggeur_isotropic": row(enlarge="full", geometry="isotropic"),
    "ggeur_copies": row(enlarge="full", geometry="none"),
    "fedavg_repeated": row(enlarge="repeat"),
  }
  plain = {name: row(name) for name in ALGORITHMS}
  combined = {
    f"{name}_ggeur": row(name, "full")
    for name in ALGORITHMS
    if name not in ("fedavg", "local", "centralised")
  }
  return ablations | plain | combined
