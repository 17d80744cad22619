"""Continual learning put together: the model, the tasks in their order, one learner."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxmethods.experiments.gift import figures, learner, material
from jaxmethods.methods import gift
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment, Metrics, Values

if TYPE_CHECKING:
  from jax.sharding import Mesh
  from matplotlib.figure import Figure

  from jaxmethods.experiments.gift.config import Config


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: data or models that are missing or cannot be used.
  """
  checks.no_mesh("gift", mesh)
  loaded = material.load(config)
  data, names = loaded.data, loaded.names
  of = learner.make(config, loaded.stage)

  def batches(k: int) -> Iterator[learner.Batch]:
    while True:
      task, place = divmod(k, of.steps)
      last = jnp.bool_(place == of.steps - 1)
      yield learner.Batch(jnp.int32(task), jnp.int32(place), data, last)
      k += 1

  return Experiment(
    init=functools.partial(learner.start, of, data),
    batches=batches,
    step=functools.partial(learner.step, of),
    evaluate=functools.partial(evaluate, names, config.incremental == "class"),
    test=data.test_n,
    figures=lambda state: figures.pictures(state.accuracy, names, loaded.painted),
    num_steps=config.steps,
    about=loaded.about,
    files=lambda state: {"accuracy.csv": figures.table(state.accuracy, names)},
  )


def evaluate(names: list[str], split: bool, state: learner.State, test_n: jax.Array) -> Metrics:
  """Summarises the accuracy matrix, in percent; NaN before the last task is learnt.

  Args:
    names: of the stages.
    split: whether they are pieces of one task, of which later ones are not tested before.
    state: of the learner.
    test_n: test images of every stage (T,).
  """
  accuracy = 100 * state.accuracy
  found = gift.summary(accuracy)
  parts = {f"last/{name}": accuracy[-1, j] for j, name in enumerate(names)}
  learnt = {"learnt": jnp.diagonal(accuracy).mean()}
  if split:
    seen = jnp.tri(len(names)) * test_n
    each = jnp.where(seen > 0, accuracy * seen, 0).sum(1) / seen.sum(1)
    return {"average": each.mean(), "last": each[-1], **learnt, **parts}
  return {
    "average": found.average,
    "last": found.last,
    "transfer": found.transfer,
    "forget": found.forget,
    **learnt,
    **parts,
  }


def comparison(rows: list[Values]) -> dict[str, Figure]:
  """The three numbers of every row, for the page of eval.compare."""
  return figures.comparison(rows)
