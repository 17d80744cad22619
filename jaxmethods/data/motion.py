"""Clips of moving skeletons: the record, what a clip must be, and folds of clips."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmethods.data.records import Source
from jaxmethods.errors import InputError

# Features of a frame -> (features (T, F) -> joints (T, persons, J, 3), m, y up).
Decoders = Mapping[int, Callable[[np.ndarray], np.ndarray]]
UNLABELLED = "unlabelled"
_SHORTEST = 2  # frames
_NOTHING = 1e-6  # m; a bone must be longer


class MotionData(NamedTuple):
  """Clips of one skeleton and one number of persons.

  Attributes:
    clips: world positions (T, persons, J, 3) float32, m, y up; T differs.
    fps: frames per second of all.
    label: of each clip, a place in `label_names`, (n,) int32.
    label_names: of the actions.
    fold: of each clip, (n,) int32; -1: the source has no folds.
    names: of the clips, for messages.
    joint_names: J names.
    parents: of each joint, -1 at the root.
    texts: of each clip, "" without.
    notes: what was left out or guessed, one line; may be empty.
    source: provenance.
  """

  clips: list[np.ndarray]
  fps: float
  label: np.ndarray
  label_names: tuple[str, ...]
  fold: np.ndarray
  names: tuple[str, ...]
  joint_names: tuple[str, ...]
  parents: tuple[int, ...]
  texts: tuple[str, ...]
  notes: str
  source: Source

  @property
  def persons(self) -> int:
    return self.clips[0].shape[1]


# --- checks ---------------------------------------------------------------------------------------


def checked(data: MotionData) -> MotionData:
  """Returns clips that can be used.

  Raises:
    InputError: naming clip, frame and joint: fewer than two frames, positions that are not finite, other
      numbers of joints or persons than the first clip, a bone of length zero.
  """
  where = data.source.name
  if not data.clips:
    raise InputError(f"{where}: no clips in it")
  joints = len(data.joint_names)
  children = [(joint, parent) for joint, parent in enumerate(data.parents) if parent >= 0]
  for clip, name in zip(data.clips, data.names, strict=True):
    if clip.shape[2] != joints:
      raise InputError(
        f"{where}: clip {name} has {clip.shape[2]} joints, the others {joints}: expected one skeleton"
      )
    if clip.shape[1] != data.persons:
      raise InputError(
        f"{where}: clip {name} has {clip.shape[1]} persons, the others {data.persons}: its partner is "
        "missing, or one too many"
      )
    if len(clip) < _SHORTEST:
      raise InputError(
        f"{where}: clip {name} has {len(clip)} frame{'s' * (len(clip) != 1)}, expected at least "
        f"{_SHORTEST}"
      )
    if not (finite := np.isfinite(clip).all(-1)).all():
      frame, person, joint = np.argwhere(~finite)[0]
      raise InputError(
        f"{where}: clip {name}, frame {frame}, person {person}: joint {data.joint_names[joint]} is not "
        "finite"
      )
    _check_bones(where, name, clip, children, data.joint_names)
  return data


def _check_bones(
  where: str,
  name: str,
  clip: np.ndarray,
  children: Sequence[tuple[int, int]],
  joint_names: Sequence[str],
) -> None:
  if not children:
    return
  child, parent = np.array(children).T
  length = np.linalg.norm(clip[:, :, child] - clip[:, :, parent], axis=-1)
  if (short := length < _NOTHING).any():
    frame, person, bone = np.argwhere(short)[0]
    raise InputError(
      f"{where}: clip {name}, frame {frame}, person {person}: the bone {joint_names[parent[bone]]} - "
      f"{joint_names[child[bone]]} has length 0"
    )


# --- folds ----------------------------------------------------------------------------------------


def with_folds(data: MotionData, count: int) -> MotionData:
  """Deals clips out to folds, label by label in the order of a checksum of their names.

  A source with folds of its own keeps them.

  Raises:
    InputError: fewer folds than asked for.
  """
  if (data.fold >= 0).all():
    own = int(data.fold.max()) + 1
    if own != count:
      raise InputError(f"folds: {data.source.name} has {own} folds, got {count}")
    return data
  order = sorted(range(len(data.clips)), key=lambda i: zlib.crc32(data.names[i].encode()))
  fold, dealt = np.zeros(len(data.clips), np.int32), dict[int, int]()
  for i in order:
    label = int(data.label[i])
    fold[i] = dealt.get(label, label) % count
    dealt[label] = int(fold[i]) + 1
  return data._replace(fold=fold)


def split(data: MotionData, fold: int) -> tuple[np.ndarray, np.ndarray]:
  """Places of the clips outside a fold (training) and in it (test).

  Raises:
    InputError: a part is empty, or the test part has a label that is never trained.
  """
  test = data.fold == fold
  for part, chosen in (("training", ~test), ("test", test)):
    if not chosen.any():
      raise InputError(f"fold: fold {fold} of {data.source.name} leaves no {part} clip")
  if strangers := set(data.label[test]) - set(data.label[~test]):
    name = data.label_names[min(strangers)]
    raise InputError(
      f"fold: label {name!r} of {data.source.name} is in fold {fold} only: it would never be trained"
    )
  return np.flatnonzero(~test), np.flatnonzero(test)
