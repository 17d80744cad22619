"""Federated learning of prompts: data, model and rounds put together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.errors import InputError
from jaxmethods.experiments.fpl import data as sources, deal, figures, rounds
from jaxmethods.experiments.fpl.config import Config
from jaxmethods.experiments.fpl.learner import Frozen, Learner, make_learner
from jaxmethods.experiments.fpl.texts import prompt_texts
from jaxmethods.experiments.fpl.towers import Towers, clip_towers, dual_towers, plain_texts
from jaxmethods.federated import engine
from jaxmethods.methods import fpl
from jaxmethods.runtime import compiler, pictures
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.federated_images import clients
from jaxmethods.testbeds.federated_images.figures import own_examples
from jaxmethods.testbeds.vision_language import encoder
from jaxmethods.testbeds.vision_language.words import class_texts


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: data or a model that are missing or do not fit the settings, or a mesh without clients.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  if config.carry_momentum and mesh is not None:
    raise InputError("--mesh: carry_momentum trains one client after the other; leave it out")
  data = sources.load(config.data, config.size, config.held_out)
  towers = load_towers(config)
  parts = make_parts(config, data, towers, mesh)
  # Not `compiler.jit`: a traced start takes no options of the compiler.
  first = jax.jit(functools.partial(rounds.first_state, parts))
  return Experiment(
    init=functools.partial(rounds.init, parts, first=first),
    batches=lambda step: itertools.repeat(parts.work),
    step=functools.partial(rounds.step, parts),
    evaluate=functools.partial(rounds.evaluate, parts),
    test=parts.test,
    figures=functools.partial(draw_figures, parts),
    num_steps=config.steps,
    about=f"{data.about}; model: {towers.about}",
  )


def load_towers(config: Config) -> Towers:
  """Loads the model of a config.

  Raises:
    InputError: missing files or packages.
  """
  if config.model == "dual":
    return dual_towers()
  return clip_towers(encoder.load(config.model, config.clip), config.behind_norm)


def make_parts(
  config: Config, data: sources.Data, towers: Towers, mesh: Mesh | None = None
) -> rounds.Parts:
  """Puts a row together from data and model; embeds the pictures where no one trains the tower."""
  num_classes = len(data.classes)
  whole = data.train.y if config.skew != "labels" else data.train.y.reshape(1, -1)
  clients.check(config, whole, num_classes)
  names = clients.client_names(config, data.domains)
  learner = make_learner(config, towers, num_classes)
  texts = texts_of(config, data.classes, towers)
  ids = jnp.asarray(class_texts(data.classes, data.templates, towers.tokens)[:, 0])
  frozen = frozen_of(towers, texts, plain_texts(ids, towers.tokens))
  work, test = (
    rounds.Work(frozen, read(learner, towers, part), jnp.asarray(part.y.reshape(-1)))
    for part in (data.train, data.test)
  )
  size = deal.capacity(config, data.train.y, num_classes)
  optimizer = rounds.sgd(config.learning_rate, config.momentum, config.weight_decay)
  return rounds.Parts(config, data, names, learner, optimizer, work, test, size, mesh)


def texts_of(
  config: Config, classes: Sequence[str], towers: Towers
) -> fpl.ClassTexts | fpl.SharedTexts:
  """The texts that a row puts prompts into; with what they have in common once, where they have."""
  count = config.text_prompts if config.trained in ("text", "both") else 0
  texts = prompt_texts(classes, count, config.position, towers.tokens)
  common = count and config.position == "end" and not config.class_specific
  return fpl.share_prefix(texts, count) if common and config.model != "dual" else texts


def frozen_of(
  towers: Towers, texts: fpl.ClassTexts | fpl.SharedTexts, plain: fpl.ClassTexts
) -> Frozen:
  """The frozen model, with the hand-written texts embedded once."""
  params = jax.tree.map(jnp.asarray, towers.params)
  embed = compiler.jit(lambda params: towers.text(params, {}, plain))
  return Frozen(params, texts, plain, embed(params))


def read(learner: Learner, towers: Towers, images: sources.Images) -> jax.Array:
  """Pictures (D * n, h, w, 3), or their embeddings where those never change."""
  if learner.reads_embeddings:
    return towers.embed(images.x, images.y)
  return jnp.asarray(images.x.reshape(-1, *images.x.shape[2:]))


def draw_figures(parts: rounds.Parts, state: rounds.State) -> dict[str, Figure]:
  """Draws accuracies, what clients hold and, for prompts, how far the clients agree."""
  program = compiler.jit(functools.partial(rounds.evaluate, parts))
  metrics = jax.device_get(program(state, parts.test))
  accuracy = {name: float(metrics[f"test_accuracy/{name}"]) for name in parts.data.domains}
  label = f"test accuracy (mean {float(metrics['test_accuracy']):.3f})"
  labels = np.asarray(parts.work.y)[np.asarray(state.deal.rows)]
  held, num_classes = np.asarray(state.deal.mask), len(parts.data.classes)
  counts = np.stack([
    np.bincount(y[real], minlength=num_classes) for y, real in zip(labels, held, strict=True)
  ])  # fmt: skip
  names = parts.names if len(counts) == len(parts.names) else ["all"]
  drawn = {
    "accuracy": pictures.bars({"accuracy": accuracy}, label),
    "own_examples": own_examples(counts, names, "own examples"),
  }
  if state.server.drift:
    drawn["agreement"] = figures.agreement(jax.device_get(state.server.drift), names)
  return drawn
