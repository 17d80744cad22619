"""Vision transformer: plain ViT, and the image tower of CLIP and LLaVA."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmethods.errors import InputError
from jaxmethods.models.conv import Conv
from jaxmethods.models.hugging_face import (
  encoder_config,
  encoder_rules,
  family,
  norm,
  rooted,
  setting,
)
from jaxmethods.models.transformer import Encoded, Encoder, EncoderConfig, layer_norm
from jaxmethods.models.weights import Rule
from jaxmethods.trees import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """Shape of a vision transformer.

  Attributes:
    encoder: its blocks.
    image_size: height and width in pixels.
    patch: side of a patch.
    stride: between two patches; smaller than `patch`: they overlap. None: `patch`.
    channels: of the image.
    clip: whether it is CLIP's image tower: a patch's embedding has no bias, and the tokens are
      normalised before the first block.
  """

  encoder: EncoderConfig
  image_size: tuple[int, int]
  patch: int
  stride: int | None = None
  channels: int = 3
  clip: bool = False

  def __post_init__(self) -> None:
    if self.patch < 1 or (self.stride is not None and self.stride < 1):
      raise InputError(f"patch, stride: must be at least 1, got {self.patch}, {self.stride}")
    if min(self.image_size) < self.patch:
      raise InputError(f"image_size: {self.image_size} is smaller than a patch of {self.patch}")

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = ((n - self.patch) // (self.stride or self.patch) + 1 for n in self.image_size)
    return rows, columns

  @property
  def num_tokens(self) -> int:
    """Tokens of an image: the patches and the class token."""
    return self.grid[0] * self.grid[1] + 1

  @classmethod
  def from_hugging_face(cls, config: Json, **encoder: Any) -> ViTConfig:
    """Reads the config of a `vit` or of CLIP's image tower; `encoder`: how to compute, as there.

    Raises:
      InputError: another family, or a key is missing.
    """
    side = setting(config, "image_size")
    return cls(
      encoder=encoder_config(config, **encoder),
      image_size=(side, side),
      patch=setting(config, "patch_size"),
      channels=config.get("num_channels", 3),
      clip=family(config, "vit", "clip_vision_model") == "clip_vision_model",
    )


class ViT(nn.Module):
  """A class token and the patches of an image, pre-norm blocks, a last norm.

  `embed` and `encode` are separate so that a method can put prompts between them, or leave patches
  out. Parameters: `class_token`, `position`, `patch_embedding`, `encoder/layers...`, `norm`, and
  `pre_norm` where there is one.

  >>> from jaxmethods.models.transformer import EncoderConfig
  >>> encoder = EncoderConfig(width=8, num_layers=1, heads=2, hidden=16)
  >>> model = jm.models.ViT(jm.models.ViTConfig(encoder=encoder, image_size=(8, 8), patch=4))
  >>> model.init_with_output(key, jnp.zeros((1, 8, 8, 3)))[0].hidden.shape  # a class token, 4 patches
  (1, 5, 8)
  """

  config: ViTConfig

  def setup(self) -> None:
    """Declares the parameters."""
    config, normal = self.config, nn.initializers.normal(0.02)
    width, dtype = config.encoder.width, config.encoder.dtype
    stride = config.stride or config.patch
    self.patch_embedding = Conv(
      width, config.patch, stride, use_bias=not config.clip, kernel_init=normal, dtype=dtype
    )
    ones = () if config.clip else (1,)  # as the published files store them
    self.class_token = self.param("class_token", normal, (*ones, *ones, width))
    self.position = self.param("position", normal, (*ones, config.num_tokens, width))
    if config.clip:
      self.pre_norm = layer_norm(config.encoder)
    self.encoder = Encoder(config.encoder)
    self.norm = layer_norm(config.encoder)

  def __call__(self, pixels: jax.Array, **hooks: Any) -> Encoded:
    """Encodes images.

    Args:
      pixels: (B, height, width, channels), normalised as the weights expect.
      **hooks: keywords of `Encoder.__call__`.

    Returns:
      The normalised tokens (B, 1 + N, D), class token first, patches row by row.
    """
    encoded = self.encode(self.embed(pixels), **hooks)
    return encoded._replace(hidden=self.norm(encoded.hidden))

  def embed(self, pixels: jax.Array) -> jax.Array:
    """Maps images (B, height, width, channels) to tokens (B, 1 + N, D) with their positions."""
    chex.assert_shape(pixels, (None, *self.config.image_size, self.config.channels))
    patches = self.patch_embedding(pixels)
    batch, *_, width = patches.shape
    class_token = jnp.broadcast_to(self.class_token, (batch, 1, width)).astype(patches.dtype)
    tokens = jnp.concatenate([class_token, patches.reshape(batch, -1, width)], axis=1)
    return tokens + self.position.astype(tokens.dtype)

  def encode(self, tokens: jax.Array, **hooks: Any) -> Encoded:
    """Runs the blocks on embedded tokens (B, T, D); the result is not normalised yet."""
    return self.encoder(self.pre_norm(tokens) if self.config.clip else tokens, **hooks)


class ViTClassifier(nn.Module):
  """A vision transformer with a linear layer, "head", on its class token.

  Attributes:
    config: its shape.
    num_classes: number of logits.
  """

  config: ViTConfig
  num_classes: int

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps images (B, height, width, channels) to logits (B, num_classes)."""
    tokens = ViT(self.config, name="vit")(pixels).hidden
    return nn.Dense(self.num_classes, name="head")(tokens[:, 0])


def resized_position(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Brings the positions of a square grid of patches to another grid, bilinear between centres.

  Args:
    table: (1, 1 + n, D) or (1 + n, D), the class token first; n is a square number.
    grid: rows and columns wanted.

  Returns:
    The same rank, 1 + rows * columns positions.

  Raises:
    ValueError: n is no square number.
  """
  own, patches = jnp.split(table, [1], axis=-2)
  side, width = math.isqrt(patches.shape[-2]), table.shape[-1]
  if side * side != patches.shape[-2]:
    raise ValueError(f"table: {patches.shape[-2]} patches are no square grid")
  if (side, side) == tuple(grid):
    return table
  old = patches.reshape(side, side, width)
  new = jax.image.resize(old, (*grid, width), "bilinear", antialias=False)
  return jnp.concatenate([own, new.reshape(*own.shape[:-2], -1, width)], axis=-2)


# Names of transformers 5 first, those of files written before it as aliases.
VIT_TABLE = rooted(
  (
    Rule("embeddings.cls_token", "class_token"),
    Rule("embeddings.position_embeddings", "position"),
    Rule("embeddings.patch_embeddings.projection.weight", "patch_embedding/kernel", "conv"),
    Rule("embeddings.patch_embeddings.projection.bias", "patch_embedding/bias"),
    *encoder_rules(
      {
        "norm_1": ("layers.{i}.layernorm_before", "encoder.layer.{i}.layernorm_before"),
        "attention/query": (
          "layers.{i}.attention.q_proj",
          "encoder.layer.{i}.attention.attention.query",
        ),
        "attention/key": (
          "layers.{i}.attention.k_proj",
          "encoder.layer.{i}.attention.attention.key",
        ),
        "attention/value": (
          "layers.{i}.attention.v_proj",
          "encoder.layer.{i}.attention.attention.value",
        ),
        "attention/out": (
          "layers.{i}.attention.o_proj",
          "encoder.layer.{i}.attention.output.dense",
        ),
        "norm_2": ("layers.{i}.layernorm_after", "encoder.layer.{i}.layernorm_after"),
        "mlp/fc_1": ("layers.{i}.mlp.fc1", "encoder.layer.{i}.intermediate.dense"),
        "mlp/fc_2": ("layers.{i}.mlp.fc2", "encoder.layer.{i}.output.dense"),
      }
    ),
    *norm("norm", "layernorm"),
  ),
  "",
  "",
  "vit.",
)
