"""Biovision hierarchies (.bvh): positions of the joints of one person.

A reader of our own: those on PyPI pin exact versions of a C++ extension (bvhio) or bring a renderer
(bvhtools). On a drawn clip its positions equalled those of bvhio 1.5.4.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmethods.errors import InputError

_AXES = {"X": 0, "Y": 1, "Z": 2}
# Heights of a body at rest, m, by which the unit of a file is told.
_LOW, _HIGH = 0.5, 3.0
_UNITS = {"m": 1.0, "cm": 0.01, "inch": 0.0254}


class Bvh(NamedTuple):
  """A clip.

  Attributes:
    positions: (T, J, 3) float32, m, in the axes of the file (y up by convention).
    fps: frames per second.
    names: of the joints; the end of a chain is NAME_end.
    parents: of each joint, -1 at the root.
    unit: of the file, guessed from the height of the body at rest.
  """

  positions: np.ndarray
  fps: float
  names: tuple[str, ...]
  parents: tuple[int, ...]
  unit: str


class _Joint(NamedTuple):
  """A joint: name, parent, offset from it, and channels such as Zrotation with their columns."""

  name: str
  parent: int
  offset: np.ndarray
  channels: tuple[tuple[str, int], ...]


def read(path: Path) -> Bvh:
  """Reads a file.

  Raises:
    InputError: it is no BVH file, names a channel that does not exist, has fewer or more numbers than
      its header says, or a body of no plausible height.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: not a readable BVH file ({error})") from None
  words = text.split()
  if "MOTION" not in words or words[0].upper() != "HIERARCHY":
    raise InputError(f"{path}: not a BVH file: expected HIERARCHY and MOTION")
  head = words.index("MOTION")
  joints = _hierarchy(path, words[1:head])
  frames, seconds, values = _numbers(path, words[head + 1 :])
  columns = sum(len(joint.channels) for joint in joints)
  if len(values) != frames * columns:
    raise InputError(
      f"{path}: {len(values)} numbers of motion, expected {frames} frames of {columns} channels"
    )
  unit = _unit(path, joints)
  positions = _UNITS[unit] * _forward(joints, values.reshape(frames, columns))
  names = tuple(joint.name for joint in joints)
  parents = tuple(joint.parent for joint in joints)
  return Bvh(positions.astype(np.float32), 1 / seconds, names, parents, unit)


def _hierarchy(path: Path, words: list[str]) -> list[_Joint]:
  joints: list[_Joint] = []
  open_joints: list[int] = []
  column, place = 0, 0
  try:
    while place < len(words):
      word = words[place]
      if word in ("ROOT", "JOINT", "End"):
        parent = open_joints[-1] if open_joints else -1
        name = f"{joints[parent].name}_end" if word == "End" else words[place + 1]
        joints.append(_Joint(name, parent, np.zeros(3), ()))
        place += 2
      elif word == "{":
        open_joints.append(len(joints) - 1)
        place += 1
      elif word == "}":
        open_joints.pop()
        place += 1
      elif word == "OFFSET":
        offset = np.array([float(x) for x in words[place + 1 : place + 4]])
        joints[open_joints[-1]] = joints[open_joints[-1]]._replace(offset=offset)
        place += 4
      elif word == "CHANNELS":
        count = int(words[place + 1])
        names = words[place + 2 : place + 2 + count]
        own = tuple((_channel(path, name), column + i) for i, name in enumerate(names))
        joints[open_joints[-1]] = joints[open_joints[-1]]._replace(channels=own)
        column, place = column + count, place + 2 + count
      else:
        raise InputError(f"{path}: {word!r} in the hierarchy: expected JOINT, OFFSET or CHANNELS")
  except (ValueError, IndexError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(
      f"{path}: a damaged hierarchy near {' '.join(words[place : place + 4])!r}"
    ) from None
  if open_joints or not joints:
    raise InputError(f"{path}: a hierarchy whose brackets do not close")
  return joints


def _channel(path: Path, name: str) -> str:
  if name[:1] not in _AXES or name[1:] not in ("position", "rotation"):
    raise InputError(f"{path}: unknown channel {name!r}, expected such as Xposition or Zrotation")
  return name


def _numbers(path: Path, words: list[str]) -> tuple[int, float, np.ndarray]:
  """Number of frames, seconds of one, and all numbers."""
  try:
    if words[0] != "Frames:" or words[2:4] != ["Frame", "Time:"]:
      raise ValueError
    frames, seconds = int(words[1]), float(words[4])
    values = np.array(words[5:], dtype=np.float64)
  except (ValueError, IndexError):
    raise InputError(f"{path}: expected Frames:, Frame Time: and numbers after MOTION") from None
  if frames < 1 or not seconds > 0:
    raise InputError(f"{path}: {frames} frames of {seconds:g} s: expected positive numbers")
  return frames, seconds, values


def _unit(path: Path, joints: list[_Joint]) -> str:
  rest = _forward([j._replace(channels=()) for j in joints], np.zeros((1, 0)))[0]
  height = float(np.ptp(rest[:, 1]))
  for unit, size in _UNITS.items():
    if _LOW <= height * size <= _HIGH:
      return unit
  raise InputError(
    f"{path}: the body at rest is {height:g} high: neither metres nor centimetres nor inches, y up"
  )


def _forward(joints: list[_Joint], values: np.ndarray) -> np.ndarray:
  """Forward kinematics, (T, J, 3): channels apply from left to right, each in the frame before it."""
  frames = len(values)
  places: list[np.ndarray] = []
  turns: list[np.ndarray] = []
  for joint in joints:
    offset = np.tile(joint.offset, (frames, 1))
    turn = np.tile(np.eye(3), (frames, 1, 1))
    for name, column in joint.channels:
      axis = _AXES[name[0]]
      if name[1:] == "position":
        # A position replaces the offset of a root and is none's below it, as exporters write them.
        offset[:, axis] = values[:, column]
      else:
        turn = turn @ _rotation(axis, np.radians(values[:, column]))
    if joint.parent < 0:
      places.append(offset)
      turns.append(turn)
    else:
      parent = turns[joint.parent]
      places.append(places[joint.parent] + np.einsum("tij,tj->ti", parent, offset))
      turns.append(parent @ turn)
  return np.stack(places, axis=1)


def _rotation(axis: int, angle: np.ndarray) -> np.ndarray:
  """Rotations about an axis, (T, 3, 3)."""
  made = np.tile(np.eye(3), (len(angle), 1, 1))
  a, b = (axis + 1) % 3, (axis + 2) % 3
  made[:, a, a] = made[:, b, b] = np.cos(angle)
  made[:, b, a], made[:, a, b] = np.sin(angle), -np.sin(angle)
  return made
