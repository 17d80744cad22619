"""Shapes of decoder-only language models, as published configs state them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmethods.trees import Json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding, half-split layout.

  Attributes:
    base: wavelengths grow from 2 pi to 2 pi base.
    scaling: "linear" divides all frequencies by `factor`; "llama3" the low ones only.
    factor: of the scaling.
    low, high: "llama3" leaves wavelengths below `context / high` alone, divides those above
      `context / low`, and blends in between.
    context: context length of the pretraining.
  """

  base: float = 10000.0
  scaling: Literal["default", "linear", "llama3"] = "default"
  factor: float = 1.0
  low: float = 1.0
  high: float = 4.0
  context: int = 8192

  def angles(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, (B, T, head_dim / 2) each, of positions (B, T)."""
    frequency = self.base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if self.scaling == "linear":
      frequency = frequency / self.factor
    elif self.scaling == "llama3":
      turns = self.context * frequency / (2 * math.pi)
      kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
      frequency = kept * frequency + (1 - kept) * frequency / self.factor
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


# Keys of relatives of these families that change what a model computes, with the value that does not.
_NEUTRAL = {
  "partial_rotary_factor": 1, "logit_scale": 1, "logits_scaling": 1, "embedding_multiplier": 1,
  "residual_multiplier": 1, "final_logit_softcapping": None, "attn_logit_softcapping": None,
  "query_pre_attn_scalar": None, "num_experts": 0, "num_local_experts": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CausalLMConfig:
  """Shapes of a model; `from_hugging_face` reads those of published ones.

  Attributes:
    vocab_size: V.
    width: D.
    num_layers: L.
    num_heads: K * G query heads.
    num_kv_heads: K key and value heads.
    head_dim: d.
    mlp_width: of the gated MLP.
    norm_eps: of the RMS norms.
    rope: rotary embedding.
    qkv_bias, out_bias, mlp_bias: which linear layers have a bias.
    qk_norm: RMS norm of every query and key head (Qwen3).
    tied: the head is the transposed embedding.
    windows: tokens that a layer looks back, itself included, per layer; None: all. Empty: all in all.
    init_std: of random parameters.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  norm_eps: float = 1e-6
  rope: Rope = Rope()
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  tied: bool = False
  windows: tuple[int | None, ...] = ()
  init_std: float = 0.02

  def __post_init__(self) -> None:
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads")
    if self.head_dim % 2:
      raise ValueError(f"head_dim: must be even to be rotated, got {self.head_dim}")
    if self.windows and len(self.windows) != self.num_layers:
      raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
    if len(set(self.windows) - {None}) > 1:
      raise ValueError(f"windows: more than one length, {self.windows}")

  @classmethod
  def from_hugging_face(cls, config: Json) -> CausalLMConfig:
    """Reads the contents of a `config.json`.

    Args:
      config: of the Llama, Mistral, Qwen2 or Qwen3 family, as transformers 4 or 5 writes it.

    Returns:
      The config.

    Raises:
      ValueError: an unsupported family, activation or rotary embedding, or a missing key.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
      known = ", ".join(FAMILIES)
      raise ValueError(f"model_type {family!r} is no supported causal LM family ({known})")
    if (activation := config.get("hidden_act", "silu")) != "silu":
      raise ValueError(f"hidden_act {activation!r} is not supported, only silu")
    for key, neutral in _NEUTRAL.items():
      if config.get(key, neutral) not in (neutral, None):
        raise ValueError(f"{key} {config[key]!r} is not supported")
    try:
      heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
      # Qwen2 has these biases always, the others if they say so; only the others have one on out.
      bias = bool(config.get("attention_bias", False))
      return cls(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope(config),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        windows=_windows(config, family, layers),
        init_std=config.get("initializer_range", 0.02),
      )
    except KeyError as error:
      raise ValueError(f"{error.args[0]}: is missing from the config of a {family} model") from None


def _rope(config: Json) -> Rope:
  """Of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
  given: Json = config.get("rope_parameters") or config.get("rope_scaling") or {}
  base = given.get("rope_theta", config.get("rope_theta", 10000.0))
  kind = given.get("rope_type", given.get("type", "default"))
  if kind not in ("default", "linear", "llama3") or given.get("partial_rotary_factor", 1) != 1:
    raise ValueError(f"rope_parameters {dict(given)} are not supported")
  if kind == "default":
    return Rope(base)
  if kind == "linear":
    return Rope(base, kind, given["factor"])
  context = given["original_max_position_embeddings"]
  return Rope(
    base, kind, given["factor"], given["low_freq_factor"], given["high_freq_factor"], context
  )


def _windows(config: Json, family: str, layers: int) -> tuple[int | None, ...]:
  """Which layers slide: all of Mistral, the upper ones of Qwen where it is switched on."""
  window = config.get("sliding_window")
  on = family == "mistral" or config.get("use_sliding_window", False)
  if window is None or not on or family == "llama":
    return ()
  if kinds := config.get("layer_types"):
    slides = [kind == "sliding_attention" for kind in kinds]
  else:
    first = config.get("max_window_layers", 28) if family != "mistral" else 0
    slides = [layer >= first for layer in range(layers)]
  return tuple(window if slide else None for slide in slides)
