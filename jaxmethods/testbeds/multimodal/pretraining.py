"""Pretraining of the small model on easy-VQA, in two stages, once per machine.

First the image tower alone learns shape and colour, which are told by the training questions, and is
frozen; then projector and language model learn to answer the questions. A tower of patches that is
trained end to end with the language model stays at chance on shapes for as long.

A language model that sees images has read texts before. Ours repeats single words meanwhile, every word
of the vocabulary: the output vectors of words that are never said all move alike and end up nearly
parallel, and LoRA beside a frozen head hardly learns to tell such words apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.data import multimodal
from jaxmethods.data.array_cache import cached, described
from jaxmethods.data.multimodal import Vocabulary
from jaxmethods.data.records import QuestionData
from jaxmethods.models.causal_lm import CausalLMConfig
from jaxmethods.models.desk_mllm import DeskConfig, DeskMLLM, Tower
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.runtime import compiler
from jaxmethods.runtime.metric_log import Display
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.multimodal.questions import Split, choose_questions, draw, encode
from jaxmethods.testbeds.multimodal.settings import Desk
from jaxmethods.trees import Params, flatten, unflatten
from jaxmethods.tuning.tuner import answer_loss

FORMAT = b"desk 1"  # changes when the model or its training changes
# (params, state of the optimiser, number of the step, data) -> (the first two anew, loss).
Step = Callable[[Params, optax.OptState, jax.Array, Any], tuple[Params, optax.OptState, jax.Array]]
_TOWER_IMAGES, _IMAGES, _QUESTIONS, _WARMUP = 64, 16, 8, 50


def model_of(desk: Desk, vocab_size: int) -> DeskMLLM:
  """Makes the architecture for a vocabulary of `vocab_size` words."""
  language = CausalLMConfig(
    vocab_size=vocab_size,
    width=desk.width,
    num_layers=desk.num_layers,
    num_heads=desk.num_heads,
    num_kv_heads=desk.num_heads,
    head_dim=desk.width // desk.num_heads,
    mlp_width=desk.mlp_width,
  )
  tower = EncoderConfig(
    width=desk.tower_width,
    num_layers=desk.tower_layers,
    heads=desk.tower_heads,
    hidden=4 * desk.tower_width,
  )
  return DeskMLLM(DeskConfig(language=language, tower=tower, image_size=multimodal.IMAGE_SIZE))


def pretrained(model: DeskMLLM, data: QuestionData, vocabulary: Vocabulary, desk: Desk) -> Params:
  """Trains the parameters on the training part of easy-VQA, or reads them from the cache."""
  whole_recipe = (described_model(model), described(desk, "Desk"), repr(vocabulary.words).encode())
  about = [FORMAT, _tuple(*whole_recipe), *_bytes_of(data)]
  # Neither words nor language model: a new task must not train the tower again.
  tower_recipe = (model.config.image_size, desk.tower_steps, desk.tower_rate, desk.seed)
  shape = described(model.config.tower, "EncoderConfig")
  tower_about = [FORMAT, _tuple(shape, *(repr(x).encode() for x in tower_recipe)), *_bytes_of(data)]
  tower = cached("desk_towers", tower_about, lambda: _host(_train_tower(model, data, desk)))
  whole = cached(
    "desk_models",
    [b"language", *about],
    lambda: _host(_train_language(model, data, vocabulary, desk, unflatten(tower))),
  )
  return unflatten(whole)


def features_of(model: DeskMLLM, params: Params, images: np.ndarray) -> np.ndarray:
  """Computes the outputs (n, N, F) of the frozen tower, float32, or reads them from the cache."""
  depends: list[bytes | np.ndarray] = [FORMAT, _described_config(model.config)]
  depends += [*_host(params["vision"]).values(), images]
  return cached(
    "desk_features", depends, lambda: {"x": _features(model, params["vision"], images)}
  )["x"]


def described_model(model: DeskMLLM) -> bytes:
  """Returns the shape of the model as a part of a cache key.

  The bytes are those of the keys so far, whatever its classes are called: models in the cache survive.
  """
  config, dtype = _described_config(model.config).decode(), jnp.dtype(model.dtype).name
  lines = ("# attributes", f"config = {config}", f"scan_layers = {model.scan_layers}")
  return "\n    ".join(("DeskMLLM(", *lines, f"dtype = {dtype}")).encode() + b"\n)"


def _described_config(config: DeskConfig) -> bytes:
  kinds = {"language": "CausalLMConfig", "rope": "Rope", "tower": "EncoderConfig"}
  return described(config, "DeskConfig", nested=kinds)


def _tuple(*parts: bytes) -> bytes:
  return b"(" + b", ".join(parts) + b")"


def _host(params: Params) -> dict[str, np.ndarray]:
  """Moves a tree to the host, by path."""
  return jax.tree.map(np.asarray, flatten(params))


def _bytes_of(data: QuestionData) -> Iterable[bytes | np.ndarray]:
  texts = (data.question, data.answer, data.split)
  return [data.images, data.image, *("\n".join(text.tolist()).encode() for text in texts)]


def _features(model: DeskMLLM, vision: Params, images: np.ndarray) -> np.ndarray:
  tower = compiler.jit(lambda vision, x: Tower(model.config).apply({"params": vision}, x))
  parts = np.array_split(images, -(-len(images) // 200))
  return np.concatenate([np.asarray(tower(vision, part)) for part in parts])


def _adam(rate: float, steps: int, end: float) -> optax.GradientTransformation:
  warmup = min(_WARMUP, steps // 2)
  schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, end * rate)
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02)
  )


def _run(
  title: str,
  steps: int,
  step: Step,
  start: Params,
  optimiser: optax.GradientTransformation,
  data: Any,
) -> Params:
  """Trains with a progress bar."""
  run = compiler.jit(step, donate_argnums=(0, 1))
  params, opt_state = start, optimiser.init(start)
  data = jax.device_put(data)
  with Display(title, 0, steps) as display:
    for i in range(steps):
      params, opt_state, loss = run(params, opt_state, jnp.int32(i), data)
      shown = (i + 1) % 20 == 0 or i + 1 == steps
      display.update(i + 1, {"loss": float(loss)} if shown else None)
  return jax.device_get(params)


class _Classifier(nn.Module):
  """The tower with a head for shape and colour, which is dropped afterwards."""

  config: DeskConfig

  @nn.compact
  def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = Tower(self.config, name="vision")(pixels).mean(1)
    shape = nn.Dense(len(multimodal.SHAPES), name="shape")(mean)
    return shape, nn.Dense(len(multimodal.COLOURS), name="colour")(mean)


def _train_tower(model: DeskMLLM, data: QuestionData, desk: Desk) -> Params:
  """Learns shape and colour of the training images (stage 1); unknown labels do not count."""
  images = np.unique(data.image[data.split == "train"])
  labels = [known[images] for known in multimodal.image_labels(data)]
  classifier, optimiser = _Classifier(model.config), _adam(desk.tower_rate, desk.tower_steps, 0.0)
  key = jax.random.key(desk.seed)
  size = min(_TOWER_IMAGES, len(images))

  def loss(params, pixels, labels):
    total = jnp.zeros(())
    for logits, label in zip(classifier.apply({"params": params}, pixels), labels, strict=True):
      each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
      total += jnp.sum(each, where=label >= 0) / jnp.maximum(jnp.sum(label >= 0), 1)
    return total

  def step(params, opt_state, i, data):
    keys = jax.random.split(jax.random.fold_in(key, i))
    rows = jax.random.choice(keys[0], len(data[0]), (size,), replace=False)
    pixels, *labels = (x[rows] for x in data)
    value, gradients = jax.value_and_grad(loss)(params, _turned(pixels, keys[1]), labels)
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  start = compiler.jit(classifier.init)(key, data.images[:1])["params"]
  arrays = (data.images[images], *labels)
  params = _run("pretraining 1/2: tower", desk.tower_steps, step, start, optimiser, arrays)
  return params["vision"]


def _turned(images: jax.Array, key: jax.Array) -> jax.Array:
  """Mirrors or transposes every image at random: the eight symmetries of the square."""
  for bit, change in enumerate(
    (lambda x: x[:, ::-1], lambda x: x[:, :, ::-1], lambda x: x.swapaxes(1, 2))
  ):
    which = jax.random.bernoulli(jax.random.fold_in(key, bit), 0.5, (len(images), 1, 1, 1))
    images = jnp.where(which, change(images), images)
  return images


def _train_language(
  model: DeskMLLM, data: QuestionData, vocabulary: Vocabulary, desk: Desk, vision: Params
) -> Params:
  """Learns all questions about the training images and their mirror images (stage 2)."""
  images, *texts = encode(vocabulary, data, data.split == "train", multimodal.FAMILIES)
  shown = data.images[images]
  both = np.stack([_features(model, vision, x) for x in (shown, shown[:, :, ::-1])])
  split = Split(both, *texts)
  optimiser, key = _adam(desk.learning_rate, desk.steps, 0.01), jax.random.key(desk.seed + 1)
  size = min(_IMAGES, len(images))
  echoes = repeats(vocabulary, split.ids.shape[-1])

  def loss(params, batch):
    run = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)
    total, count = answer_loss(run, batch, None)
    return total / count

  def step(params, opt_state, i, split):
    keys = jax.random.split(jax.random.fold_in(key, i))
    mirrored = jax.random.bernoulli(keys[0]).astype(jnp.int32)
    one = split._replace(features=split.features[mirrored])
    batch = draw(one, key, i, size)
    batch = choose_questions(batch, keys[1], _QUESTIONS)
    chosen = jax.random.choice(jax.random.fold_in(keys[1], 1), len(echoes[0]), (size, desk.words))
    for name, texts in zip(("ids", "labels"), echoes, strict=True):
      batch[name] = jnp.concatenate([batch[name], texts[chosen]], axis=1)
    value, gradients = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  start = compiler.jit(model.init)(key, split.ids[:1], features=split.features[0, :1])["params"]
  start = {name: start[name] for name in ("projector", "language")}
  params = _run("pretraining 2/2: language", desk.steps, step, start, optimiser, split)
  return {**params, "vision": vision}


def repeats(vocabulary: Vocabulary, length: int) -> tuple[jax.Array, jax.Array]:
  """Makes every word a question that it answers itself: ids and labels (W, length), as in `Split`."""
  words = vocabulary.spoken
  ids = np.full((len(words), length), vocabulary.pad, np.int32)
  labels = np.full_like(ids, IGNORED)
  for row, word in enumerate(words):
    prompt = vocabulary.prompt(word)
    ids[row, : len(prompt)] = prompt
    labels[row, len(prompt) - 1] = prompt[1]
  return jnp.asarray(ids), jnp.asarray(labels)
