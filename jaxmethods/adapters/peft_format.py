"""Adapters under the names and in the layouts of the PEFT library.

What PEFT has no words for is written as what it is: MoSLoRA as LoRA with the mixer multiplied into A,
PiSSA and MiLoRA as LoRA of twice the rank (what was trained minus what it started from), so that the
files fit the published base model. Files themselves are `jaxmethods.data.adapter_files`.

An option that we do not know and that is not empty may change what an adapter computes: it is refused
by name. So are initialisations that move a part of W out of the base layer (PiSSA, OLoRA, CorDA, LoftQ,
LoRA-GA): their B A belongs to a base model that the files do not have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxmethods.adapters import low_rank, scaling
from jaxmethods.adapters.adapter import SHARED, Adapter, Params, Tree, layers_of
from jaxmethods.errors import InputError
from jaxmethods.models.weights import Table, tensor_names
from jaxmethods.trees import Json, below, flatten, unflatten

ROOT = "base_model.model."

Tensors = dict[str, np.ndarray]


class _Format(NamedTuple):
  """How one kind is written: (settings, factors of a layer) -> tensors by suffix; and its config."""

  layer: Callable[[Json, Tensors], Tensors]
  config: Callable[[Json], dict[str, object]]


def to_peft(
  adapter: Adapter, tree: Tree, table: Table, *, base: str = ""
) -> tuple[dict[str, object], Tensors]:
  """The contents of adapter_config.json and adapter_model.safetensors.

  Args:
    adapter: what the tree belongs to.
    tree: adapter tree, layers stacked or numbered.
    table: names of the model's parameters.
    base: name or path of the base model, recorded in the config.

  Returns:
    (config, tensors).

  Raises:
    InputError: if PEFT has no form for this kind of adapter.

  >>> from jaxmethods.models.causal_lm import table
  >>> model, ids = jm.models.CausalLM(tiny), jnp.arange(6)[None]
  >>> tree = lora.init(key, model.init(key, ids)["params"], "layers_0/attention/query/kernel")
  >>> config, tensors = jm.adapters.to_peft(lora, tree, table(tiny))
  >>> config["peft_type"], len(tensors)
  ('LORA', 2)
  """
  kind = adapter.settings["kind"]
  if kind not in _FORMATS:
    raise InputError(f"{kind}: PEFT has no such adapter; it can write {', '.join(_FORMATS)}")
  form, tensors, modules, inward = _FORMATS[kind], {}, [], []
  for path, factors in layers_of(jax.device_get(tree)).items():
    stacked = "layers" in path.split("/")
    for i, (name, *_) in enumerate(_modules(path, next(iter(factors.values())).shape, table)):
      own = {key: np.asarray(f[i] if stacked else f, np.float32) for key, f in factors.items()}
      modules.append(name)
      inward += [name] if "scale_in" in own else []
      for suffix, value in form.layer(adapter.settings, own).items():
        tensors[f"{ROOT}{name}.{suffix}"] = np.ascontiguousarray(value)
  if SHARED in tree:
    tensors["base_model.vera_A"] = np.asarray(tree[SHARED]["a"])
    tensors["base_model.vera_B"] = np.ascontiguousarray(np.asarray(tree[SHARED]["b"]).T)
  config = {
    "base_model_name_or_path": base or None,
    "bias": "none",
    "inference_mode": True,
    "target_modules": sorted(modules),
    "task_type": "CAUSAL_LM",
    **form.config(adapter.settings),
  }
  if kind == "ia3":
    del config["bias"]
    config["feedforward_modules"] = sorted(inward)
  return config, tensors


def from_peft(
  config: Json, tensors: Mapping[str, np.ndarray], table: Table, params: Params
) -> tuple[Adapter, Tree]:
  """Reads what `to_peft` or PEFT itself wrote: LoRA, rsLoRA, DoRA, VeRA, AdaLoRA, OFT and IA3.

  Args:
    config: contents of adapter_config.json.
    tensors: contents of adapter_model.safetensors.
    table: names of the model's parameters.
    params: of the model, or their shapes: layers stacked or numbered.

  Returns:
    (adapter, tree).

  Raises:
    InputError: an unsupported adapter or option, a tensor that fits nowhere, has the wrong shape, or is
      missing for one of the targets or of the layers of a stack.

  >>> from jaxmethods.models.causal_lm import table
  >>> model, ids = jm.models.CausalLM(tiny), jnp.arange(6)[None]
  >>> weights = model.init(key, ids)["params"]
  >>> files = jm.adapters.to_peft(lora, lora.init(key, weights, "query/kernel"), table(tiny))
  >>> adapter, tree = jm.adapters.from_peft(*files, table(tiny), weights)
  >>> jm.adapters.num_trainable(adapter, tree)
  64
  """
  adapter, read, suffixes = _reader(config)
  tree: dict[str, np.ndarray] = {}
  used: set[str] = set()
  for path, leaf in flatten(params).items():
    module, _, last = path.rpartition("/")
    if last != "kernel":
      continue
    layers = []
    for names in _modules(module, leaf.shape, table):
      found = {
        suffix: f"{ROOT}{name}.{suffix}"
        for name in names
        for suffix in suffixes
        if f"{ROOT}{name}.{suffix}" in tensors
      }
      _check_target(config, names, bool(found))
      used.update(found.values())
      layers.append({suffix: np.asarray(tensors[name]) for suffix, name in found.items()})
    if not any(layers):
      continue
    kinds = {frozenset(layer) for layer in layers}
    if len(kinds) > 1:
      raise InputError(f"the PEFT adapter has not the same tensors for all layers of {module}")
    try:
      read_layers = [read(layer) for layer in layers]
    except KeyError as error:
      raise InputError(f"the PEFT adapter has no {error.args[0]} for {module}") from None
    for name in read_layers[0]:
      stack = [layer[name] for layer in read_layers]
      tree[below(module, name)] = np.stack(stack) if "layers" in path.split("/") else stack[0]
  for ours, theirs in (("a", "base_model.vera_A"), ("b", "base_model.vera_B")):
    if theirs in tensors:
      value = np.asarray(tensors[theirs])
      tree[below(SHARED, ours)] = value if ours == "a" else value.T
      used.add(theirs)
  if left := sorted(set(tensors) - used):
    raise InputError(f"{left[0]}: this model has no place for this tensor of the PEFT adapter")
  if not tree:
    raise InputError("the PEFT adapter has no tensors")
  adapter.variables(params, unflatten(tree))  # shapes, and factors that should be there
  return adapter, unflatten(tree)


def _modules(path: str, shape: tuple[int, ...], table: Table) -> list[list[str]]:
  """The names that a linear layer may have there, one list for each layer in a stack."""
  names = tensor_names(below(path, "kernel"), shape, table)
  return [[name.removesuffix(".weight") for name in options] for options in names]


def _lora(settings: Json, f: Tensors) -> Tensors:
  a, b = f["a"], f["b"]
  if "mixer" in f:
    a = f["mixer"] @ a
  if "start_a" in f:
    a, b = np.concatenate([a, f["start_a"]]), np.concatenate([b, -f["start_b"]])
  tensors = {"lora_A.weight": a, "lora_B.weight": b.T}
  if "magnitude" in f:
    tensors["lora_magnitude_vector"] = f["magnitude"]
  return tensors


def _lora_config(settings: Json) -> dict[str, object]:
  # s = alpha / rank must stay what it is when the rank doubles.
  double = 2 if settings["kind"] in ("pissa", "milora") else 1
  return {
    "peft_type": "LORA",
    "r": double * settings["rank"],
    "lora_alpha": double * settings["alpha"],
    "lora_dropout": settings["dropout"],
    "use_rslora": settings["kind"] == "rslora",
    "use_dora": settings["kind"] == "dora",
  }


def _vera_config(settings: Json) -> dict[str, object]:
  return {
    "peft_type": "VERA",
    "r": settings["rank"],
    "vera_dropout": settings["dropout"],
    "save_projection": True,
    "projection_prng_key": 0,
  }


def _adalora_config(settings: Json) -> dict[str, object]:
  rank = settings["rank"]
  return {
    "peft_type": "ADALORA",
    "init_r": rank,
    "target_r": rank,
    "lora_alpha": rank,
    "lora_dropout": settings["dropout"],
    "tinit": 0,
    "tfinal": 0,
    "total_step": 1,
  }


def _adalora_unit(rank: int, alpha: float) -> float:
  """What PEFT multiplies P diag(lam) Q by; here there is no scale."""
  return (alpha if alpha > 0 else rank) / (rank + 1e-5)


def _oft_config(settings: Json) -> dict[str, object]:
  exact = {"use_cayley_neumann": False, "coft": False, "block_share": False}
  return {"peft_type": "OFT", "r": 0, "oft_block_size": settings["block_size"], **exact}


def _ia3(settings: Json, f: Tensors) -> Tensors:
  return {"ia3_l": f["scale_in"][None] if "scale_in" in f else f["scale_out"][:, None]}


_LORA = _Format(_lora, _lora_config)
_FORMATS = {
  **dict.fromkeys(("lora", "rslora", "dora", "moslora", "pissa", "milora"), _LORA),
  "vera": _Format(
    lambda settings, f: {"vera_lambda_d": f["scale_rank"], "vera_lambda_b": f["scale_out"]},
    _vera_config,
  ),
  "adalora": _Format(
    lambda settings, f: {
      "lora_A": f["a"],
      "lora_B": f["b"].T,
      "lora_E": f["lam"][:, None] / _adalora_unit(settings["rank"], settings["rank"]),
    },
    _adalora_config,
  ),
  "oft": _Format(lambda settings, f: {"oft_R.weight": f["skew"]}, _oft_config),
  "ia3": _Format(_ia3, lambda settings: {"peft_type": "IA3"}),
}


# Options that are read, and those that have no say in what a trained adapter computes.
_COMMON = {
  "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
  "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
  "fan_in_fan_out",
}  # fmt: skip
_OF_LORA = {
  "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "eva_config", "megatron_core",
  "qalora_group_size",
}  # fmt: skip
_OPTIONS = {
  "LORA": _OF_LORA,
  "VERA": {
    "r", "vera_dropout", "save_projection", "projection_prng_key", "d_initial", "init_weights",
  },
  "ADALORA": _OF_LORA - {"use_rslora", "use_dora"} | {
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
  },
  "OFT": {
    "r", "oft_block_size", "module_dropout", "init_weights", "eps", "use_cayley_neumann",
    "num_cayley_neumann_terms",
  },
  "IA3": {"feedforward_modules", "init_ia3_weights"},
}  # fmt: skip
# Values, beside an empty one, with which an option changes nothing.
_NEUTRAL = {
  "bias": ("none",),
  "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
  "num_transformer_submodules": (1,),
}


def check_options(config: Json, own: Collection[str]) -> None:
  """Raises for an option that may change what the adapter computes.

  Args:
    config: contents of adapter_config.json.
    own: options of its kind that are read, or that change nothing.

  Raises:
    InputError: an option that is neither, with a value that is not empty.
  """
  for name, value in config.items():
    known = name in _COMMON or name in own
    empty = value is None or value is False or value in ("", [], {})
    if not (known or empty or value in _NEUTRAL.get(name, ())):
      changed = ": it changes the base model" if name == "init_lora_weights" else ""
      raise InputError(f"{name} {value!r}: a PEFT adapter with this option cannot be read{changed}")


def _whole(config: Json, name: str) -> int:
  """An option that must be there and be a positive whole number."""
  value = config.get(name)
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise InputError(f"{name}: expected a positive whole number in the PEFT config, got {value!r}")
  return value


def _number(config: Json, name: str, default: float | None = None) -> float:
  """An option that must be a number, and be there unless it has a default."""
  value = config.get(name, default)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not math.isfinite(value):
    raise InputError(f"{name}: expected a number in the PEFT config, got {value!r}")
  return value


def _check_target(config: Json, names: list[str], found: bool) -> None:
  """Raises where the config and the tensors disagree on whether a module is adapted.

  Args:
    config: contents of adapter_config.json.
    names: those the module may have.
    found: whether there are tensors for it.
  """
  if not config.get("target_modules"):
    return  # older files leave it to PEFT's table of models
  target = any(_is_target(config, name) for name in names)
  if target and not found:
    raise InputError(f"target_modules: the PEFT adapter has no tensors for {names[0]}")
  if found and not target:
    raise InputError(f"target_modules: do not name {names[0]}, for which there are tensors")


def _is_target(config: Json, name: str) -> bool:
  """Whether PEFT adapts the module of that name."""
  targets = config["target_modules"]
  if targets == "all-linear":
    chosen = name.rpartition(".")[2] != "lm_head"
  else:
    chosen = _is_named(targets, name, "target_modules")
  layers = config.get("layers_to_transform")
  if not chosen or _is_named(config.get("exclude_modules"), name, "exclude_modules"):
    return False
  if layers is None:
    return True
  patterns = config.get("layers_pattern") or r"[^.]*"
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    if match := re.match(rf".*\.{pattern}\.(\d+)\.", name):
      return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
  return False


def _is_named(chosen: object, name: str, option: str) -> bool:
  """Whether a module is among names, or ends of names, or matches a regular expression."""
  if not chosen:
    return False
  if isinstance(chosen, str):
    try:
      return bool(re.fullmatch(chosen, name))
    except re.error as error:
      raise InputError(f"{option} {chosen!r}: is not a regular expression: {error}") from None
  if not isinstance(chosen, list | tuple | set) or not all(isinstance(c, str) for c in chosen):
    raise InputError(f"{option}: expected names of modules in the PEFT config, got {chosen!r}")
  return any(name == each or name.endswith(f".{each}") for each in chosen)


class _Reader(NamedTuple):
  """An adapter, what turns a layer's tensors into factors, and their suffixes."""

  adapter: Adapter
  read: Callable[[Tensors], Tensors]
  suffixes: tuple[str, ...]


def _reader(config: Json) -> _Reader:
  """How the tensors of a config are read."""
  kind = config.get("peft_type")
  if kind not in _READERS:
    raise InputError(f"peft_type {kind!r} cannot be read")
  check_options(config, _OPTIONS[kind])
  return _READERS[kind](config)


def _read_lora(config: Json) -> _Reader:
  if config.get("use_dora") and config.get("use_rslora"):
    raise InputError("use_dora with use_rslora: such a PEFT adapter cannot be read")
  make = low_rank.dora if config.get("use_dora") else low_rank.lora
  if config.get("use_rslora"):
    make = low_rank.rslora
  adapter = make(
    _whole(config, "r"),
    _number(config, "lora_alpha"),
    _number(config, "lora_dropout", 0.0),
  )

  def read(t: Tensors) -> Tensors:
    factors = {"a": t["lora_A.weight"], "b": t["lora_B.weight"].T}
    if "lora_magnitude_vector" in t:
      factors["magnitude"] = t["lora_magnitude_vector"]
    return factors

  return _Reader(adapter, read, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))


def _read_vera(config: Json) -> _Reader:
  if not config.get("save_projection", True):
    raise InputError("save_projection: a VeRA adapter without its projections cannot be read")
  dropout = _number(config, "vera_dropout", 0.0)
  adapter = low_rank.vera(_whole(config, "r"), dropout=dropout)
  names = {"scale_rank": "vera_lambda_d", "scale_out": "vera_lambda_b"}
  read = lambda t: {ours: t[theirs] for ours, theirs in names.items()}
  return _Reader(adapter, read, tuple(names.values()))


def _read_adalora(config: Json) -> _Reader:
  rank = _whole(config, "init_r")
  unit = _adalora_unit(rank, _number(config, "lora_alpha", 8))
  read = lambda t: {"a": t["lora_A"], "b": t["lora_B"].T, "lam": unit * t["lora_E"][:, 0]}
  adapter = low_rank.adalora(rank, _number(config, "lora_dropout", 0.0))
  return _Reader(adapter, read, ("lora_A", "lora_B", "lora_E"))


def _read_oft(config: Json) -> _Reader:
  if config.get("use_cayley_neumann", True):
    raise InputError("use_cayley_neumann: OFT by a truncated series cannot be read")
  adapter = scaling.oft(_whole(config, "oft_block_size"))
  return _Reader(adapter, lambda t: {"skew": t["oft_R.weight"]}, ("oft_R.weight",))


def _read_ia3(config: Json) -> _Reader:
  def read(t: Tensors) -> Tensors:
    value = t["ia3_l"]
    return {"scale_in": value[0]} if value.shape[0] == 1 else {"scale_out": value[:, 0]}

  return _Reader(scaling.ia3(), read, ("ia3_l",))


_READERS: dict[str, Callable[[Json], _Reader]] = {
  "LORA": _read_lora,
  "VERA": _read_vera,
  "ADALORA": _read_adalora,
  "OFT": _read_oft,
  "IA3": _read_ia3,
}

# Kinds of adapters that `to_peft` can write.
KINDS = tuple(_FORMATS)
