"""Guidance of sampling by contact with an object (CHOIS, code, with the object given).

Before each of the last steps the clean prediction goes down the gradient of J:
x0 <- x0 - alpha var_t dJ/dx0, not through the network. J is computed per clip, so that the guidance of a
clip does not depend on its batch. The published alpha fits the published features; here the step is also
limited to 5 cm for the joint that moves most, and halved where a shorter one lowers J more (inferred).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmethods.methods.human_interaction import losses, representation, rotations
from jaxmethods.methods.human_interaction.diffusion import Guidance
from jaxmethods.methods.human_interaction.representation import Scaling
from jaxmethods.methods.human_interaction.skeleton import SMPL22, Skeleton
from jaxmethods.stats import shapes

# Joints (B, T, E, J, 3), m -> J (B,).
Objective: TypeAlias = Callable[[Array], Array]


class Object(NamedTuple):
  """An object along its path.

  Attributes:
    points: of its surface, (B, T, V, 3), m.
    centre: (B, T, 3), m.
    turn: its rotation matrices, (B, T, 3, 3).
  """

  points: Array
  centre: Array
  turn: Array


class Weights(NamedTuple):
  """Weights of the terms of J (code): 1e4 [contact + consistency + 100 floor] + 3e5 feet."""

  contact: float = 1e4
  consistency: float = 1e4
  floor: float = 1e6
  feet: float = 3e5


CHOIS = Weights()


# --- terms, (B,) ----------------------------------------------------------------------------------


def hand_distances(
  joints: Float[Array, "B T J 3"], points: Float[Array, "B T V 3"], skeleton: Skeleton = SMPL22
) -> Float[Array, "B T 2"]:
  """Distance of each hand to the nearest point of the object, m."""
  return losses.distances(joints[:, :, jnp.array(skeleton.hands)], points).min(-1)


def hand_contact(
  distances: Float[Array, "B T 2"],
  contact: Float[Array, "B T 2"],
  mask: Bool[Array, "B T"],
  slack: float = 0.02,
) -> Float[Array, " B"]:
  """Mean of relu(c_h d_h - slack) over frames and hands, m.

  Args:
    distances: d_h, see `hand_distances`.
    contact: c_h, 1 where a hand should touch.
    mask: real frames.
    slack: m.
  """
  shapes.check(distances=(distances, "B T H"), contact=(contact, "B T H"), mask=(mask, "B T"))
  return losses.mean(jnp.maximum(contact * distances - slack, 0).mean(-1), mask, 1)


def consistency(
  joints: Float[Array, "B T J 3"],
  thing: Object,
  contact: Float[Array, "B T 2"],
  mask: Bool[Array, "B T"],
  skeleton: Skeleton = SMPL22,
) -> Float[Array, " B"]:
  """2 - sum over hands of mean_{s,t} c_s c_t cos(hand at s, hand at t), seen from the object.

  Args:
    joints: m.
    thing: whose frame the hands are seen in.
    contact: c_h, 1 where a hand should touch.
    mask: real frames.
    skeleton: names the hands.
  """
  hands = joints[:, :, jnp.array(skeleton.hands)] - thing.centre[:, :, None]
  local = jnp.einsum("btij,bthi->bthj", thing.turn, hands)
  counted = contact * mask[..., None]
  # The mean of cosines of all pairs is the square of the mean direction.
  mean = (counted[..., None] * rotations.unit(local)).sum(1)
  mean = mean / jnp.maximum(mask.sum(1), 1)[:, None, None]
  return 2 - jnp.square(mean).sum((-1, -2))


def below_floor(points: Float[Array, "B T V 3"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
  """Mean depth of the object's lowest point below the floor at y = 0, m.

  It guides only where the object is generated: the gradient of a given one does not reach the body.
  """
  return losses.mean(jnp.maximum(-points[..., 1].min(-1), 0), mask, 1)


def supporting_foot(
  joints: Float[Array, "B T J 3"],
  mask: Bool[Array, "B T"],
  skeleton: Skeleton = SMPL22,
  height: float = 0.02,
) -> Float[Array, " B"]:
  """Mean square of the lower toe's height over its resting height, m^2."""
  low = joints[:, :, jnp.array(skeleton.toes), 1].min(-1)
  return losses.mean(jnp.square(low - height), mask, 1)


# --- what should touch, and J ---------------------------------------------------------------------


def expected_contact(
  joints: Float[Array, "B T J 3"],
  thing: Object,
  mask: Bool[Array, "B T"],
  skeleton: Skeleton = SMPL22,
  still: float = 0.005,
) -> Float[Array, "B T 2"]:
  """Guesses which hand holds the object when (inferred): 1 or 0, without gradient.

  CHOIS predicts contact beside the motion. Here an object that moves is held, by the hand that is nearer
  to it while it moves.

  Args:
    joints: predicted, m.
    thing: its path.
    mask: real frames.
    skeleton: names the hands.
    still: an object rests that moves less, m per frame.
  """
  step = rotations.length(thing.centre[:, 1:] - thing.centre[:, :-1]) > still
  none = jnp.zeros_like(step[:, :1])
  held = jnp.concatenate([step, none], 1) | jnp.concatenate([none, step], 1)
  held = held & mask
  apart = losses.mean(hand_distances(joints, thing.points, skeleton), held[..., None], 1)
  nearer = jnp.arange(2) == apart.argmin(-1)[:, None]
  chosen = held[..., None] & nearer[:, None]
  return jax.lax.stop_gradient(chosen.astype(joints.dtype))


def object_objective(
  thing: Object,
  mask: Bool[Array, "B T"],
  skeleton: Skeleton = SMPL22,
  *,
  contact: Float[Array, "B T 2"] | None = None,
  weights: Weights = CHOIS,
  toe: float = 0.02,
  sure: float = 0.95,
) -> Objective:
  """J of a person with an object, a function of the joints.

  Args:
    thing: the object.
    mask: real frames.
    skeleton: names hands and toes.
    contact: probability that a hand touches; None: `expected_contact` of the prediction.
    weights: of the terms.
    toe: height of a resting toe, m.
    sure: a hand touches above this probability.
  """
  batch, frames = mask.shape
  shapes.check(
    points=(thing.points, f"{batch} {frames} V 3"), centre=(thing.centre, f"{batch} {frames} 3"),
    turn=(thing.turn, f"{batch} {frames} 3 3"),
  )  # fmt: skip

  def objective(joints: Array) -> Array:
    own = joints[:, :, 0]
    if contact is None:
      touch = expected_contact(own, thing, mask, skeleton)
    else:
      touch = (contact > sure).astype(own.dtype)
    near = hand_contact(hand_distances(own, thing.points, skeleton), touch, mask)
    return (
      weights.contact * near
      + weights.consistency * consistency(own, thing, touch, mask, skeleton)
      + weights.floor * below_floor(thing.points, mask)
      + weights.feet * supporting_foot(own, mask, skeleton, toe)
    )

  return objective


# --- the step -------------------------------------------------------------------------------------


def make(
  objective: Objective,
  scaling: Scaling,
  skeleton: Skeleton,
  steps: int,
  *,
  alpha: float = 1e3,
  share: float = 0.1,
  limit: float = 0.05,
  halvings: int = 6,
) -> Guidance:
  """Makes the guidance of `diffusion.sample`: it runs inside its scan.

  Args:
    objective: J of the joints, per clip.
    scaling: of the features, which begin with 3 J positions.
    skeleton: of the bodies.
    steps: S that are visited.
    alpha: length of a step; 0 changes nothing.
    share: of the steps, the last ones, that are guided; at least two, for the very last has variance 0.
    limit: farthest that a step moves a joint, m.
    halvings: a clip takes the one of the step, its half, ..., and none that makes J smallest.

  Raises:
    ValueError: if `share` is outside [0, 1].
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share: must be in [0, 1], got {share}")
  guided = max(round(share * steps), 2) if share else 0
  factors = jnp.array([0.0] + [0.5**i for i in range(halvings + 1)])

  def of(clean: Array) -> Array:
    return objective(representation.joints_of(representation.denormalise(clean, scaling), skeleton))

  def step(clean: Array, variance: Array) -> Array:
    change = alpha * variance * jax.grad(lambda x: of(x).sum())(clean)
    change = limited(change, scaling, skeleton, limit)
    found = jax.lax.map(lambda factor: of(clean - factor * change), factors)
    best = factors[found.argmin(0)].reshape(-1, *(1,) * (clean.ndim - 1))
    return clean - best * change

  def guide(clean: Array, place: Array, variance: Array) -> Array:
    return jax.lax.cond(place < guided, step, lambda clean, _: clean, clean, variance)

  return guide


def limited(
  change: Float[Array, "B T E F"], scaling: Scaling, skeleton: Skeleton, limit: float
) -> Float[Array, "B T E F"]:
  """Shortens the change of a normalised clip so that no joint moves by more than `limit` m."""
  far = rotations.length(representation.joints_of(change * scaling.std, skeleton))
  far = far.max(tuple(range(1, far.ndim)), keepdims=True)
  factor = jnp.where(far > limit, limit / jnp.where(far > limit, far, 1), 1)
  return change * factor.reshape(-1, *(1,) * (change.ndim - 1))
