"""Models that prompts are learnt for: a CLIP, or two towers that others trained apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

from jaxmethods.data.records import sealed
from jaxmethods.methods import fpl
from jaxmethods.methods.fpl import ClassTexts, Prompts, SharedTexts
from jaxmethods.models.bert import Bert
from jaxmethods.models.clip import CLIP, end_of_text
from jaxmethods.models.transformer import normalise
from jaxmethods.runtime import compiler
from jaxmethods.testbeds.vision_language import dual
from jaxmethods.testbeds.vision_language.dual import Bridge
from jaxmethods.testbeds.vision_language.encoder import Stage
from jaxmethods.testbeds.vision_language.words import Tokens
from jaxmethods.trees import Params, Tree

_CHUNK = 256  # pictures that are embedded at once
_DUAL_SCALE = 20.0  # tau of the towers trained apart, where there is none to read (ours)


class Widths(NamedTuple):
  """Sizes that prompts and heads follow; 0 where there is no such tower."""

  text: int
  text_layers: int
  vision: int
  vision_layers: int
  embedding: int


class Towers(NamedTuple):
  """A frozen model.

  Attributes:
    params: its parameters; the functions below get them as an argument.
    tokens: how it reads texts.
    widths: of its towers.
    text: (params, prompts, texts) -> embeddings of the classes (K, E), unit length.
    image: (params, prompts, pixels) -> embeddings (B, E), unit length; None: pictures are embedded once.
    pixels: uint8 images (B, h, w, 3) -> what `image` reads.
    words: params -> the table of token embeddings.
    scale: params -> tau.
    embed: uint8 images (D, n, h, w, 3), labels with -1 where there is none -> embeddings (D n, E).
    about: provenance.
  """

  params: Tree
  tokens: Tokens
  widths: Widths
  text: Callable[[Params, Prompts, ClassTexts | SharedTexts], Array]
  image: Callable[[Params, Prompts, Array], Array] | None
  pixels: Callable[[Array], Array]
  words: Callable[[Params], Array]
  scale: Callable[[Params], Array]
  embed: Callable[[np.ndarray, np.ndarray], Array]
  about: str


def clip_towers(stage: Stage, behind_norm: bool = False) -> Towers:
  """A CLIP; `behind_norm`: vision prompts behind the first norm."""
  model, config = stage.model, stage.model.config
  text, vision = config.text.encoder, config.vision.encoder
  return Towers(
    params=stage.params,
    tokens=stage.tokens,
    widths=Widths(text.width, text.num_layers, vision.width, vision.num_layers, config.projection),
    text=functools.partial(_clip_texts, model),
    image=functools.partial(fpl.image_features, model, behind_norm=behind_norm),
    pixels=stage.pixels,
    words=lambda params: params["text"]["token"]["embedding"],
    scale=lambda params: jnp.exp(jnp.asarray(params["logit_scale"])),
    embed=functools.partial(_clip_embeddings, stage),
    about=f"{sealed(stage.source.name, stage.source.digest)}, {stage.source.origin}",
  )


def dual_towers() -> Towers:
  """EfficientNet-Lite0 and MiniLM; pictures are embedded once, centred on their domain's mean.

  Raises:
    InputError: a package is missing.
  """
  both = dual.load()
  width = both.text.config.encoder.width
  return Towers(
    params={"text": both.text_params, "bridge": both.bridge._asdict()},
    tokens=both.tokens,
    widths=Widths(width, both.text.config.encoder.num_layers, 0, 0, len(both.bridge.mean)),
    text=functools.partial(_dual_texts, both.text, both.tokens.pad),
    image=None,
    pixels=lambda images: images,
    words=_bert_words,
    scale=lambda params: jnp.float32(_DUAL_SCALE),
    embed=functools.partial(_dual_embeddings, both),
    about="EfficientNet-Lite0 and MiniLM, joined without pairs (no CLIP): "
    + ", ".join(source.origin for source in both.sources),
  )


def plain_texts(ids: Int[Array, "K T"], tokens: Tokens) -> ClassTexts:
  """Hand-written texts, without places for prompts."""
  order = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
  return ClassTexts(ids, order, end_of_text(ids, tokens.end).astype(jnp.int32))


def _clip_texts(
  model: CLIP, params: Params, prompts: Prompts, texts: ClassTexts | SharedTexts
) -> Array:
  if isinstance(texts, SharedTexts):
    return fpl.shared_text_features(model, params, prompts, texts)
  return fpl.text_features(model, params, prompts, texts)


def _clip_embeddings(
  stage: Stage, images: UInt8[np.ndarray, "D n h w 3"], y: Int[np.ndarray, "D n"]
) -> Float[Array, "Dn E"]:
  del y
  x = images.reshape(-1, *images.shape[2:])
  embed = compiler.jit(
    lambda params, x: fpl.image_features(stage.model, params, {}, stage.pixels(x))
  )
  padded = np.pad(x, ((0, -len(x) % _CHUNK), *[(0, 0)] * (x.ndim - 1)))
  parts = [embed(stage.params, part) for part in padded.reshape(-1, _CHUNK, *x.shape[1:])]
  return jnp.concatenate(parts)[: len(x)]


def _dual_embeddings(
  both: dual.Dual, images: UInt8[np.ndarray, "D n h w 3"], y: Int[np.ndarray, "D n"]
) -> Float[Array, "Dn E"]:
  embed = compiler.jit(dual.image_embeddings)
  domains = []
  for k, (x, labels) in enumerate(zip(images, y, strict=True)):
    real = labels >= 0
    features = dual.image_features(both.image_params, x[real], f"domain {k}")
    embedded = np.zeros((len(x), len(both.bridge.mean)), np.float32)
    embedded[real] = normalise(embed(both.bridge, features, features.mean(0)))
    domains.append(embedded)
  return jnp.asarray(np.concatenate(domains))


def _bert_words(params: Params) -> Array:
  return params["text"]["word"]["embedding"]


def _dual_texts(
  text: Bert, pad: int, params: Params, prompts: Prompts, texts: ClassTexts | SharedTexts
) -> Array:
  """Embeddings of the classes; prompts stand among MiniLM's word embeddings."""
  assert isinstance(texts, ClassTexts)  # MiniLM looks both ways: texts have nothing in common
  words = jnp.asarray(_bert_words(params))[texts.ids]
  if "text" in prompts:
    words = fpl.insert_context(prompts["text"], words, texts.order)
  mask = texts.ids != pad
  return dual.text_embeddings(
    text, params["text"], Bridge(**params["bridge"]), texts.ids, mask, words
  )
