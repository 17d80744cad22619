"""Composes the experiment of one row: photographs, their views, a network, the search."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmethods.data import vision_sources
from jaxmethods.data.model_sources import open_model
from jaxmethods.data.records import sealed
from jaxmethods.errors import InputError
from jaxmethods.experiments.adafreq import data as data_lib, networks, pages, training
from jaxmethods.experiments.adafreq.config import Config, untrained
from jaxmethods.experiments.adafreq.networks import Network, Objective
from jaxmethods.experiments.adafreq.views import (
  Frozen,
  Recipe,
  load_frozen,
  of_photographs,
  of_views,
)
from jaxmethods.methods import adafreq
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViT, ViTConfig, resized_position
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.trees import Params

_ON_MAPS = ("hybrid", "pooled", "frozen")


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: data or weights that are missing or do not fit.
  """
  checks.no_mesh("adafreq", mesh)
  data = data_lib.load(config)
  recipe = recipe_of(config)
  frozen = None
  if config.network in _ON_MAPS:
    frozen = load_frozen(config.resolutions, moments=config.network != "hybrid")
  photographs, count = np.concatenate([data.images, data.test.images]), len(data.images)
  inputs = photographs if frozen is None else of_photographs(frozen, photographs)
  train, test = _train(config, data, frozen, inputs[:count]), inputs[count:]
  trunk = vit_of(config, test.shape[1:]) if config.network in ("vit", "hybrid") else None
  network = network_of(config, len(data.counts), trunk)
  parts = training.Parts(
    network, recipe, _rates(config, len(data.images)), config.identities, config.images, test[:1]
  )
  selects = config.view != "none" and config.select != "none"
  selecting = trunk[0] if trunk and selects else None
  search = data.asked or data.test
  show = pages.Show(
    parts, search, _asked(data.asked, frozen) if data.asked else test, data.asked is not None,
    config.top, data.images[data.members[:4, 0]], selecting, config.share,
  )  # fmt: skip
  return Experiment(
    init=functools.partial(training.init, parts),
    batches=lambda step: itertools.repeat(train),
    step=functools.partial(training.step, parts),
    evaluate=functools.partial(training.evaluate, parts, config.protocol == "closed"),
    test=_test(data.test, test),
    figures=functools.partial(pages.figures, show),
    num_steps=config.steps,
    about=data.about + _weights(config),
    files=functools.partial(pages.files, show),
  )


def recipe_of(config: Config) -> Recipe:
  """How the views of a row are drawn."""
  mixes: dict[str, adafreq.Mix | None] = {"none": None, "plain": "none", "mixed": config.mix}
  on = 1.0 if config.augment else 0.0
  return Recipe(
    pad=on * config.pad, rotation=config.rotation, jitter=config.jitter, flip=on * config.flip,
    chance=0.5 * on, deviation=config.deviation, area=config.area, mix=mixes[config.view],
  )  # fmt: skip


def network_of(config: Config, classes: int, trunk: tuple[ViT, Params | None] | None) -> Network:
  """Composes the network of a row; `trunk`: see `vit_of`."""
  objective = _objective(config)
  match config.network:
    case "pixels":
      return networks.floor(networks.pixels_16)
    case "histogram":
      return networks.floor(networks.histogram)
    case "frozen":
      return networks.floor(lambda moments: moments)
    case "resnet":
      high = config.view != "none"
      return networks.flat(networks.Flat(networks.resnet(), classes, objective.weights, high))
    case "pooled":
      layers, high = networks.Pooled(config.width, config.drop_rate), config.view != "none"
      return networks.flat(networks.Flat(layers, classes, objective.weights, high))
  assert trunk is not None
  model, given = trunk
  if config.local_groups:
    encoder = dataclasses.replace(
      model.config.encoder, num_layers=max(model.config.encoder.num_layers - 1, 1)
    )
    shorter = ViT(dataclasses.replace(model.config, encoder=encoder))
    return networks.jigsaw(networks.Jigsaw(shorter, classes, config.local_groups))
  patches = model.config.num_tokens - 1
  if config.view != "none" and config.select != "none" and config.share * patches < 1:
    raise InputError(f"share: {config.share} keeps none of {patches} patches")
  return networks.two_branches(networks.Branches(model, classes, objective, given))


def _objective(config: Config) -> Objective:
  weights = adafreq.CODE if config.loss == "code" else adafreq.PAPER
  weights = weights._replace(equilibrium=config.equilibrium)
  return Objective(
    weights, config.reduce, 1 if config.loss == "code" else 0,
    None if config.view == "none" else config.select, config.share,
  )  # fmt: skip


def _weights(config: Config) -> str:
  """Names the given weights for reports."""
  if not config.weights:
    return ""
  source = open_model(config.weights).source
  return f"; weights: {sealed(source.name, source.digest)}"


def vit_of(config: Config, shape: tuple[int, ...]) -> tuple[ViT, Params | None]:
  """Returns the ViT of a row, and its weights if they are given.

  Raises:
    InputError: no such weights, or weights of another family.
  """
  height, width, channels = shape
  if config.weights:
    loaded = vision_sources.load_model(config.weights)
    if not isinstance(loaded.model, ViT) or loaded.model.config.clip:
      raise InputError(f"weights: {config.weights} is no plain ViT")
    form = dataclasses.replace(
      loaded.model.config, image_size=(height, width), stride=config.stride
    )
    position = resized_position(jnp.asarray(loaded.params["position"]), form.grid)
    return ViT(form), {**loaded.params, "position": position}
  encoder = EncoderConfig(
    width=config.width, num_layers=config.layers, heads=config.heads, hidden=4 * config.width,
    epsilon=1e-6, drop_path=config.drop_path,
  )  # fmt: skip
  on_maps = config.network == "hybrid"
  patch, stride = (1, 1) if on_maps else (config.patch, config.stride)
  form = ViTConfig(
    encoder=encoder, image_size=(height, width), patch=patch, stride=stride, channels=channels
  )
  return ViT(form), None


def _rates(config: Config, photographs: int) -> training.Rates | None:
  if untrained(config):
    return None
  per_epoch = max(photographs / (config.identities * config.images), 1.0)
  epochs = max(int(np.ceil(config.steps / per_epoch)), 1)
  return training.Rates(
    config.optimizer, config.learning_rate, config.weight_decay, epochs, per_epoch,
    min(config.warmup_epochs, epochs // 4),
  )  # fmt: skip


def _train(
  config: Config, data: data_lib.Data, frozen: Frozen | None, inputs: np.ndarray
) -> training.Train:
  members, counts = jnp.asarray(data.members), jnp.asarray(data.counts)
  if untrained(config):
    return training.Train(None, None, members, counts)
  if frozen is None:
    return training.Train(jnp.asarray(inputs), None, members, counts)
  drawn = of_views(
    frozen, recipe_of(config), data.images, inputs, config.drawn_views, config.split_seed
  )
  return training.Train(None, drawn, members, counts)


def _asked(search: data_lib.Search, frozen: Frozen | None) -> np.ndarray:
  return search.images if frozen is None else of_photographs(frozen, search.images)


def _test(search: data_lib.Search, inputs: np.ndarray) -> training.Test:
  number = lambda x: jnp.asarray(x, jnp.int32)
  return training.Test(
    jnp.asarray(inputs), number(search.identity), number(search.group), number(search.query),
    number(search.gallery), number(search.itself), jnp.zeros(search.most, bool),
  )  # fmt: skip
