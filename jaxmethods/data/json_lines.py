"""JSON lines from the user's disk: one value a line, ended by the line feed alone.

JSON allows U+2028, U+0085 and the like inside a string, so that `str.splitlines` would cut an object in
two. A byte order mark at the start is no part of the first line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxmethods.errors import InputError


class Line(NamedTuple):
  """A value of a file; `where` is "FILE, line NUMBER" for errors."""

  where: str
  entry: Any


def read(path: Path, *, name: str = "", malformed: str = "is not JSON") -> Iterator[Line]:
  """Yields the values of a file; blank lines are left out.

  Args:
    path: the file.
    name: setting that named it, for errors.
    malformed: said of a line that is not JSON.

  Raises:
    InputError: the file cannot be read as text; a line is not JSON, or holds half a character.
  """
  file = f"{name}: {path}" if name else str(path)
  try:
    # Bytes, since text mode would end lines at \r too.
    text = path.read_bytes().decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{file}: cannot be read as text: {error}") from None
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      where = f"{file}, line {number}"
      yield Line(where, _entry(line, where, malformed))


def parsed(text: str) -> Any:
  """Returns a JSON value.

  Raises:
    ValueError: it is no JSON, or a key stands twice in an object.
    RecursionError: it is too deep.
  """
  return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a key stands twice")
  return found


def _entry(line: str, where: str, malformed: str) -> Any:
  try:
    entry = parsed(line)
    json.dumps(entry, ensure_ascii=False).encode()  # half of a surrogate pair is no text
  except UnicodeEncodeError:
    raise InputError(f"{where}: a string is no Unicode text") from None
  except (ValueError, RecursionError):
    raise InputError(f"{where}: {malformed}, got {line.strip()[:80]}") from None
  return entry
