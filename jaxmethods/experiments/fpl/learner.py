"""What a row trains of the model, and the logits it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmethods import trees
from jaxmethods.errors import InputError
from jaxmethods.experiments.fpl.config import Config
from jaxmethods.experiments.fpl.texts import phrase_ids
from jaxmethods.experiments.fpl.towers import Towers
from jaxmethods.images import views
from jaxmethods.methods import fpl
from jaxmethods.methods.fpl import ClassTexts, SharedTexts
from jaxmethods.trees import Params, Tree

# Of the image tower; the temperature is frozen in all rows.
_IMAGE_TOWER = ("vision", "visual_projection")
_SMALLEST_CROP = 0.08


class Frozen(NamedTuple):
  """What all clients have alike and nobody trains.

  Attributes:
    params: of the model.
    texts: of the classes, with places for prompts.
    plain: hand-written texts of the classes.
    classes: embeddings of these, (K, E).
  """

  params: Tree
  texts: ClassTexts | SharedTexts
  plain: ClassTexts
  classes: Float[Array, "K E"]


class Learner(NamedTuple):
  """The model of a row.

  Attributes:
    start: key, frozen parameters -> {"prompts": ...}, {"clip": ...}, {"head": ...} or {}, to be trained.
    logits: (trained, frozen, x) -> (B, K).
    read: uint8 images (B, h, w, 3), a key to augment them or None -> x; embeddings stay what they are.
    reads_embeddings: whether examples are embeddings, made once for all rounds.
  """

  start: Callable[[Array, Params], Tree]
  logits: Callable[[Params, Frozen, Array], Array]
  read: Callable[[Array, Array | None], Array]
  reads_embeddings: bool


def make_learner(config: Config, towers: Towers, num_classes: int) -> Learner:
  """Returns the model of a row.

  Raises:
    InputError: deeper prompts than the towers, a phrase shorter than the prompts, an image tower that
      cannot be trained.
  """
  _check(config, towers)
  embedded = reads_embeddings(config)
  phrase: list[int] = []
  if config.initial_phrase:
    phrase = phrase_ids(config.initial_phrase, config.text_prompts, towers.tokens)
  return Learner(
    start=functools.partial(_start, config, towers, phrase, num_classes),
    logits=functools.partial(_logits, config, towers),
    read=(lambda x, key: x) if embedded else functools.partial(_pixels, towers),
    reads_embeddings=embedded,
  )


def reads_embeddings(config: Config) -> bool:
  """Tells whether every picture has one embedding for the whole run."""
  return config.trained in ("text", "probe", "none") and not config.augment


def num_parameters(trained: Params) -> int:
  """Counts the numbers of a tree: of what is trained, that is what travels."""
  return sum(x.size for x in jax.tree.leaves(trained))


def _check(config: Config, towers: Towers) -> None:
  if towers.image is None and not reads_embeddings(config):
    raise InputError(
      f"trained: {config.trained}{' with augment' * config.augment} needs the image tower, which "
      f"{config.model} reads once; there are text, probe and none"
    )
  if towers.image is None and config.text_depth > 1:
    raise InputError(f"text_depth: {config.model} has prompts in front of its first block alone")
  layers = {"text_depth": towers.widths.text_layers, "vision_depth": towers.widths.vision_layers}
  for name, most in layers.items():
    if towers.image is not None and getattr(config, name) > most:
      raise InputError(f"{name}: must be at most {most}, got {getattr(config, name)}")


def _pixels(towers: Towers, images: Array, key: Array | None) -> Array:
  """Images as the tower reads them; with a key, random crops that are resized back and flipped."""
  if key is None:
    return towers.pixels(images)
  crop_key, flip_key = jax.random.split(key)
  crop = lambda key, image: views.resized_crop(key, image, images.shape[1], _SMALLEST_CROP)
  crops = jax.vmap(crop)(jax.random.split(crop_key, len(images)), images)
  flipped = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
  return towers.pixels(jnp.where(flipped, crops[:, :, ::-1], crops))


def _start(
  config: Config, towers: Towers, phrase: list[int], num_classes: int, key: Array, params: Params
) -> Tree:
  """What a row trains, before the first round."""
  widths = towers.widths
  match config.trained:
    case "none":
      return {}
    case "probe":
      kernel = jnp.zeros((widths.embedding, num_classes))
      return {"head": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}
    case "towers":
      return {"clip": {name: part for name, part in params.items() if name != "logit_scale"}}
    case "image_tower":
      return {"clip": {name: params[name] for name in _IMAGE_TOWER}}
  text_key, deep_key, vision_key = jax.random.split(key, 3)
  random = lambda key, *shape: fpl.STDDEV * jax.random.normal(key, shape)
  prompts: Tree = {}
  if config.trained in ("text", "both"):
    m = config.text_prompts
    classes = (num_classes,) if config.class_specific else ()
    prompts["text"] = random(text_key, *classes, m, widths.text)
    if phrase:
      table = jnp.asarray(towers.words(params))
      words = table[jnp.array(phrase, jnp.int32)].astype(jnp.float32)
      prompts["text"] = jnp.broadcast_to(words, prompts["text"].shape)
    if config.text_depth > 1:
      prompts["text_deep"] = random(deep_key, config.text_depth - 1, m, widths.text)
  if config.trained in ("vision", "both"):
    shape = config.vision_depth, config.vision_prompts, widths.vision
    prompts["vision"] = random(vision_key, *shape)
  return {"prompts": prompts}


def _logits(config: Config, towers: Towers, trained: Params, frozen: Frozen, x: Array) -> Array:
  """Logits (B, K); the texts are embedded once, whatever B is."""
  prompts, params = trained.get("prompts", {}), frozen.params
  if "clip" in trained:
    params = trees.unflatten(trees.flatten(params) | trees.flatten(trained["clip"]))
  embedded, scale = x, towers.scale(frozen.params)
  if not reads_embeddings(config):
    embedded = cast(Callable, towers.image)(params, prompts, x)
  if "head" in trained:
    return scale * (embedded @ trained["head"]["kernel"] + trained["head"]["bias"])
  match config.trained:
    case "text" | "both":
      classes = towers.text(params, prompts, frozen.texts)
    case "towers":
      classes = towers.text(params, {}, frozen.plain)
    case _:
      classes = frozen.classes
  return cast(Array, fpl.class_logits(embedded, classes, scale))
