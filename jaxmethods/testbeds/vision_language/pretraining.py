"""Pretraining of the small CLIP on pairs that we render, once per machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.data import scenes
from jaxmethods.data.array_cache import cached, cached_tree, described
from jaxmethods.models.clip import CLIP, CLIPConfig, CLIPOutput, TextConfig
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViTConfig
from jaxmethods.runtime import compiler
from jaxmethods.runtime.metric_log import Display
from jaxmethods.testbeds.vision_language.settings import SmallClip
from jaxmethods.testbeds.vision_language.words import Tokens, pack, vocabulary
from jaxmethods.trees import Params, Tree, flatten, unflatten

FORMAT = b"small clip 2"  # changes when the renderer, the model or its training changes
_WARMUP, _LARGEST_SCALE = 100, float(np.log(100.0))
_PIECE = 305  # steps after which the state is kept


def model_of(settings: SmallClip, tokens: Tokens) -> CLIP:
  """The architecture."""
  encoder = lambda width, layers: EncoderConfig(
    width=width,
    num_layers=layers,
    heads=settings.heads,
    hidden=4 * width,
    activation="quick_gelu",
  )
  vision = ViTConfig(
    encoder=encoder(settings.width, settings.layers),
    image_size=(scenes.SIZE, scenes.SIZE),
    patch=settings.patch,
    clip=True,
  )
  text = TextConfig(
    encoder=encoder(settings.text_width, settings.text_layers),
    vocabulary=tokens.size,
    context=settings.context,
    eos=tokens.end,
  )
  return CLIP(CLIPConfig(vision=vision, text=text, projection=settings.projection))


def pretrained(model: CLIP, tokens: Tokens, settings: SmallClip) -> Tree:
  """Parameters of the model, trained or read from the cache."""
  about = [FORMAT, described(settings, "small clip"), " ".join(vocabulary()).encode()]
  train = lambda: jax.tree.map(np.asarray, flatten(_train(model, tokens, settings, about)))
  return unflatten(cached("small_clips", about, train))


def scaled(images: jax.Array) -> jax.Array:
  """Pixels of 0..255 as the small CLIP reads them: float32 in -1..1."""
  return images.astype(jnp.float32) / 127.5 - 1


def fitting(shown: jax.Array, named: jax.Array) -> jax.Array:
  """Tells which captions are true of which pictures, (B, B), rows: pictures.

  Args:
    shown: attributes of pictures, (B, A).
    named: those that captions name, (B, A), -1 for what they do not say.
  """
  return ((named[None] == shown[:, None]) | (named[None] == -1)).all(-1)


def pair_loss(
  model: CLIP,
  params: Params,
  images: jax.Array,
  ids: jax.Array,
  shown: jax.Array,
  named: jax.Array,
) -> jax.Array:
  """Contrastive loss of pairs; all captions that are true of a picture share the probability.

  Args:
    model: CLIP.
    params: its parameters.
    images: (B, 32, 32, 3) uint8.
    ids: captions (B, T).
    shown: attributes of the pictures, see `fitting`.
    named: attributes that the captions name.
  """
  output = cast(CLIPOutput, model.apply({"params": params}, scaled(images), ids))
  fits = fitting(shown, named)
  value = jnp.zeros(())
  for logits, true in ((output.logits_per_image, fits), (output.logits_per_image.T, fits.T)):
    target = true / true.sum(-1, keepdims=True)
    value += 0.5 * optax.softmax_cross_entropy(logits, target).mean()
  return value


def _train(
  model: CLIP, tokens: Tokens, settings: SmallClip, about: Sequence[bytes | np.ndarray]
) -> Params:
  """Trains in pieces that the cache keeps, so that a run that was killed goes on."""
  pairs = scenes.pretraining_pairs(settings.pairs, settings.seed)
  data = jax.device_put((pairs.images, pack(pairs.captions, tokens), pairs.shown, pairs.named))
  key = jax.random.key(settings.seed)
  optimiser = _optimiser(settings)

  def step(params, opt_state, i, data):
    rows = jax.random.choice(
      jax.random.fold_in(key, i), len(data[0]), (settings.batch_size,), replace=False
    )
    loss = lambda params: pair_loss(model, params, *(x[rows] for x in data))
    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    limited = jnp.minimum(params["logit_scale"], _LARGEST_SCALE)
    return params | {"logit_scale": limited}, opt_state, value

  example = (scaled(data[0][:1]), jnp.zeros((1, settings.context), jnp.int32))
  params = compiler.jit(model.init)(key, *example)["params"]
  run = compiler.jit(step, donate_argnums=(0, 1))
  state = params, optimiser.init(params)
  structure = jax.tree.structure(state)
  with Display("pretraining of the small CLIP", 0, settings.steps) as display:

    def piece(state, start, end):
      for i in range(start, end):
        *state, loss = run(*state, jnp.int32(i), data)
        shown = (i + 1) % 20 == 0 or i + 1 == end
        display.update(i + 1, {"loss": float(loss)} if shown else None)
      return tuple(state)

    for start in range(0, settings.steps, _PIECE):
      end = min(start + _PIECE, settings.steps)
      train = functools.partial(piece, state, start, end)
      state = cached_tree("small_clip_pieces", [*about, str(end).encode()], structure, train)
  return jax.device_get(state[0])


def _optimiser(settings: SmallClip) -> optax.GradientTransformation:
  warmup = min(_WARMUP, settings.steps // 2)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, settings.learning_rate, warmup, settings.steps, 0.01 * settings.learning_rate
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02)
  )
