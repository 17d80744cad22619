"""Federated training of different convnets on corrupted images: RAHFL and its rivals together."""

from __future__ import annotations

import functools
import itertools

import optax
from jax.sharding import Mesh

from jaxmethods.errors import InputError
from jaxmethods.experiments.rahfl import alone, clients, floor, rounds
from jaxmethods.experiments.rahfl.config import Config
from jaxmethods.experiments.rahfl.peers import network_of
from jaxmethods.experiments.rahfl.teaching import make_teach
from jaxmethods.federated import engine
from jaxmethods.models.convnets import classifier
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: data that are missing or cannot be used, an unknown architecture, or a mesh without
      clients.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  nets = [
    classifier(name, 1, narrow=config.narrow, stages=config.stages) for name in config.architectures
  ]
  checks.warn_alone(len(clients.client_names(config)))
  data = clients.load(config)
  nets = [net.clone(num_classes=data.num_classes) for net in nets]
  parts = rounds.Parts(
    config=config,
    data=data,
    names=clients.client_names(config),
    nets=nets,
    networks=[network_of(net) for net in nets],
    optimizer=optax.adam(config.learning_rate),
    public_optimizer=optax.adam(config.public_rate or config.learning_rate),
    teach=make_teach(config.exchange, config.rhfl_eta),
    engine={"client_map": "shard" if mesh else None, "mesh": mesh},
  )
  if config.local == "ridge":
    return _floor(parts)
  skipped = config.pretrain if config.reuse else 0  # steps that init has done
  return Experiment(
    init=functools.partial(alone.pretrained if config.reuse else rounds.init, parts),
    batches=lambda step: rounds.batches(parts, skipped + step),
    step=functools.partial(rounds.step, parts),
    evaluate=functools.partial(rounds.evaluate, parts),
    test={**data.test, "pool": data.pool},
    figures=functools.partial(rounds.draw_figures, parts),
    num_steps=config.pretrain + config.steps - skipped,
    about=data.about,
  )


def _floor(parts: rounds.Parts) -> Experiment:
  """Composes the row without networks, whose one step solves it."""
  data = parts.data
  return Experiment(
    init=functools.partial(floor.init, parts),
    batches=lambda step: itertools.repeat({"pool": data.pool}),
    step=functools.partial(floor.step, parts),
    evaluate=functools.partial(floor.evaluate, parts),
    test={**data.test, "pool": data.pool},
    figures=lambda state: {},
    num_steps=1,
    about=data.about,
  )
