"""Motions as files for others: npz, BVH, a moving picture, and the player."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmethods.runtime import motion_files, motion_page, motion_pictures
from jaxmethods.runtime.motion import Pair, Skeleton

PLAYER = "player.html"
_COLUMNS = 4  # of the moving picture


def player(
  pairs: Sequence[Pair], skeleton: Skeleton, about: str, persons: tuple[str, str]
) -> dict[str, str | bytes]:
  """The page that shows clips beside real ones.

  Args:
    pairs: generated clips, each beside a real one of the fold held out.
    skeleton: of all bodies.
    about: first line: the data.
    persons: names of the bodies.
  """
  title = "Human interaction: generated beside real"
  page = motion_page.render(pairs, skeleton, title=title, about=about, persons=persons)
  return {PLAYER: page}


def files(pairs: Sequence[Pair], skeleton: Skeleton) -> dict[str, str | bytes]:
  """All generated clips: `generated.npz`, a BVH for each person, `generated.gif` of the first ones.

  Args:
    pairs: as of `player`.
    skeleton: of all bodies.
  """
  clips = [pair.made for pair in pairs]
  found: dict[str, str | bytes] = {
    "generated.npz": motion_files.npz(clips, [pair.label for pair in pairs], skeleton),
    "generated.gif": motion_pictures.gif(pairs[:_COLUMNS], skeleton),
  }
  for i, clip in enumerate(clips, 1):
    persons = clip.positions.shape[1]
    for person in range(persons):
      ending = f"_person{person + 1}" if persons > 1 else ""
      found[f"generated_{i}{ending}.bvh"] = motion_files.bvh(clip, skeleton, person)
  return found
