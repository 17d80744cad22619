"""One module per method: `Config`, `build(config, mesh)` and `rows(config)`.

`METHODS` is a plain table, so that `--list` and argument errors need no heavy import. A method's
module is imported by name when it is asked for; it provides

  Config                         frozen dataclass, a `RunConfig`
  build(config, mesh=None)       -> Experiment
  rows(config)                   -> {row name: config}: the method and its baselines for eval.compare
  untrained(config)              -> whether there is nothing to train; optional, see eval.run
  comparison(rows)               -> {name: figure} of the rows in the JSON of eval.compare; optional

A method of one's own is any importable module with these three names: `--method package.module`.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

from jaxmethods.errors import InputError, nearest


class Method(NamedTuple):
  """One line of `--list`."""

  title: str
  paper: str
  summary: str
  # How long `python -m train.run --method NAME` takes on two CPU cores; ~: estimated.
  embedded_run: str


METHODS: dict[str, Method] = {
  "acgkd": Method(
    title="ACGKD",
    paper="Jia et al., 2025, arXiv 2504.00540",
    summary="a graph network distilled without any graph (a reconstruction)",
    embedded_run="~1 min",
  ),
  "bye": Method(
    title="BYE",
    paper="Rong et al., NeurIPS 2025, arXiv 2505.16916",
    summary="poisoned tuning data of a multimodal model, found by the collapse of its attention",
    embedded_run="~9 min, after 7 min of pretraining once",
  ),
  "cot_kinetics": Method(
    title="CoT-Kinetics",
    paper="Bi et al., 2025, arXiv 2505.13408",
    summary="which answers of a reasoning model to trust, from its layers (a reconstruction)",
    embedded_run="~5 min",
  ),
  "fedssp": Method(
    title="FedSSP",
    paper="Tan et al., NeurIPS 2024, arXiv 2410.20105",
    summary="federated graph classification that shares only spectral encoders",
    embedded_run="2.5 min",
  ),
  "ggeur": Method(
    title="GGEUR",
    paper="Ma et al., CVPR 2025, arXiv 2503.06457",
    summary="federated learning on embeddings, enlarged along the global shape of every class",
    embedded_run="45 s",
  ),
  "lorasculpt": Method(
    title="LoRASculpt",
    paper="Liang et al., CVPR 2025, arXiv 2503.16843",
    summary="low-rank tuning of a multimodal model, pruned early so that it forgets less",
    embedded_run="~2 min, after 7 min of pretraining once",
  ),
  "mllm_tuning": Method(
    title="Keeping Yourself",
    paper="Huang et al., 2025, arXiv 2503.04543",
    summary="ways to tune a multimodal model without forgetting: 39 rows, one model, one budget",
    embedded_run="~2 min, after 7 min of pretraining once",
  ),
  "rahfl": Method(
    title="RAHFL",
    paper="Fang et al., TPAMI 2025, arXiv 2503.09206",
    summary="clients of different networks and corrupted images that learn from better ones' answers",
    embedded_run="~3 min",
  ),
  "spider": Method(
    title="SPIDER",
    paper="Huang et al., ICML 2025, arXiv 2411.10928",
    summary="tunes only what the task needs more than pretraining did",
    embedded_run="~2 min, after 7 min of pretraining once",
  ),
  "thanora": Method(
    title="ThanoRA",
    paper="Liang et al., 2025, arXiv 2505.18640",
    summary="one mergeable low-rank update for several tasks (inferred in parts: no code exists)",
    embedded_run="~2 min, after 7 min of pretraining once",
  ),
}


def load(name: str) -> ModuleType:
  """Returns the module of a method in `METHODS`, or of one's own (`package.module`)."""
  if name in METHODS:
    return importlib.import_module(f"{__name__}.{name}")
  if "." not in name:
    raise InputError(
      f"--method {name}: unknown method, the nearest is {nearest(name, METHODS)}; --list shows all"
    )
  try:
    module = importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name and (name == error.name or name.startswith(f"{error.name}.")):
      raise InputError(f"--method {name}: there is no module {error.name}") from None
    raise
  if missing := [part for part in ("Config", "build", "rows") if not hasattr(module, part)]:
    raise InputError(f"--method {name}: the module has no {' and no '.join(missing)}")
  return module


def listing() -> str:
  """Returns the table of `--list`."""
  cells = [("name", "embedded run", "paper", "what it does")]
  cells += [
    (name, m.embedded_run, f"{m.title} ({m.paper})", m.summary) for name, m in METHODS.items()
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in cells
  )
