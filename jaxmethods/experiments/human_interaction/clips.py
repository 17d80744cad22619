"""Clips as the network sees them: cut, put into their canonical frame, encoded, scaled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import ndimage

from jaxmethods.data import motion, motion_sources
from jaxmethods.data.motion import MotionData
from jaxmethods.errors import InputError
from jaxmethods.experiments.human_interaction import bodies
from jaxmethods.experiments.human_interaction.config import ClipSettings, Task
from jaxmethods.methods.human_interaction import representation
from jaxmethods.methods.human_interaction.representation import Scaling
from jaxmethods.methods.human_interaction.skeleton import Skeleton


class Part(NamedTuple):
  """Training or test clips.

  Attributes:
    joints: canonical positions (n, T, E, J, 3), m.
    features: normalised (n, T, E, F).
    label: (n,) int32.
  """

  joints: Array
  features: Array
  label: Array


class Clips(NamedTuple):
  """All clips of a run.

  Attributes:
    train: with mirrored and swapped ones.
    test: of the fold held out.
    scaling: of training features.
    skeleton: of the bodies.
    fps: frames per second; the median where clips were resampled.
    label_names: of the actions.
    about: one line.
  """

  train: Part
  test: Part
  scaling: Scaling
  skeleton: Skeleton
  fps: float
  label_names: tuple[str, ...]
  about: str


def load(settings: ClipSettings, task: Task) -> Clips:
  """Loads and cuts the clips of a fold.

  Raises:
    InputError: clips that do not fit the task, see `motion_sources.load`.
  """
  data = motion.with_folds(_read(settings), settings.folds)
  if task == "hhi" and data.persons != 2:
    raise InputError(
      f"task: hhi needs clips of two persons; those of {settings.data} have {data.persons}: the partner "
      "is missing"
    )
  if len(data.label_names) < 2:
    raise InputError(
      f"data: {settings.data} has one label, {data.label_names[0]!r}; the evaluator needs two: give an "
      "array label, folders LABEL/FILE, or label_words"
    )
  skeleton = bodies.skeleton_of(data.joint_names, data.parents)
  fold = settings.fold % settings.folds
  train, test = motion.split(data, fold)
  parts, rates = [], []
  for chosen in (train, test):
    joints, rate, label = _cut(data, chosen, settings, task)
    parts.append((joints, rate, label))
    rates.append(rate)
  made = [
    _canonical(joints, rate, label, skeleton, settings.augment and part == 0)
    for part, (joints, rate, label) in enumerate(parts)
  ]
  scaling = jax.jit(representation.fit_scaling)(made[0][1])
  scale = jax.jit(representation.normalise)
  learnt, held_out = (
    Part(joints, scale(features, scaling), label) for joints, features, label in made
  )
  about = (
    f"{motion_sources.describe(data)}; fold {fold} of {settings.folds} held out: "
    f"{len(parts[0][0])} clips to train on, {len(parts[1][0])} to test, {settings.frames} frames each"
  )
  fps = float(np.median(np.concatenate(rates)))
  return Clips(learnt, held_out, scaling, skeleton, fps, data.label_names, about)


def _read(settings: ClipSettings) -> MotionData:
  return motion_sources.load(
    settings.data, seed=settings.data_seed, fps=settings.fps, label_words=settings.label_words,
    decoders={
      representation.HUMANML3D: lambda x: _decoded(representation.decode_humanml3d, x),
      representation.INTERHUMAN: lambda x: _decoded(representation.decode_interhuman, x),
    },
  )  # fmt: skip


def _decoded(decode: Callable, values: np.ndarray) -> np.ndarray:
  """Joints (T, 1, J, 3) of features (T, F)."""
  return np.asarray(decode(jnp.asarray(values, jnp.float32)).joints)[:, None]


def _cut(
  data: MotionData, chosen: np.ndarray, settings: ClipSettings, task: Task
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Clips of T + 1 frames (n, T + 1, E, J, 3), their frame rates and labels."""
  length, found, rates, labels = settings.frames + 1, [], [], []
  for i in chosen:
    clip = data.clips[i]
    if settings.smooth:
      clip = ndimage.gaussian_filter1d(clip, settings.smooth, axis=0, mode="nearest")
    pieces = _pieces(clip, length, settings)
    # One-person tasks take every body as a clip of its own.
    split = (clip,) if task == "hhi" else np.split(clip, clip.shape[1], axis=1)
    for body in split if settings.clips == "whole" else ():
      found.append(resampled(body, length))
      rates.append(data.fps * (length - 1) / (len(body) - 1))
      labels.append(data.label[i])
    for piece in pieces:
      for body in (piece,) if task == "hhi" else np.split(piece, piece.shape[1], axis=1):
        found.append(body)
        rates.append(data.fps)
        labels.append(data.label[i])
  if not found:
    raise InputError(f"frames: no clip of {settings.data} has {length} frames: ask for fewer")
  return np.stack(found), np.array(rates), np.array(labels, np.int32)


def _pieces(clip: np.ndarray, length: int, settings: ClipSettings) -> list[np.ndarray]:
  """Windows of a clip; none of whole clips."""
  if settings.clips == "whole":
    return []
  return [clip[a : a + length] for a in range(0, len(clip) - length + 1, settings.stride)]


def resampled(clip: np.ndarray, frames: int) -> np.ndarray:
  """`representation.resampled` without a compiled program for every length."""
  place = np.linspace(0, len(clip) - 1, frames)
  before = np.minimum(place.astype(int), max(len(clip) - 2, 0))
  share = (place - before).reshape(-1, *(1,) * (clip.ndim - 1)).astype(clip.dtype)
  return clip[before] * (1 - share) + clip[np.minimum(before + 1, len(clip) - 1)] * share


def _canonical(
  joints: np.ndarray, rate: np.ndarray, label: np.ndarray, skeleton: Skeleton, augment: bool
) -> tuple[Array, Array, Array]:
  """Canonical positions and features of T frames, with variants, and labels."""
  variants = [joints]
  if augment:
    mirror, flip = np.array(skeleton.mirror), np.array([-1, 1, 1], joints.dtype)
    variants.append(joints[..., mirror, :] * flip)
    if joints.shape[2] == 2:
      variants += [x[:, :, ::-1] for x in variants]
  every, count = np.concatenate(variants), len(variants)
  run = jax.jit(functools.partial(canonical, skeleton=skeleton))
  placed, features = run(every, np.tile(rate, count).astype(np.float32))
  return placed[:, :-1], features, jnp.asarray(np.tile(label, count))


def canonical(joints: Array, fps: Array, skeleton: Skeleton) -> tuple[Array, Array]:
  """Canonical positions (n, T + 1, E, J, 3) and features (n, T, E, F) of world positions.

  The floor is that of the lower feet of all bodies of a clip.
  """
  by_body = jnp.moveaxis(joints, 2, 1)
  floor = representation.estimated_floor(by_body, skeleton).min(1)
  if joints.shape[2] == 2:
    placed = representation.canonical_pair(joints, skeleton, floor=floor)
  else:
    frame = representation.canonical_frame(joints[:, :, 0], skeleton, floor=floor)
    placed = representation.to_frame(joints[:, :, 0], frame)[:, :, None]
  features = representation.encode_positions(
    jnp.moveaxis(placed, 2, 1), skeleton, jnp.broadcast_to(fps[:, None], by_body.shape[:2])
  )
  return placed, jnp.moveaxis(features, 1, 2)
