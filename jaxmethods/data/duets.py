"""Generated motion: `embedded:duets`, two skeletons that are animated by rules.

One acts, the other answers; who is person 0 is drawn. Trunks follow paths on the floor, feet step under
them, hands reach for places by inverse kinematics of two bones. It is no motion of people, and every
report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxmethods.data.motion import MotionData
from jaxmethods.data.records import Source

NAME = "embedded:duets"
FPS = 15.0
PER_ACTION, FOLDS = 40, 5

JOINTS = (
  "head", "neck", "torso", "left_shoulder", "left_elbow", "left_hand", "right_shoulder", "right_elbow",
  "right_hand", "left_hip", "left_knee", "left_foot", "right_hip", "right_knee", "right_foot",
)  # fmt: skip
PARENTS = (1, 2, -1, 1, 3, 4, 1, 6, 7, 2, 9, 10, 2, 12, 13)
_HEAD, _NECK, _TORSO = 0, 1, 2
_ARMS, _LEGS = ((3, 4, 5), (6, 7, 8)), ((9, 10, 11), (12, 13, 14))
_SHORTEST, _LONGEST = 20, 32  # frames

# Lengths of a body 1.7 m high, m.
_TRUNK, _NECK_HEAD, _SHOULDERS, _HIPS = 0.3, 0.22, 0.19, 0.1
_UPPER_ARM, _FOREARM, _THIGH, _SHANK = 0.28, 0.26, 0.43, 0.4
_TORSO_HEIGHT, _HIP_DROP, _ANKLE = 1.08, 0.2, 0.08
_STEP_SECONDS, _LIFT = 0.45, 0.08
_JITTER = 0.006  # m


class _Pose(NamedTuple):
  """What a person does in the T frames of a clip, in the world.

  Attributes:
    root: (T, 2) place on the floor (x, z), m.
    yaw: (T,) direction ahead, rad from +z to +x.
    lean: (T,) of the trunk ahead, rad.
    hands: (T, 2, 3) where left and right hand reach for, m ...
    reach: (T, 2) ... and how far they follow it, 0 (hanging) .. 1.
    foot: (T, 3) where the right foot is thrown, m.
    kick: (T,) how far it follows, 0 (stepping) .. 1.
  """

  root: np.ndarray
  yaw: np.ndarray
  lean: np.ndarray
  hands: np.ndarray
  reach: np.ndarray
  foot: np.ndarray
  kick: np.ndarray


class _Scene(NamedTuple):
  """Draws of a clip: generator, time (T,) in 0..1, seconds, distance apart and moment of touch."""

  random: np.random.Generator
  time: np.ndarray
  seconds: float
  apart: float
  touch: float
  size: float  # of the bodies, as a share of 1.7 m


def generate(seed: int = 0) -> MotionData:
  """Animates `PER_ACTION` clips of each action, by turns, in `FOLDS` folds.

  Args:
    seed: of all draws.
  """
  names = tuple(ACTIONS)
  random = np.random.default_rng(seed)
  clips = [_clip(random, names[i % len(names)]) for i in range(PER_ACTION * len(names))]
  label = np.arange(len(clips), dtype=np.int32) % len(names)
  fold = (np.arange(len(clips), dtype=np.int32) // len(names)) % FOLDS
  source = Source(NAME, "jaxmethods.data.duets", "Apache-2.0", "", real=False)
  return MotionData(
    clips, FPS, label, names, fold, tuple(f"{names[k]}-{i}" for i, k in enumerate(label)), JOINTS,
    PARENTS, tuple(f"two persons: {names[k]}" for k in label), "", source,
  )  # fmt: skip


def _clip(random: np.random.Generator, action: str) -> np.ndarray:
  """One clip, (T, 2, 15, 3): acted on the z axis, then turned and moved as a whole."""
  frames = int(random.integers(_SHORTEST, _LONGEST + 1))
  scene = _Scene(
    random, np.linspace(0, 1, frames), frames / FPS, random.uniform(0.85, 1.15),
    random.uniform(0.4, 0.6), random.uniform(0.9, 1.1),
  )  # fmt: skip
  poses = ACTIONS[action](scene)
  bodies = np.stack([_body(pose, scene) for pose in poses], axis=1)
  bodies += _smooth_noise(random, bodies.shape)
  if random.random() < 0.5:
    bodies = bodies[:, ::-1]
  angle = random.uniform(-np.pi, np.pi)
  turned = _turned(bodies, angle) + np.append(random.normal(size=3)[:2], 0)[[0, 2, 1]]
  return turned.astype(np.float32)


def _smooth_noise(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  noise = random.normal(size=(shape[0] + 2, *shape[1:]))
  return _JITTER * (noise[:-2] + 2 * noise[1:-1] + noise[2:]) / 2


# --- actions --------------------------------------------------------------------------------------


def _bump(time: np.ndarray, at: float, width: float) -> np.ndarray:
  """Rises to 1 at a moment and falls again."""
  return np.exp(-0.5 * ((time - at) / width) ** 2)


def _ramp(time: np.ndarray, start: float, end: float) -> np.ndarray:
  """Rises smoothly from 0 to 1 between two moments."""
  x = np.clip((time - start) / (end - start), 0, 1)
  return x * x * (3 - 2 * x)


def _standing(scene: _Scene, z: np.ndarray | float, facing: float) -> _Pose:
  """Somebody at z, who looks along +z (facing 1) or -z (-1), arms hanging."""
  time = scene.time
  frames = len(time)
  root = np.stack([np.full(frames, scene.random.normal(0, 0.04)), z + 0 * time], axis=1)
  yaw = np.full(frames, 0.0 if facing > 0 else np.pi) + scene.random.normal(0, 0.08)
  zeros = np.zeros(frames)
  return _Pose(
    root, yaw, zeros + scene.random.normal(0, 0.03), np.zeros((frames, 2, 3)),
    np.zeros((frames, 2)), np.zeros((frames, 3)), zeros,
  )  # fmt: skip


def _facing(scene: _Scene, apart: np.ndarray | float) -> tuple[_Pose, _Pose]:
  """Two who look at each other."""
  half = np.asarray(apart) / 2
  return _standing(scene, -half, 1.0), _standing(scene, half, -1.0)


def _at(pose: _Pose, height: float, ahead: float = 0.0, side: float = 0.0) -> np.ndarray:
  """A place (T, 3) before a person, in its own directions; `side`: to its left."""
  forward = np.stack([np.sin(pose.yaw), np.cos(pose.yaw)], axis=1)
  left = np.stack([forward[:, 1], -forward[:, 0]], axis=1)
  place = pose.root + ahead * forward + side * left
  return np.stack([place[:, 0], np.full(len(place), height), place[:, 1]], axis=1)


def _reaching(pose: _Pose, hand: int, place: np.ndarray, amount: np.ndarray) -> _Pose:
  hands, reach = pose.hands.copy(), pose.reach.copy()
  hands[:, hand], reach[:, hand] = place, amount
  return pose._replace(hands=hands, reach=reach)


def _approach(scene: _Scene) -> tuple[_Pose, _Pose]:
  far, near = scene.random.uniform(1.8, 2.3), scene.random.uniform(0.65, 0.9)
  share = _ramp(scene.time, 0.02, scene.random.uniform(0.8, 1.0))
  one, other = _facing(scene, far)
  one.root[:, 1] += (far - near) * share
  return one, other


def _depart(scene: _Scene) -> tuple[_Pose, _Pose]:
  near, way = scene.random.uniform(0.65, 0.9), scene.random.uniform(0.9, 1.4)
  one, other = _facing(scene, near)
  turn = np.pi * _ramp(scene.time, 0.0, 0.35) * scene.random.choice([-1, 1])
  one.root[:, 1] -= way * _ramp(scene.time, 0.1, 1.0)
  return one._replace(yaw=one.yaw + turn), other


def _recoil(scene: _Scene, pose: _Pose, step: float, lean: float) -> _Pose:
  """Somebody who is hit: leans and steps back."""
  after = _ramp(scene.time, scene.touch, scene.touch + 0.25)
  back = np.stack([np.sin(pose.yaw), np.cos(pose.yaw)], axis=1)
  bump = _bump(scene.time, scene.touch + 0.12, 0.12)
  return pose._replace(root=pose.root - step * after[:, None] * back, lean=pose.lean - lean * bump)


def _push(scene: _Scene) -> tuple[_Pose, _Pose]:
  one, other = _facing(scene, 0.75 * scene.apart)
  one.root[:, 1] += 0.12 * _bump(scene.time, scene.touch, 0.2)
  chest = _at(other, 1.25 * scene.size, ahead=0.13)
  amount = _bump(scene.time, scene.touch, 0.13)
  for hand, side in ((0, 0.12), (1, -0.12)):
    one = _reaching(one, hand, chest + np.array([side, 0, 0]), amount)
  return one._replace(lean=one.lean + 0.2 * amount), _recoil(scene, other, 0.35, 0.25)


def _punch(scene: _Scene) -> tuple[_Pose, _Pose]:
  one, other = _facing(scene, 0.8 * scene.apart)
  one.root[:, 1] += 0.15 * _bump(scene.time, scene.touch, 0.2)
  face = _at(other, 1.48 * scene.size, ahead=0.12)
  draw = _at(one, 1.25 * scene.size, ahead=0.1, side=-0.25)
  back, hit = _bump(scene.time, scene.touch - 0.2, 0.1), _bump(scene.time, scene.touch, 0.06)
  place = face * hit[:, None] + draw * (1 - hit[:, None])
  one = _reaching(one, int(scene.random.random() < 0.8), place, np.maximum(back, hit))
  return one, _recoil(scene, other, 0.1, 0.3)


def _kick(scene: _Scene) -> tuple[_Pose, _Pose]:
  one, other = _facing(scene, 1.0 * scene.apart)
  hit = _bump(scene.time, scene.touch, 0.1)
  place = _at(other, scene.random.uniform(0.6, 0.95) * scene.size, ahead=0.15)
  return one._replace(foot=place, kick=hit, lean=one.lean - 0.2 * hit), _recoil(
    scene, other, 0.18, 0.12
  )


def _shake(scene: _Scene) -> tuple[_Pose, _Pose]:
  one, other = _facing(scene, 0.85 * scene.apart)
  held = _ramp(scene.time, 0.1, 0.35) * (1 - _ramp(scene.time, 0.75, 0.98))
  shakes = 0.05 * np.sin(2 * np.pi * scene.random.uniform(1.5, 2.5) * scene.seconds * scene.time)
  middle = (one.root + other.root) / 2
  height = np.full(len(middle), 1.05 * scene.size) + held * shakes
  place = np.stack([middle[:, 0], height, middle[:, 1]], axis=1)
  return _reaching(one, 1, place, held), _reaching(other, 1, place, held)


def _hug(scene: _Scene) -> tuple[_Pose, _Pose]:
  far, near = scene.random.uniform(0.9, 1.3), 0.36
  close = _ramp(scene.time, 0.05, 0.45) * (1 - 0.5 * _ramp(scene.time, 0.85, 1.0))
  one, other = _facing(scene, far - (far - near) * close)
  arms = _ramp(scene.time, 0.15, 0.5) * (1 - _ramp(scene.time, 0.85, 1.0))
  for hand, side in ((0, -0.1), (1, 0.1)):
    one, other = (
      _reaching(a, hand, _at(b, 1.2 * scene.size, ahead=-0.14, side=side), arms)
      for a, b in ((one, other), (other, one))
    )
  return one, other


def _hand_over(scene: _Scene) -> tuple[_Pose, _Pose]:
  one, other = _facing(scene, 0.95 * scene.apart)
  giving = _bump(scene.time, scene.touch, 0.14)
  middle = (one.root + other.root) / 2
  place = np.stack([middle[:, 0], np.full(len(middle), 1.15 * scene.size), middle[:, 1]], axis=1)
  carried = np.maximum(giving, 0.7 * (scene.time < scene.touch))
  taken = np.maximum(giving, 0.7 * (scene.time > scene.touch))
  before = lambda pose: _at(pose, 1.1 * scene.size, ahead=0.28, side=-0.1)
  mix = giving[:, None]
  hand = int(scene.random.random() < 0.8)
  one = _reaching(one, 1, place * mix + before(one) * (1 - mix), carried)
  return one, _reaching(other, hand, place * mix + before(other) * (1 - mix), taken)


ACTIONS: dict[str, Callable[[_Scene], tuple[_Pose, _Pose]]] = {
  "approach": _approach,
  "depart": _depart,
  "kick": _kick,
  "push": _push,
  "shake hands": _shake,
  "hug": _hug,
  "hand over": _hand_over,
  "punch": _punch,
}


# --- bodies ---------------------------------------------------------------------------------------


def _body(pose: _Pose, scene: _Scene) -> np.ndarray:
  """Joints (T, 15, 3) of a pose."""
  size, frames = scene.size, len(scene.time)
  joints = np.zeros((frames, len(JOINTS), 3))
  forward = np.stack([np.sin(pose.yaw), 0 * pose.yaw, np.cos(pose.yaw)], axis=1)
  left = np.stack([forward[:, 2], 0 * pose.yaw, -forward[:, 0]], axis=1)
  up = np.array([0.0, 1.0, 0.0])
  trunk = np.cos(pose.lean)[:, None] * up + np.sin(pose.lean)[:, None] * forward
  root = np.stack([pose.root[:, 0], 0 * pose.yaw, pose.root[:, 1]], axis=1)
  joints[:, _TORSO] = root + size * _TORSO_HEIGHT * up
  joints[:, _NECK] = joints[:, _TORSO] + size * _TRUNK * trunk
  joints[:, _HEAD] = joints[:, _NECK] + size * _NECK_HEAD * trunk
  phase = scene.random.random()
  for side, arm, leg in zip((1, -1), _ARMS, _LEGS, strict=True):
    number = 0 if side > 0 else 1
    shoulder = joints[:, _NECK] + size * (side * _SHOULDERS * left - 0.03 * trunk)
    hang = shoulder + size * (-0.5 * up + 0.06 * forward + side * 0.04 * left)
    reach = pose.reach[:, number, None]
    hand = reach * pose.hands[:, number] + (1 - reach) * hang
    down = -0.7 * up - 0.5 * forward + side * 0.5 * left
    joints[:, arm[0]] = shoulder
    joints[:, arm[1]], joints[:, arm[2]] = _two_bones(
      shoulder, hand, size * _UPPER_ARM, size * _FOREARM, down
    )
    hip = joints[:, _TORSO] + size * (side * _HIPS * left - _HIP_DROP * up)
    foot = _stepping(pose, scene, side, phase)
    kick = pose.kick[:, None] if side < 0 else 0.0
    foot = kick * pose.foot + (1 - kick) * foot
    joints[:, leg[0]] = hip
    joints[:, leg[1]], joints[:, leg[2]] = _two_bones(
      hip, foot, size * _THIGH, size * _SHANK, forward + 0.1 * side * left
    )
  return joints


def _stepping(pose: _Pose, scene: _Scene, side: int, phase: float) -> np.ndarray:
  """Path of a foot, (T, 3): it rests, then swings to where the body will be."""
  clock = scene.time * scene.seconds / _STEP_SECONDS + phase + (0.5 if side > 0 else 0.0)
  swing = np.clip(2 * (clock % 1.0), 0, 1)
  swung = swing * swing * (3 - 2 * swing)
  # The moments, in 0..1, at which the body is above the old and the new place.
  moment = lambda beat: (beat - phase - (0.5 if side > 0 else 0.0)) * _STEP_SECONDS / scene.seconds
  place = lambda beat: _under(pose, scene, np.clip(moment(beat), 0, 1), side)
  old, new = place(np.floor(clock) - 0.25), place(np.floor(clock) + 0.75)
  level = old + (new - old) * swung[:, None]
  moved = np.linalg.norm(new - old, axis=1)
  height = _ANKLE * scene.size + _LIFT * np.minimum(moved / 0.3, 1) * np.sin(np.pi * swing)
  return np.stack([level[:, 0], height, level[:, 1]], axis=1)


def _under(pose: _Pose, scene: _Scene, moment: np.ndarray, side: int) -> np.ndarray:
  """Place on the floor (T, 2) below the hip of a side at some moments."""
  yaw = np.interp(moment, scene.time, pose.yaw)
  root = np.stack([np.interp(moment, scene.time, pose.root[:, axis]) for axis in (0, 1)], axis=1)
  left = np.stack([np.cos(yaw), -np.sin(yaw)], axis=1)
  return root + side * _HIPS * scene.size * left


def _two_bones(
  start: np.ndarray, end: np.ndarray, first: float, second: float, bend: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Middle and end joint of a chain of two bones that reaches for `end` and bends towards `bend`."""
  way = end - start
  wanted = np.linalg.norm(way, axis=1, keepdims=True)
  far = np.clip(wanted, abs(first - second) + 0.02, 0.999 * (first + second))
  along = way / np.maximum(wanted, 1e-9)
  side = bend - (bend * along).sum(1, keepdims=True) * along
  side = side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9)
  share = (far**2 + first**2 - second**2) / (2 * far)
  height = np.sqrt(np.maximum(first**2 - share**2, 0))
  return start + share * along + height * side, start + far * along


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
  """Points turned about the upward axis."""
  x, y, z = np.moveaxis(points, -1, 0)
  c, s = np.cos(angle), np.sin(angle)
  return np.stack([c * x + s * z, y, c * z - s * x], axis=-1)
