"""What an exception means to the person at the command line: one line and an exit status."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from jaxmethods.errors import InputError, MachineError

BAD_INPUT, BAD_MACHINE = 2, 1

# What was asked for is not there, or is of another kind; everything else that the system refuses is the
# machine's.
_ASKED_FOR = {
  errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENODEV,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}
# Libraries in C++ say in words only what the system told them.
_WORDED = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EACCES,
  errno.EIO,
  errno.EMFILE,
  errno.EFBIG,
)
_IN_WORDS = {os.strerror(number): number for number in _WORDED}
_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|CUDA_ERROR_OUT_OF_MEMORY")
_REMOTE = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b")


class Failure(NamedTuple):
  """An exit status and the line that is said."""

  status: int
  line: str


def explain(error: BaseException) -> Failure:
  """Returns what to say about any exception."""
  if isinstance(error, InputError):
    return Failure(BAD_INPUT, _one_line(error))
  if isinstance(error, MachineError):
    return Failure(BAD_MACHINE, _one_line(error))
  for link in _chain(error):
    if found := _of_system(link):
      return found
  return Failure(BAD_MACHINE, f"{_place(error)}{_kept(error)}")


def of_system(error: OSError, name: str) -> InputError | MachineError:
  """Returns the error to raise where the system refuses to read or write what is called `name`."""
  kind = InputError if error.errno in _ASKED_FOR else MachineError
  return kind(f"{name}: {_said(error)}")


def _of_system(error: BaseException) -> Failure | None:
  text = str(error)
  if isinstance(error, OSError) and error.errno is not None:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    status = BAD_INPUT if error.errno in _ASKED_FOR else BAD_MACHINE
    return Failure(status, _one_line(": ".join([*names[:1], _said(error)])))
  if isinstance(error, MemoryError) or _MEMORY.search(text):
    return Failure(
      BAD_MACHINE,
      f"not enough memory: {_one_line(text)[:200] or 'of the machine'}; try smaller batches",
    )
  for words, number in _IN_WORDS.items():
    if words in text:
      return Failure(BAD_MACHINE, _said(OSError(number, words)))
  if type(error).__name__ == "JaxRuntimeError" and _REMOTE.search(text):
    return Failure(
      BAD_MACHINE, f"another process or the device does not answer: {_one_line(text)[:200]}"
    )
  if isinstance(error, RuntimeError) and "home directory" in text:
    return Failure(BAD_INPUT, "there is no home folder: write the path without ~")
  return None


def _said(error: OSError) -> str:
  words = error.strerror or _one_line(error)
  remedy = "; make space, the same command continues" if error.errno in _FULL else ""
  return words + remedy


def _chain(error: BaseException) -> Iterator[BaseException]:
  """Yields an exception and those it came from."""
  seen, queue = set(), [error]
  while queue:
    link = queue.pop(0)
    if id(link) not in seen:
      seen.add(id(link))
      yield link
      inner = getattr(link, "exceptions", ())  # of a group
      queue += [e for e in (link.__cause__, link.__context__, *inner) if e is not None]


def _place(error: BaseException) -> str:
  """Returns kind, words and place of an exception that nobody foresaw."""
  frames = traceback.extract_tb(error.__traceback__)
  ours = [frame for frame in frames if "site-packages" not in frame.filename] or frames
  where = f" ({os.path.basename(ours[-1].filename)}, line {ours[-1].lineno})" if ours else ""
  return f"a fault of the program: {type(error).__name__}: {_one_line(error)[:300]}{where}"


def _kept(error: BaseException) -> str:
  """Writes the traceback to a file of its own; returns where."""
  try:
    with tempfile.NamedTemporaryFile(
      "w", prefix="jaxmethods-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
      traceback.print_exception(error, file=file)
  except OSError:
    return ""
  return f"; the traceback is in {file.name}"


def _one_line(words: object) -> str:
  return " ".join(str(words).split())


class Threads:
  """Collects what threads of libraries die of, in place of printed tracebacks; a context manager."""

  def __init__(self) -> None:
    self.errors: list[BaseException] = []

  def __enter__(self) -> Threads:
    self._hooks = threading.excepthook, sys.unraisablehook
    threading.excepthook = self._collect  # type: ignore[assignment]
    sys.unraisablehook = self._collect
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
  ) -> None:
    threading.excepthook, sys.unraisablehook = self._hooks

  def _collect(self, what: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
    if what.exc_value is not None:
      self.errors.append(what.exc_value)
