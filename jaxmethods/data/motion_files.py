"""Motion of the user: `motion:PATH`.

| PATH | read as |
| --- | --- |
| FILE.npz | `positions` (N, persons, J, 3) with `offsets` (n + 1,), or (n, T, persons, J, 3), m, y up |
| folder with `person1/`, `person2/` | InterHuman: .npy of 492 or 192 columns, z up, 30 fps |
| folder of .npy | HumanML3D: (T, 22, 3) joints or (T, 263) features, 20 fps; (T, persons, J, 3) |
| folder of .bvh | one person a file, or NAME_person1.bvh beside NAME_person2.bvh; y up |

An npz has `fps`, and may have `label`, `label_names`, `fold`, `name`, `joint_names` and `parents`.
In a folder `LABEL/FILE` gives labels. Texts stand in NAME.txt beside a clip, in `texts/` or `annots/`;
`label_words` makes labels of them. HumanML3D's `text#tokens#from#to` is cut at the first #.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmethods.data import bvh, files
from jaxmethods.data.motion import UNLABELLED, Decoders, MotionData
from jaxmethods.data.records import own_source
from jaxmethods.errors import InputError

_POSITIONS = ("positions", "positions_m", "positions22", "joints")
_TEXT_FOLDERS = ("texts", "annots")
_PERSONS = ("person1", "person2")
_STATISTICS = ("mean", "std")
_SMPL = 22
_SMPL_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)
_INTERHUMAN = (192, 492)  # columns: 22 or 62 positions first, rotations after
_INTERHUMAN_FPS, _HUMANML3D_FPS = 30.0, 20.0
_HUMANML3D = 263


def load(path: str, *, fps: float, label_words: Sequence[str], decoders: Decoders) -> MotionData:
  """Reads the user's motion; see the module docstring and `motion.load`."""
  place = files.local_path(path)
  if place.is_file() and place.suffix.lower() == ".npz":
    return unpacked(place, archive(place), fps)
  if not place.is_dir():
    raise InputError(f"motion:{path}: no such folder or npz file")
  data = _from_folder(place, fps, decoders)
  return _labelled(data, label_words) if label_words else data


# --- npz ------------------------------------------------------------------------------------------


def archive(path: Path) -> dict[str, np.ndarray]:
  """Reads all arrays of an npz file.

  Raises:
    InputError: it is damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as stored:
      return dict(stored)
  except Exception as error:  # whatever a damaged archive makes zipfile, zlib and numpy do
    raise InputError(f"{path}: not a readable npz archive ({error})") from None


def unpacked(
  path: Path, arrays: Mapping[str, np.ndarray], fps: float, positions: str = ""
) -> MotionData:
  """Cuts the arrays of an npz into clips.

  Args:
    path: of the file.
    arrays: see the module docstring.
    fps: where the file does not say it.
    positions: name of the positions; empty: the first of the usual ones.

  Raises:
    InputError: naming the array that is missing or does not fit.
  """
  key = positions or next((name for name in _POSITIONS if name in arrays), "")
  if key not in arrays:
    raise InputError(f"{path}: no array positions; it has {', '.join(sorted(arrays)) or 'none'}")
  clips = _cut(path, key, arrays[key], arrays.get("offsets"))
  count, joints = len(clips), clips[0].shape[2] if clips else 0
  rate = float(arrays["fps"]) if "fps" in arrays else fps
  if not rate > 0:
    raise InputError(f"{path}: no frame rate: add an array fps, or set fps")
  names = _column(path, arrays, "name", count, [str(i) for i in range(count)])
  joint_names, parents = _joints(path, arrays, joints)
  label = _column(path, arrays, "label", count, [0] * count)
  fold = _column(path, arrays, "fold", count, [-1] * count)
  label_names = _label_names(path, arrays, label)
  return MotionData(
    clips, rate, np.array(label, np.int32), label_names, np.array(fold, np.int32),
    tuple(map(str, names)), joint_names, parents, ("",) * count, "",
    own_source(f"motion:{path}", str(path)),
  )  # fmt: skip


def _cut(path: Path, key: str, values: np.ndarray, offsets: np.ndarray | None) -> list[np.ndarray]:
  if values.dtype.kind not in "fiu" or values.shape[-1:] != (3,):
    raise InputError(
      f"{path}: {key}: expected positions (..., 3), got {values.dtype} {values.shape}"
    )
  values = values.astype(np.float32)
  if offsets is None:
    if values.ndim != 5:
      raise InputError(
        f"{path}: {key}: expected (clips, frames, persons, joints, 3), or offsets beside it, got "
        f"{values.shape}"
      )
    return list(values)
  if values.ndim == 3:
    values = values[:, None]
  whole = offsets.ndim == 1 and len(offsets) > 1 and offsets.dtype.kind in "iu"
  steps = np.diff(offsets.astype(np.int64)) if whole else np.array([-1])
  if values.ndim != 4 or (steps < 0).any() or offsets[0] != 0 or offsets[-1] != len(values):
    raise InputError(
      f"{path}: offsets: expected numbers that rise from 0 to the {len(values)} frames of {key} "
      f"{values.shape}"
    )
  return [values[a:b] for a, b in itertools.pairwise(offsets)]


def _column(
  path: Path, arrays: Mapping[str, np.ndarray], key: str, count: int, default: list
) -> list:
  if key not in arrays:
    return default
  if arrays[key].shape != (count,):
    raise InputError(
      f"{path}: {key}: expected one for each of {count} clips, got {arrays[key].shape}"
    )
  return arrays[key].tolist()


def _label_names(
  path: Path, arrays: Mapping[str, np.ndarray], label: Sequence[int]
) -> tuple[str, ...]:
  if "label" not in arrays:
    return (UNLABELLED,)
  names = [str(name) for name in arrays.get("label_names", range(max(label, default=0) + 1))]
  for i, each in enumerate(label):
    if not isinstance(each, int) or not 0 <= each < len(names):
      raise InputError(f"{path}: label: clip {i} has {each!r}, expected 0 .. {len(names) - 1}")
  return tuple(names)


def _joints(
  path: Path, arrays: Mapping[str, np.ndarray], joints: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
  keys = {key: key for key in ("joint_names", "parents")}
  if joints == _SMPL:
    keys = {key: key if key in arrays else f"{key}22" for key in keys}
  found = {key: arrays[name].tolist() for key, name in keys.items() if name in arrays}
  if joints == _SMPL and "parents" not in found:
    found["parents"] = list(_SMPL_PARENTS)
  if "parents" not in found:
    raise InputError(f"{path}: parents: the parents of {joints} joints are not given")
  names = found.get("joint_names", [str(i) for i in range(joints)])
  parents = found["parents"]
  for key, values in (("joint_names", names), ("parents", parents)):
    if len(values) != joints:
      raise InputError(f"{path}: {key}: has {len(values)} entries, positions {joints} joints")
  if sum(parent < 0 for parent in parents) != 1 or max(parents) >= joints:
    raise InputError(f"{path}: parents: expected one root, -1, and joints 0 .. {joints - 1}")
  return tuple(map(str, names)), tuple(parents)


# --- folders --------------------------------------------------------------------------------------


class _Clip(NamedTuple):
  """A clip as it is read: positions (T, persons, J, 3), frame rate, names and parents of joints."""

  positions: np.ndarray
  fps: float
  joint_names: tuple[str, ...]
  parents: tuple[int, ...]


def _from_folder(root: Path, fps: float, decoders: Decoders) -> MotionData:
  groups = _groups(root)
  if not groups:
    raise InputError(f"motion:{root}: no .npy or .bvh clips in it")
  clips = [_read(paths, fps, decoders) for paths in groups.values()]
  first = clips[0]
  for paths, clip in zip(groups.values(), clips, strict=True):
    if clip.fps != first.fps:
      raise InputError(f"{paths[0]}: {clip.fps:g} frames per second, the others {first.fps:g}")
    if len(clip.parents) == len(first.parents) and clip.parents != first.parents:
      raise InputError(
        f"{paths[0]}: its joints hang together otherwise than those of the first clip"
      )
  texts = _texts(root, groups)
  folders = [Path(name).parent.name for name in groups]
  names = sorted({folder or UNLABELLED for folder in folders})
  label = [names.index(folder or UNLABELLED) for folder in folders]
  return MotionData(
    [clip.positions for clip in clips], first.fps, np.array(label, np.int32), tuple(names),
    np.full(len(clips), -1, np.int32), tuple(groups), first.joint_names, first.parents, texts, "",
    own_source(f"motion:{root}", str(root)),
  )  # fmt: skip


def _groups(root: Path) -> dict[str, list[Path]]:
  """The files of every clip by its name, LABEL/NAME: one file a person."""
  both = [root / name for name in _PERSONS]
  if any(folder.is_dir() for folder in both):
    inside = [_clips(folder, folder) for folder in both]
    for name in sorted(set(inside[0]) ^ set(inside[1])):
      there = 0 if name in inside[0] else 1
      raise InputError(
        f"{inside[there][name]}: its partner is missing: expected {_PERSONS[1 - there]}/{name}"
      )
    return {name: [found[name] for found in inside] for name in sorted(inside[0])}
  groups: dict[str, list[Path]] = {}
  for name, path in sorted(_clips(root, root).items()):
    person = next((p for p in _PERSONS if name.endswith(f"_{p}")), "")
    groups.setdefault(name.removesuffix(f"_{person}") if person else name, []).append(path)
    if person and not path.with_stem(path.stem.removesuffix(person) + _other(person)).is_file():
      raise InputError(f"{path}: its partner is missing: expected one of {_other(person)}")
  return groups


def _other(person: str) -> str:
  return _PERSONS[1 - _PERSONS.index(person)]


def _clips(root: Path, folder: Path) -> dict[str, Path]:
  """Clips of a folder and of the folders in it, by name; joints go before features of them."""
  found: dict[str, Path] = {}
  for path in sorted(folder.rglob("*")):
    inside = path.relative_to(root)
    hidden = any(part.startswith(".") for part in inside.parts)
    known = path.suffix.lower() in (".npy", ".bvh") and path.stem.lower() not in _STATISTICS
    if hidden or not known or not path.is_file():
      continue
    parts = [part for part in inside.parent.parts if part not in ("new_joints", "new_joint_vecs")]
    name = "/".join([*parts, path.stem])
    vectors = "new_joint_vecs" in (*inside.parts, path.stem[: len("new_joint_vecs")])
    plain = name.replace("new_joint_vecs_", "").replace("new_joints_", "")
    if plain not in found or not vectors:
      found[plain] = path
  return found


def _read(paths: Sequence[Path], fps: float, decoders: Decoders) -> _Clip:
  """Reads the persons of a clip."""
  bodies = [
    _of_bvh(path) if path.suffix.lower() == ".bvh" else _of_npy(path, fps, decoders)
    for path in paths
  ]
  if len({body.positions.shape[2] for body in bodies}) > 1:
    counts = " and ".join(str(body.positions.shape[2]) for body in bodies)
    raise InputError(f"{paths[1]}: {counts} joints: its persons have different skeletons")
  if len({len(body.positions) for body in bodies}) > 1:
    counts = " and ".join(str(len(body.positions)) for body in bodies)
    raise InputError(f"{paths[1]}: {counts} frames: its persons do not move at the same time")
  return bodies[0]._replace(positions=np.concatenate([body.positions for body in bodies], axis=1))


def _of_bvh(path: Path) -> _Clip:
  motion = bvh.read(path)
  return _Clip(motion.positions[:, None], motion.fps, motion.names, motion.parents)


def _of_npy(path: Path, fps: float, decoders: Decoders) -> _Clip:
  try:
    values = np.load(path, allow_pickle=False)
  except Exception as error:  # whatever a damaged file makes numpy do
    raise InputError(f"{path}: not a readable npy file ({error})") from None
  if values.dtype.kind not in "fiu":
    raise InputError(f"{path}: expected numbers, got {values.dtype}")
  rate = 0.0
  if values.ndim == 2 and values.shape[1] in _INTERHUMAN:
    x, y, z = np.moveaxis(values[:, : 3 * _SMPL].reshape(len(values), 1, _SMPL, 3), -1, 0)
    positions, rate = np.stack([x, z, -y], axis=-1), _INTERHUMAN_FPS
  elif values.ndim == 2 and values.shape[1] in decoders:
    positions = decoders[values.shape[1]](values)
    rate = _HUMANML3D_FPS if values.shape[1] == _HUMANML3D else 0.0
  elif values.ndim == 3 and values.shape[2] == 3:
    positions, rate = values[:, None], _HUMANML3D_FPS if values.shape[1] == _SMPL else 0.0
  elif values.ndim == 4 and values.shape[3] == 3:
    positions = values
  else:
    raise InputError(
      f"{path}: expected joints (T, J, 3) or (T, persons, J, 3), or features (T, 192), (T, 492), "
      f"{', '.join(f'(T, {size})' for size in decoders)}, got {values.shape}"
    )
  joints = positions.shape[2]
  if joints != _SMPL:
    raise InputError(f"{path}: {joints} joints whose parents nobody knows: use an npz with parents")
  if not (fps or rate) > 0:
    raise InputError(f"{path}: no frame rate: set fps")
  names = tuple(str(i) for i in range(joints))
  return _Clip(positions.astype(np.float32), fps or rate, names, _SMPL_PARENTS)


# --- texts ----------------------------------------------------------------------------------------


def _texts(root: Path, groups: Iterable[str]) -> tuple[str, ...]:
  """The first text of every clip; "" without.

  Raises:
    InputError: a text without a clip.
  """
  known = {Path(name).name: name for name in groups}
  found: dict[str, str] = {}
  for path in sorted(root.rglob("*.txt")):
    listed = path.parent == root and path.stem in ("train", "val", "test", "all", "train_val")
    if listed or any(part.startswith(".") for part in path.relative_to(root).parts):
      continue
    stem = path.stem
    stem = next((stem.removesuffix(f"_{p}") for p in _PERSONS if stem.endswith(f"_{p}")), stem)
    beside = path.parent.name in _TEXT_FOLDERS or any(
      path.with_suffix(suffix).exists() for suffix in (".npy", ".bvh")
    )
    if stem not in known:
      if beside or path.parent == root:
        raise InputError(f"{path}: a text without a clip: expected {stem}.npy or {stem}.bvh")
      continue
    found[known[stem]] = _first_line(path)
  return tuple(found.get(name, "") for name in groups)


def _first_line(path: Path) -> str:
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: not a readable text ({error})") from None
  return next((line.split("#")[0].strip() for line in lines if line.strip()), "")


def _labelled(data: MotionData, words: Sequence[str]) -> MotionData:
  """Labels clips by words of their texts.

  Raises:
    InputError: no clip has a text, or a text has none of the words.
  """
  label = []
  for name, text in zip(data.names, data.texts, strict=True):
    hits = [i for i, word in enumerate(words) if word.lower() in text.lower()]
    if not hits:
      raise InputError(
        f"label_words: the text of clip {name}, {text!r}, has none of {', '.join(words)}"
      )
    label.append(hits[0])
  used = sorted(set(label))
  names = tuple(words[i] for i in used)
  return data._replace(label=np.array([used.index(i) for i in label], np.int32), label_names=names)
