"""Clips of moving skeletons as they are shown: positions, frame rate, words. Plain arrays, no jax."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxmethods.errors import InputError


class Skeleton(Protocol):
  """What is read of a skeleton, such as `methods.human_interaction.skeleton.SMPL22`."""

  @property
  def names(self) -> Sequence[str]: ...
  @property
  def parents(self) -> Sequence[int]: ...
  @property
  def hips(self) -> tuple[int, int]: ...
  @property
  def shoulders(self) -> tuple[int, int]: ...
  @property
  def hands(self) -> tuple[int, int]: ...
  @property
  def feet(self) -> Sequence[int]: ...
  @property
  def foot_heights(self) -> Sequence[float]: ...
  @property
  def trunk(self) -> Collection[int]: ...


class Clip(NamedTuple):
  """A clip of one or two persons.

  Attributes:
    positions: (T, persons, J, 3), m, y up, floor at 0.
    fps: frames per second.
    name: of the clip.
    points: surface of an object at each frame (T, V, 3), or of a scene (V, 3), m; None: there is none.
  """

  positions: np.ndarray
  fps: float
  name: str
  points: np.ndarray | None = None


class Pair(NamedTuple):
  """What is looked at side by side: a generated clip and a real one of the same label, or none."""

  label: str
  made: Clip
  real: Clip | None = None


def checked(clip: Clip, skeleton: Skeleton) -> Clip:
  """Returns the clip.

  Raises:
    InputError: naming clip and frame: no frame, another number of joints or more than two persons than
      can be drawn, positions that are not finite, a frame rate that is not positive.
  """
  shape, joints = clip.positions.shape, len(skeleton.names)
  if len(shape) != 4 or shape[0] < 1 or shape[1] not in (1, 2) or shape[2:] != (joints, 3):
    raise InputError(
      f"clip {clip.name}: positions of shape {shape}, expected (frames, 1 or 2, {joints}, 3)"
    )
  if not (finite := np.isfinite(clip.positions).all((1, 2, 3))).all():
    raise InputError(f"clip {clip.name}, frame {int(finite.argmin())}: a joint is not finite")
  if not clip.fps > 0:
    raise InputError(f"clip {clip.name}: fps {clip.fps}, expected a positive number")
  return clip


def end_joint(skeleton: Skeleton) -> int:
  """The head: the end of a chain that is neither hand nor foot, the last if there are several."""
  inner = set(skeleton.parents) | {*skeleton.hands, *skeleton.feet}
  return max(set(range(len(skeleton.names))) - inner)
