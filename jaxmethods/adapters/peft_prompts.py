"""Prompts and prefixes under the names and in the layouts of the PEFT library.

A prompt stands in front of the text and a prefix in front of every layer's keys and values, as
`prompts.insert_prompt` at position 0 and `causal_lm.prefix_cache` have it. Files themselves are
`jaxmethods.data.adapter_files`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxmethods.adapters.adapter import Tree
from jaxmethods.adapters.peft_format import check_options
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm_config import CausalLMConfig
from jaxmethods.trees import Json

_TENSOR = "prompt_embeddings"
# Options that have no say in what a trained prompt computes: the tensor is what encoders gave, and its
# shape says the rest.
_SHARED = {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"}
_OPTIONS = {
  "PROMPT_TUNING": {
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
  },
  "P_TUNING": {
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
  },
  "PREFIX_TUNING": {"encoder_hidden_size", "prefix_projection"},
}  # fmt: skip


def prompt_to_peft(
  tree: Tree, config: CausalLMConfig, *, base: str = ""
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
  """The contents of adapter_config.json and adapter_model.safetensors.

  Args:
    tree: of `prompts.init_prompt` or `prompts.init_prefix`.
    config: of the model.
    base: name or path of the base model, recorded in the config.

  Returns:
    (config, tensors).
  """
  tree = jax.device_get(tree)
  if "prompt" in tree:
    kind, flat = "PROMPT_TUNING", tree["prompt"]
    own: dict[str, object] = {"token_dim": config.width, "num_attention_heads": config.num_heads}
  else:
    # (L, 2, K, length, d): a layer's keys, then its values.
    both = np.stack([tree["keys"], tree["values"]], axis=1)
    kind, flat = "PREFIX_TUNING", both.transpose(3, 0, 1, 2, 4).reshape(both.shape[3], -1)
    own = {
      "token_dim": config.num_kv_heads * config.head_dim,
      "num_attention_heads": config.num_kv_heads,
      "prefix_projection": False,
    }
  settings = {
    "peft_type": kind,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base or None,
    "inference_mode": True,
    "num_virtual_tokens": len(flat),
    "num_layers": config.num_layers,
    "num_transformer_submodules": 1,
    **own,
  }
  return settings, {_TENSOR: np.ascontiguousarray(flat, np.float32)}


def prompt_from_peft(
  settings: Json, tensors: Mapping[str, np.ndarray], config: CausalLMConfig
) -> Tree:
  """Reads what `prompt_to_peft` or PEFT itself wrote: prompt tuning, p-tuning and prefix tuning.

  PEFT saves what its prompt encoders give, so those with layers of their own read like those without.

  Args:
    settings: contents of adapter_config.json.
    tensors: contents of adapter_model.safetensors.
    config: of the model.

  Returns:
    A tree as `prompts.init_prompt` or `prompts.init_prefix` makes it.

  Raises:
    InputError: another kind of adapter, an unknown option, or tensors that do not fit the model.
  """
  kind = settings.get("peft_type")
  if kind not in _OPTIONS:
    raise InputError(f"peft_type {kind!r}: is no prompt or prefix")
  check_options(settings, _SHARED | _OPTIONS[kind])
  if odd := sorted(set(tensors) ^ {_TENSOR}):
    raise InputError(f"{odd[0]}: a PEFT prompt has the tensor {_TENSOR} and no other")
  flat = np.asarray(tensors[_TENSOR])
  is_prefix = kind == "PREFIX_TUNING"
  of_all_layers = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
  length = settings.get("num_virtual_tokens", len(flat))
  needed = (length, math.prod(of_all_layers) if is_prefix else config.width)
  if flat.shape != needed:
    raise InputError(f"{_TENSOR}: has shape {flat.shape}, this model needs {needed}")
  if not is_prefix:
    return {"prompt": flat}
  both = flat.reshape(length, *of_all_layers).transpose(1, 2, 3, 0, 4)
  return {"keys": both[:, 0], "values": both[:, 1]}
