"""The generator: a small denoiser that paints what a caption says, trained on rendered pairs.

Its texts are read by the pretrained CLIP, which is frozen. It predicts the clean picture (patches are
the frames of `models.denoiser`, words are what they look at) and is sampled by DDIM with guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxmethods.data import scenes
from jaxmethods.data.array_cache import cached, described
from jaxmethods.experiments.gift.config import Painter
from jaxmethods.models.clip import end_of_text
from jaxmethods.models.denoiser import Denoiser
from jaxmethods.models.transformer import Encoded
from jaxmethods.runtime import compiler
from jaxmethods.runtime.metric_log import Display
from jaxmethods.testbeds.vision_language.encoder import Stage
from jaxmethods.testbeds.vision_language.words import pack
from jaxmethods.trees import Params, Tree, flatten, unflatten

FORMAT = b"painter 1"  # changes when the network, its training or its sampling changes
EMPTY = "a picture."  # stands for a hidden caption
_TIMES = 1000.0  # steps of the diffusion, as the network counts them
_CHUNK = 100  # pictures at once


def network(settings: Painter) -> Denoiser:
  """The architecture."""
  return Denoiser(settings.width, settings.layers, settings.heads, 2 * settings.width)


def signal(time: Array) -> tuple[Array, Array]:
  """Factors of picture and noise at a time in [0, 1]: a quarter of a circle."""
  angle = 0.5 * jnp.pi * (0.005 + 0.99 * time)
  return jnp.cos(angle), jnp.sin(angle)


def patches(images: Array, side: int) -> Array:
  """Images (B, 32, 32, 3) in -1..1 as frames (B, patches, 1, 3 * side ** 2)."""
  count = images.shape[1] // side
  x = images.reshape(len(images), count, side, count, side, 3).swapaxes(2, 3)
  return x.reshape(len(images), count * count, 1, -1)


def pictures(frames: Array, side: int) -> Array:
  """The inverse of `patches`."""
  count = scenes.SIZE // side
  x = frames.reshape(len(frames), count, count, side, side, 3).swapaxes(2, 3)
  return x.reshape(len(frames), scenes.SIZE, scenes.SIZE, 3)


def read(stage: Stage, params: Params, ids: Array) -> tuple[Array, Array, Array]:
  """What the frozen CLIP reads: words (B, T, D), which of them are real (B, T), the whole (B, E)."""
  model = stage.model
  embedded = model.apply({"params": params}, ids, method="embed_text")
  encoded = cast(Encoded, model.apply({"params": params}, embedded, method="encode_text"))
  end = end_of_text(ids, model.config.text.eos)
  whole = model.apply({"params": params}, encoded.hidden, end, method="project_text")
  return encoded.hidden, jnp.arange(ids.shape[1]) <= end[:, None], cast(Array, whole)


def predict(
  settings: Painter, params: Params, x: Array, time: Array, text: tuple[Array, Array, Array]
) -> Array:
  """The clean frames, from noisy ones (B, N, 1, F) at times (B,)."""
  words, real, whole = text
  denoiser = network(settings)
  out = denoiser.apply(
    {"params": params}, x, time * _TIMES, whole, other=words, other_mask=real.astype(jnp.float32)
  )
  return cast(Array, out)


def trained(stage: Stage, settings: Painter) -> Tree:
  """Parameters of the painter, trained or read from the cache."""
  about: list[bytes | np.ndarray] = [FORMAT, described(settings, "painter", _SAMPLING)]
  about += _host(stage.params).values()
  return unflatten(cached("painters", about, lambda: _host(_train(stage, settings))))


_SAMPLING = ("guidance", "denoising_steps")


def _host(params: Params) -> dict[str, np.ndarray]:
  return jax.tree.map(np.asarray, flatten(params))


def _train(stage: Stage, settings: Painter) -> Params:
  pairs = scenes.pretraining_pairs(settings.pairs, settings.seed)
  ids = pack([*pairs.captions, EMPTY], stage.tokens)
  data = jax.device_put((pairs.images, ids[:-1], ids[-1], stage.params))
  key, optimiser = jax.random.key(settings.seed), _optimiser(settings)

  def loss(params, key, data):
    images, ids, empty, clip = data
    rows_key, hide_key, time_key, noise_key = jax.random.split(key, 4)
    rows = jax.random.choice(rows_key, len(images), (settings.batch_size,))
    hidden = jax.random.bernoulli(hide_key, settings.unconditional, (settings.batch_size, 1))
    text = read(stage, clip, jnp.where(hidden, empty, ids[rows]))
    clean = patches(images[rows].astype(jnp.float32) / 127.5 - 1, settings.patch)
    time = jax.random.uniform(time_key, (settings.batch_size,))
    kept, noise = (s[:, None, None, None] for s in signal(time))
    noisy = kept * clean + noise * jax.random.normal(noise_key, clean.shape)
    found = predict(settings, params, noisy, time, text)
    return jnp.square(found - clean).mean()

  def step(params, opt_state, i, data):
    value, gradients = jax.value_and_grad(loss)(params, jax.random.fold_in(key, i), data)
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  params = compiler.jit(lambda: _initial(stage, settings))()
  run, opt_state = compiler.jit(step, donate_argnums=(0, 1)), optimiser.init(params)
  with Display("training of the painter", 0, settings.steps) as display:
    for i in range(settings.steps):
      params, opt_state, value = run(params, opt_state, jnp.int32(i), data)
      shown = (i + 1) % 20 == 0 or i + 1 == settings.steps
      display.update(i + 1, {"loss": float(value)} if shown else None)
  return jax.device_get(params)


def _initial(stage: Stage, settings: Painter) -> Params:
  text = stage.model.config
  frames = patches(jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3)), settings.patch)
  words, whole = jnp.zeros((1, 2, text.text.encoder.width)), jnp.zeros((1, text.projection))
  start = network(settings).init(
    jax.random.key(settings.seed), frames, jnp.zeros(1), whole, other=words, other_mask=jnp.ones((1, 2))
  )  # fmt: skip
  return start["params"]


def _optimiser(settings: Painter) -> optax.GradientTransformation:
  warmup = min(50, settings.steps // 2)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, settings.learning_rate, warmup, settings.steps, 0.02 * settings.learning_rate
  )
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def paint(
  stage: Stage, params: Params, settings: Painter, texts: Sequence[str], seed: int
) -> np.ndarray:
  """Paints one picture for every text, (n, 32, 32, 3) uint8.

  Args:
    stage: the pretrained CLIP, whose text tower reads.
    params: of the painter.
    settings: of the painter.
    texts: captions.
    seed: of the noise.
  """
  ids = pack([*texts, EMPTY], stage.tokens)
  run = compiler.jit(
    lambda clip, params, ids, empty, key: sample(stage, clip, params, settings, ids, empty, key)
  )
  filled = np.concatenate([ids[:-1], np.repeat(ids[-2:-1], -len(texts) % _CHUNK, axis=0)])
  parts = filled.reshape(-1, _CHUNK, ids.shape[1])
  out = []
  with Display("painting", 0, len(parts)) as display:
    for k, part in enumerate(parts):
      key = jax.random.fold_in(jax.random.key(seed), k)
      out.append(np.asarray(run(stage.params, params, part, ids[-1], key)))
      display.update(k + 1, None)
  return np.concatenate(out)[: len(texts)]


def sample(
  stage: Stage,
  clip: Params,
  params: Params,
  settings: Painter,
  ids: Array,
  empty: Array,
  key: Array,
) -> Array:
  """Samples pictures (B, 32, 32, 3) uint8 of captions (B, T) by DDIM with guidance."""
  text = read(stage, clip, ids)
  blank = read(stage, clip, jnp.broadcast_to(empty, ids.shape))
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text, blank)
  form = patches(jnp.zeros((len(ids), scenes.SIZE, scenes.SIZE, 3)), settings.patch)
  times = jnp.linspace(1.0, 0.0, settings.denoising_steps + 1)

  def step(x, pair):
    now, then = pair
    doubled = jnp.concatenate([x, x])
    found = predict(settings, params, doubled, jnp.full(len(doubled), now), both)
    with_text, without = jnp.split(found, 2)
    clean = jnp.clip(without + settings.guidance * (with_text - without), -1, 1)
    (kept, noise), (kept_then, noise_then) = signal(now), signal(then)
    return kept_then * clean + noise_then * (x - kept * clean) / noise, clean

  start = jax.random.normal(key, form.shape)
  _, clean = jax.lax.scan(step, start, (times[:-1], times[1:]))
  image = pictures(clean[-1], settings.patch)
  return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)
