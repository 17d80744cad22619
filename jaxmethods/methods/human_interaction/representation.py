"""Representations of motion: InterHuman (262), HumanML3D (263) and positions, there and back.

All are made of T frames of joints and hold T - 1 frames, because velocities look ahead. Contact
thresholds are per frame in the published code, hence depend on the frame rate: here they are rescaled
to the rate that is given.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmethods.methods.human_interaction import rotations
from jaxmethods.methods.human_interaction.skeleton import SMPL22, Skeleton
from jaxmethods.stats import shapes

INTERHUMAN, HUMANML3D = 262, 263
_J = SMPL22.num_joints


class Frame(NamedTuple):
  """A canonical frame: on the floor, first root at xz 0, facing +z.

  Attributes:
    floor: height that becomes 0, (...), m.
    root: xz of the first root, (..., 2), m.
    turn: quaternion from the world to the frame, (..., 4).
  """

  floor: Array
  root: Array
  turn: Array


# --- canonical frames -----------------------------------------------------------------------------


def facing(joints: Float[Array, "*n J 3"], skeleton: Skeleton) -> Float[Array, "*n 3"]:
  """The horizontal unit vector ahead: y x (right hip - left hip)."""
  shapes.check(joints=(joints, f"... {skeleton.num_joints} 3"))
  left, right = skeleton.hips
  across = rotations.unit(joints[..., right, :] - joints[..., left, :])
  return rotations.unit(_level(across))


def _level(across: Array) -> Array:
  """Crosses y with a vector."""
  x, _, z = jnp.moveaxis(across, -1, 0)
  return jnp.stack([z, jnp.zeros_like(x), -x], axis=-1)


def lowest(
  joints: Float[Array, "*n T J 3"], mask: Bool[Array, "*n T"] | None = None
) -> Float[Array, "*n"]:
  """Height of the lowest joint of a clip, m: InterHuman's floor (code)."""
  height = joints[..., 1].min(-1)
  return (height if mask is None else jnp.where(mask, height, jnp.inf)).min(-1)


def estimated_floor(
  joints: Float[Array, "*n T J 3"],
  skeleton: Skeleton,
  mask: Bool[Array, "*n T"] | None = None,
  share: float = 0.05,
) -> Float[Array, "*n"]:
  """Height below which a `share` of the lower feet of a clip lies, m; for noisy captures (inferred)."""
  height = joints[..., jnp.array(skeleton.toes), 1].min(-1)
  if mask is not None:
    height = jnp.where(mask, height, jnp.nan)
  return jnp.nanquantile(height, share, axis=-1)


def canonical_frame(
  joints: Float[Array, "*n T J 3"],
  skeleton: Skeleton = SMPL22,
  *,
  mask: Bool[Array, "*n T"] | None = None,
  floor: Float[Array, "*n"] | None = None,
) -> Frame:
  """Finds the frame of a clip from its first frame (InterHuman, code).

  Args:
    joints: world positions, m.
    skeleton: of the joints.
    mask: real frames; None: all.
    floor: height of the floor, m; None: `lowest`.
  """
  shapes.check(joints=(joints, f"... T {skeleton.num_joints} 3"))
  first = joints[..., 0, :, :]
  ahead = facing(first, skeleton)
  root = first[..., skeleton.root, :]
  floor = lowest(joints, mask) if floor is None else floor
  turn = rotations.about_y(_half_yaw(ahead))
  return Frame(floor, root[..., jnp.array([0, 2])], turn)


def _half_yaw(ahead: Array) -> Array:
  """Half the angle about y that turns horizontal vectors to +z."""
  return jnp.arctan2(-ahead[..., 0], ahead[..., 2]) / 2


def _origin(frame: Frame) -> Array:
  x, z = jnp.moveaxis(frame.root, -1, 0)
  return jnp.stack([x, jnp.broadcast_to(frame.floor, x.shape), z], axis=-1)[..., None, None, :]


def to_frame(joints: Float[Array, "*n T J 3"], frame: Frame) -> Float[Array, "*n T J 3"]:
  """World to canonical positions, m."""
  return rotations.rotate(frame.turn[..., None, None, :], joints - _origin(frame))


def from_frame(joints: Float[Array, "*n T J 3"], frame: Frame) -> Float[Array, "*n T J 3"]:
  """Canonical to world positions, m; undoes `to_frame`."""
  back = rotations.conjugate(frame.turn)[..., None, None, :]
  return rotations.rotate(back, joints) + _origin(frame)


def canonical_pair(
  joints: Float[Array, "*n T 2 J 3"],
  skeleton: Skeleton = SMPL22,
  *,
  mask: Bool[Array, "*n T"] | None = None,
  floor: Literal["each", "shared"] | Float[Array, "*n"] = "shared",
) -> Float[Array, "*n T 2 J 3"]:
  """Puts two bodies into the canonical frame of the first.

  Args:
    joints: world positions, m.
    skeleton: of both bodies.
    mask: real frames; None: all.
    floor: "each": every body stands on its own lowest joint, as InterHuman does it, which breaks
      true differences in height; "shared": on the lowest of both; or a height, m.
  """
  shapes.check(joints=(joints, f"... T 2 {skeleton.num_joints} 3"))
  bodies = [joints[..., body, :, :] for body in range(2)]
  low = [lowest(body, mask) for body in bodies]
  if isinstance(floor, str):
    heights = low if floor == "each" else [jnp.minimum(*low)] * 2
  else:
    heights = [floor] * 2
  frame = canonical_frame(bodies[0], skeleton, mask=mask)
  moved = [
    to_frame(body, frame._replace(floor=jnp.broadcast_to(height, low[0].shape)))
    for body, height in zip(bodies, heights, strict=True)
  ]
  return jnp.stack(moved, axis=-3)


def relative_pose(first: Frame, second: Frame) -> Float[Array, "*n 3"]:
  """(a, x, z) of the second body in the frame of the first; a is half the yaw, rad (code)."""
  turn = rotations.multiply(second.turn, rotations.conjugate(first.turn))
  x, z = jnp.moveaxis(second.root - first.root, -1, 0)
  apart = rotations.rotate(first.turn, jnp.stack([x, jnp.zeros_like(x), z], axis=-1))
  return jnp.stack([jnp.arctan2(turn[..., 2], turn[..., 0]), apart[..., 0], apart[..., 2]], axis=-1)


# --- contacts -------------------------------------------------------------------------------------


def contacts(
  joints: Float[Array, "*n T J 3"],
  skeleton: Skeleton = SMPL22,
  fps: float | Array = 30.0,
  *,
  speed: float = 0.001,
  published_fps: float = 30.0,
  heights: bool = True,
) -> Bool[Array, "*n t C"]:
  """Finds the feet that rest on the floor at y = 0, frames 0 .. T - 2 (InterHuman, code).

  Args:
    joints: positions, m.
    skeleton: names `feet` and `foot_heights`.
    fps: frames per second of the clips, broadcast to (...).
    speed: a resting foot's squared distance to the next frame is below it, m^2 per frame^2 ...
    published_fps: ... at this rate; the bound is rescaled by (published_fps / fps)^2.
    heights: whether the foot must also be low (InterHuman) or not (HumanML3D, speed 0.002 at 20 fps).
  """
  shapes.check(joints=(joints, f"... T {skeleton.num_joints} 3"))
  feet = joints[..., jnp.array(skeleton.feet), :]
  moved = jnp.square(feet[..., 1:, :, :] - feet[..., :-1, :, :]).sum(-1)
  bound = speed * (published_fps / jnp.asarray(fps, joints.dtype)) ** 2
  resting = moved < bound[..., None, None]
  if heights:
    resting &= feet[..., :-1, :, 1] < jnp.array(skeleton.foot_heights, joints.dtype)
  return resting


# --- positions, and InterHuman --------------------------------------------------------------------


def positions_size(skeleton: Skeleton) -> int:
  """Features of a frame of `encode_positions`."""
  return 6 * skeleton.num_joints + len(skeleton.feet)


def encode_positions(
  joints: Float[Array, "*n T J 3"], skeleton: Skeleton = SMPL22, fps: float | Array = 30.0
) -> Float[Array, "*n t F"]:
  """Encodes as [positions 3J, displacements to the next frame 3J, contacts C] (inferred).

  Args:
    joints: canonical positions, m; T at least 2.
    skeleton: of the joints.
    fps: as in `contacts`.

  Returns:
    (..., T - 1, 6J + C); displacements in m per frame.

  Raises:
    ValueError: with fewer than two frames.
  """
  flat, moved, touching = _parts(joints, skeleton, fps)
  return jnp.concatenate([flat, moved, touching], axis=-1)


def joints_of(
  features: Float[Array, "*n T F"], skeleton: Skeleton = SMPL22
) -> Float[Array, "*n T J 3"]:
  """Reads the positions, m, of `encode_positions` and `encode_interhuman`: both begin with them."""
  size = 3 * skeleton.num_joints
  return features[..., :size].reshape(*features.shape[:-1], skeleton.num_joints, 3)


def _parts(joints: Array, skeleton: Skeleton, fps: float | Array) -> tuple[Array, Array, Array]:
  touching = contacts(joints, skeleton, fps).astype(joints.dtype)
  at_least_two(joints)
  moved = joints[..., 1:, :, :] - joints[..., :-1, :, :]
  flat = lambda x: x.reshape(*x.shape[:-2], -1)
  return flat(joints[..., :-1, :, :]), flat(moved), touching


def at_least_two(joints: Float[Array, "*n T J 3"]) -> None:
  """Raises ValueError if there are fewer than two frames: a motion has none to look ahead to."""
  if joints.shape[-3] < 2:
    raise ValueError(f"joints: a motion needs at least 2 frames, got {joints.shape[-3]}")


def y_up(joints: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
  """(x, y, z) with z up -> (x, z, -y)."""
  x, y, z = jnp.moveaxis(joints, -1, 0)
  return jnp.stack([x, z, -y], axis=-1)


def z_up(joints: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
  """Undoes `y_up`."""
  x, y, z = jnp.moveaxis(joints, -1, 0)
  return jnp.stack([x, -z, y], axis=-1)


def encode_interhuman(
  joints: Float[Array, "*n T 22 3"],
  six: Float[Array, "*n T 21 6"],
  fps: float | Array = 30.0,
) -> Float[Array, "*n t 262"]:
  """Encodes as [positions 66, displacements 66, 21 rotations 126, contacts 4] (InterHuman, code).

  Args:
    joints: canonical positions, m, y up; T at least 2.
    six: 6D rotations of all joints but the root, relative to the parent.
    fps: as in `contacts`.
  """
  shapes.check(joints=(joints, f"... T {_J} 3"), six=(six, f"... T {_J - 1} 6"))
  flat, moved, touching = _parts(joints, SMPL22, fps)
  turns = six[..., :-1, :, :].reshape(*flat.shape[:-1], -1)
  return jnp.concatenate([flat, moved, turns, touching], axis=-1)


class InterHuman(NamedTuple):
  """What 262 features say: joints (..., 22, 3), displacements, 6D rotations (..., 21, 6), contacts."""

  joints: Array
  moved: Array
  six: Array
  contacts: Array


def decode_interhuman(features: Float[Array, "*n 262"]) -> InterHuman:
  """Reads the features of `encode_interhuman`."""
  shapes.check(features=(features, f"... {INTERHUMAN}"))
  flat, moved, six, touching = jnp.split(features, [66, 132, 258], axis=-1)
  shaped = lambda x, rows, columns: x.reshape(*x.shape[:-1], rows, columns)
  return InterHuman(shaped(flat, _J, 3), shaped(moved, _J, 3), shaped(six, _J - 1, 6), touching)


def placed(
  features: Float[Array, "*n T 262"], relative: Float[Array, "*n 3"]
) -> Float[Array, "*n T 262"]:
  """Moves a body from its own canonical frame to that of the other, see `relative_pose` (code)."""
  parts = decode_interhuman(features)
  back = rotations.conjugate(rotations.about_y(relative[..., 0]))[..., None, None, :]
  x, z = relative[..., 1], relative[..., 2]
  there = jnp.stack([x, jnp.zeros_like(x), z], axis=-1)[..., None, None, :]
  joints = rotations.rotate(back, parts.joints) + there
  flat = lambda x: x.reshape(*x.shape[:-2], -1)
  moved = rotations.rotate(back, parts.moved)
  return jnp.concatenate([flat(joints), flat(moved), flat(parts.six), parts.contacts], axis=-1)


def interhuman_pair(
  joints: Float[Array, "*n T 2 22 3"],
  six: Float[Array, "*n T 2 21 6"],
  fps: float | Array = 30.0,
) -> Float[Array, "*n t 2 262"]:
  """Encodes two bodies in the canonical frame of the first, each on its own floor (code).

  Args:
    joints: world positions, m, y up (`y_up` of the raw files).
    six: as in `encode_interhuman`.
    fps: as in `contacts`.
  """
  shapes.check(joints=(joints, f"... T 2 {_J} 3"), six=(six, f"... T 2 {_J - 1} 6"))
  bodies = [joints[..., body, :, :] for body in range(2)]
  frames = [canonical_frame(body) for body in bodies]
  first, second = (
    encode_interhuman(to_frame(body, frame), six[..., i, :, :], fps)
    for i, (body, frame) in enumerate(zip(bodies, frames, strict=True))
  )
  return jnp.stack([first, placed(second, relative_pose(*frames))], axis=-2)


# --- HumanML3D ------------------------------------------------------------------------------------


def half_yaw(joints: Float[Array, "*n T 22 3"], smooth: float = 20.0) -> Float[Array, "*n T"]:
  """Half the yaw that turns each frame to +z, rad, 0 at the first frame (HumanML3D, code).

  Args:
    joints: canonical positions, y up.
    smooth: standard deviation of the Gaussian that smooths the facing direction, frames; 0: none.
  """
  (left, right), (left_arm, right_arm) = SMPL22.hips, SMPL22.shoulders
  of = lambda joint: joints[..., joint, :]
  ahead = _level(rotations.unit(of(right) - of(left) + of(right_arm) - of(left_arm)))
  if smooth:
    ahead = _smoothed(ahead, smooth)
  yaw = jnp.unwrap(2 * _half_yaw(rotations.unit(ahead)), axis=-1)
  return (yaw / 2).at[..., 0].set(0)


def _smoothed(x: Array, deviation: float) -> Array:
  """A Gaussian, four deviations wide, along the axis before the last; the ends are repeated."""
  radius = int(4 * deviation + 0.5)
  weight = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
  frames = x.shape[-2]
  source = np.clip(np.arange(frames)[:, None] + np.arange(-radius, radius + 1), 0, frames - 1)
  matrix = np.zeros((frames, frames))
  np.add.at(matrix, (np.arange(frames)[:, None], source), weight / weight.sum())
  return jnp.einsum("ts,...sd->...td", jnp.asarray(matrix, x.dtype), x, precision="highest")


def encode_humanml3d(
  joints: Float[Array, "*n T 22 3"],
  six: Float[Array, "*n T 21 6"],
  half: Float[Array, "*n T"] | None = None,
  fps: float | Array = 20.0,
) -> Float[Array, "*n t 263"]:
  """Encodes a canonical motion as the 263 features of HumanML3D (code).

  [0] change of the half yaw, rad per frame; [1:3] root velocity (x, z) in the facing frame of the next
  frame, m per frame; [3] root height, m; [4:67] 21 joints in the facing frame, below them the root's
  xz; [67:193] 6D rotations; [193:259] velocities of 22 joints in the facing frame; [259:263] contacts
  (squared speed below 0.002 at 20 fps, no height).

  Args:
    joints: canonical positions, m, y up; T at least 2.
    six: 6D rotations of all joints but the root.
    half: half yaw of every frame, rad, 0 at the first; None: `half_yaw`.
    fps: frames per second, for the contacts.
  """
  shapes.check(joints=(joints, f"... T {_J} 3"), six=(six, f"... T {_J - 1} 6"))
  at_least_two(joints)
  half = half_yaw(joints) if half is None else half
  turn = rotations.about_y(half)
  moved = joints[..., 1:, :, :] - joints[..., :-1, :, :]
  root_moved = rotations.rotate(turn[..., 1:, :], moved[..., 0, :])
  level = jnp.array([1, 0, 1], joints.dtype)
  local = rotations.rotate(turn[..., None, :], joints - joints[..., :1, :] * level)[..., :-1, :, :]
  velocity = rotations.rotate(turn[..., :-1, None, :], moved)
  touching = contacts(joints, SMPL22, fps, speed=0.002, published_fps=20.0, heights=False)
  spin = half[..., 1:] - half[..., :-1]
  flat = lambda x: x.reshape(*x.shape[:-2], -1)
  return jnp.concatenate(
    [
      jnp.arcsin(jnp.sin(spin))[..., None], root_moved[..., jnp.array([0, 2])],
      joints[..., :-1, 0, 1:2], flat(local[..., 1:, :]), flat(six[..., :-1, :, :]),
      flat(velocity), touching.astype(joints.dtype),
    ],
    axis=-1,
  )  # fmt: skip


class HumanML3D(NamedTuple):
  """What 263 features say: joints (..., 22, 3), half yaw (...,), 6D (..., 21, 6), contacts (..., 4)."""

  joints: Array
  half: Array
  six: Array
  contacts: Array


def decode_humanml3d(features: Float[Array, "*n T 263"]) -> HumanML3D:
  """Recovers joints by summing up the yaw and the root's velocity (HumanML3D, code)."""
  shapes.check(features=(features, f"... T {HUMANML3D}"))
  later = lambda x: jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=-2)
  half = jnp.cumsum(later(features[..., :1]), axis=-2)[..., 0]
  back = rotations.conjugate(rotations.about_y(half))
  x, z = features[..., 1], features[..., 2]
  moved = rotations.rotate(back, later(jnp.stack([x, jnp.zeros_like(x), z], axis=-1)))
  root = jnp.cumsum(moved, axis=-2).at[..., 1].add(features[..., 3])
  local = features[..., 4:67].reshape(*features.shape[:-1], _J - 1, 3)
  others = rotations.rotate(back[..., None, :], local)
  others = others + (root * jnp.array([1, 0, 1], root.dtype))[..., None, :]
  joints = jnp.concatenate([root[..., None, :], others], axis=-2)
  six = features[..., 67:193].reshape(*features.shape[:-1], _J - 1, 6)
  return HumanML3D(joints, half, six, features[..., 259:])


# --- clips ----------------------------------------------------------------------------------------


def mirrored(joints: Float[Array, "*n J 3"], skeleton: Skeleton = SMPL22) -> Float[Array, "*n J 3"]:
  """Reflects x and swaps left and right joints; labels and texts are the caller's to swap."""
  shapes.check(joints=(joints, f"... {skeleton.num_joints} 3"))
  return joints[..., jnp.array(skeleton.mirror), :] * jnp.array([-1, 1, 1], joints.dtype)


def resampled(clip: Float[Array, "T ..."], frames: int) -> Float[Array, "t ..."]:
  """Interpolates a clip linearly in time from its first to its last frame."""
  place = jnp.linspace(0.0, len(clip) - 1.0, frames)
  before = jnp.minimum(place.astype(int), max(len(clip) - 2, 0))
  share = (place - before).reshape(-1, *(1,) * (clip.ndim - 1)).astype(clip.dtype)
  after = jnp.minimum(before + 1, len(clip) - 1)
  return clip[before] * (1 - share) + clip[after] * share


def smoothed(joints: Float[Array, "*n T J 3"], deviation: float = 1.0) -> Float[Array, "*n T J 3"]:
  """Smooths positions in time by a Gaussian of `deviation` frames."""
  flat = joints.reshape(*joints.shape[:-2], -1)
  return _smoothed(flat, deviation).reshape(joints.shape)


class Scaling(NamedTuple):
  """z-scores: features minus `mean` by `std`, (F,) each."""

  mean: Array
  std: Array


def fit_scaling(
  features: Float[Array, "N T *e F"], mask: Bool[Array, "N T"] | None = None, floor: float = 1e-2
) -> Scaling:
  """Mean and deviation over the real frames of all bodies; of training clips only, please.

  Args:
    features: clips.
    mask: real frames; None: all.
    floor: deviations below it are raised to it.
  """
  weight = jnp.ones(features.shape[:2]) if mask is None else mask.astype(features.dtype)
  weight = jnp.broadcast_to(
    weight.reshape(*weight.shape, *(1,) * (features.ndim - 2)), (*features.shape[:-1], 1)
  )
  axes = tuple(range(features.ndim - 1))
  total = jnp.maximum(weight.sum(), 1)
  mean = (weight * features).sum(axes) / total
  variance = (weight * jnp.square(features - mean)).sum(axes) / total
  return Scaling(mean, jnp.maximum(jnp.sqrt(variance), floor))


def normalise(features: Float[Array, "*n F"], scaling: Scaling) -> Float[Array, "*n F"]:
  """Subtracts the mean and divides by the standard deviation of the training clips."""
  return (features - scaling.mean) / scaling.std


def denormalise(features: Float[Array, "*n F"], scaling: Scaling) -> Float[Array, "*n F"]:
  """Undoes `normalise`."""
  return features * scaling.std + scaling.mean


def frame_mask(lengths: Array, frames: int) -> Bool[Array, "*n T"]:
  """True at the first `lengths` frames of `frames`."""
  return jnp.arange(frames) < jnp.asarray(lengths)[..., None]
