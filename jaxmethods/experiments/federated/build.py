"""Composes plain federated learning: clients, model, algorithm, report."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.errors import InputError
from jaxmethods.experiments.federated import algorithms, figures, holdings, nets, population, rounds
from jaxmethods.experiments.federated.config import Config
from jaxmethods.experiments.federated.figures import Clients
from jaxmethods.experiments.federated.holdings import Arrays, Holdings
from jaxmethods.experiments.federated.nets import Task
from jaxmethods.federated import engine, padding
from jaxmethods.federated.batching import shuffled
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment

_ROWS = 256  # of a published test at once
_REPORTED = 100  # clients of a population that are tested one by one


class Material(NamedTuple):
  """Data and model of a run.

  Attributes:
    task: model and loss.
    batches: step -> rounds from there on.
    sizes: as in `rounds.Parts`.
    total: N, clients.
    test: what is tested on.
    clients: for the report.
    about: the line for reports.
  """

  task: Task
  batches: Callable[[int], Iterator[rounds.Batch]]
  sizes: tuple[int, ...]
  total: int
  test: rounds.Test
  clients: Clients
  about: str


class Desk(NamedTuple):
  """What pictures and files are made of."""

  parts: rounds.Parts
  test: rounds.Test
  clients: Clients
  title: str


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment.

  Raises:
    InputError: data or a model that cannot be used, or a mesh without clients.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  material = load(config)
  if config.cohort > material.total:
    raise InputError(f"cohort: {config.cohort} of {material.total} clients")
  task, rates = material.task, settings(config, algorithms.Rates)
  if config.algorithm == "fedper":
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    algorithms.check_personal(config.personal, params)
  method = lambda fixed: algorithms.make(
    config.algorithm, rates, task, fixed, shuffled(config.batch_size), material.total
  )
  method(task.fixed)  # what is wrong with it is said now
  personal = config.algorithm in algorithms.PERSONAL
  cohort = 0 if config.algorithm == "centralised" else config.cohort
  parts = rounds.Parts(task, method, material.sizes, cohort, personal, mesh)
  desk = Desk(parts, material.test, material.clients, f"{config.algorithm}, {config.model}")
  return Experiment(
    init=functools.partial(rounds.init, parts),
    batches=material.batches,
    step=functools.partial(rounds.step, parts),
    evaluate=functools.partial(rounds.evaluate, parts),
    test=material.test,
    figures=functools.partial(_figures, desk),
    files=functools.partial(_files, desk),
    num_steps=config.steps,
    about=material.about,
  )


def load(config: Config) -> Material:
  """Reads the data, makes the clients and the model.

  Raises:
    InputError: either cannot be used.
  """
  pool = holdings.load(config.data, config.image_size)
  example = pool.arrays["x"][0]
  module = nets.make(config.model, settings(config, nets.Sizes), example.shape, pool.num_classes)
  task = nets.array_task(config.model, module, example, pool.num_classes)
  if config.population:
    if jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))[1]):
      raise InputError(f"model: {config.model} has statistics that a client of a population loses")
    return _of_population(config, pool, task)
  deal = holdings.Deal(
    config.split, config.clients, config.alpha, config.shards_per_client, config.min_examples,
    config.test_share, config.split_seed,
  )  # fmt: skip
  return _of_clients(config, holdings.deal_out(pool, deal, config.data), task)


def settings(config: Config, kind: type) -> tuple:
  """Takes the fields of a named tuple from the config."""
  return kind(*(getattr(config, field) for field in kind._fields))


def _of_clients(config: Config, held: Holdings, task: Task) -> Material:
  """Clients that are all there, in groups of one size."""
  train = held.train
  if config.algorithm == "centralised":
    train = [{name: np.concatenate([own[name] for own in train]) for name in train[0]}]
  buckets = padding.bucket_clients(train, multiple=config.batch_size)
  batch = rounds.Batch(buckets.data, buckets.weights, buckets.ids)
  order = np.concatenate([np.asarray(ids) for ids in buckets.ids])
  if config.algorithm == "centralised":
    own: list[Arrays] = [holdings.stacked([_joined(held.test)])]
  return rounds, batch, order, own
