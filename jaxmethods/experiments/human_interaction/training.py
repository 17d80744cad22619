"""State and step of the diffusion model."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxmethods.experiments.human_interaction.clips import Part
from jaxmethods.experiments.human_interaction.drawing import Artist, Request, condition
from jaxmethods.models.interaction import Condition
from jaxmethods.trees import Key, Params, PyTree

_FASTEST = 10.0  # the average forgets its start: its rate grows as (1 + step) / (10 + step)


class Rates(NamedTuple):
  """The optimiser: AdamW with warm-up and cosine, the norm of gradients, the average."""

  steps: int
  batch: int
  rate: float
  warmup: float
  decay: float
  clip: float
  average: float


class Train(NamedTuple):
  """What batches are drawn from: training clips, and what is beside each."""

  clips: Part
  entity: Condition


class State(NamedTuple):
  """Everything that a checkpoint needs.

  Attributes:
    params: of the model; empty for a row that learns nothing, as the next two.
    average: exponential moving average of them, which is sampled with.
    opt_state: of the optimiser.
    key: of all draws.
    step: number of steps done.
  """

  params: Params
  average: Params
  opt_state: PyTree
  key: Key
  step: Array


def optimizer(rates: Rates) -> optax.GradientTransformation:
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rates.rate, max(int(rates.warmup * rates.steps), 1), max(rates.steps, 2)
  )
  return optax.chain(
    optax.clip_by_global_norm(rates.clip), optax.adamw(schedule, weight_decay=rates.decay)
  )


def requested(train: Train, chosen: Array) -> Request:
  """Training clips at some places, as a request."""
  entity = jax.tree.map(lambda x: x[chosen], train.entity)
  return Request(train.clips.label[chosen], entity, train.clips.features[chosen])


def init(artist: Artist, rates: Rates, train: Train, key: Key) -> State:
  """Makes the state before the first step."""
  init_key, run_key = jax.random.split(key)
  if artist.algorithm != "diffusion":
    return State({}, {}, (), run_key, jnp.int32(0))
  example = requested(train, jnp.zeros(1, int))
  start = jax.jit(artist.model.init)
  params = start(init_key, example.real, condition(artist, example))
  copy = jax.tree.map(jnp.copy, params)
  return State(params, copy, optimizer(rates).init(params), run_key, jnp.int32(0))


def step(
  artist: Artist, rates: Rates, state: State, train: Train
) -> tuple[State, dict[str, Array]]:
  """Trains on one batch."""
  if artist.algorithm != "diffusion":
    return state._replace(step=state.step + 1), {"loss": jnp.zeros(())}
  batch_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  chosen = jax.random.randint(batch_key, (rates.batch,), 0, len(train.clips.label))
  batch = requested(train, chosen)
  mask = jnp.ones(batch.real.shape[:2], bool)

  def loss(params: Params) -> tuple[Array, dict[str, Array]]:
    terms = artist.model.loss(params, loss_key, batch.real, mask, condition(artist, batch))
    return terms["total"], terms

  (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
  updates, opt_state = optimizer(rates).update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  keep = jnp.minimum(rates.average, (1.0 + state.step) / (_FASTEST + state.step))
  average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state.average, params)
  shown = {f"loss/{name}": x for name, x in terms.items() if name != "total"}
  return State(params, average, opt_state, state.key, state.step + 1), {"loss": value} | shown
