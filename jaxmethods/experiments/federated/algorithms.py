"""The engine's algorithms by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxmethods import trees
from jaxmethods.errors import InputError, hint
from jaxmethods.experiments.federated.config import Algorithm
from jaxmethods.experiments.federated.nets import Task
from jaxmethods.federated import algorithms, corrections, guidance, prototypes
from jaxmethods.federated.algorithm import ClientState, FederatedAlgorithm, Params, Upload
from jaxmethods.federated.algorithms import ModelState, Options
from jaxmethods.federated.batching import Batching
from jaxmethods.trees import PyTree

# Those whose clients end with models of their own: there is no one model to test.
PERSONAL: tuple[Algorithm, ...] = ("fedper", "fedproto", "local")


class Rates(NamedTuple):
  """Settings of the algorithms; see the config."""

  optimizer: str
  learning_rate: float
  weighted: bool
  local_epochs: int
  fedprox_mu: float
  server_rate: float
  server_tau: float
  server_momentum: float
  scaffold_rate: float
  feddyn_alpha: float
  personal: tuple[str, ...]
  moon_mu: float
  moon_temperature: float
  fedntd_beta: float
  fedntd_temperature: float
  fedproto_weight: float


class Method(NamedTuple):
  """An algorithm, and (parameters, model state) -> a client before its first round."""

  algorithm: FederatedAlgorithm
  client: Callable[[Params, ModelState], ClientState]


class Local(TypedDict):
  """How a client works."""

  local_epochs: int
  batches: Batching


def make(
  name: Algorithm, rates: Rates, task: Task, fixed: PyTree, batches: Batching, clients: int
) -> Method:
  """Makes an algorithm; its metrics have "drift" too.

  Args:
    name: of the algorithm.
    rates: its settings.
    task: model and loss.
    fixed: of the task, arrays or their forms.
    batches: of a client's epoch.
    clients: N, all that there are.

  Raises:
    InputError: the algorithm needs classes, and the task has none.
  """
  loss = task.loss(fixed)
  optimizer = {"sgd": optax.sgd, "adam": optax.adam}[rates.optimizer](rates.learning_rate)
  local: Local = {"local_epochs": rates.local_epochs, "batches": batches}
  average = Options(**local, weighted=rates.weighted)
  plain = algorithms.init_client
  guided = functools.partial(plain, keep_previous=True)
  at_home = functools.partial(plain, shared=trees.nothing, optimizer=optimizer)
  speed = rates.server_rate, rates.server_tau
  match name:
    case "fedavg" | "centralised":
      return _drifting(algorithms.fedavg(loss, optimizer, **average), plain)
    case "fedprox":
      return _drifting(algorithms.fedprox(loss, optimizer, rates.fedprox_mu, **average), plain)
    case "fedavgm":
      momentum = rates.server_momentum
      return _drifting(algorithms.fedavgm(loss, optimizer, 1.0, momentum, **average), plain)
    case "fedadam":
      return _drifting(algorithms.fedadam(loss, optimizer, *speed, **average), plain)
    case "fedyogi":
      return _drifting(algorithms.fedyogi(loss, optimizer, *speed, **average), plain)
    case "fedper":
      own = functools.partial(plain, shared=trees.all_but(*rates.personal))
      return _drifting(algorithms.fedper(loss, optimizer, rates.personal, **average), own)
    case "local":
      return _drifting(algorithms.local_only(loss, optimizer, **average), at_home)
    case "scaffold":
      algorithm = corrections.scaffold(
        loss,
        rates.learning_rate,
        server_rate=rates.scaffold_rate,
        population=clients,
        **local,
      )
      return _drifting(algorithm, corrections.init_client, lambda upload, client: upload.params)
    case "feddyn":
      alpha = rates.feddyn_alpha
      algorithm = corrections.feddyn(loss, optimizer, alpha, population=clients, **local)
      return _drifting(algorithm, corrections.init_client, lambda upload, client: upload)
  if task.features is None or task.logits is None:
    raise InputError(f"algorithm: {name} compares classes; texts have none")
  features, logits = task.features(fixed), task.logits(fixed)
  match name:
    case "moon":
      mu, heat = rates.moon_mu, rates.moon_temperature
      return _drifting(guidance.moon(loss, optimizer, features, mu, heat, **average), guided)
    case "fedntd":
      heat, beta = rates.fedntd_temperature, rates.fedntd_beta
      return _drifting(guidance.fedntd(loss, optimizer, logits, heat, beta, **average), guided)
    case "fedproto":
      sizes = task.num_classes, task.width, rates.fedproto_weight
      algorithm = prototypes.fedproto(loss, optimizer, features, *sizes, **local)
      return _drifting(algorithm, at_home, lambda upload, client: client.params)
  raise InputError(f"algorithm: {name!r} is not known")


def check_personal(names: tuple[str, ...], params: Params) -> None:
  """Checks that the model has all the parts that fedper leaves at home.

  Raises:
    InputError: naming the first that it has not.
  """
  parts = {part for path in trees.flatten(params) for part in path.split("/")}
  for name in names:
    if name not in parts:
      raise InputError(
        f"personal: the model has no part {name!r}; {hint(name, sorted(parts), 'parts')}"
      )


def _drifting(
  algorithm: FederatedAlgorithm,
  client: Callable[[Params, ModelState], ClientState],
  trained: Callable[[Upload, ClientState], Params] | None = None,
) -> Method:
  """Adds "drift" to the metrics: how far a client's parameters went in a round, ||w_k - w||."""
  end = trained or algorithm.params

  def local(message, client, data, key):
    after, upload, metrics = algorithm.local(message, client, data, key)
    step = jax.tree.map(jnp.subtract, end(upload, after), algorithm.params(message, client))
    distance: Array = optax.tree.norm(step)
    return after, upload, metrics | {"drift": distance}

  return Method(algorithm._replace(local=local), client)
