"""The rows of the suite: which tuner each name stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxmethods.adapters import bottleneck, low_rank, scaling
from jaxmethods.adapters import selective as masks
from jaxmethods.errors import InputError
from jaxmethods.methods import lorasculpt, spider, thanora
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import benchmark as multimodal
from jaxmethods.testbeds.multimodal import checkpoint as checkpoint_tuning
from jaxmethods.testbeds.multimodal import tuning
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.tuning import suite
from jaxmethods.tuning.calibration import input_moments
from jaxmethods.tuning.tuner import (
  EVERYTHING,
  LINEARS,
  PROJECTOR,
  Tuner,
  adapted,
  answer_loss,
  selected,
)

if TYPE_CHECKING:
  from jaxmethods.experiments.mllm_tuning.config import Config
  from jaxmethods.testbeds.multimodal.settings import TuningConfig

# Last linear layers of attention and MLP: what serial adapters stand behind (orig).
BRANCH_ENDS = r"^language/.*\b(out|down)/kernel$"
MLP_ENDS = r"^language/.*\bdown/kernel$"
IA3 = r"^language/.*\b(key|value|down)/kernel$"


# What these do needs the desk model: inputs that only it takes, its layers' inputs, its own data.
DESK_ONLY = ("joint", "prompt", "prefix", "tailor", "corda")


def build(config: Config, mesh: Any = None, benchmark: Benchmark | None = None) -> Experiment:
  """Composes the experiment of `config.row`, on the desk model or on a checkpoint."""
  if config.checkpoint.model:
    if config.row in DESK_ONLY:
      raise InputError(f"row: {config.row} works on the desk model only")
    return compose(config, functools.partial(tuner_of, config), mesh)
  benchmark = benchmark or multimodal.load(config.desk, (config.target,))
  return compose(
    config,
    functools.partial(tuner_of, config),
    mesh,
    benchmark,
    probe=_probe(config, benchmark),
    mixture=config.row == "joint",
  )


def compose(
  config: TuningConfig,
  make_tuner: Callable[[Any], Tuner],
  mesh: Any = None,
  benchmark: Benchmark | None = None,
  **options: Any,
) -> Experiment:
  """The experiment of one way of tuning, on the checkpoint that the config names or on the desk model.

  Args:
    config: budget, target, model.
    make_tuner: model -> how it is tuned.
    mesh: for a checkpoint.
    benchmark: default: that of the config.
    **options: of `tuning.build`.
  """
  if config.checkpoint.model:
    return checkpoint_tuning.build(config, make_tuner, mesh)
  benchmark = benchmark or multimodal.load(config.desk, (config.target,))
  return tuning.build(config, make_tuner(benchmark.model), benchmark=benchmark, **options)


def tuner_of(config: Config, model: Any) -> Tuner:
  """The tuner of a row."""
  c = config
  low = (c.rank, c.alpha, c.dropout)
  layers = model.config.language.num_layers
  last = suite.last_layers(c.last, layers)
  make: dict[str, Callable[[], Tuner]] = {
    "base": suite.frozen,
    "joint": lambda: selected(EVERYTHING),
    "full": lambda: selected(EVERYTHING),
    "full_no_head": lambda: selected(suite.LAYERS),
    "last_layers": lambda: selected(last),
    "projector": lambda: selected(PROJECTOR),
    "bitfit": lambda: selected(suite.VECTORS),
    "attention": lambda: selected(suite.ATTENTION),
    "gate_up": lambda: selected(suite.GATE_UP),
    "magnitude_mask": lambda: suite.masked(c.share, masks.by_magnitude),
    "gradient_mask": lambda: suite.gradient_masked(c.share, model, answer_loss),
    "random_mask": lambda: suite.masked(c.share, masks.at_random),
    "l2_sp": lambda: suite.l2_sp(c.l2_weight),
    "ewc": lambda: suite.ewc(c.ewc_weight, model, answer_loss),
    "spider": lambda: spider.tuner(last),
    "dare": lambda: suite.dare(c.dare_rate),
    "grafting": lambda: suite.grafting(c.graft_share),
    "half": lambda: suite.half(c.half_share),
    "wise": lambda: suite.interpolated(c.wise_weight),
    "ties": lambda: suite.ties(c.ties_share, c.ties_scale),
    "tailor": lambda: suite.tailor(model, c.tailor_sparsity, c.tailor_sign),
    "serial_adapter": lambda: adapted(bottleneck.serial(c.bottleneck), BRANCH_ENDS),
    "parallel_adapter": lambda: adapted(bottleneck.parallel(c.bottleneck), MLP_ENDS),
    "ia3": lambda: adapted(scaling.ia3(), IA3),
    "prompt": lambda: suite.prompt(c.prompt_length),
    "prefix": lambda: suite.prefix(model, c.prompt_length),
    "lora": lambda: adapted(low_rank.lora(*low)),
    "lora_plus": lambda: suite.lora_plus(*low),
    "rslora": lambda: adapted(low_rank.rslora(*low)),
    "dora": lambda: adapted(low_rank.dora(*low)),
    "vera": lambda: adapted(low_rank.vera(c.vera_rank, dropout=c.dropout)),
    "moslora": lambda: adapted(low_rank.moslora(*low)),
    "pissa": lambda: adapted(low_rank.pissa(*low)),
    "milora": lambda: adapted(low_rank.milora(*low)),
    "corda": lambda: thanora.corda(*low),
    "adalora": lambda: suite.adalora(c.rank, c.dropout, c.adalora_weight, c.steps),
    "oft": lambda: adapted(scaling.oft(c.oft_block)),
    "loramoe": lambda: adapted(low_rank.loramoe(*low, c.experts)),
    "lorasculpt": lambda: lorasculpt.tuner(
      *low, keep_ratio=c.keep_ratio, prune_at=c.prune_at, weight=c.cmr_weight
    ),
  }
  return make[c.row]()


def _probe(config: Config, benchmark: Benchmark) -> Any:
  """What the row's start wants to see: upstream data (EWC), second moments (CorDA), or target data."""
  if config.row == "ewc":
    return tuning.probe_of(benchmark.upstream, config.probe_size)
  probe = tuning.probe_of(benchmark.targets[config.target], config.probe_size)
  if config.row != "corda":
    return probe
  tokens = len(probe["ids"]) * (benchmark.model.config.num_tokens + probe["ids"].shape[-1])
  moments = compiler.jit(
    lambda params, probe: input_moments(benchmark.model, params, probe, LINEARS)
  )(benchmark.params, probe)
  return {path: moment[None] / tokens for path, moment in moments.items()}
