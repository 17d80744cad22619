"""One module per method: `Config`, `build(config, mesh)` and `rows(config)`.

`METHODS` is a plain table, so that `--list` and argument errors need no heavy import. A method's
module is imported by name when it is asked for; it provides

  Config                         frozen dataclass, a `RunConfig`
  build(config, mesh=None)       -> Experiment
  rows(config)                   -> {row name: config}: the method and its baselines for eval.compare
"""

from typing import NamedTuple


class Method(NamedTuple):
  """One line of `--list`."""

  title: str
  paper: str
  summary: str
  embedded_run: str  # how long `python -m train.run --method NAME` takes on two CPU cores


METHODS: dict[str, Method] = {
  "fedssp": Method(
    title="FedSSP",
    paper="Tan et al., NeurIPS 2024, arXiv 2410.20105",
    summary="federated graph classification that shares only spectral encoders",
    embedded_run="2 min",
  ),
}
