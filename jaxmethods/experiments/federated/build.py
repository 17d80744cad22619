"""Composes plain federated learning: clients, model, algorithm, report."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.errors import InputError
from jaxmethods.experiments.federated import (
  algorithms,
  figures,
  graphs,
  holdings,
  nets,
  population,
  rounds,
  texts,
)
from jaxmethods.experiments.federated.config import GRAPHS, TEXTS, Config
from jaxmethods.experiments.federated.figures import Clients
from jaxmethods.experiments.federated.holdings import Arrays, Holdings, Pool
from jaxmethods.experiments.federated.nets import Task
from jaxmethods.federated import engine, padding
from jaxmethods.federated.batching import Batching, prebatched, shuffled
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
    batching: of a client's epoch; None: a fresh order in batches of the config.
  """

  task: Task
  batches: Callable[[int], Iterator[rounds.Batch]]
  sizes: tuple[int, ...]
  total: int
  test: rounds.Test
  clients: Clients
  about: str
  batching: Batching | None = None


class Desk(NamedTuple):
  """What pictures and files are made of."""

  parts: rounds.Parts
  test: rounds.Test
  clients: Clients
  title: str


def build(config: Config, mesh: Mesh | None = None, material: Material | None = None) -> Experiment:
  """Composes the experiment.

  Args:
    config: its settings.
    mesh: devices with an axis "clients"; None: one device.
    material: data and model; default: those of the config.

  Raises:
    InputError: data or a model that cannot be used, or a mesh without clients.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  material = material or load(config)
  if config.cohort > material.total:
    raise InputError(f"cohort: {config.cohort} of {material.total} clients")
  task, rates = material.task, algorithms.Rates(**settings(config, algorithms.Rates._fields))
  if config.algorithm == "fedper":
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    algorithms.check_personal(config.personal, params)
  batching = material.batching or shuffled(config.batch_size)
  method = lambda fixed: algorithms.make(
    config.algorithm, rates, task, fixed, batching, material.total
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
  deal = holdings.Deal(
    config.split, config.clients, config.alpha, config.shards_per_client, config.min_examples,
    config.test_share, config.split_seed,
  )  # fmt: skip
  if config.data.startswith(TEXTS):
    tokenizer, limit = config.tokenizer, config.max_length
    loaded, held = texts.load(config.model, tokenizer, config.data, deal, limit)
    lm_task = texts.task(loaded, config.adapter, config.rank, config.lora_alpha)
    return of_clients(config, held, lm_task)
  if config.data.startswith(GRAPHS):
    return _of_graphs(config, deal)
  pool = holdings.load(config.data, config.image_size)
  example = pool.arrays["x"][0]
  sizes = nets.Sizes(**settings(config, nets.Sizes._fields))
  module = nets.make(config.model, sizes, example.shape, pool.num_classes)
  task = nets.array_task(config.model, module, example, pool.num_classes)
  if not config.population:
    return of_clients(config, holdings.deal_out(pool, deal, config.data), task)
  if jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))[1]):
    raise InputError(f"model: {config.model} has statistics that a client of a population loses")
  return _of_population(config, pool, task)


def settings(config: Config, names: Sequence[str]) -> dict:
  """Takes fields of the config."""
  return {name: getattr(config, name) for name in names}


def of_clients(config: Config, held: Holdings, task: Task) -> Material:
  """Clients that are all there, in groups of one size."""
  pooled = config.algorithm == "centralised"
  train = [_joined(held.train)] if pooled else held.train
  buckets = padding.bucket_clients(train, multiple=config.batch_size)
  batch = rounds.Batch(buckets.data, buckets.weights, buckets.ids)
  ids = [np.arange(len(held.names))] if pooled else [np.asarray(each) for each in buckets.ids]
  own = [holdings.stacked([held.test[k] for k in group]) for group in ids]
  test = _test(own, np.argsort(np.concatenate(ids)), held.published)
  clients = _clients(held.names, held.train, held.test, held.num_classes)
  sizes = tuple(len(weights) for weights in buckets.weights)
  return Material(
    task, lambda step: itertools.repeat(batch), sizes, len(train), test, clients, held.about
  )


def _of_graphs(config: Config, deal: holdings.Deal) -> Material:
  """Clients of graphs, in batches that are the same in every epoch."""
  data, clients = graphs.load(config.data, deal, config.batch_size)
  held, train = clients.held, clients.train
  task = graphs.task(config.model, data, clients, config.gin_width, config.gin_layers)
  if config.algorithm == "centralised":
    train = graphs.pooled(data, clients, config.batch_size)
  count = len(train.real)
  weights = train.batch["mask"].sum((1, 2)).astype(np.float32)
  numbers = np.arange(count, dtype=np.int32)
  batch = jax.device_put(rounds.Batch((train,), (weights,), (numbers,)))
  test = jax.device_put(
    rounds.Test((clients.test,), np.arange(len(held.names), dtype=np.int32), {})
  )
  told = _clients(held.names, held.train, held.test, held.num_classes)
  return Material(
    task, lambda step: itertools.repeat(batch), (count,), count, test, told, held.about, prebatched
  )


def _of_population(config: Config, pool: Pool, task: Task) -> Material:
  """Clients that are drawn when a round needs them."""
  people, test = population.make(
    pool, config.population, config.population_examples, config.alpha, config.test_share,
    config.split_seed,
  )  # fmt: skip

  def batches(first: int) -> Iterator[rounds.Batch]:
    size = config.cohort
    for rows, weights, numbers in population.batches(
      people, size, config.batch_size, config.seed, first
    ):
      yield rounds.Batch((rows,), (weights,), (numbers,))

  asked = population.cohort(people, min(_REPORTED, people.size), config.split_seed, 0)
  train = [population.client(people, int(number)) for number in asked]
  own = [population.examined(people, test, int(number)) for number in asked]
  names = [f"client {number}" for number in asked]
  least, most = population.sizes(people)
  about = (
    f"{pool.about}; a population of {people.size:,} clients, each drawn by its number from "
    f"{len(people.arrays['y'])} examples, with replacement: {least} to {most} examples, "
    f"Dirichlet({people.alpha:g}) label skew; tested on {len(test['y'])} others, and of "
    f"{len(names)} clients one by one"
  )
  return Material(
    task, batches, (), people.size,
    _test([holdings.stacked(own)], np.arange(len(own)), test),
    _clients(names, train, own, pool.num_classes), about,
  )  # fmt: skip


def _test(own: list[Arrays], order: np.ndarray, published: Arrays) -> rounds.Test:
  """Puts the tests on the device; the published one in chunks."""
  chunks: Arrays = {}
  if published:
    count = len(published["y"])
    rows = min(_ROWS, count)
    cut = [{name: x[i : i + rows] for name, x in published.items()} for i in range(0, count, rows)]
    chunks = holdings.stacked(cut)
  return jax.device_put(rounds.Test(tuple(own), order.astype(np.int32), chunks))


def _clients(
  names: list[str], train: list[Arrays], test: list[Arrays], num_classes: int
) -> Clients:
  """Counts what the clients hold."""
  count = lambda parts: np.array([len(next(iter(part.values()))) for part in parts])
  if not num_classes:
    return Clients(names, count(train), count(test), None)
  classes = np.stack([np.bincount(part["y"], minlength=num_classes) for part in train])
  return Clients(names, count(train), count(test), classes)


def _joined(parts: list[Arrays]) -> Arrays:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# --- the report -----------------------------------------------------------------------------------


def _scores(desk: Desk, state: rounds.State) -> tuple[np.ndarray, np.ndarray]:
  """Returns accuracy and loss of every client, (K,) each, NaN where nothing is tested."""
  program = compiler.jit(functools.partial(rounds.client_scores, desk.parts))
  found = jax.device_get(program(state, desk.test))
  counted = np.where(found.counted > 0, found.counted, np.nan)
  return found.right / counted, found.loss / counted


def _figures(desk: Desk, state: rounds.State) -> dict[str, Figure]:
  """Draws the clients' accuracies, and what they hold."""
  accuracy, _ = _scores(desk, state)
  drawn = {"clients": figures.accuracies(desk.clients, accuracy, desk.title)}
  if desk.clients.classes is not None:
    drawn["own_examples"] = figures.classes_held(desk.clients)
  return drawn


def _files(desk: Desk, state: rounds.State) -> Mapping[str, str | bytes]:
  """Writes clients.csv."""
  return {"clients.csv": figures.table(desk.clients, *_scores(desk, state))}
