"""Federated training of a linear head on embeddings: data, GGEUR and the algorithms put together.

The partition, the exchange of moments and the generation happen in `init`, so every seed draws its own;
the draw is part of the state and of the checkpoint.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from jax.sharding import Mesh

from jaxmethods.errors import InputError
from jaxmethods.experiments.ggeur import rounds
from jaxmethods.experiments.ggeur.algorithms import make_algorithm
from jaxmethods.experiments.ggeur.config import Config
from jaxmethods.experiments.ggeur.data import load
from jaxmethods.experiments.ggeur.generation import make_enlarge
from jaxmethods.federated import engine
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.federated_images import clients


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: data that are missing or cannot be used, or a mesh without clients.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  data = load(config)
  names = clients.client_names(config, data.domains)
  enlarge = make_enlarge(config, np.asarray(data.train.y), data.num_classes)
  parts = rounds.Parts(config, data, names, *make_algorithm(config), enlarge, mesh)
  return Experiment(
    init=functools.partial(rounds.init, parts),
    batches=lambda step: itertools.repeat(()),
    step=functools.partial(rounds.step, parts),
    evaluate=functools.partial(rounds.evaluate, parts),
    test=data.test,
    figures=functools.partial(rounds.draw_figures, parts),
    num_steps=config.steps,
    about=data.about,
  )
