"""Solids with an analytic signed distance: synthetic scenes, and objects along a path (inferred)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmethods.methods.human_interaction import rotations
from jaxmethods.stats import shapes
from jaxmethods.trees import Key

SPHERE, BOX, CYLINDER = 0, 1, 2
BASIS = 32


class Solids(NamedTuple):
  """Spheres, boxes and upright cylinders.

  Attributes:
    kind: `SPHERE`, `BOX` or `CYLINDER`, (S,) int.
    centre: (S, 3), m.
    size: (S, 3), m: half edges of a box; radius of a sphere first; radius and half height of a cylinder.
    turn: of boxes about y, (S,), rad.
    real: false at padding, (S,).
  """

  kind: Array
  centre: Array
  size: Array
  turn: Array
  real: Array


def signed_distances(points: Float[Array, "*n 3"], solids: Solids) -> Float[Array, "*n S"]:
  """Distance to the surface of every solid, negative inside, m; infinite at padding."""
  shapes.check(
    kind=(solids.kind, "S"), centre=(solids.centre, "S 3"), size=(solids.size, "S 3"),
    turn=(solids.turn, "S"), real=(solids.real, "S"),
  )  # fmt: skip
  local = rotations.rotate(
    rotations.about_y(-solids.turn / 2), points[..., None, :] - solids.centre
  )
  sphere = rotations.length(local) - solids.size[:, 0]
  box = _outside(jnp.abs(local) - solids.size)
  radial = rotations.length(local[..., jnp.array([0, 2])]) - solids.size[:, 0]
  cylinder = _outside(jnp.stack([radial, jnp.abs(local[..., 1]) - solids.size[:, 1]], axis=-1))
  found = jnp.where(solids.kind == SPHERE, sphere, jnp.where(solids.kind == BOX, box, cylinder))
  return jnp.where(solids.real, found, jnp.inf)


def _outside(beyond: Array) -> Array:
  """Distance to a product of intervals from how far each coordinate is beyond its own."""
  return rotations.length(jnp.maximum(beyond, 0)) + jnp.minimum(beyond.max(-1), 0)


def signed_distance(points: Float[Array, "*n 3"], solids: Solids) -> Float[Array, "*n"]:
  """Distance to the scene, the nearest solid, m; infinite in an empty scene."""
  return signed_distances(points, solids).min(-1)


def surface_points(
  key: Key, kind: Int[Array, ""] | int, size: Float[Array, " 3"], count: int
) -> Float[Array, "count 3"]:
  """Draws points on a solid's surface round 0: a direction, and the surface along it.

  Args:
    key: of the directions.
    kind: see `Solids`.
    size: see `Solids`, m.
    count: of points.
  """
  ray = rotations.unit(jax.random.normal(key, (count, 3)))
  tiny = jnp.finfo(ray.dtype).tiny
  level = rotations.length(ray[:, jnp.array([0, 2])])
  box = (size / jnp.maximum(jnp.abs(ray), tiny)).min(-1)
  cylinder = jnp.minimum(
    size[0] / jnp.maximum(level, tiny), size[1] / jnp.maximum(jnp.abs(ray[:, 1]), tiny)
  )
  far = jnp.where(kind == SPHERE, size[0], jnp.where(kind == BOX, box, cylinder))
  return far[..., None] * ray


def moved(
  points: Float[Array, "V 3"], centre: Float[Array, "T 3"], turn: Float[Array, "T 3 3"]
) -> Float[Array, "T V 3"]:
  """Puts an object's points along its path."""
  return jnp.einsum("tij,vj->tvi", turn, points) + centre[:, None]


def basis_points(count: int = BASIS, radius: float = 0.5) -> Float[Array, "count 3"]:
  """Fixed points spread over a sphere (a Fibonacci lattice), m."""
  place = np.arange(count) + 0.5
  height, angle = 1 - 2 * place / count, np.pi * (1 + np.sqrt(5)) * place
  level = np.sqrt(1 - height**2)
  return jnp.asarray(radius * np.stack([level * np.cos(angle), height, level * np.sin(angle)], 1))


def object_features(
  points: Float[Array, "T V 3"],
  centre: Float[Array, "T 3"],
  turn: Float[Array, "T 3 3"],
  basis: Float[Array, "K 3"] | None = None,
) -> Float[Array, "T G"]:
  """Features of an object for the denoiser: [centre 3, displacement 3, rotation 6, K distances].

  A distance is that of a basis point round the centre to the nearest point of the surface (BPS), m.

  Args:
    points: of the surface, m.
    centre: m.
    turn: rotation.
    basis: K points round 0; None: `basis_points`.
  """
  shapes.check(points=(points, "T V 3"), centre=(centre, "T 3"), turn=(turn, "T 3 3"))
  basis = basis_points() if basis is None else basis
  step = jnp.concatenate([centre[1:] - centre[:-1], jnp.zeros_like(centre[:1])])
  apart = rotations.length(points[:, None] - (centre[:, None] + basis)[:, :, None]).min(-1)
  return jnp.concatenate([centre, step, rotations.six(turn), apart], axis=1)
