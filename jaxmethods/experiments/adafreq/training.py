"""State, step and evaluation of one row, as functions of the parts it is made of."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxmethods.experiments.adafreq import networks
from jaxmethods.experiments.adafreq.networks import Network
from jaxmethods.experiments.adafreq.views import Pair, Recipe, views
from jaxmethods.methods import adafreq
from jaxmethods.stats import retrieval
from jaxmethods.trees import Key, Params, PyTree

_TOP = 10
_AT_ONCE = 64  # photographs that are embedded together


class Rates(NamedTuple):
  """The optimiser: name, rate of the weights, decay, and the schedule in steps and epochs."""

  optimizer: str
  rate: float
  decay: float
  epochs: int
  steps_per_epoch: float
  warmup: int


class Parts(NamedTuple):
  """Everything that a row is made of.

  Attributes:
    network: that embeds.
    recipe: of the views.
    rates: of the optimiser; None: nothing is learnt.
    identities: in a batch.
    images: of each.
    example: one input of the network, which makes its parameters.
  """

  network: Network
  recipe: Recipe
  rates: Rates | None
  identities: int
  images: int
  example: np.ndarray


class Train(NamedTuple):
  """What every batch is drawn from: photographs, or maps that a frozen network drew views of.

  Attributes:
    images: (n, side, side, 3) uint8, or None.
    drawn: maps (copies, n, g, g, C), or None.
    members: see `adafreq.balanced_batch`.
    counts: likewise.
  """

  images: Array | None
  drawn: Pair | None
  members: Array
  counts: Array


class Test(NamedTuple):
  """What the metrics are of; see `data.Search`. `matched` has M columns, of which nothing is read."""

  inputs: Array
  identity: Array
  group: Array
  query: Array
  gallery: Array
  itself: Array
  matched: Array


class State(NamedTuple):
  """Everything that a checkpoint needs."""

  params: Params
  moving: PyTree
  opt_state: PyTree
  key: Key
  step: Array


def optimizer(rates: Rates) -> optax.GradientTransformation:
  """Returns AdamW, or SGD with momentum whose biases have twice the rate (code)."""
  if rates.optimizer == "adamw":
    return optax.adamw(functools.partial(_rate, rates, 1.0), weight_decay=rates.decay)
  sgd = lambda group: optax.chain(
    optax.add_decayed_weights(rates.decay),
    optax.sgd(functools.partial(_rate, rates, group), momentum=0.9),
  )
  return optax.multi_transform({"weight": sgd(1.0), "bias": sgd(2.0)}, _kinds)


def _rate(rates: Rates, group: float, step: Array) -> Array:
  """The rate of a group of parameters at a step."""
  epoch = 1 + jnp.floor(step / rates.steps_per_epoch)
  return adafreq.learning_rate(epoch, rates.rate, rates.epochs, warmup=rates.warmup, group=group)


def _kinds(params: Params) -> PyTree:
  kind = lambda path, _: "bias" if "bias" in jax.tree_util.keystr(path) else "weight"
  return jax.tree.map_with_path(kind, params)


def init(parts: Parts, key: Key) -> State:
  """Makes the state before the first step."""
  init_key, run_key = jax.random.split(key)
  start = jax.jit(parts.network.init)
  params, moving = start(init_key, networks.as_inputs(jnp.asarray(parts.example)))
  if parts.network.given is not None:
    params = {**params, "trunk": jax.tree.map(jnp.asarray, parts.network.given)}
  opt_state = () if parts.rates is None else optimizer(parts.rates).init(params)
  return State(params, moving, opt_state, run_key, jnp.int32(0))


def draw(parts: Parts, key: Key, train: Train) -> tuple[Pair, Array]:
  """Draws a batch: views and labels."""
  batch_key, view_key = jax.random.split(key)
  chosen, labels = adafreq.balanced_batch(
    batch_key, train.members, train.counts, identities=parts.identities, images=parts.images
  )
  if train.drawn is None:
    assert train.images is not None
    return views(parts.recipe, view_key, train.images[chosen]), labels
  copy = jax.random.randint(view_key, chosen.shape, 0, len(train.drawn.original))
  taken = lambda maps: maps[copy, chosen].astype(jnp.float32)
  return jax.tree.map(taken, train.drawn), labels


def step(parts: Parts, state: State, train: Train) -> tuple[State, dict[str, Array]]:
  """Trains on one batch."""
  if parts.rates is None:
    return state._replace(step=state.step + 1), {"loss": jnp.zeros(())}
  draw_key, drop_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  pair, labels = draw(parts, draw_key, train)
  loss = lambda params: parts.network.loss(params, state.moving, pair, labels, drop_key)
  (value, (moving, terms)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
  updates, opt_state = optimizer(parts.rates).update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": value} | {
    f"loss/{name}": x for name, x in terms._asdict().items() if isinstance(x, Array)
  }
  return State(params, moving, opt_state, state.key, state.step + 1), metrics


def embed(parts: Parts, state: State, inputs: Array) -> Array:
  """Embeds photographs, or maps, a few at a time: (n, d) of length 1."""
  some = lambda x: parts.network.embed(state.params, state.moving, networks.as_inputs(x[None]))[0]
  return jax.lax.map(some, inputs, batch_size=min(_AT_ONCE, len(inputs)))


def evaluate(parts: Parts, closed: bool, state: State, test: Test) -> dict[str, Array]:
  """Computes the metrics in percent; `noss`: without matches of the query's own sighting or camera."""
  features = embed(parts, state, test.inputs)
  queries, gallery = features[test.query], features[test.gallery]
  labels, others = test.identity[test.query], test.identity[test.gallery]
  own = test.group[test.query], test.group[test.gallery]
  # An unknown group is nobody's own.
  own = jnp.where(own[0] < 0, -2, own[0]), own[1]

  def metrics(groups: tuple[Array, Array] | None, name: str) -> dict[str, Array]:
    most = test.matched.shape[0]
    found = retrieval.matches(labels, others, most, itself=test.itself, groups=groups)
    got = retrieval.summary(retrieval.ranks(queries, gallery, found), _TOP)
    values = {
      "mAP": got.mean_ap, "rank1": got.cmc[0], "rank5": got.cmc[4], "rank10": got.cmc[9],
      "mINP": got.mean_inp, "mAP_at_R": got.map_at_r, "top1": got.top1,
    }  # fmt: skip
    if closed:
      values = {"top1": values["top1"]} | values
    return {key + name: 100 * value for key, value in values.items()}

  return metrics(None, "") | metrics(own, "_noss")
