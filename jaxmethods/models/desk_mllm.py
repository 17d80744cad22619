"""A small multimodal language model: convolutional tower, projector, causal language model.

The image comes first, so under the causal mask its tokens never see the text: their keys and values
are computed once per image and shared by all questions about it (exact). The tower is meant to be
frozen: its output, `encode`, can be computed once per image and given as `features`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxmethods.models.causal_lm import Cache, CausalLM, CausalLMConfig, Output, prefix_cache
from jaxmethods.models.conv import Conv
from jaxmethods.models.mllm import Projector
from jaxmethods.models.probe import Probe
from jaxmethods.models.transformer import Encoder, EncoderConfig, layer_norm
from jaxmethods.stats.activations import gelu


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeskConfig:
  """Shape of the model.

  Attributes:
    language: the language model.
    tower: the blocks of the image tower.
    image_size: side of the square images, a multiple of 8.
    stem: channels between the two convolutions.
  """

  language: CausalLMConfig
  tower: EncoderConfig
  image_size: int = 64
  stem: int = 32

  def __post_init__(self) -> None:
    if self.image_size % 8:
      raise ValueError(f"image_size: must be a multiple of 8, got {self.image_size}")

  @property
  def num_tokens(self) -> int:
    """Tokens of an image, N."""
    return (self.image_size // 8) ** 2


class Tower(nn.Module):
  """Encodes images: halves them, two strided convolutions, transformer blocks, a norm."""

  config: DeskConfig

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps images (B, size, size, 3), uint8 or in 0..255, to tokens (B, N, F), row by row."""
    config = self.config
    x = nn.avg_pool(pixels.astype(jnp.float32) / 127.5 - 1, (2, 2), (2, 2))
    x = gelu(Conv(config.stem, stride=2, padding=1, name="conv_1")(x))
    x = Conv(config.tower.width, stride=2, padding=1, name="conv_2")(x)
    x = x.reshape(len(x), config.num_tokens, config.tower.width)
    x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
    return layer_norm(config.tower, "norm")(Encoder(config.tower, name="encoder")(x).hidden)


class DeskMLLM(nn.Module):
  """Answers one or several questions about each image; parameters "vision", "projector", "language".

  Attributes:
    config: shapes.
    scan_layers: of the language model, as in `CausalLM`.
    dtype: of the computation of projector and language model.
  """

  config: DeskConfig
  scan_layers: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    """Declares the parameters."""
    language = self.config.language
    self.vision = Tower(self.config)
    self.projector = Projector(language.width, "gelu", self.dtype, jnp.float32)
    self.language = CausalLM(language, scan_layers=self.scan_layers, dtype=self.dtype)

  def __call__(
    self,
    ids: jax.Array,
    *,
    features: jax.Array | None = None,
    pixels: jax.Array | None = None,
    mask: jax.Array | None = None,
    cache: Cache | None = None,
    cache_size: int | None = None,
    prompt: jax.Array | None = None,
    prefix: dict[str, jax.Array] | None = None,
    probe: Probe | None = None,
    logits: Literal["all", "last", "none"] = "all",
  ) -> Output:
    """Reads images and then the texts about them.

    Args:
      ids: token ids (B, T), or (B, K, T): K texts about each image. Padding on the right needs no mask,
        padding on the left does.
      features: output of the tower (B, N, F).
      pixels: (B, size, size, 3), in place of the features; neither: the image is in the cache.
      mask: like the ids, 0 at padding.
      cache: as in `CausalLM`, of image and text.
      cache_size: slots for the text, to begin a cache that outlives the call.
      prompt: learned vectors (p, D) between image and text.
      prefix: learned keys and values before the image, see `adapters.prompts.init_prefix`.
      probe: what to keep of the layers, of the text's tokens; a chosen query is counted from the first
        token behind the image, keys are prefix, image, prompt, text.
      logits: of which of the text's positions.

    Returns:
      See `Output`: logits (B, T, V) or (B, K, T, V); in the rest K texts of an image are rows of a batch
      (B * K, ...). Values at the prompt's places are left out of the logits only.
    """
    *lead, length = ids.shape
    embeddings = self.language.embed_tokens(ids.reshape(-1, length))
    mask = None if mask is None else mask.reshape(-1, length)
    extra = 0
    if prompt is not None:
      extra = len(prompt)
      wide = jnp.broadcast_to(prompt.astype(embeddings.dtype), (len(embeddings), *prompt.shape))
      embeddings = jnp.concatenate([wide, embeddings], axis=1)
      mask = None if mask is None else jnp.pad(mask, ((0, 0), (extra, 0)), constant_values=1)
    if cache is None:
      room = extra + (length if cache_size is None else cache_size)
      cache = self._look(features, pixels, prefix, room)
      cache = _repeated(cache, len(embeddings) // cache.valid.shape[0])
    out = self.language(embeddings=embeddings, mask=mask, cache=cache, probe=probe, logits=logits)
    if out.logits is None or logits == "last":
      return out
    return out._replace(logits=out.logits[:, extra:].reshape(*lead, length, -1))

  def encode(self, pixels: jax.Array) -> jax.Array:
    """Maps images (B, size, size, 3) to features (B, N, F) by the tower alone."""
    return self.vision(pixels)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Maps hidden states (..., D) of the language model to logits (..., V)."""
    return self.language.logits(hidden)

  def _look(
    self,
    features: jax.Array | None,
    pixels: jax.Array | None,
    prefix: dict[str, jax.Array] | None,
    room: int,
  ) -> Cache:
    """Begins a cache with the images in it and room for the text."""
    if (features is None) == (pixels is None):
      raise ValueError("exactly one of features and pixels is needed where the cache is empty")
    if features is None:
      assert pixels is not None
      features = self.vision(pixels)
    tokens = self.projector(features)
    batch, count, _ = tokens.shape
    begun: dict[str, Any] = {"cache_size": count + room}
    if prefix is not None:
      language, dtype = self.config.language, self.dtype
      filled = prefix_cache(
        prefix, language, batch, count + room, dtype, scan_layers=self.scan_layers
      )
      begun = {"cache": filled}
    cache = self.language(embeddings=tokens, logits="none", **begun).cache
    assert cache is not None
    return cache


def _repeated(cache: Cache, times: int) -> Cache:
  """Repeats every row of the cache `times` times, one after the other."""
  if times == 1:
    return cache
  repeat = lambda x, axis: jnp.repeat(x, times, axis=axis)
  keys, values = jax.tree.map(lambda x: repeat(x, 1), (cache.keys, cache.values))
  return Cache(keys, values, repeat(cache.valid, 0), cache.length)
