"""Skeletons: the 22 joints of SMPL, and the 15 of the SBU Kinect interactions."""

from __future__ import annotations

from typing import NamedTuple


class Skeleton(NamedTuple):
  """Joints of a body, by their index. Plain tuples: it can be static in a jitted function.

  Attributes:
    names: of the joints.
    parents: of each joint, -1 at the root.
    hips: left, right.
    shoulders: left, right.
    hands: left, right.
    feet: joints that touch the ground; left, then right.
    foot_heights: below it a joint of `feet` can be in contact, m.
    sliding_heights: below it a joint of `feet` can slide, m (OMOMO).
    toes: lowest joint of the left and of the right foot.
    trunk: joints whose bone to their parent is thick.
  """

  names: tuple[str, ...]
  parents: tuple[int, ...]
  hips: tuple[int, int]
  shoulders: tuple[int, int]
  hands: tuple[int, int]
  feet: tuple[int, ...]
  foot_heights: tuple[float, ...]
  sliding_heights: tuple[float, ...]
  toes: tuple[int, int]
  trunk: frozenset[int]

  @property
  def num_joints(self) -> int:
    return len(self.names)

  @property
  def root(self) -> int:
    return self.parents.index(-1)

  @property
  def bones(self) -> tuple[tuple[int, int], ...]:
    """(joint, parent) of every joint but the root."""
    return tuple((joint, parent) for joint, parent in enumerate(self.parents) if parent >= 0)

  @property
  def mirror(self) -> tuple[int, ...]:
    """The joint on the other side of each joint, itself in the middle."""
    swap = {"left": "right", "right": "left"}
    others = ("_".join(swap.get(word, word) for word in name.split("_")) for name in self.names)
    return tuple(map(self.names.index, others))


SMPL22 = Skeleton(
  names=(
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle",
    "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar",
    "head", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist",
    "right_wrist",
  ),
  parents=(-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19),
  hips=(1, 2),
  shoulders=(16, 17),
  hands=(20, 21),
  feet=(7, 10, 8, 11),
  foot_heights=(0.12, 0.05, 0.12, 0.05),
  sliding_heights=(0.08, 0.04, 0.08, 0.04),
  toes=(10, 11),
  trunk=frozenset({1, 2, 3, 6, 9, 12, 13, 14, 15}),
)  # fmt: skip

# Its one foot joint is high on the foot: the height of an ankle (inferred).
SBU15 = Skeleton(
  names=(
    "head", "neck", "torso", "left_shoulder", "left_elbow", "left_hand", "right_shoulder",
    "right_elbow", "right_hand", "left_hip", "left_knee", "left_foot", "right_hip", "right_knee",
    "right_foot",
  ),
  parents=(1, 2, -1, 1, 3, 4, 1, 6, 7, 2, 9, 10, 2, 12, 13),
  hips=(9, 12),
  shoulders=(3, 6),
  hands=(5, 8),
  feet=(11, 14),
  foot_heights=(0.12, 0.12),
  sliding_heights=(0.08, 0.08),
  toes=(11, 14),
  trunk=frozenset({0, 1, 3, 6, 9, 12}),
)  # fmt: skip
