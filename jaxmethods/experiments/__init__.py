"""One room per method, the only place where data, model and method meet.

`METHODS` is a plain table, so that `--list` and argument errors need no heavy import. A room has

  config.py   Config                    frozen dataclass, a `RunConfig`; starts without jax
              rows(config)              -> {row name: config}: method and baselines for eval.compare
              untrained(config)         -> whether there is nothing to train; optional, see eval.run
              studies(config)           -> {name: study} for eval.compare --study; optional
              selection(config)         -> how a setting of a row is chosen, for --tune; optional
  build.py    build(config, mesh=None)  -> Experiment; imported when a run starts
              comparison(rows)          -> {name: figure} of the rows of eval.compare; optional

A method of one's own is any importable module with `Config`, `build` and `rows`: `--method module`.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from jaxmethods.errors import InputError, hint
from jaxmethods.runtime.experiment import Room


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
  "adafreq": Method(
    title="AdaFreq",
    paper="Li et al., ECCV 2024, arXiv 2410.06977",
    summary="individual animals found again by the high frequencies of their coats",
    embedded_run="~4 min",
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
  "epeagent": Method(
    title="EPEAgent",
    paper="Shi et al., 2025, arXiv 2503.08175",
    summary="agents that work together without telling each other what they need not",
    embedded_run="~1 min",
  ),
  "federated": Method(
    title="Federated",
    paper="no paper of ours: FedAvg, McMahan et al., AISTATS 2017, arXiv 1602.05629, and its kin",
    summary="plain federated learning on data, models and clients of yours, by any algorithm",
    embedded_run="~20 s",
  ),
  "fedssp": Method(
    title="FedSSP",
    paper="Tan et al., NeurIPS 2024, arXiv 2410.20105",
    summary="federated graph classification that shares only spectral encoders",
    embedded_run="2.5 min",
  ),
  "fpl": Method(
    title="FPL",
    paper="Wang et al., IJCAI 2025, arXiv 2505.23024",
    summary="prompts of a frozen CLIP, for texts, images or both, learnt by clients together",
    embedded_run="~2 min, after ~15 min of pretraining once",
  ),
  "ggeur": Method(
    title="GGEUR",
    paper="Ma et al., CVPR 2025, arXiv 2503.06457",
    summary="federated learning on embeddings, enlarged along the global shape of every class",
    embedded_run="45 s",
  ),
  "gift": Method(
    title="GIFT",
    paper="Wu et al., CVPR 2025, arXiv 2503.04229",
    summary="a vision-language model that learns task after task, reminded by synthetic pairs",
    embedded_run="~3 min, after ~15 min of pretraining once",
  ),
  "human_interaction": Method(
    title="Human interaction",
    paper="after the survey of Fan et al., 2025, arXiv 2503.13120; InterGen, arXiv 2304.05684",
    summary="motion of two persons, or of one with an object or in a scene, by diffusion",
    embedded_run="~5 min",
  ),
  "llm_safety": Method(
    title="LLM safety",
    paper="after the survey by Wang et al., 2025, arXiv 2504.15585",
    summary="an attack, a defence and a metric for every stage of a language model's life (a toy world)",
    embedded_run="~5 min",
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
  "tuning": Method(
    title="Tuning",
    paper="no paper of ours: LoRA, Hu et al., ICLR 2022, arXiv 2106.09685, and its kin",
    summary="a causal LM tuned on texts of yours: adapters, in private if wanted, exported for others",
    embedded_run="~1.3 min, after ~5 min of pretraining once",
  ),
}


def load(name: str) -> Room:
  """Returns a method of `METHODS`, or one's own: an importable module.

  Raises:
    InputError: there is no such method, or the module lacks a part of the contract.
  """
  if name in METHODS:
    config = importlib.import_module(f"{__name__}.{name}.config")
    return _room(config, lambda: importlib.import_module(f"{__name__}.{name}.build"))
  module = _own(name)
  if missing := [part for part in ("Config", "build", "rows") if not hasattr(module, part)]:
    raise InputError(f"--method {name}: the module has no {' and no '.join(missing)}")
  return _room(module, lambda: module)


def _own(name: str) -> ModuleType:
  """Imports a module of the user, from the directory the command is run in too."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name and (name == error.name or name.startswith(f"{error.name}.")):
      if "." in name:
        raise InputError(f"--method {name}: there is no module {error.name}") from None
      raise InputError(
        f"--method {name}: unknown method, {hint(name, METHODS, 'methods')}; --list shows all"
      ) from None
    raise InputError(f"--method {name}: cannot be imported: {_said(error)}") from None
  except Exception as error:  # whatever the module does when it is imported
    raise InputError(f"--method {name}: cannot be imported: {_said(error)}") from None


def _said(error: Exception) -> str:
  """Returns kind, words and place of an error in one line: the last frame outside of importlib."""
  frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
  where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
  return f"{type(error).__name__}: {error}{where}"


def _room(config: ModuleType, heavy: Callable[[], ModuleType]) -> Room:
  """Joins the module that starts without jax and the one that is imported when a run starts."""
  return Room(
    Config=config.Config,
    rows=config.rows,
    build=lambda *args: heavy().build(*args),
    untrained=getattr(config, "untrained", lambda config: False),
    comparison=lambda rows: getattr(heavy(), "comparison", lambda rows: {})(rows),
    studies=getattr(config, "studies", lambda config: {}),
    selection=getattr(config, "selection", lambda config: None),
  )


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
