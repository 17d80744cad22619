"""A CLIP with what it needs to read images and texts, and its zero-shot classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data import vision_sources
from jaxmethods.data.records import Source
from jaxmethods.errors import InputError
from jaxmethods.models.clip import CLIP
from jaxmethods.models.transformer import normalise
from jaxmethods.testbeds.vision_language import pretraining
from jaxmethods.testbeds.vision_language.settings import SmallClip
from jaxmethods.testbeds.vision_language.words import Tokens, clip_tokens, word_tokens
from jaxmethods.trees import Params, Tree

SCALE = 100.0  # of the zero-shot logits

# Of every released CLIP.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Stage(NamedTuple):
  """A model and how it reads.

  Attributes:
    model: CLIP.
    params: its parameters.
    tokens: how it reads texts.
    pixels: uint8 images (B, h, w, 3) -> what the image tower reads; pure.
    source: provenance.
  """

  model: CLIP
  params: Tree
  tokens: Tokens
  pixels: Callable[[jax.Array], jax.Array]
  source: Source


def load(name: str, settings: SmallClip) -> Stage:
  """Loads a model.

  Args:
    name: `small`, which is pretrained here once, or a CLIP of `model_sources` (`hf:PATH`).
    settings: of the small one.

  Raises:
    InputError: an unknown name, missing or damaged files, or a model that is no CLIP.
  """
  if name == "small":
    tokens = word_tokens(settings.context)
    model = pretraining.model_of(settings, tokens)
    params = pretraining.pretrained(model, tokens, settings)
    source = Source(
      "small CLIP", f"pretrained by us on {settings.pairs} rendered pairs", "ours", "none", False
    )
    return Stage(model, params, tokens, pretraining.scaled, source)
  loaded = vision_sources.load_model(name, scan_layers=True)
  if not isinstance(loaded.model, CLIP):
    raise InputError(f"{name}: is no CLIP")
  config = loaded.model.config
  tokens = clip_tokens(loaded.files.tokenizer(), config.text.context)
  side = config.vision.image_size[0]
  pixels = lambda images: clip_pixels(images, side)
  return Stage(loaded.model, loaded.params, tokens, pixels, loaded.files.source)


def clip_pixels(images: jax.Array, side: int) -> jax.Array:
  """Resizes uint8 images (B, h, w, 3) and scales them as released CLIPs read them."""
  resized = jax.image.resize(
    images.astype(jnp.float32) / 255, (len(images), side, side, 3), "cubic", antialias=True
  )
  return (jnp.clip(resized, 0, 1) - _MEAN) / _DEVIATION


def image_embeddings(model: CLIP, params: Params, pixels: jax.Array) -> jax.Array:
  """Unit-length embeddings (B, E) of what the image tower reads."""
  return normalise(
    cast(jax.Array, model.apply({"params": params}, pixels, method="image_features"))
  )


def text_embeddings(model: CLIP, params: Params, ids: jax.Array) -> jax.Array:
  """Unit-length embeddings (N, E) of texts (N, T)."""
  return normalise(cast(jax.Array, model.apply({"params": params}, ids, method="text_features")))


def class_embeddings(model: CLIP, params: Params, ids: jax.Array) -> jax.Array:
  """One unit-length embedding a class (K, E): the mean over its templates; ids (K, M, T)."""
  classes, templates, length = ids.shape
  each = text_embeddings(model, params, ids.reshape(-1, length))
  return normalise(each.reshape(classes, templates, -1).mean(1))


def zero_shot(
  stage: Stage, params: Params, images: jax.Array, ids: jax.Array, chunk: int = 100
) -> jax.Array:
  """Logits (n, K) of images by the texts of classes, `chunk` images at a time.

  Args:
    stage: model and how it reads.
    params: of the model.
    images: (n, h, w, 3) uint8.
    ids: texts of the classes (K, M, T).
    chunk: images at once.
  """
  classes = class_embeddings(stage.model, params, ids)
  embed = lambda part: image_embeddings(stage.model, params, stage.pixels(part[None]))[0]
  return SCALE * jax.lax.map(embed, images, batch_size=chunk) @ classes.T
