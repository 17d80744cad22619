"""Clips of moving skeletons by name, as world positions of joints.

| name | what |
| --- | --- |
| `embedded:duets` | generated: two skeletons of 15 joints in eight labelled actions |
| `sbu` | the real two-person clips of `sbu_interaction/` in the data folder, five folds |
| `cmu` | real one-person motion of `cmu_mocap/` in the data folder, labelled by subject |
| `motion:PATH` | your own: an npz of joints, or a folder; see `motion_files` |

`$JAXMETHODS_DATA` is the data folder. A missing source says so; nothing falls back to other data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmethods.data import duets, files, motion_files
from jaxmethods.data.motion import Decoders, MotionData, checked
from jaxmethods.data.records import Source, digest_of, sealed
from jaxmethods.errors import InputError, hint


def load(
  name: str,
  *,
  seed: int = 0,
  fps: float = 0.0,
  label_words: Sequence[str] = (),
  decoders: Decoders | None = None,
) -> MotionData:
  """Loads clips by the name of a source.

  Args:
    name: see the module docstring.
    seed: of generated clips.
    fps: frames per second of files that do not say theirs; 0: as their layout has it.
    label_words: a clip of a folder has the first of these words that its text contains as label.
    decoders: readers of files that hold features, not joints; by the number of features.

  Raises:
    InputError: an unknown name, missing files, or clips that cannot be used, see `checked`.
  """
  kind, _, path = name.partition(":")
  if name == duets.NAME:
    data = duets.generate(seed)
  elif name in _SETS:
    data = _packed(name, *_SETS[name])
  elif kind == "motion" and path:
    data = motion_files.load(path, fps=fps, label_words=label_words, decoders=decoders or {})
  else:
    known = (duets.NAME, *_SETS, "motion:PATH")
    raise InputError(f"data: unknown motion {name!r}; {hint(name, known, 'sources')}")
  data = checked(data)
  digest = digest_of([*data.clips, data.label, data.fold], [*data.names, *data.texts])
  return data._replace(source=data.source._replace(digest=digest))


def describe(data: MotionData) -> str:
  """One line for the top of a report: which clips, how many, where from, real or not, licence."""
  source, frames = data.source, sum(map(len, data.clips))
  shown = (
    f"{len(data.clips)} clips of {data.persons} person{'s' * (data.persons > 1)}, {frames} frames"
  )
  kind = "data of yours" if source.own else "real data" if source.real else "generated data"
  notes = f"; {data.notes}" if data.notes else ""
  return (
    f"{sealed(source.name, source.digest, shown)}; {kind}; from {source.origin}; licence: "
    f"{source.licence}{notes}"
  )


class _Set(NamedTuple):
  """A published set in the data folder."""

  file: str
  positions: str
  fps: float
  licence: str
  citation: str


_SETS: dict[str, tuple[_Set, Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]]] = {
  "sbu": (
    _Set(
      "sbu_interaction/sbu_skeletons.npz", "positions_m", 15.0, "none stated; for research",
      "Yun et al., CVPR workshops 2012",
    ),
    lambda arrays: arrays,
  ),
  "cmu": (
    _Set(
      "cmu_mocap/cmu_positions_30fps.npz", "positions22", 30.0, "free to use, not to be sold",
      "CMU Graphics Lab Motion Capture Database",
    ),
    lambda arrays: _with_subjects(arrays),
  ),
}  # fmt: skip
_SUBJECTS = {"01": "playground", "02": "actions", "03": "uneven terrain"}


def _with_subjects(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Labels trials such as 02_05 by their subject, which had one theme each."""
  subject = [str(name).partition("_")[0] for name in arrays["sequence"]]
  known = sorted(set(subject))
  label = np.array([known.index(each) for each in subject], np.int32)
  names = np.array([_SUBJECTS.get(each, each) for each in known])
  return dict(arrays) | {"label": label, "label_names": names, "name": arrays["sequence"]}


def _packed(
  name: str, own: _Set, prepared: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
) -> MotionData:
  path = files.data_dir() / own.file
  if not path.is_file():
    raise InputError(
      f"{name}: {path} is missing: put the file there, or set JAXMETHODS_DATA to the folder that has "
      f"{own.file}"
    )
  arrays = prepared(motion_files.archive(path))
  data = motion_files.unpacked(path, arrays, own.fps, positions=own.positions)
  origin = own.citation
  return data._replace(
    source=Source(name, origin, own.licence, own.citation, real=True), texts=("",) * len(data.clips)
  )
