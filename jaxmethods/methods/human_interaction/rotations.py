"""Rotations: unit quaternions, w first, and the first two columns of a matrix (6D).

Every product and norm is along the last axis. (The published quaternion code calls a cross product
without an axis, which with a leading axis of size 3 takes that one.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TINY = 1e-12
_SURE = 1e-6  # below this length a direction is noise


def length(x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
  """|x| along the last axis, with gradient 0 instead of NaN at x = 0."""
  square = jnp.square(x).sum(-1)
  nothing = square == 0
  return jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, square)))


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
  """Scales to length 1; 0 stays 0.

  The gradient is 0 below a length of 1e-6, where it would grow as 1 / |x| without meaning.
  """
  far = length(x)[..., None]
  sure = far > _SURE
  unsure = jax.lax.stop_gradient(x / jnp.maximum(far, _TINY))
  return jnp.where(sure, x / jnp.where(sure, far, 1), unsure)


def multiply(p: Float[Array, "*n 4"], q: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
  """The rotation q, then p."""
  pw, pv, qw, qv = p[..., :1], p[..., 1:], q[..., :1], q[..., 1:]
  w = pw * qw - (pv * qv).sum(-1, keepdims=True)
  return jnp.concatenate([w, pw * qv + qw * pv + jnp.cross(pv, qv)], axis=-1)


def conjugate(q: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
  """The rotation back."""
  return q * jnp.array([1, -1, -1, -1], q.dtype)


def rotate(q: Float[Array, "*n 4"], x: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
  """Turns vectors; the leading axes broadcast."""
  w, v = q[..., :1], q[..., 1:]
  side = jnp.cross(v, x)
  return x + 2 * (w * side + jnp.cross(v, side))


def between(u: Float[Array, "*n 3"], v: Float[Array, "*n 3"]) -> Float[Array, "*n 4"]:
  """The shortest rotation of u to v: normalise(|u||v| + u.v, u x v); 0 where they are opposite."""
  w = length(u) * length(v) + (u * v).sum(-1)
  return unit(jnp.concatenate([w[..., None], jnp.cross(u, v)], axis=-1))


def about_y(half: Float[Array, "*n"]) -> Float[Array, "*n 4"]:
  """(cos a, 0, sin a, 0): a turn about y by twice the `half` angle a, rad."""
  zero = jnp.zeros_like(half)
  return jnp.stack([jnp.cos(half), zero, jnp.sin(half), zero], axis=-1)


def matrix(six: Float[Array, "*n 6"]) -> Float[Array, "*n 3 3"]:
  """Makes rotation matrices of 6D numbers by orthonormalising the two columns."""
  x = unit(six[..., :3])
  z = unit(jnp.cross(x, six[..., 3:]))
  return jnp.stack([x, jnp.cross(z, x), z], axis=-1)


def six(matrix: Float[Array, "*n 3 3"]) -> Float[Array, "*n 6"]:
  """The first two columns of rotation matrices."""
  return jnp.concatenate([matrix[..., 0], matrix[..., 1]], axis=-1)
