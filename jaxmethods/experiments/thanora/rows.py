"""Rows of ThanoRA: their tuners, starts and batches, and the merging of separate models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.adapters import low_rank
from jaxmethods.errors import InputError
from jaxmethods.experiments.thanora.config import Config
from jaxmethods.methods import thanora as method
from jaxmethods.trees import Params
from jaxmethods.tuning import posterior, tuner as tuners
from jaxmethods.tuning.tuner import Tuner

# Rows that train one model for every task; all but the first merge them afterwards.
SEPARATE = ("single", "average", "dare", "ties")


def tuner_of(config: Config) -> Tuner:
  """Makes the tuner of a row; rows that train apart are LoRA."""
  update = (config.rank, config.alpha, dropout_of(config))
  targets = targets_of(config)
  also = tuners.PROJECTOR if config.train_projector else None
  if config.row == "thanora":
    return method.tuner(
      *update,
      tasks=len(config.tasks),
      weight=config.spr_weight,
      orth_on=config.orth_on,
      start=config.start,
      compensate=config.compensate,
      cooperative=config.cooperative,
      targets=targets,
      also=also,
    )
  if config.row == "corda":
    return method.corda(*update, targets=targets, also=also)
  if config.row in ("hydralora", "loramoe"):
    kind = {"hydralora": low_rank.hydralora, "loramoe": low_rank.loramoe}[config.row]
    return tuners.adapted(kind(*update, config.experts), targets, also)
  plain = low_rank.dora if config.row == "dora" else low_rank.lora
  return tuners.adapted(plain(*update), targets, also)


def dropout_of(config: Config) -> float:
  """Returns the rate on the input of the update: 0 where it holds a part of the pretrained weights."""
  compensated = needs_preview(config) and (config.compensate or config.row == "corda")
  return config.dropout if config.compensated_dropout or not compensated else 0.0


def targets_of(config: Config) -> str:
  """Returns the regular expression on the kernel paths that get an update."""
  return config.targets or tuners.LINEARS


def needs_preview(config: Config) -> bool:
  """Tells whether the row starts from data."""
  return config.row == "corda" or (config.row == "thanora" and config.start == "preview")


def plan_of(
  config: Config, params: Params, moments: Mapping[str, np.ndarray]
) -> dict[str, method.Blocks]:
  """Starts the blocks of the row by the second moments of the preview."""
  if config.row == "corda":
    return method.corda_plan(params, moments, config.rank, config.alpha, config.damping)
  return method.plan(
    params,
    moments,
    config.rank,
    gain=gain_of(config),
    temperature=config.temperature,
    spectrum=config.spectrum,
    damping=config.damping,
    cooperative=config.cooperative,
    weights=config.weights,
  )


def gain_of(config: Config) -> float:
  """Returns gamma."""
  scale = config.alpha / config.rank if config.gain_form == "scaled" else 1.0
  return config.gain or 1 / (len(config.tasks) * scale)


def batch_sizes(
  names: Sequence[str], counts: np.ndarray, batch_size: int, *, balanced: bool, apart: bool
) -> list[int]:
  """Divides a batch among tasks: by their shares of the mixture, or in equal parts.

  Args:
    names: of the tasks.
    counts: number of examples of every task, (T,).
    batch_size: examples of a batch.
    balanced: whether the parts are equal.
    apart: whether every task is drawn by itself and needs a part.

  Raises:
    InputError: a task is smaller than its part, or its part is empty.
  """
  equal = np.full(len(counts), 1 / len(counts))
  sizes = np.floor(batch_size * (equal if balanced else counts / counts.sum())).astype(int)
  for name, size, count in zip(names, sizes, counts, strict=True):
    if size > count or (apart and size == 0):
      raise InputError(
        f"task {name}: {count} examples give it {size} of a batch of {batch_size}; "
        "change batch_size or sampler"
      )
  if batch_size > counts.sum():
    raise InputError(f"batch_size: {batch_size} is more than the {counts.sum()} examples")
  return sizes.tolist()


def put_together(
  how: str,
  before: Params,
  tuned: Sequence[Params],
  key: jax.Array,
  *,
  drop: float = 0.9,
  keep: float = 0.2,
) -> Params:
  """Merges the models of all tasks into one, tensor by tensor.

  Args:
    how: "average", "dare" or "ties".
    before: pretrained parameters.
    tuned: parameters of every task.
    key: random key of the dropped entries.
    drop: rate of "dare".
    keep: share of "ties".
  """
  leaves, structure = jax.tree.flatten(before)
  keys = jax.random.split(key, len(leaves))

  def merge(key: jax.Array, before: jax.Array, *after: jax.Array) -> jax.Array:
    stack = jnp.stack(after)
    if how == "ties":
      return posterior.ties(before, stack - before, keep)
    if how == "dare":
      stack = posterior.dare(before, stack, jax.random.bernoulli(key, drop, stack.shape), drop)
    return stack.mean(0)

  parts = zip(keys, leaves, *map(jax.tree.leaves, tuned), strict=True)
  return jax.tree.unflatten(structure, [merge(*part) for part in parts])
