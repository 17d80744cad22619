"""Motions of a row: by the diffusion model, or of training clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmethods.experiments.human_interaction.clips import Part
from jaxmethods.experiments.human_interaction.config import Algorithm
from jaxmethods.methods.human_interaction.diffusion import Guidance
from jaxmethods.methods.human_interaction.tasks import Interaction
from jaxmethods.models.interaction import Condition
from jaxmethods.trees import Key, Params


class Artist(NamedTuple):
  """How a row draws; static.

  Attributes:
    algorithm: of the row.
    model: functions of the diffusion model.
    labelled: whether the model sees labels.
    classes: K.
    frames: T.
    steps: of sampling.
    scale: of classifier-free guidance.
    reaction: whether person 0 is given.
    guide: from what is beside the motions to the guidance of their sampling; None: there is none.
  """

  algorithm: Algorithm
  model: Interaction
  labelled: bool
  classes: int
  frames: int
  steps: int
  scale: float
  reaction: bool
  guide: Callable[[Condition], Guidance] | None = None


class Request(NamedTuple):
  """What motions are drawn for.

  Attributes:
    label: (n,) int32.
    entity: object or scene, leaves (n, ...).
    real: clips with that label and entity (n, T, E, F), normalised; person 0 of them is given in a
      reaction.
  """

  label: Array
  entity: Condition
  real: Array


def condition(artist: Artist, request: Request) -> Condition:
  """The condition of the model; zeros stand for a label it must not see."""
  label = jax.nn.one_hot(request.label, artist.classes)
  if not artist.labelled:
    label = jnp.zeros_like(label)
  first = request.real[:, :, 0] if artist.reaction else None
  return request.entity._replace(label=label, first=first)


def draw(
  artist: Artist,
  params: Params,
  library: Part,
  key: Key,
  request: Request,
  guidance: Guidance | None = None,
) -> Array:
  """Draws one motion for each place of a request, (n, T, E, F) normalised.

  Args:
    artist: of the row.
    params: of its model; unused by the others.
    library: training clips.
    key: of all draws.
    request: of n motions.
    guidance: of the diffusion model; None: that of the row.
  """
  match artist.algorithm:
    case "diffusion":
      scale = artist.scale if artist.labelled else 1.0
      if guidance is None and artist.guide is not None:
        guidance = artist.guide(request.entity)
      return artist.model.sample(
        params, key, condition(artist, request), artist.frames, steps=artist.steps, scale=scale,
        guidance=guidance,
      )  # fmt: skip
    case "real":
      return request.real
    case "mean":
      made = _means(library, artist.classes)[request.label]
    case "training_clip":
      made = library.features[_chosen(artist, library, key, request)]
    case "gaussian":
      made = _gaussian(library, artist.classes, key, request.label)
  return made.at[:, :, 0].set(request.real[:, :, 0]) if artist.reaction else made


def _means(library: Part, classes: int) -> Array:
  """Mean clip of each label, (K, T, E, F)."""
  weight = jax.nn.one_hot(library.label, classes).T
  total = jnp.einsum("kn,ntef->ktef", weight, library.features)
  return total / jnp.maximum(weight.sum(1), 1)[:, None, None, None]


def _chosen(artist: Artist, library: Part, key: Key, request: Request) -> Array:
  """A random training clip of the label; in a reaction that with the nearest person 0."""
  own = request.label[:, None] == library.label
  if not artist.reaction:
    return jnp.where(own, jax.random.uniform(key, own.shape), -1).argmax(1)
  flat = lambda x: x[:, :, 0].reshape(len(x), -1)
  apart = jax.lax.map(lambda x: jnp.square(x - flat(library.features)).sum(1), flat(request.real))
  return jnp.where(own, apart, jnp.inf).argmin(1)


def _gaussian(library: Part, classes: int, key: Key, label: Array) -> Array:
  """A Gaussian with mean and full covariance of the training clips of the label.

  Deviations from the mean, weighted by standard normal numbers, have that covariance: no PCA is needed.
  """
  own = (label[:, None] == library.label).astype(library.features.dtype)
  weight = own * jax.random.normal(key, own.shape)
  weight = weight / jnp.sqrt(jnp.maximum(own.sum(1, keepdims=True) - 1, 1))
  means = _means(library, classes)
  apart = library.features - means[library.label]
  return means[label] + jnp.einsum("mn,ntef->mtef", weight, apart)
