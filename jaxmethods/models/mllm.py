"""LLaVA-style multimodal language model: an image tower, a projector, a causal language model."""

from __future__ import annotations

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jaxmethods.errors import InputError
from jaxmethods.models import causal_lm
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig, Output
from jaxmethods.models.clip import VISION_TABLE
from jaxmethods.models.hugging_face import dense, family, rooted, setting
from jaxmethods.models.transformer import ACTIVATIONS, check_activation
from jaxmethods.models.vit import ViT, ViTConfig
from jaxmethods.models.weights import Rule
from jaxmethods.trees import Json, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLLMConfig:
  """Shape of a multimodal language model.

  Attributes:
    vision: the image tower.
    language: the language model.
    image_token: id that stands for one image token in a text.
    feature_layer: hidden state of the tower that is read: 0 is its input, -1 the last block's
      output, -2 (LLaVA) the one before it.
    select: "default" leaves the class token out, "full" keeps it.
    activation: between the projector's two layers, a name in `ACTIVATIONS`.
  """

  vision: ViTConfig
  language: CausalLMConfig
  image_token: int
  feature_layer: int = -2
  select: Literal["default", "full"] = "default"
  activation: str = "gelu"

  def __post_init__(self) -> None:
    layers = self.vision.encoder.num_layers
    if not -layers - 1 <= self.feature_layer <= layers:
      raise InputError(f"feature_layer: {self.feature_layer} is not in a tower of {layers} blocks")
    if self.select not in ("default", "full"):
      raise InputError(f"select: must be 'default' or 'full', got {self.select!r}")
    if not 0 <= self.image_token < self.language.vocab_size:
      raise InputError(
        f"image_token: {self.image_token} is outside the vocabulary of {self.language.vocab_size}"
      )
    check_activation(self.activation)

  @property
  def depth(self) -> int:
    """Blocks of the tower that are run."""
    layers = self.vision.encoder.num_layers
    return self.feature_layer + (layers + 1 if self.feature_layer < 0 else 0)

  @property
  def tokens_per_image(self) -> int:
    """Image tokens in the text for each image."""
    return self.vision.num_tokens - (self.select == "default")

  @classmethod
  def from_hugging_face(cls, config: Json) -> MLLMConfig:
    """Reads the contents of a LLaVA `config.json`, of transformers 4 or 5.

    Raises:
      ValueError: another family, a form that LLaVA-1.5 does not have, or a missing key.
    """
    family(config, "llava")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
      raise InputError(f"vision_feature_layer: only one layer can be read, got {layer!r}")
    if not config.get("multimodal_projector_bias", True):
      raise InputError("multimodal_projector_bias: a projector without bias is not supported")
    name = "image_token_id" if "image_token_id" in config else "image_token_index"
    return cls(
      vision=ViTConfig.from_hugging_face(setting(config, "vision_config")),
      language=CausalLMConfig.from_hugging_face(setting(config, "text_config")),
      image_token=setting(config, name),
      feature_layer=layer,
      select=config.get("vision_feature_select_strategy", "default"),
      activation=config.get("projector_hidden_act", "gelu"),
    )


class Projector(nn.Module):
  """Brings image features into the embedding space of the language model: fc_1, fc_2."""

  width: int
  activation: str
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (B, N, D) to (B, N, width)."""
    layer = lambda name: nn.Dense(
      self.width, dtype=self.dtype, param_dtype=self.param_dtype, name=name
    )
    return layer("fc_2")(ACTIVATIONS[self.activation](layer("fc_1")(x)))


class MLLM(nn.Module):
  """Images among text: parameters `vision/...`, `projector/...`, `language/...`.

  Attributes:
    config: shapes; how the tower is computed is taken from the four below.
    scan_layers: of both towers, as in `CausalLM`.
    dtype: of the computation.
    param_dtype: of random parameters (imported ones keep theirs).
    remat: recompute every layer in the backward pass.
  """

  config: MLLMConfig
  scan_layers: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: bool = False

  def setup(self) -> None:
    """Declares the parameters."""
    config, width = self.config, self.config.language.width
    how: dict[str, PyTree] = {
      "scan_layers": self.scan_layers,
      "dtype": self.dtype,
      "remat": self.remat,
    }
    encoder = dataclasses.replace(config.vision.encoder, **how)
    self.vision = ViT(dataclasses.replace(config.vision, encoder=encoder))
    self.projector = Projector(width, config.activation, self.dtype, self.param_dtype)
    self.language = CausalLM(config.language, param_dtype=self.param_dtype, **how)

  def __call__(self, ids: jax.Array, pixels: jax.Array | None = None, **keywords: PyTree) -> Output:
    """Runs the model on texts with images in them.

    Args:
      ids: token ids (B, T), `image_token` in the place of every image token; see `check_images`.
      pixels: as in `image_features`; None: no images, or they are in the cache already.
      **keywords: of `CausalLM.__call__`: mask, cache, probe, ...

    Returns:
      The output of the language model.
    """
    features = None if pixels is None else self.image_features(pixels)
    return self.language(embeddings=self.embed(ids, features), **keywords)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) of the language model's hidden states (..., D)."""
    return self.language.logits(hidden)

  def image_features(self, pixels: jax.Array) -> jax.Array:
    """The tokens by which images appear in a text.

    Args:
      pixels: one image per text (B, height, width, channels), or I (B, I, height, width, channels).

    Returns:
      (B, I * tokens_per_image, D).
    """
    chex.assert_rank(pixels, {4, 5})
    images = pixels.reshape(-1, *pixels.shape[-3:])
    if self.is_initializing():
      self.vision(images)  # makes what only the file needs: the blocks and the norm after `depth`
    hidden = self.vision.encode(self.vision.embed(images), depth=self.config.depth).hidden
    if self.config.select == "default":
      hidden = hidden[:, 1:]
    return self.projector(hidden.reshape(len(pixels), -1, hidden.shape[-1]))

  def embed(self, ids: jax.Array, features: jax.Array | None = None) -> jax.Array:
    """Token embeddings (B, T, D) with the features (B, N, D) in the places of image tokens, in order.

    The n-th image token of a text is its n-th feature; features beyond its last are not used.
    """
    embedded = self.language.embed_tokens(ids)
    if features is None:
      return embedded
    is_image = ids == self.config.image_token
    place = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
    features = jnp.take_along_axis(features, place[..., None], axis=1).astype(embedded.dtype)
    return jnp.where(is_image[..., None], features, embedded)


def check_images(ids: np.ndarray, images: int, config: MLLMConfig) -> None:
  """Checks on the host that texts (B, T) have whole images, and no more than `images` each.

  Raises:
    InputError: names the text and both numbers.
  """
  each = config.tokens_per_image
  counts = (ids == config.image_token).sum(1)
  if (wrong := (counts % each != 0) | (counts > images * each)).any():
    text = int(np.argmax(wrong))
    raise InputError(
      f"text {text}: has {counts[text]} image tokens, {images} image(s) have {each} each"
    )


def table(config: MLLMConfig) -> tuple[Rule, ...]:
  """Names in a checkpoint: those of transformers 5, and the older ones of published LLaVA-1.5."""
  projector = (
    *dense("projector/fc_1", "multi_modal_projector.linear_1"),
    *dense("projector/fc_2", "multi_modal_projector.linear_2"),
  )
  return (
    *rooted(VISION_TABLE, "vision/", "model.vision_tower.", "vision_tower."),
    *rooted(projector, "", "model.", ""),
    *causal_lm.table(
      config.language,
      under="language/",
      prefixes=("model.language_model.", "language_model.model."),
      heads=("lm_head.weight", "language_model.lm_head.weight"),
    ),
  )
