"""Synthetic objects and scenes round motion (inferred): nobody recorded them.

An object rests, follows a hand with a fixed offset for a while, and rests again. Solids of a scene stand
where no joint comes near them, and the goal is where the root ends.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxmethods.methods.human_interaction import rotations, scenes
from jaxmethods.methods.human_interaction.scenes import BOX, CYLINDER, SPHERE, Solids
from jaxmethods.methods.human_interaction.skeleton import Skeleton
from jaxmethods.models.interaction import Condition
from jaxmethods.trees import Key

_CARRIED, _BEFORE = (0.35, 0.6), (0.15, 0.35)  # shares of a clip
_HALF_SIZE = (0.025, 0.1)  # of an object, m
_CANDIDATES, _MOST, _LEAST = 48, 6, 3  # solids
_SOLID_SIZE, _AWAY = (0.12, 0.45), (0.3, 1.6)  # m
_FREE = 0.1  # m, between a solid and every joint


def objects(seed: int, joints: Array, skeleton: Skeleton, points: int) -> Condition:
  """Puts an object to every clip.

  Args:
    seed: of all draws.
    joints: canonical positions (n, T, 1, J, 3), m.
    skeleton: names the hands.
    points: V, on the surface.

  Returns:
    entity (n, T, G) and points (n, T, V, 3).
  """
  keys = jax.random.split(jax.random.key(seed), len(joints))
  make = functools.partial(_object, skeleton=skeleton, count=points)
  entity, surface = jax.jit(jax.vmap(make))(keys, joints[:, :, 0])
  return Condition(entity=entity, points=surface)


def placement(entity: Array) -> tuple[Array, Array]:
  """Centre (..., 3), m, and rotation (..., 3, 3) of objects by their features (..., G)."""
  return entity[..., :3], rotations.matrix(entity[..., 6:12])


def _object(key: Key, joints: Array, skeleton: Skeleton, count: int) -> tuple[Array, Array]:
  """Features (T, G) and surface (T, V, 3) of an object in the path of a hand."""
  keys = jax.random.split(key, 7)
  frames = len(joints)
  first = frames * jax.random.uniform(keys[0], minval=_BEFORE[0], maxval=_BEFORE[1])
  last = first + frames * jax.random.uniform(keys[1], minval=_CARRIED[0], maxval=_CARRIED[1])
  hand = jnp.array(skeleton.hands)[jax.random.randint(keys[2], (), 0, 2)]
  kind = jnp.array([SPHERE, BOX])[jax.random.randint(keys[3], (), 0, 2)]
  size = jax.random.uniform(keys[4], (3,), minval=_HALF_SIZE[0], maxval=_HALF_SIZE[1])
  # One point of the surface is in the hand.
  held = scenes.surface_points(keys[5], kind, size, 1)[0]
  moment = jnp.clip(jnp.arange(frames), jnp.round(first), jnp.round(last)).astype(int)
  centre = joints[jnp.minimum(moment, frames - 1), hand] - held
  turn = jnp.broadcast_to(jnp.eye(3), (frames, 3, 3))
  surface = scenes.moved(scenes.surface_points(keys[6], kind, size, count), centre, turn)
  return scenes.object_features(surface, centre, turn), surface


def surroundings(seed: int, joints: Array, skeleton: Skeleton, points: int) -> Condition:
  """Puts a scene and a goal to every clip.

  Args:
    seed: of all draws.
    joints: canonical positions (n, T, 1, J, 3), m.
    skeleton: names the root.
    points: M, of all solids.

  Returns:
    scene (n, M, 3), scene_mask, goal, start (n, 3) and solids.
  """
  keys = jax.random.split(jax.random.key(seed), len(joints))
  make = functools.partial(_scene, root=skeleton.root, count=points // _MOST)
  return jax.jit(jax.vmap(make))(keys, joints[:, :, 0])


def _scene(key: Key, joints: Array, root: int, count: int) -> Condition:
  keys = jax.random.split(key, 4)
  drawn = _candidates(keys[0], joints[:, root])
  apart = scenes.signed_distances(joints.reshape(-1, 3), drawn).min(0)
  wanted = jax.random.randint(keys[1], (), _LEAST, _MOST + 1)
  chosen = jnp.argsort(~(apart > _FREE), stable=True)[:_MOST]
  real = (apart[chosen] > _FREE) & (jnp.arange(_MOST) < wanted)
  solids = jax.tree.map(lambda x: x[chosen], drawn)._replace(real=real)
  surface = jax.vmap(functools.partial(scenes.surface_points, count=count))(
    jax.random.split(keys[2], _MOST), solids.kind, solids.size
  )
  turned = rotations.rotate(rotations.about_y(solids.turn / 2)[:, None], surface)
  scene = (turned + solids.centre[:, None]).reshape(-1, 3)
  return Condition(
    scene=scene, scene_mask=jnp.repeat(real, count), goal=joints[-1, root], start=joints[0, root],
    solids=solids,
  )  # fmt: skip


def _candidates(key: Key, path: Array) -> Solids:
  """Draws solids that stand on the floor beside a path (T, 3)."""
  keys = jax.random.split(key, 6)
  many = (_CANDIDATES,)
  kind = jax.random.randint(keys[0], many, SPHERE, CYLINDER + 1)
  size = jax.random.uniform(keys[1], (*many, 3), minval=_SOLID_SIZE[0], maxval=_SOLID_SIZE[1])
  near = path[jax.random.randint(keys[2], many, 0, len(path))]
  angle = jax.random.uniform(keys[3], many, maxval=2 * jnp.pi)
  away = jax.random.uniform(keys[4], many, minval=_AWAY[0], maxval=_AWAY[1])
  height = jnp.where(kind == SPHERE, size[:, 0], size[:, 1])
  centre = jnp.stack(
    [near[:, 0] + away * jnp.sin(angle), height, near[:, 2] + away * jnp.cos(angle)], axis=1
  )
  turn = jax.random.uniform(keys[5], many, maxval=2 * jnp.pi)
  return Solids(kind, centre, size, turn, jnp.ones(many, bool))
