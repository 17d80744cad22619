"""CLIP: an image tower and a text tower that meet in one space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmethods.errors import InputError
from jaxmethods.models.hugging_face import (
  encoder_config,
  encoder_rules,
  family,
  norm,
  rooted,
  setting,
)
from jaxmethods.models.transformer import Encoded, Encoder, EncoderConfig, layer_norm, normalise
from jaxmethods.models.vit import ViT, ViTConfig
from jaxmethods.models.weights import Rule
from jaxmethods.trees import Json, PyTree

# In the config of every conversion made before the true id was written there.
_LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """Shape of the text tower.

  Attributes:
    encoder: its blocks.
    vocabulary: number of token ids.
    context: longest text in tokens.
    eos: id that ends a text. 2 stands for the rule of the first release: the largest id of the
      text ends it. Any other: the first place with this id.
  """

  encoder: EncoderConfig
  vocabulary: int
  context: int
  eos: int

  @classmethod
  def from_hugging_face(cls, config: Json, **encoder: PyTree) -> TextConfig:
    """Reads the config of CLIP's text tower."""
    family(config, "clip_text_model")
    return cls(
      encoder=encoder_config(config, **encoder),
      vocabulary=setting(config, "vocab_size"),
      context=setting(config, "max_position_embeddings"),
      eos=setting(config, "eos_token_id"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
  """Shape of both towers, and the width of the space in which they meet."""

  vision: ViTConfig
  text: TextConfig
  projection: int

  @classmethod
  def from_hugging_face(cls, config: Json, **encoder: PyTree) -> CLIPConfig:
    """Reads the config of a CLIPModel; `encoder`: how to compute, as in `EncoderConfig`.

    Raises:
      InputError: another family, or a key is missing.
    """
    family(config, "clip")
    return cls(
      vision=ViTConfig.from_hugging_face(setting(config, "vision_config"), **encoder),
      text=TextConfig.from_hugging_face(setting(config, "text_config"), **encoder),
      projection=setting(config, "projection_dim"),
    )

  @classmethod
  def from_openai(
    cls,
    tensors: Mapping[str, np.ndarray],
    *,
    heads: tuple[int, int] | None = None,
    **encoder: PyTree,
  ) -> CLIPConfig:
    """Reads the shapes of a checkpoint in the layout of the first release, which has no config.

    Args:
      tensors: of the checkpoint, split or not.
      heads: of the text and image tower; None: one for each 64 channels, as in every released model.
      **encoder: how to compute, as in `EncoderConfig`.

    Raises:
      InputError: a tensor is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
      if name not in tensors:
        raise InputError(f"{name}: not in the checkpoint, so it is no CLIP of the first release")
      return tensors[name].shape

    def tower(prefix: str, width: int, heads: int | None) -> EncoderConfig:
      blocks = f"{prefix}transformer.resblocks."
      layers = {
        name.removeprefix(blocks).split(".")[0] for name in tensors if name.startswith(blocks)
      }
      return EncoderConfig(
        width=width,
        num_layers=len(layers),
        heads=width // 64 if heads is None else heads,
        hidden=shape(f"{blocks}0.mlp.c_fc.bias")[0],
        activation="quick_gelu",
        **encoder,
      )

    text_heads, vision_heads = heads or (None, None)
    vocabulary, text_width = shape("token_embedding.weight")
    vision_width, channels, patch, _ = shape("visual.conv1.weight")
    side = patch * math.isqrt(shape("visual.positional_embedding")[0] - 1)
    return cls(
      vision=ViTConfig(
        encoder=tower("visual.", vision_width, vision_heads),
        image_size=(side, side),
        patch=patch,
        channels=channels,
        clip=True,
      ),
      text=TextConfig(
        encoder=tower("", text_width, text_heads),
        vocabulary=vocabulary,
        context=shape("positional_embedding")[0],
        eos=_LEGACY_EOS,
      ),
      projection=shape("text_projection")[1],
    )


class CLIPOutput(NamedTuple):
  """Embeddings of unit length (B, E) and (N, E), and their scaled cosines (B, N)."""

  image_embeddings: jax.Array
  text_embeddings: jax.Array
  logits_per_image: jax.Array


class TextTower(nn.Module):
  """Token and position embeddings, causal pre-norm blocks, a last norm."""

  config: TextConfig

  def setup(self) -> None:
    """Declares the parameters."""
    config = self.config
    width, dtype, normal = config.encoder.width, config.encoder.dtype, nn.initializers.normal(0.02)
    self.token = nn.Embed(config.vocabulary, width, dtype=dtype, embedding_init=normal)
    self.position = self.param("position", nn.initializers.normal(0.01), (config.context, width))
    self.encoder = Encoder(config.encoder)
    self.norm = layer_norm(config.encoder)

  def __call__(self, ids: jax.Array, **hooks: PyTree) -> Encoded:
    """Maps token ids (B, T) to normalised hidden states (B, T, D)."""
    return self.encode(self.token(ids), **hooks)

  def encode(self, embedded: jax.Array, **hooks: PyTree) -> Encoded:
    """The same from token embeddings (B, T, D), in which prompts may stand for words."""
    length = embedded.shape[1]
    if length > self.config.context:
      raise ValueError(f"text of {length} tokens: the model reads at most {self.config.context}")
    x = embedded + self.position[:length].astype(embedded.dtype)
    encoded = self.encoder(x, jnp.tri(length, dtype=bool)[None], **hooks)
    return encoded._replace(hidden=self.norm(encoded.hidden))


class CLIP(nn.Module):
  """Both towers with their projections, and `logit_scale`, the log of the inverse temperature.

  Every step is a method of its own (`model.apply(variables, ..., method="image_features")`), so that
  a method can put prompts between them or read one tower only.

  >>> from jaxmethods.models.clip import TextConfig
  >>> from jaxmethods.models.transformer import EncoderConfig
  >>> encoder = EncoderConfig(width=8, num_layers=1, heads=2, hidden=16)
  >>> image = jm.models.ViTConfig(encoder=encoder, image_size=(8, 8), patch=4, clip=True)
  >>> text = TextConfig(encoder=encoder, vocabulary=11, context=6, eos=2)
  >>> model = jm.models.CLIP(jm.models.CLIPConfig(vision=image, text=text, projection=4))
  >>> ids = jnp.array([[1, 2, 10, 0, 0, 0]])
  >>> model.init_with_output(key, jnp.zeros((3, 8, 8, 3)), ids)[0]._fields
  ('image_embeddings', 'text_embeddings', 'logits_per_image')
  """

  config: CLIPConfig

  def setup(self) -> None:
    """Declares the parameters."""
    config = self.config
    self.vision = ViT(config.vision)
    self.text = TextTower(config.text)
    self.visual_projection = self._projection(config.vision.encoder)
    self.text_projection = self._projection(config.text.encoder)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

  def _projection(self, encoder: EncoderConfig) -> nn.Dense:
    return nn.Dense(self.config.projection, use_bias=False, dtype=encoder.dtype)

  def __call__(self, pixels: jax.Array, ids: jax.Array) -> CLIPOutput:
    """Compares images with texts.

    Args:
      pixels: (B, height, width, channels).
      ids: token ids (N, T).
    """
    image = normalise(self.image_features(pixels))
    text = normalise(self.text_features(ids))
    return CLIPOutput(image, text, jnp.exp(self.logit_scale) * image @ text.T)

  def image_features(self, pixels: jax.Array) -> jax.Array:
    """Embeds images (B, height, width, channels): (B, E), not normalised."""
    return self.project_image(self.encode_image(self.vision.embed(pixels)).hidden)

  def text_features(self, ids: jax.Array) -> jax.Array:
    """Embeds texts (N, T): (N, E), not normalised; see `check_texts` for what a text must have."""
    return self.project_text(self.text(ids).hidden, end_of_text(ids, self.config.text.eos))

  def embed_image(self, pixels: jax.Array) -> jax.Array:
    """The image tower's tokens (B, 1 + N, D) before the first block."""
    return self.vision.embed(pixels)

  def encode_image(self, tokens: jax.Array, **hooks: PyTree) -> Encoded:
    """The image tower's blocks; keywords of `Encoder.__call__`."""
    return self.vision.encode(tokens, **hooks)

  def project_image(self, tokens: jax.Array) -> jax.Array:
    """(B, E) from the class token of encoded tokens (B, T, D)."""
    return self.visual_projection(self.vision.norm(tokens[:, 0]))

  def embed_text(self, ids: jax.Array) -> jax.Array:
    """Token embeddings (N, T, D), without positions."""
    return self.text.token(ids)

  def encode_text(self, embedded: jax.Array, **hooks: PyTree) -> Encoded:
    """The text tower from token embeddings (N, T, D); keywords of `Encoder.__call__`."""
    return self.text.encode(embedded, **hooks)

  def project_text(self, hidden: jax.Array, end: jax.Array) -> jax.Array:
    """(N, E) from the hidden states (N, T, D) at the ends `end` (N,) of the texts."""
    return self.text_projection(jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0])


def end_of_text(ids: jax.Array, eos: int) -> jax.Array:
  """The place (N,) at which each text of token ids (N, T) ends; `eos` as in `TextConfig`.

  Without an end token that is place 0, as in the published code: `check_texts` refuses such a text
  before it is on the device.
  """
  return jnp.argmax(ids if eos == _LEGACY_EOS else ids == eos, axis=-1)


def check_texts(ids: np.ndarray, config: TextConfig) -> None:
  """Checks token ids (N, T) on the host.

  Raises:
    InputError: too long, an id out of range, or a text without the end token; names the text.
  """
  if ids.shape[1] > config.context:
    raise InputError(f"texts of {ids.shape[1]} tokens: the model reads at most {config.context}")
  if (outside := ((ids < 0) | (ids >= config.vocabulary)).any(1)).any():
    text = int(np.argmax(outside))
    raise InputError(f"text {text}: has a token id outside [0, {config.vocabulary})")
  if config.eos != _LEGACY_EOS and (endless := (ids != config.eos).all(1)).any():
    text = int(np.argmax(endless))
    raise InputError(f"text {text}: has no end token (id {config.eos})")


def contrastive_loss(logits_per_image: jax.Array) -> jax.Array:
  """CLIP's loss of n matching pairs, the mean of both directions; logits (n, n)."""
  chex.assert_axis_dimension(logits_per_image, 1, len(logits_per_image))
  both = (jax.nn.log_softmax(logits_per_image, axis=axis) for axis in (0, 1))
  return -0.5 * sum(jnp.diagonal(log).mean() for log in both)


_ENCODER = encoder_rules(
  {
    "norm_1": ("encoder.layers.{i}.layer_norm1",),
    "attention/query": ("encoder.layers.{i}.self_attn.q_proj",),
    "attention/key": ("encoder.layers.{i}.self_attn.k_proj",),
    "attention/value": ("encoder.layers.{i}.self_attn.v_proj",),
    "attention/out": ("encoder.layers.{i}.self_attn.out_proj",),
    "norm_2": ("encoder.layers.{i}.layer_norm2",),
    "mlp/fc_1": ("encoder.layers.{i}.mlp.fc1",),
    "mlp/fc_2": ("encoder.layers.{i}.mlp.fc2",),
  }
)

_VISION = (
  Rule("embeddings.class_embedding", "class_token"),
  Rule("embeddings.patch_embedding.weight", "patch_embedding/kernel", "conv"),
  Rule("embeddings.position_embedding.weight", "position"),
  *norm("pre_norm", "pre_layrnorm"),
  *_ENCODER,
  *norm("norm", "post_layernorm"),
)

_TEXT = (
  Rule("embeddings.token_embedding.weight", "token/embedding"),
  Rule("embeddings.position_embedding.weight", "position"),
  *_ENCODER,
  *norm("norm", "final_layer_norm"),
)

CLIP_TABLE = (
  Rule("logit_scale", "logit_scale"),
  *rooted(_TEXT, "text/", "text_model."),
  *rooted(_VISION, "vision/", "vision_model."),
  Rule("visual_projection.weight", "visual_projection/kernel", "transpose"),
  Rule("text_projection.weight", "text_projection/kernel", "transpose"),
)

# One tower alone: the files of transformers 5 drop the prefix.
VISION_TABLE = rooted(_VISION, "", "", "vision_model.")
TEXT_TABLE = rooted(_TEXT, "", "", "text_model.")

# Buffers that old files hold beside the weights.
CLIP_IGNORED = ("*embeddings.position_ids",)

_OPENAI_BLOCKS = encoder_rules(
  {
    "norm_1": ("transformer.resblocks.{i}.ln_1",),
    "attention/query": ("transformer.resblocks.{i}.attn.q",),
    "attention/key": ("transformer.resblocks.{i}.attn.k",),
    "attention/value": ("transformer.resblocks.{i}.attn.v",),
    "attention/out": ("transformer.resblocks.{i}.attn.out_proj",),
    "norm_2": ("transformer.resblocks.{i}.ln_2",),
    "mlp/fc_1": ("transformer.resblocks.{i}.mlp.c_fc",),
    "mlp/fc_2": ("transformer.resblocks.{i}.mlp.c_proj",),
  }
)

# The layout of the first release and of open_clip, after `split_in_proj`.
OPENAI_TABLE = (
  Rule("logit_scale", "logit_scale"),
  Rule("token_embedding.weight", "text/token/embedding"),
  Rule("positional_embedding", "text/position"),
  *rooted(_OPENAI_BLOCKS, "text/", ""),
  *norm("text/norm", "ln_final"),
  Rule("text_projection", "text_projection/kernel"),
  Rule("visual.class_embedding", "vision/class_token"),
  Rule("visual.positional_embedding", "vision/position"),
  Rule("visual.conv1.weight", "vision/patch_embedding/kernel", "conv"),
  *norm("vision/pre_norm", "visual.ln_pre"),
  *rooted(_OPENAI_BLOCKS, "vision/", "visual."),
  *norm("vision/norm", "visual.ln_post"),
  Rule("visual.proj", "visual_projection/kernel"),
)

OPENAI_IGNORED = ("input_resolution", "context_length", "vocab_size")
