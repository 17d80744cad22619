"""Animals that do not exist: coats grown by reaction and diffusion, photographed.

A coat is the pattern of two substances that feed on each other and spread at different speeds (Gray &
Scott 1984; Turing 1952). Feed and kill rate decide whether it has spots, stripes or dapples: the
species. The seeds from which it grows make the individual.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmethods.images.augment import bilinear
from jaxmethods.stats import shapes
from jaxmethods.trees import Key

_SPREAD = (0.16, 0.08)  # of the two substances
_SEEDS = 0.12  # share of places where growth starts


class Species(NamedTuple):
  """Rates of a pattern, and the two colours (r, g, b) in 0..1 that it is drawn in."""

  feed: float
  kill: float
  dark: tuple[float, float, float]
  light: tuple[float, float, float]


SPECIES = {
  "spotted": Species(0.035, 0.065, (0.25, 0.16, 0.08), (0.85, 0.68, 0.42)),
  "striped": Species(0.035, 0.060, (0.12, 0.10, 0.10), (0.80, 0.62, 0.45)),
  "dappled": Species(0.039, 0.058, (0.45, 0.27, 0.12), (0.93, 0.85, 0.66)),
  "mazed": Species(0.029, 0.057, (0.18, 0.18, 0.20), (0.88, 0.88, 0.85)),
}


class Pose(NamedTuple):
  """Where an animal stands and how; () each. Lengths are in half widths of the picture."""

  turn: Array
  size: Array
  across: Array
  down: Array
  slant: Array


def grow(key: Key, feed: Array | float, kill: Array | float, *, side: int, steps: int) -> Array:
  """Grows a coat on a torus.

  Args:
    key: of the seeds.
    feed: rate.
    kill: rate.
    side: places in each direction.
    steps: of time; a pattern of 48 x 48 is full after some 2000.

  Returns:
    (side, side) in 0..1.
  """
  seeds = jax.random.uniform(key, (side // 4, side // 4)) < _SEEDS
  seeds = jnp.repeat(jnp.repeat(seeds, 4, 0), 4, 1)
  seeds = jnp.pad(seeds, ((0, side - len(seeds)), (0, side - len(seeds))))
  start = jnp.where(seeds, 0.5, 1.0), jnp.where(seeds, 0.25, 0.0)

  def step(_: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
    food, eater = both
    eaten = food * eater * eater
    food += _SPREAD[0] * _around(food) - eaten + feed * (1 - food)
    eater += _SPREAD[1] * _around(eater) + eaten - (feed + kill) * eater
    return food, eater

  food, _ = jax.lax.fori_loop(0, steps, step, start)
  return (food - food.min()) / jnp.maximum(food.max() - food.min(), 1e-6)


def _around(x: Array) -> Array:
  """The difference between the mean of the neighbours and a place (nine-point Laplacian)."""
  rows = jnp.roll(x, 1, 0) + jnp.roll(x, -1, 0)
  columns = jnp.roll(x, 1, 1) + jnp.roll(x, -1, 1)
  corners = jnp.roll(rows, 1, 1) + jnp.roll(rows, -1, 1)
  return 0.2 * (rows + columns) + 0.05 * corners - x


def photograph(
  scene_key: Key, pose_key: Key, coat: Float[Array, "s s"], colours: Float[Array, "2 3"], side: int
) -> Float[Array, "h w 3"]:
  """Takes a picture of an animal.

  Args:
    scene_key: of background and light; pictures of one sighting share it.
    pose_key: of pose, noise and the grass in front.
    coat: see `grow`.
    colours: dark and light, in 0..1.
    side: pixels.

  Returns:
    (side, side, 3) in whole values 0..255.
  """
  shapes.check(coat=(coat, "s s"), colours=(colours, "2 3"))
  turn_key, grass_key, noise_key = jax.random.split(pose_key, 3)
  back_key, light_key = jax.random.split(scene_key)
  place = (jnp.arange(side) + 0.5) * 2 / side - 1
  down, across = jnp.meshgrid(place, place, indexing="ij")
  u, v = _on_the_body(_pose(turn_key), across, down)
  pattern = bilinear(coat[..., None], *(0.5 * (x + 1) * (len(coat) - 1) for x in (v, u)))
  body = colours[0] + (colours[1] - colours[0]) * pattern
  round_off = 1 - 0.35 * jnp.clip(v, -1, 1)[..., None] ** 2
  picture = jnp.where(_silhouette(u, v)[..., None], body * round_off, _background(back_key, side))
  direction, strength, level = jax.random.uniform(light_key, (3,))
  angle = 2 * jnp.pi * direction
  slope = jnp.cos(angle) * across + jnp.sin(angle) * down
  lit = picture * (0.75 + 0.4 * level + 0.3 * strength * slope)[..., None]
  lit = jnp.where(_grass(grass_key, across, down)[..., None], jnp.array([0.3, 0.4, 0.15]), lit)
  noise = 0.03 * jax.random.normal(noise_key, lit.shape)
  return jnp.round(255 * jnp.clip(lit + noise, 0, 1))


def _pose(key: Key) -> Pose:
  draw = jax.random.uniform(key, (5,), minval=-1)
  return Pose(
    turn=0.2 * draw[0], size=0.8 + 0.12 * draw[1], across=0.12 * draw[2], down=0.1 * draw[3],
    slant=0.88 + 0.12 * draw[4],
  )  # fmt: skip


def _on_the_body(pose: Pose, across: Array, down: Array) -> tuple[Array, Array]:
  """Coordinates on the animal, its torso within -1..1, of places in the picture."""
  x, y = across - pose.across, down - pose.down + 0.15
  cos, sin = jnp.cos(pose.turn), jnp.sin(pose.turn)
  u = (cos * x + sin * y) / (pose.size * pose.slant)
  v = (cos * y - sin * x) / (0.62 * pose.size)
  return u, v


def _silhouette(u: Array, v: Array) -> Array:
  """Torso, head and four legs."""
  torso = jnp.abs(u / 0.85) ** 2.5 + jnp.abs(v / 0.85) ** 2.5 < 1
  head = ((u - 0.92) / 0.22) ** 2 + ((v + 0.7) / 0.4) ** 2 < 1
  feet = jnp.array([-0.65, -0.4, 0.4, 0.65])
  legs = (jnp.abs(u[..., None] - feet) < 0.08).any(-1) & (v > 0) & (v < 1.8)
  return torso | head | legs


def _background(key: Key, side: int) -> Array:
  """Blurred ground with blades of another green."""
  coarse_key, fine_key, hue_key = jax.random.split(key, 3)
  coarse = jax.image.resize(jax.random.uniform(coarse_key, (6, 6)), (side, side), "cubic")
  blades = jax.image.resize(jax.random.uniform(fine_key, (side // 8, side)), (side, side), "linear")
  hue = jnp.array([0.45, 0.42, 0.22]) + 0.12 * jax.random.uniform(hue_key, (3,), minval=-1)
  return hue * (0.55 + 0.4 * coarse + 0.5 * blades)[..., None]


def _grass(key: Key, across: Array, down: Array, blades: int = 10) -> Array:
  """Blades in front of the animal, from the lower edge up."""
  where_key, height_key, lean_key = jax.random.split(key, 3)
  where = jax.random.uniform(where_key, (blades,), minval=-1)
  height = 1.1 * jax.random.uniform(height_key, (blades,))
  lean = 0.3 * jax.random.uniform(lean_key, (blades,), minval=-1)
  up = 1 - down[..., None]
  near = jnp.abs(across[..., None] - where - lean * up) < 0.03 * (1.2 - up / 1.2)
  return (near & (up < height)).any(-1)
