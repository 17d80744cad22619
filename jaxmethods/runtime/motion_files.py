"""Clips as files of others: BVH, one person a file, and npz, which `motion:FILE.npz` reads again."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.runtime.motion import Clip, Skeleton, checked

_CENTI = 100.0
_ROUND = 1e-9
# Share of the parent's turn in a turn that several bones determine: it decides where they cannot.
_INHERITED = 1e-3
_END = 0.25  # of the last bone's length


def npz(clips: Sequence[Clip], labels: Sequence[str], skeleton: Skeleton) -> bytes:
  """Packs clips of one frame rate: positions (N, persons, J, 3) and offsets (n + 1,).

  Clip i is `positions[offsets[i] : offsets[i + 1]]`, m, y up. Beside: `fps`, `label` (n,) with
  `label_names`, `name` (n,), `joint_names`, `parents`.

  Raises:
    InputError: no clips, or clips of different frame rates or numbers of persons.
  """
  if not clips or len({(clip.fps, clip.positions.shape[1]) for clip in clips}) > 1:
    raise InputError("npz: expected clips of one frame rate and one number of persons")
  names = sorted(set(labels))
  file = io.BytesIO()
  np.savez_compressed(
    file,
    positions=np.concatenate([checked(clip, skeleton).positions for clip in clips]).astype("f4"),
    offsets=np.cumsum([0] + [len(clip.positions) for clip in clips]),
    fps=np.float64(clips[0].fps),
    label=np.array([names.index(label) for label in labels], np.int32),
    label_names=np.array(names),
    name=np.array([clip.name for clip in clips]),
    joint_names=np.array(skeleton.names),
    parents=np.array(skeleton.parents, np.int32),
  )
  return file.getvalue()


# --- BVH ------------------------------------------------------------------------------------------


def bvh(clip: Clip, skeleton: Skeleton, person: int = 0, *, exact: bool = True) -> str:
  """Writes one person as a Biovision hierarchy in centimetres, y up.

  Rotations are fitted to the bones: a joint with one child turns as little as it can, one with several
  as their directions say (least squares). The body at rest is the clip's most upright frame with the
  mean lengths of its bones. The ends of hands, feet and head are invented: a quarter of the last bone.
  bvhio 1.5.4 read an exact file to 2e-6 m; without `exact` a clip of SBU, whose bones jitter, was off by
  1.3 cm on average.

  Args:
    clip: what is written.
    skeleton: of it.
    person: which.
    exact: whether every joint has channels of its position, so that bones may stretch and all positions
      are kept; else only the root has, as rigs expect it, and bones have their mean length.

  Raises:
    InputError: see `motion.checked`; a bone of length zero.
  """
  positions = np.asarray(checked(clip, skeleton).positions[:, person], np.float64)
  order = _order(skeleton.parents)
  rest = _rest(clip.name, positions, skeleton)
  turns = _turns(positions, rest, skeleton.parents, order)
  columns = [
    _channels(positions, turns, skeleton.parents, joint, exact or skeleton.parents[joint] < 0)
    for joint in order
  ]
  frames = "\n".join(
    " ".join(f"{value:.5f}" for value in row) for row in np.concatenate(columns, axis=1)
  )
  tree = "\n".join(_hierarchy(skeleton, rest, order[0], exact, 0))
  head = f"Frames: {len(positions)}\nFrame Time: {1 / clip.fps:.8f}"
  return f"HIERARCHY\n{tree}\nMOTION\n{head}\n{frames}\n"


def _children(parents: Sequence[int], joint: int) -> list[int]:
  return [child for child, parent in enumerate(parents) if parent == joint]


def _order(parents: Sequence[int]) -> list[int]:
  """Joints from the root, depth first: parents may have any index."""
  found, waiting = [], [list(parents).index(-1)]
  while waiting:
    joint = waiting.pop()
    found.append(joint)
    waiting += reversed(_children(parents, joint))
  return found


def _rest(name: str, positions: np.ndarray, skeleton: Skeleton) -> np.ndarray:
  """Offset of every joint to its parent at rest, (J, 3), m; 0 at the root."""
  upright = int(np.ptp(positions[..., 1], axis=1).argmax())
  rest = np.zeros(positions.shape[1:])
  for joint, parent in enumerate(skeleton.parents):
    if parent < 0:
      continue
    bone = positions[:, joint] - positions[:, parent]
    length = np.linalg.norm(bone, axis=1)
    if (short := length < _ROUND).any():
      raise InputError(
        f"clip {name}, frame {int(short.argmax())}: the bone {skeleton.names[parent]} - "
        f"{skeleton.names[joint]} has length 0"
      )
    rest[joint] = bone[upright] / length[upright] * length.mean()
  return rest


def _turns(
  positions: np.ndarray, rest: np.ndarray, parents: Sequence[int], order: Sequence[int]
) -> np.ndarray:
  """Turns of all joints from rest, in the world, (J, T, 3, 3)."""
  frames = len(positions)
  turns = np.tile(np.eye(3), (len(parents), frames, 1, 1))
  for joint in order:
    inherited = turns[parents[joint]] if parents[joint] >= 0 else turns[joint]
    children = _children(parents, joint)
    bones = positions[:, children] - positions[:, joint, None]
    if len(children) == 1:
      now = np.einsum("tij,j->ti", inherited, rest[children[0]])
      turns[joint] = _between(now, bones[:, 0]) @ inherited
    elif children:
      turns[joint] = _fitted(rest[children], bones, inherited)
    else:
      turns[joint] = inherited
  return turns


def _between(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """The shortest rotations of u to v, (T, 3, 3)."""
  u, v = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, v))
  axis, cosine = np.cross(u, v), (u * v).sum(-1)
  cross = np.zeros((len(u), 3, 3))
  for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
    cross[:, j, i], cross[:, i, j] = axis[:, k], -axis[:, k]
  made = np.eye(3) + cross + cross @ cross / np.maximum(1 + cosine, _ROUND)[:, None, None]
  # Half a turn, about anything across.
  side = np.cross(u, np.eye(3)[np.abs(u).argmin(-1)])
  side /= np.linalg.norm(side, axis=-1, keepdims=True)
  half = 2 * side[:, :, None] * side[:, None] - np.eye(3)
  return np.where((cosine < _ROUND - 1)[:, None, None], half, made)


def _fitted(rest: np.ndarray, bones: np.ndarray, inherited: np.ndarray) -> np.ndarray:
  """Rotations that fit directions at rest (k, 3) to those of every frame (T, k, 3) (Kabsch)."""
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  both = np.einsum("tki,kj->tij", unit(bones), unit(rest)) + _INHERITED * inherited
  left, _, right = np.linalg.svd(both)
  left[..., -1] *= np.linalg.det(left @ right)[:, None]
  return left @ right


def _channels(
  positions: np.ndarray, turns: np.ndarray, parents: Sequence[int], joint: int, moves: bool
) -> np.ndarray:
  """Columns of a joint: its position, cm, if it `moves`, and its rotation, degrees."""
  parent = parents[joint]
  if parent < 0:
    place, turn = positions[:, joint], turns[joint]
  else:
    back = np.swapaxes(turns[parent], 1, 2)
    place = np.einsum("tij,tj->ti", back, positions[:, joint] - positions[:, parent])
    turn = back @ turns[joint]
  angles = _euler(turn)
  return np.concatenate([_CENTI * place, angles], axis=1) if moves else angles


def _euler(turn: np.ndarray) -> np.ndarray:
  """Angles (T, 3), degrees, with turn = Rz Rx Ry; continuous in time."""
  x = np.arcsin(np.clip(turn[:, 2, 1], -1, 1))
  locked = np.abs(np.cos(x)) < 1e-6
  z = np.where(
    locked, np.arctan2(turn[:, 1, 0], turn[:, 0, 0]), np.arctan2(-turn[:, 0, 1], turn[:, 1, 1])
  )
  y = np.where(locked, 0, np.arctan2(-turn[:, 2, 0], turn[:, 2, 2]))
  return np.degrees(np.unwrap(np.stack([z, x, y], axis=1), axis=0))


def _hierarchy(
  skeleton: Skeleton, rest: np.ndarray, joint: int, exact: bool, depth: int
) -> list[str]:
  """Lines of a joint and of all below it."""
  root, space = skeleton.parents[joint] < 0, "  " * depth
  offset = lambda x: "OFFSET " + " ".join(f"{value:.5f}" for value in _CENTI * x)
  moves = "6 Xposition Yposition Zposition" if root or exact else "3"
  lines = [
    f"{space}{'ROOT' if root else 'JOINT'} {skeleton.names[joint]}",
    f"{space}{{",
    f"{space}  {offset(rest[joint])}",
    f"{space}  CHANNELS {moves} Zrotation Xrotation Yrotation",
  ]
  children = _children(skeleton.parents, joint)
  for child in children:
    lines += _hierarchy(skeleton, rest, child, exact, depth + 1)
  if not children:
    end = offset(_END * rest[joint])
    lines += [f"{space}  End Site", f"{space}  {{", f"{space}    {end}", f"{space}  }}"]
  return [*lines, f"{space}}}"]
