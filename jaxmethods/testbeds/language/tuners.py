"""Ways of tuning a causal LM by name: the tuners of `tuning.suite` and of the methods, on text."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmethods.adapters import bottleneck, low_rank, prompts, scaling, selective as masks
from jaxmethods.adapters.adapter import Adapter
from jaxmethods.adapters.targets import ATTENTION, BLOCK
from jaxmethods.errors import InputError
from jaxmethods.methods import lorasculpt, spider
from jaxmethods.models.causal_lm import CausalLM, prefix_cache
from jaxmethods.testbeds.language.settings import AdapterSettings
from jaxmethods.tuning import suite
from jaxmethods.tuning.tuner import Tuner, TunerState, adapted, selected, text_loss

LAYERS = r"^layers(_\d+)?/"
VECTORS = r"^layers.*(bias|scale)$|^norm/scale$"
GATE_UP = r"\b(gate|up)/kernel$"
BRANCH_ENDS = r"\b(out|down)/kernel$"
MLP_ENDS = r"\bdown/kernel$"
IA3 = r"\b(key|value|down)/kernel$"
REGULARISED = r"\b(query|key|value)/kernel$"


class Way(NamedTuple):
  """A way of tuning.

  Attributes:
    tuner: it.
    adapter: whose tree it trains; None where it trains parameters of the model, or inputs.
    inputs: whether it trains vectors that begin every text.
  """

  tuner: Tuner
  adapter: Adapter | None = None
  inputs: bool = False


def way_of(name: str, settings: AdapterSettings, model: CausalLM, steps: int) -> Way:
  """Makes the way of tuning of a name of `settings.Adapter`.

  Args:
    name: it.
    settings: rank and the like.
    model: to be tuned.
    steps: of the run.

  Raises:
    InputError: `targets` for a way that has none.
  """
  adapter = _adapter(name, settings)
  if adapter is not None:
    default = {"serial_adapter": BRANCH_ENDS, "parallel_adapter": MLP_ENDS, "ia3": IA3}
    targets = settings.targets or default.get(name, BLOCK)
    return Way(_adapted(name, settings, adapter, targets, model, steps), adapter)
  if name in ("prompt", "prefix", "base"):
    if settings.targets:
      raise InputError(f"tuner.targets: {name} has none")
    make = {"prompt": prompt, "prefix": prefix}
    if name == "base":
      return Way(suite.frozen())
    return Way(make[name](model, settings.prompt_length), inputs=True)
  return Way(_own(name, settings, model))


def _adapter(name: str, s: AdapterSettings) -> Adapter | None:
  """Makes the adapter of a name; None where there is none."""
  low = (s.rank, s.alpha, s.dropout)
  make: dict[str, Callable[[], Adapter]] = {
    "lora": lambda: low_rank.lora(*low),
    "lora_plus": lambda: low_rank.lora(*low),
    "lorasculpt": lambda: low_rank.lora(*low),
    "rslora": lambda: low_rank.rslora(*low),
    "dora": lambda: low_rank.dora(*low),
    "vera": lambda: low_rank.vera(s.vera_rank, dropout=s.dropout),
    "moslora": lambda: low_rank.moslora(*low),
    "pissa": lambda: low_rank.pissa(*low),
    "milora": lambda: low_rank.milora(*low),
    "adalora": lambda: low_rank.adalora(s.rank + s.rank // 2, s.dropout),
    "oft": lambda: scaling.oft(s.oft_block),
    "loramoe": lambda: low_rank.loramoe(*low, s.experts),
    "ia3": scaling.ia3,
    "serial_adapter": lambda: bottleneck.serial(s.bottleneck),
    "parallel_adapter": lambda: bottleneck.parallel(s.bottleneck),
    "magnitude_mask": lambda: masks.tuned(s.share, masks.by_magnitude),
    "random_mask": lambda: masks.tuned(s.share, masks.at_random),
    "gradient_mask": masks.tuned,
  }
  return make[name]() if name in make else None


def _adapted(
  name: str, s: AdapterSettings, adapter: Adapter, targets: str, model: CausalLM, steps: int
) -> Tuner:
  """Makes the tuner around an adapter: a few have hooks of their own."""
  low = (s.rank, s.alpha, s.dropout)
  special: dict[str, Callable[[], Tuner]] = {
    "lora_plus": lambda: suite.lora_plus(*low, targets, None),
    "adalora": lambda: suite.adalora(s.rank, s.dropout, s.adalora_weight, steps, targets, None),
    "gradient_mask": lambda: suite.gradient_masked(s.share, model, text_loss, targets, None),
    "lorasculpt": lambda: lorasculpt.tuner(
      *low, keep_ratio=s.keep_ratio, prune_at=s.prune_at, weight=s.cmr_weight,
      regularised=REGULARISED, connector="frozen", targets=targets,
    ),
  }  # fmt: skip
  return special[name]() if name in special else adapted(adapter, targets, None)


def _own(name: str, s: AdapterSettings, model: CausalLM) -> Tuner:
  """Makes a tuner of the model's own parameters."""
  last = rf"^layers_({'|'.join(map(str, _last(s.last, model.config.num_layers)))})/"
  default = {
    "full": "", "last_layers": last, "spider": last, "bitfit": VECTORS, "attention": ATTENTION,
    "gate_up": GATE_UP,
  }  # fmt: skip
  targets = s.targets or default.get(name, LAYERS)
  make: dict[str, Callable[[], Tuner]] = {
    "l2_sp": lambda: suite.l2_sp(s.l2_weight, targets),
    "ewc": lambda: suite.ewc(s.ewc_weight, model, text_loss, targets),
    "spider": lambda: spider.tuner(targets),
    "dare": lambda: suite.dare(s.dare_rate, targets),
    "grafting": lambda: suite.grafting(s.graft_share, targets),
    "half": lambda: suite.half(s.half_share, targets),
    "wise": lambda: suite.interpolated(s.wise_weight, targets),
    "ties": lambda: suite.ties(s.ties_share, s.ties_scale, targets),
  }
  return make[name]() if name in make else selected(targets)


def _last(count: int, of: int) -> range:
  return range(max(of - count, 0), of)


# --- learned inputs -------------------------------------------------------------------------------


def prompt(model: CausalLM, length: int) -> Tuner:
  """Makes prompt tuning: learned vectors in front of every text."""
  del model

  def start(key, params):
    return prompts.init_prompt(key, params, length)

  def run(model, variables, tree, ids, *, mask=None, cache_size=None, **kwargs):
    embedded = model.apply(variables, ids, method="embed_tokens")
    mask = jnp.ones(ids.shape, bool) if mask is None else mask
    wide, seen, _ = prompts.insert_prompt(tree["prompt"], embedded, mask, ids)
    size = None if cache_size is None else cache_size + length
    out = model.apply(variables, embeddings=wide, mask=seen, cache_size=size, **kwargs)
    return out._replace(hidden=out.hidden[:, length:])

  return _inputs(start, run)


def prefix(model: CausalLM, length: int) -> Tuner:
  """Makes prefix tuning: learned keys and values that every layer sees."""

  def start(key, params):
    del params
    return prompts.init_prefix(key, model.config, length)

  def run(model, variables, tree, ids, *, cache_size=None, **kwargs):
    room = ids.shape[1] if cache_size is None else cache_size
    cache = prefix_cache(
      tree, model.config, len(ids), room, model.dtype, scan_layers=model.scan_layers
    )
    return model.apply(variables, ids, cache=cache, **kwargs)

  return _inputs(start, run)


def _inputs(start: Callable, run: Callable) -> Tuner:
  """Trains vectors that begin every text; a cache that goes on holds them already."""

  def init(key, params, probe) -> TunerState:
    del probe
    return TunerState({"input": start(key, params)}, dict(params), {})

  def apply(model, trainable, frozen, extra, ids, **kwargs):
    del extra
    variables = {"params": frozen}
    if kwargs.get("cache") is not None or kwargs.get("method"):
      return model.apply(variables, ids, **kwargs)
    if "segments" in kwargs:
      raise InputError(
        "packing: learned inputs begin a row, not every text in it: give packing=false"
      )
    return run(model, variables, trainable["input"], ids, **kwargs)

  def rates(trainable):
    return jax.tree.map(lambda _: "prompt", trainable)

  return Tuner(init, apply, None, rates)
