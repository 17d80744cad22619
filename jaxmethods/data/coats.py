"""Generated individuals: `embedded:coats`, photographs of animals of several species."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data.array_cache import cached
from jaxmethods.data.records import Source
from jaxmethods.data.reid import ReidData
from jaxmethods.images.coats import SPECIES, grow, photograph

NAME = "embedded:coats"
_FORMAT = b"coats-1"
_COAT, _STEPS = 48, 2500


class Herd(NamedTuple):
  """How many animals and pictures; all that the pictures depend on beside their size."""

  individuals: int = 24  # of each species
  sightings: int = 4  # of each individual
  pictures: int = 2  # of each sighting
  seed: int = 20


def load(side: int, herd: Herd = Herd()) -> ReidData:  # noqa: B008
  """Generates the photographs, once per machine.

  Args:
    side: pixels.
    herd: how many.
  """
  total = herd.individuals * len(SPECIES)
  each = herd.sightings * herd.pictures
  depends = [_FORMAT, repr((side, herd, _COAT, _STEPS, tuple(SPECIES.items()))).encode()]
  images = cached("coats", depends, lambda: {"images": _pictures(side, herd)})["images"]
  identity = np.repeat(np.arange(total, dtype=np.int32), each)
  sighting = np.repeat(np.arange(total * herd.sightings, dtype=np.int32), herd.pictures)
  names = [f"{name}{i:03d}" for name in SPECIES for i in range(herd.individuals)]
  files = [f"{names[i]}/{s}_{k}" for k, (i, s) in enumerate(zip(identity, sighting, strict=True))]
  citation = "Gray & Scott 1984"
  source = Source(NAME, "jaxmethods.images.coats", "Apache-2.0", citation, real=False)
  blank = np.full(len(identity), "")
  order = np.argsort(names)  # the names of a record are sorted
  rank = np.argsort(order).astype(np.int32)
  numbered = [str(i) for i in range(total * herd.sightings)]
  return ReidData(
    images, rank[identity], sorted(names), blank, sighting, numbered, np.array(files), "", source
  )


def _pictures(side: int, herd: Herd) -> np.ndarray:
  """All photographs, uint8, animal by animal."""
  grow_key, scene_key, pose_key = jax.random.split(jax.random.key(herd.seed), 3)
  total = herd.individuals * len(SPECIES)
  feed, kill = (
    jnp.repeat(jnp.array([getattr(s, name) for s in SPECIES.values()]), herd.individuals)
    for name in ("feed", "kill")
  )
  colours = jnp.repeat(
    jnp.array([(s.dark, s.light) for s in SPECIES.values()]), herd.individuals, axis=0
  )
  growing = jax.vmap(functools.partial(grow, side=_COAT, steps=_STEPS))
  coats = jax.jit(growing)(jax.random.split(grow_key, total), feed, kill)
  animal = jnp.repeat(jnp.arange(total), herd.sightings * herd.pictures)
  scenes = jnp.repeat(jax.random.split(scene_key, total * herd.sightings), herd.pictures)
  poses = jax.random.split(pose_key, len(animal))

  def take(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    scene, pose, who = one
    return photograph(scene, pose, coats[who], colours[who], side).astype(jnp.uint8)

  return np.asarray(
    jax.jit(lambda *xs: jax.lax.map(take, xs, batch_size=64))(scenes, poses, animal)
  )
