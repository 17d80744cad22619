"""Losses of interaction diffusion: InterGen's terms, MDM's, contact with objects and scenes.

A term is a mean over what counts, sum / (count + 1e-7): 0, not NaN, where nothing does. Joints
(B, T, J, 3) in metres; `mask` (B, T) true at real frames; `gate` (B,) is s_b, 1 for samples whose
step is early enough (t <= 0.7 N) for geometry to mean something. A batch mean is over gated samples.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmethods.methods.human_interaction import representation, rotations
from jaxmethods.methods.human_interaction.representation import Scaling
from jaxmethods.methods.human_interaction.skeleton import SMPL22, Skeleton
from jaxmethods.stats import shapes

_TINY = 1e-7
_RESTING = 0.001  # m^2 per frame^2 at 30 fps


class Weights(NamedTuple):
  """Weights of the terms; the defaults are InterGen's, those of `object` and `scene` are inferred."""

  velocity: float = 30.0
  bone: float = 10.0
  foot: float = 30.0
  distance: float = 3.0
  affinity: float = 3.0
  orientation: float = 0.01
  object: float = 3.0
  scene: float = 1.0


INTERGEN = Weights()


def mean(values: Float[Array, "*n"], counted: Array, axis: int | tuple[int, ...]) -> Array:
  """sum(counted values) / (sum(counted) + 1e-7) over the axes."""
  counted = jnp.broadcast_to(counted, values.shape).astype(values.dtype)
  # What is not counted may be NaN: padding holds anything.
  chosen = jnp.where(counted != 0, values, 0)
  return (counted * chosen).sum(axis) / (counted.sum(axis) + _TINY)


def gated(per_sample: Float[Array, " B"], gate: Float[Array, " B"]) -> Float[Array, ""]:
  """Mean over the samples whose gate is open; 0 if none is."""
  return mean(per_sample, gate, 0)


def open_gate(t: Array, num_steps: int, share: float = 0.7) -> Float[Array, " B"]:
  """s_b = 1 where t <= share N."""
  return (t <= share * num_steps).astype(jnp.result_type(float))


# --- terms, (B,) unless said ----------------------------------------------------------------------


def simple(
  pred: Float[Array, "B T E F"], target: Float[Array, "B T E F"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
  """Mean square over real frames and bodies, at all steps; a scalar."""
  shapes.check(pred=(pred, "B T E F"), target=(target, "B T E F"), mask=(mask, "B T"))
  return mean(jnp.square(pred - target).mean(-1), mask[..., None], (0, 1, 2))


def steps(mask: Bool[Array, "B T"], into_padding: bool = True) -> Bool[Array, "B t"]:
  """Displacements that count: from every real frame, or between two of them.

  In the published code the step from the last real frame counts, also where it leads into padding.
  """
  return mask[:, :-1] if into_padding else mask[:, :-1] & mask[:, 1:]


def velocity(
  pred: Float[Array, "B T J 3"], target: Float[Array, "B T J 3"], counted: Bool[Array, "B t"]
) -> Float[Array, " B"]:
  """VEL: mean square difference of the displacements to the next frame, m^2 per frame^2.

  Args:
    pred: predicted joints, m.
    target: true ones.
    counted: see `steps`.
  """
  shapes.same(target=target, pred=pred)
  shapes.check_leading(len(pred), counted=counted)
  moved = lambda x: x[:, 1:] - x[:, :-1]
  return mean(jnp.square(moved(pred) - moved(target)).mean((-1, -2)), counted, 1)


def bone_lengths(joints: Float[Array, "*n J 3"], skeleton: Skeleton) -> Float[Array, "*n b"]:
  """Length of every bone, m."""
  child, parent = np.array(skeleton.bones).T
  return rotations.length(joints[..., child, :] - joints[..., parent, :])


def bones(
  pred: Float[Array, "B T J 3"],
  target: Float[Array, "B T J 3"],
  mask: Bool[Array, "B T"],
  skeleton: Skeleton = SMPL22,
) -> Float[Array, " B"]:
  """BL: mean square difference of the bones' lengths, m^2."""
  _at_the_door(pred, target, mask)
  apart = bone_lengths(pred, skeleton) - bone_lengths(target, skeleton)
  return mean(jnp.square(apart).mean(-1), mask, 1)


def feet(
  pred: Float[Array, "B T J 3"],
  counted: Bool[Array, "B t"],
  skeleton: Skeleton = SMPL22,
  fps: float | Array = 30.0,
) -> Float[Array, " B"]:
  """FC: mean square speed of the predicted feet that seem to rest, m^2 per frame^2.

  Whether a foot rests is read from the prediction and gets no gradient: a foot escapes the term by
  being fast (a known weakness of the published loss).

  Args:
    pred: predicted joints, m.
    counted: see `steps`.
    skeleton: names the feet.
    fps: as in `representation.contacts`.
  """
  resting = jax.lax.stop_gradient(representation.contacts(pred, skeleton, fps))
  own = pred[:, :, jnp.array(skeleton.feet)]
  speed = jnp.square(own[:, 1:] - own[:, :-1]).mean(-1)
  per_frame = mean(speed, resting, -1)
  return mean(per_frame, counted, 1)


def distances(a: Float[Array, "*n I 3"], b: Float[Array, "*n K 3"]) -> Float[Array, "*n I K"]:
  """|a_i - b_k|, m; its gradient is 0 where the points coincide."""
  return rotations.length(a[..., :, None, :] - b[..., None, :, :])


def distance_map(
  pred: Float[Array, "B T I K"],
  target: Float[Array, "B T I K"],
  mask: Bool[Array, "B T"],
  near: float = 1.0,
) -> Float[Array, " B"]:
  """DM: mean square difference of distances that are predicted below `near`, m^2.

  Args:
    pred: predicted distances between joints of the two, m.
    target: true ones.
    mask: real frames.
    near: m.
  """
  _at_the_door(pred, target, mask)
  return mean(mean(jnp.square(pred - target), pred < near, (-1, -2)), mask, 1)


def affinity(
  pred: Float[Array, "B T I K"],
  target: Float[Array, "B T I K"],
  mask: Bool[Array, "B T"],
  touching: float = 0.1,
) -> Float[Array, " B"]:
  """JA: mean square predicted distance of what truly touches (below `touching`), m^2."""
  _at_the_door(pred, target, mask)
  return mean(mean(jnp.square(pred), target < touching, (-1, -2)), mask, 1)


def orientation(
  pred: tuple[Float[Array, "B T J 3"], Float[Array, "B T J 3"]],
  target: tuple[Float[Array, "B T J 3"], Float[Array, "B T J 3"]],
  skeleton: Skeleton = SMPL22,
) -> Float[Array, "B T"]:
  """RO, per frame: mean square difference of (w, y) of the turn from person 0 to person 1."""

  def turn(pair: tuple[Array, Array]) -> Array:
    ahead = [representation.facing(joints, skeleton) for joints in pair]
    return rotations.between(*ahead)[..., jnp.array([0, 2])]

  return jnp.square(turn(pred) - turn(target)).mean(-1)


def collision(
  signed: Float[Array, "B T J"], mask: Bool[Array, "B T"], margin: float = 0.02
) -> Float[Array, " B"]:
  """Mean of relu(margin - sdf) over joints and frames, m (inferred).

  Args:
    signed: distance of each joint to the scene, negative inside, m.
    mask: real frames.
    margin: m.
  """
  shapes.check(signed=(signed, "B T J"), mask=(mask, "B T"))
  return mean(jnp.maximum(margin - signed, 0).mean(-1), mask, 1)


def _at_the_door(pred: Array, target: Array, mask: Array) -> None:
  shapes.check(pred=(pred, "B T J K"), target=(target, "B T J K"), mask=(mask, "B T"))


# --- losses: named terms, weighted, and their sum "total" -----------------------------------------


def body_terms(
  pred: Float[Array, "B T J 3"],
  target: Float[Array, "B T J 3"],
  mask: Bool[Array, "B T"],
  gate: Float[Array, " B"],
  skeleton: Skeleton = SMPL22,
  weights: Weights = INTERGEN,
  fps: float | Array = 30.0,
  into_padding: bool = True,
) -> dict[str, Array]:
  """VEL, BL and FC of one person, weighted; see `steps` for `into_padding`."""
  counted = steps(mask, into_padding)
  return {
    "velocity": weights.velocity * gated(velocity(pred, target, counted), gate),
    "bone": weights.bone * gated(bones(pred, target, mask, skeleton), gate),
    "foot": weights.foot * gated(feet(pred, counted, skeleton, fps), gate),
  }


def pair_terms(
  pred: tuple[Float[Array, "B T J 3"], Float[Array, "B T J 3"]],
  target: tuple[Float[Array, "B T J 3"], Float[Array, "B T J 3"]],
  mask: Bool[Array, "B T"],
  gate: Float[Array, " B"],
  skeleton: Skeleton = SMPL22,
  weights: Weights = INTERGEN,
  gate_orientation: bool = False,
) -> dict[str, Array]:
  """DM, JA and RO of two persons, weighted.

  Args:
    pred: predicted joints of both, m.
    target: true ones.
    mask: real frames.
    gate: s_b.
    skeleton: of both.
    weights: of the terms.
    gate_orientation: whether RO is gated per sample like the rest. In the published code it is
      pooled over the frames of all samples and then multiplied by sum s_b / (sum s_b + 1e-7).
  """
  made, true = distances(*pred), distances(*target)
  turned = orientation(pred, target, skeleton)
  if gate_orientation:
    turn = gated(mean(turned, mask, 1), gate)
  else:
    turn = mean(turned, mask, (0, 1)) * gate.sum() / (gate.sum() + _TINY)
  return {
    "distance": weights.distance * gated(distance_map(made, true, mask), gate),
    "affinity": weights.affinity * gated(affinity(made, true, mask), gate),
    "orientation": weights.orientation * turn,
  }


def summed(terms: dict[str, Array]) -> dict[str, Array]:
  """Adds "total"."""
  return {**terms, "total": sum(terms.values(), jnp.zeros(()))}


def interaction_loss(
  pred: Float[Array, "B T E F"],
  target: Float[Array, "B T E F"],
  mask: Bool[Array, "B T"],
  gate: Float[Array, " B"],
  scaling: Scaling,
  skeleton: Skeleton = SMPL22,
  *,
  weights: Weights = INTERGEN,
  fps: float | Array = 30.0,
  gate_orientation: bool = False,
  into_padding: bool = True,
  reaction: bool = False,
) -> dict[str, Array]:
  """The loss of InterGen (code) for two bodies; for one its terms of a single body.

  Args:
    pred: predicted clean motion, normalised; features that begin with 3J positions.
    target: true one, normalised.
    mask: real frames.
    gate: s_b, see `open_gate`.
    scaling: mean and deviation of the features.
    skeleton: of the bodies.
    weights: of the terms.
    fps: frames per second, for the contact of feet.
    gate_orientation: see `pair_terms`.
    into_padding: see `steps`.
    reaction: whether person 0 is given: its prediction is replaced by the truth, and only person 1
      has terms of its own.

  Returns:
    Weighted terms "simple", "velocity_a", ..., "foot_b", "distance", "affinity", "orientation" (for
    one body without the last three and without suffixes) and "total".
  """
  shapes.check(
    pred=(pred, "B T E F"), target=(target, "B T E F"), mask=(mask, "B T"), gate=(gate, "B")
  )
  bodies = pred.shape[2]
  if bodies not in (1, 2) or (reaction and bodies == 1):
    raise ValueError(f"pred: expected one or two bodies, two in a reaction, got {bodies}")
  own = slice(1, None) if reaction else slice(None)
  terms = {"simple": simple(pred[:, :, own], target[:, :, own], mask)}
  read = lambda x: representation.joints_of(representation.denormalise(x, scaling), skeleton)
  made, true = read(pred), read(target)
  if reaction:
    made = made.at[:, :, 0].set(true[:, :, 0])
  for body, suffix in zip(range(bodies), ("_a", "_b") if bodies == 2 else ("",), strict=True):
    if body or not reaction:
      parts = body_terms(
        made[:, :, body], true[:, :, body], mask, gate, skeleton, weights, fps, into_padding
      )
      terms |= {name + suffix: value for name, value in parts.items()}
  if bodies == 2:
    split = lambda x: (x[:, :, 0], x[:, :, 1])
    terms |= pair_terms(split(made), split(true), mask, gate, skeleton, weights, gate_orientation)
  return summed(terms)


def object_contact(
  pred: Float[Array, "B T J 3"],
  target: Float[Array, "B T J 3"],
  points: Float[Array, "B T V 3"],
  mask: Bool[Array, "B T"],
  gate: Float[Array, " B"],
  skeleton: Skeleton = SMPL22,
  touching: float = 0.05,
) -> Float[Array, ""]:
  """Mean square distance of hands and the object's points that truly touch, m^2 (inferred).

  `affinity` with the object as the second person.
  """
  hands = jnp.array(skeleton.hands)
  made, true = (distances(joints[:, :, hands], points) for joints in (pred, target))
  return gated(affinity(made, true, mask, touching), gate)


def mdm_loss(
  pred: Float[Array, "B T F"],
  target: Float[Array, "B T F"],
  pred_joints: Float[Array, "B T J 3"],
  joints: Float[Array, "B T J 3"],
  mask: Bool[Array, "B T"],
  skeleton: Skeleton = SMPL22,
  *,
  position: float = 1.0,
  velocity: float = 1.0,
  foot: float = 1.0,
  still: float = 0.01,
) -> dict[str, Array]:
  """MDM's loss (code): simple + FK positions + velocities + feet that truly stand.

  Args:
    pred: predicted clean motion, normalised.
    target: true one.
    pred_joints: its joints, m.
    joints: true ones, m.
    mask: real frames.
    skeleton: names the feet.
    position: weight of the joints' positions.
    velocity: weight of their displacements.
    foot: weight of the predicted feet's displacement ...
    still: ... where the true foot moves at most as far, m per frame.
  """
  _at_the_door(pred_joints, joints, mask)
  moved = lambda x: x[:, 1:] - x[:, :-1]
  own = jnp.array(skeleton.feet)
  made, true, real = moved(pred_joints), moved(joints), mask[:, 1:]
  standing = rotations.length(true[:, :, own]) <= still
  slide = jnp.where(standing[..., None], made[:, :, own], 0)
  return summed(
    {
      "simple": simple(pred[:, :, None], target[:, :, None], mask),
      "position": position * mean(jnp.square(pred_joints - joints).mean((-1, -2)), mask, (0, 1)),
      "velocity": velocity * mean(jnp.square(made - true).mean((-1, -2)), real, (0, 1)),
      "foot": foot * mean(jnp.square(slide).mean((-1, -2)), real, (0, 1)),
    }
  )


def omomo_loss(
  pred: Float[Array, "B T F"],
  target: Float[Array, "B T F"],
  pred_joints: Float[Array, "B T J 3"],
  joints: Float[Array, "B T J 3"],
  mask: Bool[Array, "B T"],
  skeleton: Skeleton = SMPL22,
  *,
  kinematic: float = 1.0,
  foot: float = 1.0,
) -> dict[str, Array]:
  """L1 on the clean motion, on its joints and on its feet (OMOMO and CHOIS; reduced, inferred)."""
  _at_the_door(pred_joints, joints, mask)
  own = jnp.array(skeleton.feet)
  off = jnp.abs(pred_joints - joints)
  return summed(
    {
      "simple": mean(jnp.abs(pred - target).mean(-1), mask, (0, 1)),
      "position": kinematic * mean(off.mean((-1, -2)), mask, (0, 1)),
      "foot": foot * mean(off[:, :, own].mean((-1, -2)), mask, (0, 1)),
    }
  )


def latent_divergence(
  mean: Float[Array, "B D"], log_variance: Float[Array, "B D"]
) -> Float[Array, ""]:
  """KL of N(mean, variance) from N(0, 1), mean over latents and samples; a VAE weighs it by 1e-4."""
  shapes.same(mean=mean, log_variance=log_variance)
  return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()


def text_motion_contrast(
  text: Float[Array, "B d"], motion: Float[Array, "B d"], scale: Float[Array, ""] | float
) -> Float[Array, ""]:
  """InfoNCE in both directions, logits scale^2 cos (InterCLIP, code)."""
  shapes.same(text=text, motion=motion)
  logits = scale**2 * rotations.unit(text) @ rotations.unit(motion).T
  own = lambda x: -jnp.diagonal(jax.nn.log_softmax(x, axis=1)).mean()
  return (own(logits) + own(logits.T)) / 2
