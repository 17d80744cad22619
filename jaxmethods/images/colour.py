"""Hue, saturation and value, in a form without branches."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmethods.stats import shapes


def to_hsv(
  x: Float[Array, "... 3"],
) -> tuple[Float[Array, "... 3"], Float[Array, "... 1"], Float[Array, "... 1"]]:
  """Hue (..., 3), saturation and value (..., 1) of RGB (..., 3) in 0..1.

  The hue is how far each channel lies below the highest, as a share of the lowest's distance: a pure
  colour's complement. A grey counts as red.
  """
  shapes.check(x=(x, "... 3"))
  value, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
  below = (value - x) / jnp.where(value > low, value - low, 1)
  hue = jnp.where(value > low, below, jnp.array([0.0, 1.0, 1.0]))
  return hue, (value - low) / jnp.where(value > 0, value, 1), value


def from_hsv(
  hue: Float[Array, "... 3"], saturation: Float[Array, "... 1"], value: Float[Array, "... 1"]
) -> Float[Array, "... 3"]:
  """The inverse of `to_hsv`."""
  shapes.check(hue=(hue, "... 3"), saturation=(saturation, "... 1"), value=(value, "... 1"))
  return value * (1 - saturation * hue)


def shift_hue(x: Float[Array, "... 3"], turn: Float[Array, ""] | float) -> Float[Array, "... 3"]:
  """Turns the hue of RGB (..., 3) in 0..1 by a share of the colour circle."""
  hue, saturation, value = to_hsv(x)
  red, green, blue = jnp.moveaxis(hue, -1, 0)
  # Sixths of the circle, from the channel that is highest.
  angle = jnp.where(red == 0, blue - green, jnp.where(green == 0, 2 + red - blue, 4 + green - red))
  place = jnp.mod(angle[..., None] + 6 * turn + jnp.array([5.0, 3.0, 1.0]), 6)
  return from_hsv(jnp.clip(jnp.minimum(place, 4 - place), 0, 1), saturation, value)
