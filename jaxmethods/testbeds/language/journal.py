"""Answers that were paid for, on disk: a run that was killed asks nothing twice.

A line is written, and flushed to the disk, before the next question is asked. What is written is
redacted by the caller, and restored when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

from jaxmethods.errors import InputError


class Journal:
  """Answers by request.

  Several threads may write; two runs at a time may not share a file.
  """

  def __init__(
    self, path: Path, hide: Callable[[str], str] = str, restore: Callable[[str], str] = str
  ) -> None:
    """Opens or begins a journal.

    Args:
      path: the file.
      hide: applied to what is written; must keep no secret.
      restore: undoes `hide`.

    Raises:
      InputError: the file cannot be read or written, or a line in its middle is damaged.
    """
    self.path, self._hide, self.restore = path, hide, restore
    self._lock, self._answers = threading.Lock(), _read(path)
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = path.open("ab")
      # Of a line that was cut off when the run was killed.
      self._file.truncate(sum(len(line) + 1 for line in _whole_lines(path)))
    except OSError as error:
      raise InputError(f"{path}: cannot be written: {error.strerror}") from None

  def __len__(self) -> int:
    return len(self._answers)

  def get(self, request: str) -> str | None:
    """Returns the answer to a request, if it was asked before."""
    hidden = self._answers.get(_digest(request))
    return None if hidden is None else self.restore(hidden)

  def put(self, request: str, answer: str) -> str:
    """Keeps an answer; returns it as a later run will read it."""
    hidden = self._hide(answer)
    line = json.dumps({"request": _digest(request), "answer": hidden}).encode() + b"\n"
    with self._lock:
      self._answers[_digest(request)] = hidden
      self._file.write(line)
      self._file.flush()
      os.fsync(self._file.fileno())
    return self.restore(hidden)


def _digest(request: str) -> str:
  return hashlib.sha256(request.encode("utf-8", "surrogatepass")).hexdigest()


def _whole_lines(path: Path) -> list[bytes]:
  return path.read_bytes().split(b"\n")[:-1]


def _read(path: Path) -> dict[str, str]:
  try:
    lines = _whole_lines(path)
  except FileNotFoundError:
    return {}
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error.strerror}") from None
  answers = {}
  for number, line in enumerate(lines, 1):
    try:
      entry = json.loads(line)
      answers[str(entry["request"])] = str(entry["answer"])
    except (ValueError, KeyError, TypeError):
      raise InputError(
        f"{path}, line {number}: is no answer; remove the line or the file"
      ) from None
  return answers
