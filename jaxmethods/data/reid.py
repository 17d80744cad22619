"""Photographs of known individuals, in the layouts in which people keep them: `reid:PATH`.

| layout | recognised by |
| --- | --- |
| Market-1501 | `bounding_box_train`, `bounding_box_test`, `query` of `0002_c1s1_..jpg`; or one alone |
| metadata | a CSV with `identity` and `file` or `path` (wildlife-datasets); comma, semicolon or tab |
| folders | `IDENTITY/file`, or `SPLIT/IDENTITY/file` |
| photographs | files in one folder, or one file: of nobody known |

A file is resized to a square whatever its aspect. Below one in a hundred unreadable files are left out,
and named; from there on they are an error. Files for which a layout has no place are named in the notes.
"""

from __future__ import annotations

import csv
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxmethods.data import files
from jaxmethods.data.pictures import SUFFIXES, open_picture
from jaxmethods.data.records import Source
from jaxmethods.errors import InputError

_PREFIX = "reid:"
_MARKET = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
_MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")
_FLAT_MARKET_NAME = re.compile(r"-?\d+_c\d+s\d+_")
_JUNK = "-1"  # boxes that Market-1501 wants ignored
_FILE_COLUMNS = ("file", "path", "filename", "image_path")
_GROUP_COLUMNS = ("sighting", "encounter", "camera", "cam", "date")
_SKIPPED = 0.01  # share of unreadable files from which they are an error
_NAMED = 3  # files that a message names
_DELIMITERS = ",;\t"
_LICENCE = "none stated"


class ReidData(NamedTuple):
  """Photographs of individuals.

  Attributes:
    images: (n, side, side, 3) uint8.
    identity: (n,) int32, a place in `names`; -1 where it is not known.
    names: of the individuals, sorted.
    split: (n,) str, as the source has it; "" where it has none.
    group: (n,) int32, the camera, encounter or sighting, a place in `groups`; -1 where it is not known.
    groups: names of the cameras, encounters or sightings, sorted.
    files: (n,) str, below the folder of the source.
    notes: what was left out, one line; may be empty.
    source: provenance.
  """

  images: np.ndarray
  identity: np.ndarray
  names: Sequence[str]
  split: np.ndarray
  group: np.ndarray
  groups: Sequence[str]
  files: np.ndarray
  notes: str
  source: Source


class _Entry(NamedTuple):
  """A photograph before it is read."""

  file: str
  identity: str
  split: str = ""
  group: str = ""


def load(name: str, *, side: int, split: str = "split") -> ReidData:
  """Reads photographs by the name of a source.

  Args:
    name: `reid:PATH`, or PATH; relative to the working directory or the data folder.
    side: pixels to which every photograph is brought.
    split: column of a CSV that holds the splits.

  Raises:
    InputError: no such folder; nothing in it; columns that are missing; too many unreadable files.
  """
  path = files.local_path(name.removeprefix(_PREFIX))
  if not path.exists():
    raise InputError(f"{name}: no such folder")
  root = path if path.is_dir() else path.parent
  entries, beside = _entries(path, split)
  if not entries:
    raise InputError(f"{name}: no photographs in it" + (f"; {beside}" if beside else ""))
  images, bad = read_images([_existing(root, entry.file) for entry in entries], side)
  notes = "; ".join(filter(None, (_skipped(name, bad, len(entries)), beside)))
  kept = [entry for i, entry in enumerate(entries) if i not in bad]
  data = _record(kept, images, notes, Source(name, str(path), _LICENCE, "", real=True, own=True))
  digest = hashlib.sha256(np.ascontiguousarray(images).data)
  for column in (data.identity, data.split, data.group):
    digest.update(repr(column.tolist()).encode())
  return data._replace(source=data.source._replace(digest=digest.hexdigest()))


def paths(data: ReidData) -> list[Path]:
  """Returns where the photographs are, links followed."""
  origin = Path(data.source.origin)
  root = origin if origin.is_dir() else origin.parent
  return [_existing(root, str(file)).resolve() for file in data.files]


def _record(entries: Sequence[_Entry], images: np.ndarray, notes: str, source: Source) -> ReidData:
  names = sorted({entry.identity for entry in entries} - {""})
  number = {name: i for i, name in enumerate(names)} | {"": -1}
  # A camera or a sighting is one only within its identity where matches of it are excluded.
  groups = sorted({entry.group for entry in entries} - {""})
  places = {text: i for i, text in enumerate(groups)} | {"": -1}
  column = lambda values, kind: np.array(list(values), kind)
  return ReidData(
    images,
    column((number[entry.identity] for entry in entries), np.int32),
    names,
    column((entry.split for entry in entries), str),
    column((places[entry.group] for entry in entries), np.int32),
    groups,
    column((entry.file for entry in entries), str),
    notes,
    source,
  )


def _entries(path: Path, split: str) -> tuple[list[_Entry], str]:
  """Lists the photographs of a folder or of a file, and says which files have no place in it."""
  if path.is_file():
    if path.suffix.lower() in SUFFIXES:
      return [_Entry(path.name, "")], ""
    return _of_table(path, split), ""
  if (path / "bounding_box_train").is_dir() or (path / "query").is_dir():
    return _of_market(path), ""
  tables = [table for table in sorted(path.glob("*.csv")) if _is_metadata(table)]
  if tables:
    return _of_tables(path, tables, split), ""
  if broken := sorted(path.glob("*.csv")):
    # Says which column it lacks.
    return _of_table(broken[0], split), ""
  entries = _of_folders(path)
  return entries, _beside(path, entries)


def _beside(root: Path, entries: Sequence[_Entry]) -> str:
  """Names the files below a folder that are not among its photographs."""
  used = {entry.file for entry in entries}
  below = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
  left = sorted(
    str(p) for p in below if str(p) not in used and not any(part[0] == "." for part in p.parts)
  )
  if not left:
    return ""
  some = ", ".join(left[:_NAMED]) + (", ..." if len(left) > _NAMED else "")
  return f"not read: {len(left)} files of other kinds or outside the layout: {some}"


def _existing(root: Path, file: str) -> Path:
  """A file as a table spells it, or with the other slash or another form of its accents."""
  forms = [unicodedata.normalize("NFC", file), unicodedata.normalize("NFD", file)]
  spelled = [file, *forms, *(form.replace("\\", "/") for form in (file, *forms))]
  return next((root / each for each in spelled if (root / each).is_file()), root / file)


# --- tables -----------------------------------------------------------------------------------------


def _rows(table: Path) -> tuple[list[str], list[dict[str, str]]]:
  try:
    with table.open(newline="", encoding="utf-8-sig") as stream:
      header = stream.readline()
      stream.seek(0)
      # The one that cuts the header most often; a comma where none does.
      reader = csv.DictReader(stream, delimiter=max(_DELIMITERS, key=header.count))
      reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
      return list(reader.fieldnames), list(reader)
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{table}: not a readable CSV file ({error})") from None


def _is_metadata(table: Path) -> bool:
  columns, _ = _rows(table)
  return "identity" in columns and _file_column(columns) is not None


def _file_column(columns: Iterable[str]) -> str | None:
  return next((name for name in _FILE_COLUMNS if name in set(columns)), None)


def _of_tables(root: Path, tables: Sequence[Path], split: str) -> list[_Entry]:
  """Joins the tables of a folder by file: the one with the split leads, others add groups."""
  leading = next((t for t in tables if split in _rows(t)[0]), None)
  if leading is None:
    if split != "split":
      raise InputError(f"{root}: no CSV in it has the column {split!r}")
    leading = tables[0]
  entries = _of_table(leading, split)
  groups = {e.file: e.group for t in tables for e in _of_table(t, split) if e.group}
  return [entry._replace(group=entry.group or groups.get(entry.file, "")) for entry in entries]


def _of_table(table: Path, split: str) -> list[_Entry]:
  columns, rows = _rows(table)
  file = _file_column(columns)
  if file is None or "identity" not in columns:
    missing = "identity" if file else f"{_FILE_COLUMNS[0]} (or {', '.join(_FILE_COLUMNS[1:])})"
    raise InputError(f"{table}: no column {missing}; it has {', '.join(columns) or 'none'}")
  group = next((name for name in _GROUP_COLUMNS if name in columns), None)
  entries, seen = [], dict[str, int]()
  for line, row in enumerate(rows, 2):
    if not row[file] or row["identity"] is None:
      raise InputError(f"{table}: line {line} names no file or no identity")
    if (before := seen.setdefault(row[file], line)) != line:
      raise InputError(
        f"{table}: lines {before} and {line} name the same file, {row[file]}; cut individuals out first"
      )
    # wildlife-datasets write "unknown" where nobody knows the animal.
    identity = "" if row["identity"].strip() == "unknown" else row["identity"].strip()
    entries.append(
      _Entry(row[file], identity, row.get(split) or "", (row.get(group) or "") if group else "")
    )
  return entries


# --- names and folders ------------------------------------------------------------------------------


def _of_market(root: Path) -> list[_Entry]:
  parts = (_market(_images(root / folder), f"{folder}/", part) for folder, part in _MARKET.items())
  return [entry for part in parts for entry in part]


def _market(paths: Sequence[Path], below: str, split: str) -> list[_Entry]:
  """Reads identity and camera from names."""
  entries = []
  for path in paths:
    found = _MARKET_NAME.match(path.name)
    if found is None:
      raise InputError(f"{path}: expected a name like 0002_c1s1_000451_03.jpg")
    if found[1] != _JUNK:
      entries.append(_Entry(f"{below}{path.name}", found[1], split, found[2]))
  return entries


def _of_folders(root: Path) -> list[_Entry]:
  folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  if not folders:
    loose = _images(root)
    if loose and all(_FLAT_MARKET_NAME.match(path.name) for path in loose):
      return _market(loose, "", "")
    return [_Entry(path.name, "") for path in loose]  # of nobody known
  # Splits hold folders and no photographs; a folder without either says nothing.
  if any(_images(folder) for folder in folders):
    named = [("", each) for each in folders]
  else:
    named = [(f.name, each) for f in folders for each in sorted(f.iterdir()) if each.is_dir()]
  return [
    _Entry(str(path.relative_to(root)), folder.name, split)
    for split, folder in named
    for path in _images(folder)
  ]


def _images(folder: Path) -> list[Path]:
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")


# --- pixels -----------------------------------------------------------------------------------------


def read_images(paths: Sequence[Path], side: int) -> tuple[np.ndarray, Mapping[int, str]]:
  """Reads photographs as squares.

  Args:
    paths: of the files.
    side: pixels.

  Returns:
    Those that can be read, (n, side, side, 3) uint8, and {place in `paths`: why} of the others.
  """
  images, bad = [], {}
  for i, path in enumerate(paths):
    try:
      images.append(_square(open_picture(path), side))
    except InputError as error:
      bad[i] = str(error)
  return np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8), bad


def _square(pixels: np.ndarray, side: int) -> np.ndarray:
  """Resizes (h, w, 1 or 3) to (side, side, 3)."""
  image = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
  return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _skipped(name: str, bad: Mapping[int, str], total: int) -> str:
  if not bad:
    return ""
  some = "; ".join(list(bad.values())[:_NAMED]) + ("; ..." if len(bad) > _NAMED else "")
  message = f"{len(bad)} of {total} files cannot be read: {some}"
  if len(bad) >= _SKIPPED * total:
    raise InputError(f"{name}: {message}")
  return f"left out: {message}"
