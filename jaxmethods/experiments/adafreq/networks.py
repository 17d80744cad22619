"""Networks that embed photographs: two views of a ViT, a jigsaw branch, a ResNet, and floors.

A network is three functions of its parts. `moving` are the running moments of batch norms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxmethods.experiments.adafreq.views import Pair, centred
from jaxmethods.methods import adafreq
from jaxmethods.methods.adafreq import Moments, Terms
from jaxmethods.models import convnets
from jaxmethods.models.transformer import Encoder, EncoderConfig, layer_norm, normalise
from jaxmethods.models.vit import ViT
from jaxmethods.trees import Key, Params, PyTree, Tree

_RESNET, _NARROW = "resnet10", 2
_SHIFT = 8  # of the jigsaw, TransReID's configs for animals

Init = Callable[[Key, Array], tuple[Tree, PyTree]]
Loss = Callable[[Params, PyTree, Pair, Array, Key], tuple[Array, tuple[PyTree, Terms]]]


class Network(NamedTuple):
  """Functions of a network.

  Attributes:
    init: (key, one view) -> parameters and moving moments.
    loss: (parameters, moving, views, labels, key) -> loss, (moving, its terms).
    embed: (parameters, moving, original views) -> features of length 1, (B, d).
    given: weights that stand for the trunk of `init`; None: none.
  """

  init: Init
  loss: Loss
  embed: Callable[[Params, PyTree, Array], Array]
  given: Params | None = None


class Objective(NamedTuple):
  """How the losses of the branches are joined.

  Attributes:
    weights: of the terms.
    reduce: of the equilibrium over the batch.
    first: token from which the equilibrium counts; the code leaves position 0 out.
    select: which tokens the second view keeps; None: there is no second view.
    share: of the patches.
  """

  weights: Terms
  reduce: Literal["sum", "mean"]
  first: int
  select: adafreq.Select | None
  share: float


# --- heads ------------------------------------------------------------------------------------------


def head_init(key: Key, width: int, classes: int) -> Tree:
  """Parameters of a neck and a classifier without bias."""
  kernel = 0.001 * jax.random.normal(key, (width, classes))
  return {"scale": jnp.ones(width), "kernel": kernel}


def fresh(width: int) -> Moments:
  """Moments of a batch norm that has seen nothing."""
  return Moments(jnp.zeros(width), jnp.ones(width))


def head_terms(
  head: Params, moments: Moments, features: Array, labels: Array
) -> tuple[Array, Array, Moments]:
  """Identity loss behind the neck, triplet loss before it, moved moments."""
  necked, moved = adafreq.bnneck(features, head["scale"], moments, train=True)
  identity, triplet = adafreq.branch_terms(necked @ head["kernel"], features, labels)
  return identity, triplet, moved


def necked(head: Params, moments: Moments, features: Array) -> Array:
  """Features behind the neck of a trained network."""
  return adafreq.bnneck(features, head["scale"], moments, train=False)[0]


# --- two views of a ViT -----------------------------------------------------------------------------


class Branches(NamedTuple):
  """Parts of the two-branch network; `given` are weights to start from, None: none."""

  model: ViT
  classes: int
  objective: Objective
  given: Params | None = None


def two_branches(parts: Branches) -> Network:
  """Composes AdaFreq, and the plain ViT where there is no second view."""
  return Network(
    functools.partial(_branches_init, parts),
    functools.partial(_branches_loss, parts),
    functools.partial(_branches_embed, parts),
    parts.given,
  )


def _branches_init(parts: Branches, key: Key, pixels: Array) -> tuple[Tree, PyTree]:
  trunk_key, head_key, high_key = jax.random.split(key, 3)
  width = parts.model.config.encoder.width
  # Given weights are put in afterwards: closed over, they would be a part of the program.
  trunk = {} if parts.given is not None else parts.model.init(trunk_key, pixels)["params"]
  params: Tree = {"trunk": trunk, "head": head_init(head_key, width, parts.classes)}
  moving = {"head": fresh(width)}
  objective = parts.objective
  if objective.select is not None:
    params["high"] = head_init(high_key, width, parts.classes)
    moving["high"] = fresh(width)
  if objective.select == "code":
    kept = int(objective.share * (parts.model.config.num_tokens - 1))
    params["ranked"] = jnp.zeros((1, kept + 1, width))
  return params, moving


def _branches_loss(
  parts: Branches, params: Params, moving: PyTree, views: Pair, labels: Array, key: Key
) -> tuple[Array, tuple[PyTree, Terms]]:
  objective, keys = parts.objective, jax.random.split(key)
  view = adafreq.original_view(parts.model, params["trunk"], views.original, keys[0])
  identity, triplet, moved = head_terms(params["head"], moving["head"], view.tokens[:, 0], labels)
  terms, moving = Terms(identity, triplet), moving | {"head": moved}
  if objective.select is None or views.high is None:
    return adafreq.total(terms, objective.weights), (moving, terms)
  assert view.scores is not None
  kept = adafreq.selected(view.scores, objective.share, objective.select)
  high = adafreq.high_view(
    parts.model, params["trunk"], views.high, kept, params.get("ranked"), keys[1]
  ).tokens
  identity, triplet, moved = head_terms(params["high"], moving["high"], high[:, 0], labels)
  first = objective.first
  apart = adafreq.equilibrium(
    adafreq.taken(view.tokens, kept)[:, first:], high[:, first:], objective.reduce
  )
  terms = Terms(terms.identity, terms.triplet, identity, triplet, apart)
  return adafreq.total(terms, objective.weights), (moving | {"high": moved}, terms)


def _branches_embed(parts: Branches, params: Params, moving: PyTree, original: Array) -> Array:
  tokens = adafreq.original_view(parts.model, params["trunk"], original).tokens
  return normalise(necked(params["head"], moving["head"], tokens[:, 0]))


# --- TransReID --------------------------------------------------------------------------------------


class Jigsaw(NamedTuple):
  """Parts of TransReID: the model without its last block, which is there twice."""

  model: ViT
  classes: int
  groups: int


def jigsaw(parts: Jigsaw) -> Network:
  """Composes TransReID without cameras: a global branch, and groups of shuffled patches."""
  return Network(
    functools.partial(_jigsaw_init, parts),
    functools.partial(_jigsaw_loss, parts),
    functools.partial(_jigsaw_embed, parts),
  )


class _Last(nn.Module):
  """The last block and its norm."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, tokens: Array, train: bool = False) -> Array:
    return layer_norm(self.config, "norm")(Encoder(self.config)(tokens, train=train).hidden)


def _last(parts: Jigsaw) -> _Last:
  config = parts.model.config.encoder
  # One block: its drop rate by place is 0, as that of a first one.
  return _Last(EncoderConfig(**{**vars(config), "num_layers": 1}))


def _jigsaw_init(parts: Jigsaw, key: Key, pixels: Array) -> tuple[Tree, PyTree]:
  trunk_key, last_key, head_key, local_key = jax.random.split(key, 4)
  width = parts.model.config.encoder.width
  trunk = parts.model.init(trunk_key, pixels)["params"]
  last = _last(parts).init(last_key, jnp.zeros((1, 2, width)))["params"]
  heads = jax.vmap(lambda key: head_init(key, width, parts.classes))
  params = {
    "trunk": trunk,
    "whole": last,
    "part": last,  # a copy at the start
    "head": head_init(head_key, width, parts.classes),
    "parts": heads(jax.random.split(local_key, parts.groups)),
  }
  several = jax.tree.map(lambda x: jnp.tile(x, (parts.groups, 1)), fresh(width))
  return params, {"head": fresh(width), "parts": several}


def _jigsaw_tokens(
  parts: Jigsaw, params: Params, pixels: Array, key: Key | None
) -> tuple[Array, Array]:
  """Class tokens of the whole (B, C) and of the groups (G, B, C)."""
  variables, rngs = {"params": params["trunk"]}, {} if key is None else {"dropout": key}
  tokens = nn.apply(ViT.embed, parts.model)(variables, pixels)
  encode = nn.apply(ViT.encode, parts.model)
  hidden = encode(variables, tokens, train=key is not None, rngs=rngs).hidden
  last = _last(parts)
  run = nn.apply(_Last.__call__, last)
  whole = run({"params": params["whole"]}, hidden)
  own, patches = hidden[:, :1], hidden[:, 1:]
  groups = adafreq.jigsaw(patches, parts.groups, _SHIFT)
  local = lambda group: run({"params": params["part"]}, jnp.concatenate([own, group], axis=1))[:, 0]
  return whole[:, 0], jax.vmap(local)(groups)


def _jigsaw_loss(
  parts: Jigsaw, params: Params, moving: PyTree, views: Pair, labels: Array, key: Key
) -> tuple[Array, tuple[PyTree, Terms]]:
  whole, groups = _jigsaw_tokens(parts, params, views.original, key)
  identity, triplet, head = head_terms(params["head"], moving["head"], whole, labels)
  local = jax.vmap(head_terms, (0, 0, 0, None))
  identities, triplets, others = local(params["parts"], moving["parts"], groups, labels)
  terms = Terms(0.5 * identity + 0.5 * identities.mean(), 0.5 * triplet + 0.5 * triplets.mean())
  return adafreq.total(terms), ({"head": head, "parts": others}, terms)


def _jigsaw_embed(parts: Jigsaw, params: Params, moving: PyTree, original: Array) -> Array:
  whole, groups = _jigsaw_tokens(parts, params, original, None)
  local = jax.vmap(necked)(params["parts"], moving["parts"], groups) / parts.groups
  features = [necked(params["head"], moving["head"], whole), *local]
  return normalise(jnp.concatenate(features, axis=-1))


# --- networks without tokens ------------------------------------------------------------------------


class Flat(NamedTuple):
  """Parts of a network that gives one vector for a photograph; `high`: whether it sees both views."""

  trunk: nn.Module
  classes: int
  weights: Terms
  high: bool = False


def flat(parts: Flat) -> Network:
  """Composes BoT, and layers on means of frozen maps, with the losses of AdaFreq but L_F."""
  return Network(
    functools.partial(_flat_init, parts),
    functools.partial(_flat_loss, parts),
    functools.partial(_flat_embed, parts),
  )


def resnet() -> nn.Module:
  """A small ResNet of BoT's kind."""
  trunk = convnets.ARCHITECTURES[_RESNET](narrow=_NARROW, stages=None, patches=None, dtype=None)
  return _BatchNormed(trunk)


class _BatchNormed(nn.Module):
  """A trunk called as the other ones are."""

  trunk: nn.Module

  def __call__(self, x: Array, train: bool = False) -> Array:
    return self.trunk(x, train=train)


class Pooled(nn.Module):
  """Two layers beside a linear one on moments of maps, each scaled to the training data.

  Attributes:
    width: of the features.
    drop_rate: dropout on the moments in training.
  """

  width: int
  drop_rate: float

  @nn.compact
  def __call__(self, moments: Array, train: bool = False) -> Array:
    """Maps (B, d) to (B, width)."""
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(moments)
    x = nn.Dropout(self.drop_rate, deterministic=not train)(x)
    hidden = nn.relu(nn.Dense(2 * self.width)(x))
    return nn.Dense(self.width)(hidden) + nn.Dense(self.width, use_bias=False)(x)


def _flat_init(parts: Flat, key: Key, pixels: Array) -> tuple[Tree, PyTree]:
  trunk_key, head_key, high_key = jax.random.split(key, 3)
  variables = parts.trunk.init(trunk_key, pixels)
  width = jax.eval_shape(_of_trunk(parts), variables, pixels).shape[-1]
  params = {
    "trunk": variables["params"],
    "head": head_init(head_key, width, parts.classes),
  }
  moving = {"trunk": variables["batch_stats"], "head": fresh(width)}
  if parts.high:
    params["high"] = head_init(high_key, width, parts.classes)
    moving["high"] = fresh(width)
  return params, moving


def _flat_loss(
  parts: Flat, params: Params, moving: PyTree, views: Pair, labels: Array, key: Key
) -> tuple[Array, tuple[PyTree, Terms]]:
  def features(statistics: PyTree, pixels: Array, key: Key) -> tuple[Array, PyTree]:
    variables = {"params": params["trunk"], "batch_stats": statistics}
    out, changed = parts.trunk.apply(
      variables, pixels, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return out, changed["batch_stats"]

  one, other = jax.random.split(key)
  seen, statistics = features(moving["trunk"], views.original, one)
  identity, triplet, head = head_terms(params["head"], moving["head"], seen, labels)
  terms = Terms(identity, triplet)
  moving = moving | {"trunk": statistics, "head": head}
  if parts.high and views.high is not None:
    # The running moments stay those of the first view, which is the one that is tested.
    seen, _ = features(moving["trunk"], views.high, other)
    identity, triplet, high = head_terms(params["high"], moving["high"], seen, labels)
    terms, moving = Terms(*terms[:2], identity, triplet), moving | {"high": high}
  return adafreq.total(terms, parts.weights), (moving, terms)


def _flat_embed(parts: Flat, params: Params, moving: PyTree, original: Array) -> Array:
  variables = {"params": params["trunk"], "batch_stats": moving["trunk"]}
  features = _of_trunk(parts)(variables, original)
  return normalise(necked(params["head"], moving["head"], features))


def _of_trunk(parts: Flat) -> Callable[..., Array]:
  return nn.apply(lambda trunk, x: trunk(x), parts.trunk)


# --- floors -----------------------------------------------------------------------------------------


def floor(features: Callable[[Array], Array]) -> Network:
  """Composes a network that learns nothing."""
  zero = jnp.zeros(())
  return Network(
    lambda key, pixels: ({}, {}),
    lambda params, moving, views, labels, key: (zero, (moving, Terms(zero, zero))),
    lambda params, moving, original: normalise(features(original)),
  )


def pixels_16(original: Array) -> Array:
  """Pixels at 16 x 16 without the mean of the photograph."""
  small = jax.image.resize(original, (len(original), 16, 16, 3), "linear").reshape(
    len(original), -1
  )
  return small - small.mean(1, keepdims=True)


def histogram(original: Array, bins: int = 8) -> Array:
  """The root of the joint histogram of colours, (B, bins^3)."""
  levels = jnp.clip(jnp.floor((original + 1) / 2 * bins), 0, bins - 1).astype(jnp.int32)
  cell = (levels[..., 0] * bins + levels[..., 1]) * bins + levels[..., 2]
  count = lambda cells: jnp.zeros(bins**3).at[cells.reshape(-1)].add(1)
  return jnp.sqrt(jax.vmap(count)(cell))


def as_inputs(images: Array) -> Array:
  """Photographs 0..255 as the first view of a network; maps stay."""
  return centred(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32)
