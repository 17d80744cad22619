"""A moving picture of clips (GIF): real above generated, a column for each label."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxmethods.errors import InputError
from jaxmethods.runtime.motion import Clip, Pair, Skeleton, checked, end_joint
from jaxmethods.runtime.motion_page import NEAR

_PERSONS = ((31, 122, 153), (209, 73, 91))
_TOUCH, _INK, _THING = (242, 169, 0), (29, 39, 51), (107, 91, 149)
_SKY, _FLOOR, _SHADE = (244, 247, 250), (205, 214, 222), (214, 221, 228)
_SMOOTH = 2  # pictures are drawn this much larger
_CELL = 0.5  # m
_PITCH = 0.22  # rad
_BONE, _THICK, _HEAD, _DOT = 0.034, 0.042, 0.105, 0.016  # radii, m
_EYE = 0.85  # m; height that the camera looks at
_ZOOM, _HORIZON = 1.25, 0.53
_HOLD = 0.5  # s


class _Camera(NamedTuple):
  """A pinhole: axes (right, up, ahead) (3, 3), what it aims at (3,), distance, pixels at distance 1."""

  axes: np.ndarray
  aim: np.ndarray
  far: float
  scale: float
  size: int

  def place(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (..., 2) and depth (...,) of points (..., 3)."""
    local = (points - self.aim) @ self.axes.T
    depth = self.far + local[..., 2]
    scale = self.scale / np.maximum(depth, 0.1)
    x = self.size / 2 + local[..., 0] * scale
    return np.stack([x, self.size * _HORIZON - local[..., 1] * scale], -1), depth


def gif(
  pairs: Sequence[Pair],
  skeleton: Skeleton,
  *,
  size: int = 190,
  fps: float = 12.5,
  sides: tuple[str, str] = ("real", "generated"),
) -> bytes:
  """Draws clips side by side, in time with each other.

  Args:
    pairs: a column each; a row of real clips is drawn where all have one.
    skeleton: of all bodies.
    size: of a clip's square, pixels.
    fps: of the picture; a GIF counts in hundredths of a second.
    sides: names of the rows.

  Raises:
    InputError: see `motion.checked`; no pairs.
  """
  if not pairs:
    raise InputError("a motion picture needs at least one clip, got none")
  rows = [("", [pair.made for pair in pairs])]
  if (real := [pair.real for pair in pairs if pair.real is not None]) and len(real) == len(pairs):
    rows = [(sides[0], real), (sides[1], rows[0][1])]
  for _, clips in rows:
    for clip in clips:
      checked(clip, skeleton)
  longest = max((len(clip.positions) - 1) / clip.fps for _, clips in rows for clip in clips)
  times = np.arange(0, longest + _HOLD, 1 / fps)
  frames = [_frame(rows, [pair.label for pair in pairs], skeleton, time, size) for time in times]
  palette = _palette(frames[len(frames) // 2])
  drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
  file = io.BytesIO()
  drawn[0].save(
    file, "GIF", save_all=True, append_images=drawn[1:], duration=round(1000 / fps), loop=0,
    optimize=True,
  )  # fmt: skip
  return file.getvalue()


def _palette(frame: Image.Image) -> Image.Image:
  """One palette for all frames, so that what stands still does not flicker; it knows what is rare."""
  rare = (*_PERSONS, _TOUCH, _THING)
  seen = Image.new("RGB", (frame.width, frame.height + 20 * len(rare)))
  seen.paste(frame, (0, 0))
  for i, colour in enumerate(rare):
    seen.paste(colour, (0, frame.height + 20 * i, frame.width, frame.height + 20 * (i + 1)))
  return seen.quantize(64, method=Image.Quantize.MEDIANCUT)


def _frame(
  rows: Sequence[tuple[str, Sequence[Clip]]],
  labels: Sequence[str],
  skeleton: Skeleton,
  time: float,
  size: int,
) -> Image.Image:
  top, side = 26, 26 if len(rows) > 1 else 0
  picture = Image.new("RGB", (side + size * len(labels), top + size * len(rows)), "white")
  font = ImageFont.load_default(13)
  draw = ImageDraw.Draw(picture)
  for column, label in enumerate(labels):
    middle = side + size * (column + 0.5)
    draw.text((middle, top / 2), label, _INK, font, anchor="mm")
  for row, (name, clips) in enumerate(rows):
    for column, clip in enumerate(clips):
      picture.paste(_panel(clip, skeleton, time, size), (side + size * column, top + size * row))
    if name:
      words = Image.new("RGB", (size, side), "white")
      ImageDraw.Draw(words).text((size / 2, side / 2), name, _INK, font, anchor="mm")
      picture.paste(words.rotate(90, expand=True), (0, top + size * row))
  return picture


def _panel(clip: Clip, skeleton: Skeleton, time: float, size: int) -> Image.Image:
  """One clip at a time, at its last frame after its end."""
  large = size * _SMOOTH
  picture = Image.new("RGB", (large, large), _SKY)
  draw = ImageDraw.Draw(picture)
  camera = _camera(clip, skeleton, large)
  place = min(time * clip.fps, len(clip.positions) - 1)
  low = int(place)
  high = min(low + 1, len(clip.positions) - 1)
  bodies = clip.positions[low] + (place - low) * (clip.positions[high] - clip.positions[low])
  _draw_floor(draw, camera)
  for joints in bodies:
    flat = joints * np.array([1, 0, 1])
    for child, parent in _bones(skeleton):
      _stroke(draw, camera, flat[[child, parent]], 0.045, _SHADE)
  things = clip.points if clip.points is not None else np.zeros((0, 3))
  _draw_bodies(draw, camera, bodies, skeleton, things if things.ndim == 2 else things[round(place)])
  if len(bodies) == 2:
    apart = np.linalg.norm(bodies[0][:, None] - bodies[1], axis=-1)
    for i, j in np.argwhere(apart < NEAR):
      for joint in (bodies[0][i], bodies[1][j]):
        _disc(draw, camera, joint, 0.055, _TOUCH)
  draw.rectangle((0, 0, large - 1, large - 1), outline="white", width=2 * _SMOOTH)
  return picture.resize((size, size), Image.Resampling.LANCZOS)


def _bones(skeleton: Skeleton) -> list[tuple[int, int]]:
  return [(child, parent) for child, parent in enumerate(skeleton.parents) if parent >= 0]


def _camera(clip: Clip, skeleton: Skeleton, size: int) -> _Camera:
  """Looks at the middle of the clip, from where two people stand beside each other."""
  roots = clip.positions[:, :, list(skeleton.parents).index(-1)]
  centre = roots.mean((0, 1)) * [1, 0, 1] + [0, _EYE, 0]
  yaw = 0.7
  if roots.shape[1] == 2:
    x, _, z = (roots[:, 1] - roots[:, 0]).mean(0)
    yaw = np.arctan2(-z, x) + 0.35
  (cy, sy), (cp, sp) = ((np.cos(a), np.sin(a)) for a in (yaw, _PITCH))
  axes = np.array([[cy, 0, -sy], [-sy * sp, cp, -cy * sp], [-sy * cp, -sp, -cy * cp]])
  wide = np.linalg.norm((clip.positions - centre)[..., [0, 2]], axis=-1).max()
  return _Camera(axes, centre, 2.5 + 1.25 * max(wide, 0.8), _ZOOM * size, size)


def _draw_floor(draw: ImageDraw.ImageDraw, camera: _Camera) -> None:
  reach = 2.5
  middle = np.round(camera.aim / _CELL) * _CELL
  for line in np.arange(-reach, reach + _CELL / 2, _CELL):
    for ends in (((line, -reach), (line, reach)), ((-reach, line), (reach, line))):
      points = np.array([(middle[0] + x, 0, middle[2] + z) for x, z in ends])
      at, depth = camera.place(points)
      if depth.min() > 0.2:
        draw.line([tuple(xy) for xy in at], _FLOOR, _SMOOTH)


def _draw_bodies(
  draw: ImageDraw.ImageDraw,
  camera: _Camera,
  bodies: np.ndarray,
  skeleton: Skeleton,
  things: np.ndarray,
) -> None:
  """Draws bones, heads and points of things from the farthest to the nearest, with a light edge."""
  parts: list[tuple[float, np.ndarray, float, tuple[int, ...]]] = [
    (float(camera.place(point)[1]), np.stack([point, point]), _DOT, _THING) for point in things
  ]
  for joints, colour in zip(bodies, _PERSONS, strict=False):
    depth = camera.place(joints)[1]
    for child, parent in _bones(skeleton):
      name = skeleton.names[child]
      light = ("left" in name) - ("right" in name)
      tone = _mixed(colour, 255 * (light > 0), 0.25 * abs(light))
      radius = _THICK if child in skeleton.trunk else _BONE
      parts.append((depth[[child, parent]].mean(), joints[[child, parent]], radius, tone))
    head = end_joint(skeleton)
    parts.append((depth[head] - 0.05, joints[[head, head]], _HEAD, colour))
  for _, ends, radius, tone in sorted(parts, key=lambda part: -part[0]):
    _stroke(draw, camera, ends, radius + 0.009, _SKY)
    _stroke(draw, camera, ends, radius, tone)


def _mixed(colour: tuple[int, ...], other: int, share: float) -> tuple[int, ...]:
  return tuple(round(value + share * (other - value)) for value in colour)


def _stroke(
  draw: ImageDraw.ImageDraw,
  camera: _Camera,
  ends: np.ndarray,
  radius: float,
  colour: tuple[int, ...],
) -> None:
  at, depth = camera.place(ends)
  width = 2 * radius * camera.scale / max(float(depth.mean()), 0.1)
  draw.line([tuple(xy) for xy in at], colour, max(1, round(width)))
  for end in ends:
    _disc(draw, camera, end, radius, colour)


def _disc(
  draw: ImageDraw.ImageDraw,
  camera: _Camera,
  point: np.ndarray,
  radius: float,
  colour: tuple[int, ...],
) -> None:
  (x, y), depth = camera.place(point)
  wide = radius * camera.scale / max(float(depth), 0.1)
  draw.ellipse((x - wide, y - wide, x + wide, y + wide), colour)
