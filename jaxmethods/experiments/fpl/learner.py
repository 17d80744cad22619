"""What a row trains of the model, and the logits it gives: the only module that knows the towers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxmethods import trees
from jaxmethods.errors import InputError
from jaxmethods.experiments.fpl.config import Config
from jaxmethods.experiments.fpl.texts import phrase_ids
from jaxmethods.images import views
from jaxmethods.methods import fpl
from jaxmethods.methods.fpl import ClassTexts
from jaxmethods.models.clip import CLIP
from jaxmethods.testbeds.vision_language.encoder import Stage
from jaxmethods.trees import Params, Tree

# Parts of the image tower by path; the temperature is frozen in all rows.
_IMAGE_TOWER = ("vision", "visual_projection")
_SMALLEST_CROP = 0.08
CHUNK = 100  # test pictures at once


class Frozen(NamedTuple):
  """What all clients have alike and nobody trains.

  Attributes:
    params: of the model.
    texts: of the classes, with places for prompts.
    ids: hand-written texts of the classes, (K, T).
    classes: their embeddings, (K, E).
  """

  params: Tree
  texts: ClassTexts
  ids: Int[Array, "K T"]
  classes: Float[Array, "K E"]


class Learner(NamedTuple):
  """A row's model.

  Attributes:
    start: (key, frozen parameters) -> what is trained: {"prompts": ...}, {"clip": ...}, {"head": ...} or {}.
    logits: (trained, frozen, x) -> (B, K); x as `pixels` gives it, or embeddings.
    pixels: uint8 images (B, h, w, 3) -> what the image tower reads.
    reads_embeddings: whether x is embeddings, which the frozen tower makes once for all.
  """

  start: Callable[[Array, Params], Tree]
  logits: Callable[[Params, Frozen, Array], Array]
  pixels: Callable[[Array], Array]
  reads_embeddings: bool


def make_learner(config: Config, stage: Stage, num_classes: int) -> Learner:
  """Returns the model of a row.

  Raises:
    InputError: deeper prompts than the towers, or a phrase shorter than the prompts.
  """
  check_depths(config, stage.model)
  phrase = (
    phrase_ids(config.initial_phrase, config.text_prompts, stage.tokens)
    if config.initial_phrase
    else None
  )
  return Learner(
    start=functools.partial(_start, config, stage.model, phrase, num_classes),
    logits=functools.partial(_logits, config, stage.model),
    pixels=stage.pixels,
    reads_embeddings=reads_embeddings(config),
  )


def reads_embeddings(config: Config) -> bool:
  """Tells whether every picture has one embedding for the whole run."""
  return config.trained in ("text", "probe", "none") and not config.augment


def check_depths(config: Config, model: CLIP) -> None:
  """Checks the depths of the prompts.

  Raises:
    InputError: deeper than the tower.
  """
  towers = {"text_depth": model.config.text.encoder, "vision_depth": model.config.vision.encoder}
  for name, tower in towers.items():
    if (depth := getattr(config, name)) > tower.num_layers:
      raise InputError(f"{name}: must be at most {tower.num_layers}, got {depth}")


def augmented(learner: Learner, key: Array, images: Array) -> Array:
  """Random crops of uint8 images (B, h, w, 3), resized back and flipped, as the image tower reads them."""
  crop_key, flip_key = jax.random.split(key)
  side = images.shape[1]
  crop = lambda key, image: views.resized_crop(key, image, side, _SMALLEST_CROP)
  crops = jax.vmap(crop)(jax.random.split(crop_key, len(images)), images)
  flipped = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
  return learner.pixels(jnp.where(flipped, crops[:, :, ::-1], crops))


def hand_written(model: CLIP, params: Params, ids: Array) -> Array:
  """Embeddings (K, E) of one text for each class, ids (K, T)."""
  place = jnp.arange(ids.shape[1], dtype=jnp.int32)
  order = jnp.broadcast_to(place, ids.shape)
  end = jnp.argmax(ids == model.config.text.eos, -1)
  if model.config.text.eos == 2:  # of the first conversions: the largest id
    end = jnp.argmax(ids, -1)
  return fpl.text_features(model, params, {}, ClassTexts(ids, order, end))


def _start(
  config: Config, model: CLIP, phrase: list[int] | None, num_classes: int, key: Array, params: Params
) -> Tree:
  """What a row trains, before the first round."""
  match config.trained:
    case "none":
      return {}
    case "probe":
      width = model.config.projection
      return {"head": {"kernel": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}}
    case "towers":
      return {"clip": {name: part for name, part in params.items() if name != "logit_scale"}}
    case "image_tower":
      return {"clip": {name: params[name] for name in _IMAGE_TOWER}}
  text_key, deep_key, vision_key = jax.random.split(key, 3)
  random = lambda key, *shape: fpl.STDDEV * jax.random.normal(key, shape)
  prompts: Tree = {}
  if config.trained in ("text", "both"):
    width, m = model.config.text.encoder.width, config.text_prompts
    classes = (num_classes,) if config.class_specific else ()
    prompts["text"] = random(text_key, *classes, m, width)
    if phrase is not None:
      table = params["text"]["token"]["embedding"]
      prompts["text"] = jnp.asarray(table)[jnp.array(phrase, jnp.int32)].astype(jnp.float32)
    if config.text_depth > 1:
      prompts["text_deep"] = random(deep_key, config.text_depth - 1, m, width)
  if config.trained in ("vision", "both"):
    width = model.config.vision.encoder.width
    prompts["vision"] = random(vision_key, config.vision_depth, config.vision_prompts, width)
  return {"prompts": prompts}


def _logits(config: Config, model: CLIP, trained: Params, frozen: Frozen, x: Array) -> Array:
  """Logits (B, K); texts are embedded once, whatever B is."""
  prompts = trained.get("prompts", {})
  params = frozen.params
  if "clip" in trained:
    params = trees.unflatten(trees.flatten(params) | trees.flatten(trained["clip"]))
  embedded = x
  if not reads_embeddings(config):
    embedded = fpl.image_features(model, params, prompts, x, behind_norm=config.behind_norm)
  scale = jnp.exp(jnp.asarray(frozen.params["logit_scale"]))
  if "head" in trained:
    return scale * (embedded @ trained["head"]["kernel"] + trained["head"]["bias"])
  match config.trained:
    case "text" | "both":
      classes = fpl.text_features(model, params, prompts, frozen.texts)
    case "towers":
      classes = hand_written(model, params, frozen.ids)
    case _:
      classes = frozen.classes
  return cast(Array, fpl.class_logits(embedded, classes, scale))
