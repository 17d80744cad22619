"""Composes the stages: a step makes one row of the suite, a state is the table so far."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.experiments.llm_safety import (
  editing,
  figures,
  harmful,
  injecting,
  jailbreaking,
  marking,
  memorising,
  poisoning,
  preferring,
  reading,
  unlearning,
)
from jaxmethods.experiments.llm_safety.config import TASKS, WIDTH, Config, Place, columns, places
from jaxmethods.experiments.llm_safety.scores import Makers
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment, Values
from jaxmethods.testbeds.language.toy_models import Toy


class Suite(NamedTuple):
  """The table so far, (rows, WIDTH); NaN where nothing was made."""

  values: jax.Array


class Row(NamedTuple):
  """A row as it joins the table: its number, and its columns, (WIDTH,)."""

  number: jax.Array
  values: jax.Array


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Returns the experiment.

  Raises:
    InputError: what a stage cannot be made of, named with its key; a mesh.
  """
  checks.no_mesh("llm_safety", mesh)
  if config.text:
    return reading.experiment(config)
  made = places(config.task, config.row)
  toy = Toy(config.toy, config.seed)
  stages = _stages(config, toy, {place.task for place in made})
  count = min(len(made), config.steps)

  @functools.cache
  def row(number: int) -> Row:
    return Row(jnp.int32(number), jnp.asarray(_values(made[number], stages)))

  def batches(step: int) -> Iterator[Row]:
    while True:
      yield row(step % count)
      step += 1

  def init(key: jax.Array) -> Suite:
    del key  # the seed of the config is that of worlds and models
    return Suite(jnp.full((len(made), WIDTH), jnp.nan))

  return Experiment(
    init, batches, _step, functools.partial(_evaluate, made), (),
    functools.partial(_figures, made), count, _about(config),
    functools.partial(_files, made, _about(config)),
    table=functools.partial(_table, made),
  )  # fmt: skip


def _stages(config: Config, toy: Toy, tasks: set[str]) -> Mapping[str, Makers]:
  """Makes the stages that a run needs; what is bad in their settings is found here."""
  every: dict[str, Callable[[], Makers]] = {
    "poison": lambda: poisoning.makers(toy, config.poison),
    "memorise": lambda: memorising.makers(toy, config.memorise),
    "harmful_ft": lambda: harmful.makers(toy, config.harmful),
    "dpo": lambda: preferring.makers(toy, config.dpo),
    "edit": lambda: editing.makers(toy, config.edit),
    "unlearn": lambda: unlearning.makers(toy, config.unlearn),
    "jailbreak": lambda: jailbreaking.makers(toy, config.jailbreak),
    "injection": lambda: injecting.makers(toy, config.injection),
    "watermark": lambda: marking.makers(toy, config.watermark),
  }
  return {task: every[task]() for task in TASKS if task in tasks}


def _values(place: Place, stages: Mapping[str, Makers]) -> np.ndarray:
  """Makes a row; the models of a seed that several rows share count for the first that needs them."""
  started = time.perf_counter()
  found = stages[place.task][place.row]()
  first = (found.attack, found.utility, found.epsilon, time.perf_counter() - started)
  values = [*first, *(found.extras[name] for name in TASKS[place.task].extras)]
  return np.array([*values, *[math.nan] * (WIDTH - len(values))], np.float32)


def _step(state: Suite, row: Row) -> tuple[Suite, dict[str, jax.Array]]:
  return Suite(state.values.at[row.number].set(row.values)), {"loss": row.values[0]}


def _evaluate(made: tuple[Place, ...], state: Suite, test: tuple) -> dict[str, jax.Array]:
  """Summarises: a row by its columns, a task by its two rows, all tasks by their means."""
  del test
  values = state.values
  if len(made) == 1:
    return dict(zip(columns(made[0].task), values[0], strict=False))
  tasks = list(dict.fromkeys(place.task for place in made))
  lines = {task: figures.line(made, values, task) for task in tasks}
  if len(tasks) == 1:
    parts = {
      f"{name}/{place.row}": values[i, j]
      for i, place in enumerate(made)
      for j, name in enumerate(columns(place.task))
      if name != "epsilon" or TASKS[place.task].private
    }
    return lines[tasks[0]] | parts
  mean = lambda name: jnp.nanmean(jnp.stack([line[name] for line in lines.values()]))
  whole = {name: mean(name) for name in ("attack", "defended", "utility", "epsilon")}
  whole["seconds"] = jnp.nansum(values[:, 3])
  parts = {
    f"{name}/{task}": lines[task][name]
    for name in whole
    for task in tasks
    if name != "epsilon" or TASKS[task].private
  }
  return whole | parts


def _host(state: Suite) -> np.ndarray:
  return np.asarray(jax.device_get(state.values))


def _figures(made: tuple[Place, ...], state: Suite) -> dict[str, Figure]:
  found, tasks = _host(state), list(dict.fromkeys(place.task for place in made))
  drawn = {task: figures.task_picture(made, found, task) for task in tasks}
  return ({"lifecycle": figures.lifecycle(made, found)} if len(tasks) > 1 else {}) | drawn


def _files(made: tuple[Place, ...], about: str, state: Suite) -> dict[str, str]:
  found = _host(state)
  return {
    "lifecycle.md": f"{about}\n\n{figures.markdown(*figures.table(made, found))}",
    "rows.md": f"{about}\n\n{figures.all_rows(made, found)}",
    "rows.json": figures.as_json(made, found),
  }


def _table(made: tuple[Place, ...], state: Suite) -> tuple[list[str], list[list[str]]]:
  return figures.table(made, _host(state))


def _about(config: Config) -> str:
  """The line about data and models for reports."""
  toy = config.toy
  return (
    f"a toy world of 160 generated tokens, seed {config.seed}: everything harmful in it is synthetic "
    f"tokens, no text; {toy.sequences} sequences of pre-training, a GPT of {toy.layers} layers and "
    f"width {toy.width} trained here"
  )


def comparison(rows: list[Values]) -> dict[str, Figure]:
  """Attack and utility of every row."""
  mean = lambda row, name: row["metrics"].get(name, {}).get("mean")
  points = {row["name"]: (mean(row, "attack"), mean(row, "utility")) for row in rows}
  return {"trade": figures.trade(points)}
