"""What the tables and configs of the vision and text encoders have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.weights import Layout, Rule
from jaxmethods.trees import Json

Rules = tuple[Rule, ...]


def family(config: Json, *expected: str) -> str:
  """Returns the `model_type` of a Hugging Face config, which must be one of `expected`.

  Raises:
    InputError: it is another one, or there is none.
  """
  found = config.get("model_type")
  if found not in expected:
    raise InputError(f"model_type: expected {' or '.join(expected)}, got {found!r}")
  return found


def setting(config: Json, name: str) -> Any:
  """Returns a value of a Hugging Face config.

  Raises:
    InputError: the config does not have it.
  """
  if name not in config:
    raise InputError(f"config of a {config.get('model_type', 'model')}: has no {name!r}")
  return config[name]


def encoder_config(config: Json, **how: Any) -> EncoderConfig:
  """Reads the shape of an encoder; `how` are fields of `EncoderConfig` that no file knows."""
  # ViT and BERT say it in one way, CLIP in another.
  on_weights = config.get("attention_probs_dropout_prob", config.get("attention_dropout", 0.0))
  return EncoderConfig(
    width=setting(config, "hidden_size"),
    num_layers=setting(config, "num_hidden_layers"),
    heads=setting(config, "num_attention_heads"),
    hidden=setting(config, "intermediate_size"),
    activation=setting(config, "hidden_act"),
    epsilon=setting(config, "layer_norm_eps"),
    **{"dropout": config.get("hidden_dropout_prob", 0.0), "attention_dropout": on_weights, **how},
  )


def dense(ours: str, *theirs: str) -> Rules:
  """The rules of a linear layer with a bias; `theirs`: its name, then its older names."""
  return _rules(ours, theirs, ("weight", "kernel", "transpose"), ("bias", "bias", "as_is"))


def norm(ours: str, *theirs: str) -> Rules:
  """The rules of a layer norm."""
  return _rules(ours, theirs, ("weight", "scale", "as_is"), ("bias", "bias", "as_is"))


def encoder_rules(names: Mapping[str, tuple[str, ...]]) -> Rules:
  """The rules of `Encoder` as the submodule "encoder": {our submodule of a block: their names}."""
  rules: list[Rule] = []
  for ours, theirs in names.items():
    of = norm if "norm" in ours else dense
    rules.extend(of(f"encoder/layers/{ours}", *theirs))
  return tuple(rules)


def rooted(table: Iterable[Rule], ours: str, *theirs: str) -> Rules:
  """Puts a table under a path of ours and under each of several prefixes of theirs, first is first."""
  moved = []
  for rule in table:
    first, *others = (root + name for root in theirs for name in (rule.theirs, *rule.aliases))
    moved.append(Rule(first, ours + rule.ours, rule.layout, tuple(others)))
  return tuple(moved)


def split_in_proj(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Splits what PyTorch's own attention stores as one: X.in_proj_weight to X.q.weight, X.k..., X.v..."""
  split: dict[str, np.ndarray] = {}
  for name, tensor in tensors.items():
    if match := _IN_PROJ.fullmatch(name):
      thirds = np.split(tensor, 3)
      split |= {f"{match[1]}.{k}.{match[2]}": t for k, t in zip("qkv", thirds, strict=True)}
    else:
      split[name] = tensor
  return split


def join_in_proj(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Undoes `split_in_proj`."""
  joined = {}
  for name, tensor in tensors.items():
    match = _QKV.fullmatch(name)
    if not match:
      joined[name] = tensor
    elif match[2] == "q":
      thirds = [tensors[f"{match[1]}.{k}.{match[3]}"] for k in "qkv"]
      joined[f"{match[1]}.in_proj_{match[3]}"] = np.concatenate(thirds)
  return joined


_IN_PROJ = re.compile(r"(.*)\.in_proj_(weight|bias)")
_QKV = re.compile(r"(.*)\.([qkv])\.(weight|bias)")


def _rules(ours: str, theirs: tuple[str, ...], *leaves: tuple[str, str, Layout]) -> Rules:
  return tuple(
    Rule(
      f"{theirs[0]}.{leaf}", f"{ours}/{our_leaf}", layout, tuple(f"{n}.{leaf}" for n in theirs[1:])
    )
    for leaf, our_leaf, layout in leaves
  )
