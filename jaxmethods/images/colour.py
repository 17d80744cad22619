"""Hue, saturation and value, in a form without branches."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def to_hsv(x: Array) -> tuple[Array, Array, Array]:
  """Hue (..., 3), saturation and value (..., 1) of RGB (..., 3) in 0..1.

  The hue is how far each channel lies below the highest, as a share of the lowest's distance: a pure
  colour's complement. A grey counts as red.
  """
  value, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
  below = (value - x) / jnp.where(value > low, value - low, 1)
  hue = jnp.where(value > low, below, jnp.array([0.0, 1.0, 1.0]))
  return hue, (value - low) / jnp.where(value > 0, value, 1), value


def from_hsv(hue: Array, saturation: Array, value: Array) -> Array:
  """The inverse of `to_hsv`."""
  return value * (1 - saturation * hue)


def shift_hue(x: Array, turn: Array | float) -> Array:
  """Turns the hue of RGB (..., 3) in 0..1 by a share of the colour circle."""
  hue, saturation, value = to_hsv(x)
  red, green, blue = jnp.moveaxis(hue, -1, 0)
  # Sixths of the circle, from the channel that is highest.
  angle = jnp.where(red == 0, blue - green, jnp.where(green == 0, 2 + red - blue, 4 + green - red))
  place = jnp.mod(angle[..., None] + 6 * turn + jnp.array([5.0, 3.0, 1.0]), 6)
  return from_hsv(jnp.clip(jnp.minimum(place, 4 - place), 0, 1), saturation, value)
