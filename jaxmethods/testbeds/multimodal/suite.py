"""Rows of the suite: the tuner that each name stands for, and its experiment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jaxmethods.adapters import bottleneck, low_rank, scaling, selective as masks
from jaxmethods.errors import InputError
from jaxmethods.methods import lorasculpt, spider, thanora
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.models.mllm import MLLM
from jaxmethods.runtime import checks, compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import (
  benchmark as multimodal,
  checkpoint as checkpoint_tuning,
  tuning,
)
from jaxmethods.testbeds.multimodal.benchmark import Benchmark
from jaxmethods.testbeds.multimodal.settings import TuningConfig
from jaxmethods.testbeds.multimodal.suite_settings import SuiteConfig
from jaxmethods.trees import PyTree
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

# Architectures that can be tuned: the small one, and those of LLaVA-style checkpoints.
Model = DeskMLLM | MLLM

# Last linear layers of attention and MLP: what serial adapters stand behind (orig).
BRANCH_ENDS = r"^language/.*\b(out|down)/kernel$"
MLP_ENDS = r"^language/.*\bdown/kernel$"
IA3 = r"^language/.*\b(key|value|down)/kernel$"


# These need the small model: inputs that only it takes, the inputs of its layers, its own data.
DESK_ONLY = ("joint", "prompt", "prefix", "tailor", "corda")


def build(
  config: SuiteConfig, mesh: Mesh | None = None, benchmark: Benchmark | None = None
) -> Experiment:
  """Composes the experiment of `config.row`, on the small model or on a checkpoint."""
  make_tuner = functools.partial(tuner_of, config)
  if config.checkpoint.model:
    if config.row in DESK_ONLY:
      raise InputError(f"row: {config.row} works on the small model only")
    return compose(config, make_tuner, mesh)
  benchmark = benchmark or multimodal.load(config.desk, (config.target,))
  options = {"probe": _probe(config, benchmark), "mixture": config.row == "joint"}
  return compose(config, make_tuner, mesh, benchmark, **options)


def compose(
  config: TuningConfig,
  make_tuner: Callable[[Model], Tuner],
  mesh: Mesh | None = None,
  benchmark: Benchmark | None = None,
  **options: Any,
) -> Experiment:
  """Composes the experiment of one way of tuning, on the checkpoint of the config or the small model.

  Args:
    config: budget, target, model.
    make_tuner: maps a model to the way it is tuned.
    mesh: devices over which a checkpoint is spread.
    benchmark: tasks and small model; default: those of the config.
    **options: further arguments of `tuning.build`.

  Raises:
    InputError: a mesh for the small model.
  """
  if config.checkpoint.model:
    return checkpoint_tuning.build(config, make_tuner, mesh)
  checks.no_mesh("the small model", mesh)
  benchmark = benchmark or multimodal.load(config.desk, (config.target,))
  return tuning.build(config, make_tuner(benchmark.model), benchmark=benchmark, **options)


def tuner_of(config: SuiteConfig, model: Model) -> Tuner:
  """Makes the tuner of a row."""
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
    "tailor": lambda: suite.tailor(_small(model), c.tailor_sparsity, c.tailor_sign),
    "serial_adapter": lambda: adapted(bottleneck.serial(c.bottleneck), BRANCH_ENDS),
    "parallel_adapter": lambda: adapted(bottleneck.parallel(c.bottleneck), MLP_ENDS),
    "ia3": lambda: adapted(scaling.ia3(), IA3),
    "prompt": lambda: suite.prompt(c.prompt_length),
    "prefix": lambda: suite.prefix(_small(model), c.prompt_length),
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


def _small(model: Model) -> DeskMLLM:
  assert isinstance(model, DeskMLLM)  # other models are refused before, see DESK_ONLY
  return model


def _probe(config: SuiteConfig, benchmark: Benchmark) -> PyTree:
  """Collects the data that the start of the row needs: upstream (EWC), a plan (CorDA), or the target."""
  if config.row == "ewc":
    return tuning.probe_of(benchmark.upstream, config.probe_size)
  probe = tuning.probe_of(benchmark.targets[config.target], config.probe_size)
  if config.row != "corda":
    return probe
  tokens = len(probe["ids"]) * (benchmark.model.config.num_tokens + probe["ids"].shape[-1])
  moments = compiler.jit(
    lambda params, probe: input_moments(benchmark.model, params, probe, LINEARS)
  )(benchmark.params, probe)
  second = {path: moment[None] / tokens for path, moment in moments.items()}
  return thanora.corda_plan(benchmark.params, second, config.rank, config.alpha)
