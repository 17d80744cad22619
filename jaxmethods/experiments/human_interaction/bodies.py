"""Skeletons of clips: a known one, or one whose hips, hands and feet are told by the names of joints."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmethods.errors import InputError
from jaxmethods.methods.human_interaction.skeleton import SBU15, SMPL22, Skeleton

# Words of which one is in the name of a joint, the likelier first.
_ROLES = {
  "hips": ("hip", "upleg", "thigh", "upperleg"),
  "shoulders": ("shoulder", "uparm", "upperarm", "arm", "collar"),
  "hands": ("hand", "wrist"),
  "feet": ("foot", "ankle"),
}
_SIDES = (("left", "l"), ("right", "r"))
_FOOT_HEIGHT, _SLIDING_HEIGHT = 0.12, 0.08  # m, as an ankle's


def skeleton_of(names: Sequence[str], parents: Sequence[int]) -> Skeleton:
  """Finds the skeleton of clips.

  Raises:
    InputError: no name says which joint is a hip, shoulder, hand or foot.
  """
  for known in (SBU15, SMPL22):
    if tuple(parents) == known.parents:
      return known
  pairs = {role: _pair(names, role) for role in _ROLES}
  trunk = {
    joint for joint in range(len(names))
    if not any(_side(name) for name in _to_root(joint, names, parents))
  } | {*pairs["hips"], *pairs["shoulders"]}  # fmt: skip
  return Skeleton(
    tuple(names), tuple(parents), pairs["hips"], pairs["shoulders"], pairs["hands"], pairs["feet"],
    (_FOOT_HEIGHT,) * 2, (_SLIDING_HEIGHT,) * 2, pairs["feet"], frozenset(trunk),
  )  # fmt: skip


def _pair(names: Sequence[str], role: str) -> tuple[int, int]:
  """Left and right joint of a role."""
  for word in _ROLES[role]:
    found = [
      next((i for i, n in enumerate(names) if word in _plain(n) and _side(n) == side), -1)
      for side in ("left", "right")
    ]
    if min(found) >= 0:
      return found[0], found[1]
  raise InputError(
    f"data: no joint is the left and right of {role}: expected names such as left_{_ROLES[role][0]}, "
    f"got {', '.join(names[:8])}, ..."
  )


def _plain(name: str) -> str:
  return name.rpartition(":")[2].lower().replace("_", "").replace(" ", "").replace(".", "")


def _side(name: str) -> str:
  """left, right, or nothing."""
  plain = _plain(name)
  for word, letter in _SIDES:
    if word in plain:
      return word
    rest = name.rpartition(":")[2]
    if rest[:1].lower() == letter and (rest[1:2].isupper() or rest[1:2] in "_."):
      return word
    if rest[-2:].lower() in (f"_{letter}", f".{letter}"):
      return word
  return ""


def _to_root(joint: int, names: Sequence[str], parents: Sequence[int]) -> list[str]:
  found = []
  while joint >= 0:
    found.append(names[joint])
    joint = parents[joint]
  return found
