"""Settings of methods whose clients share out one data set of one or several domains. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig

# domains: a client a domain, label skew on top; labels: the pooled data, skewed by label;
# both: several clients a domain, skewed by label inside it.
Skew = Literal["domains", "labels", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSettings(RunConfig):
  """Which data there are, which part is the test, and who holds what."""

  data: str = "embedded:digit-domains"  # or any source of arrays; its splits are the domains
  split_seed: int = 0  # of the test split; the partition follows `seed`
  test_share: float = 0.3
  skew: Skew = "domains"
  clients: int = 10  # with `skew: labels` or `both`
  alpha: float = 0.1  # of the Dirichlet label skew; 0 for none
  min_per_class: int = 1  # examples of each class that every client gets, where it has them
  # With `skew: labels`: every client holds this many classes, each class in even parts, in place of
  # `alpha` and `min_per_class`; 0: off (ours).
  classes_per_client: int = 0

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`."""
    return "initialisation, the clients' shares and their batches"

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(self, 1, "clients")
    checks.at_least(self, 0, "alpha", "min_per_class", "classes_per_client")
    checks.within(self, "(0, 1)", "test_share")
    checks.require(
      not self.classes_per_client or self.skew == "labels",
      "classes_per_client", f"needs skew labels, got {self.skew}",
    )  # fmt: skip
