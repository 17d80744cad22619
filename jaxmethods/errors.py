"""Exceptions that entry points turn into one line and an exit status; guesses at mistyped names."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 12  # names in one line of an error


class InputError(ValueError):
  """Bad input: a key, file, client or value that cannot be used.

  The entry points print its message as one line and exit with status 2; it must name what is wrong
  (which key, file, client, value) and what was expected.
  """


class MachineError(Exception):
  """A disk, a device, memory or a network that fails: one line and exit status 1."""


class Stopped(Exception):
  """A signal stopped the run, which has saved its state; `status` is the exit status."""

  def __init__(self, name: str, status: int, step: int):
    super().__init__(f"stopped by {name}, saved at step {step}; the same command continues")
    self.status = status


def hint(name: str, valid: Iterable[str], kind: str) -> str:
  """Returns "the nearest is adam" if a name was mistyped, else "rows are sgd, adam".

  Args:
    name: what was given.
    valid: names that exist.
    kind: what they are, in the plural.
  """
  valid = list(valid)
  if valid and _apart(name, near := nearest(name, valid)) <= 1 + len(name) // 4:
    return f"the nearest is {near}"
  more = ", ..." if len(valid) > _LISTED else ""
  return f"{kind} are {', '.join(valid[:_LISTED])}{more}" if valid else f"there are no {kind}"


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns the entry of `valid` with the fewest edits from `name`, the first of equals."""
  return min(valid, key=lambda key: (_apart(name, key), _edits(name, key)))


def _apart(a: str, b: str) -> int:
  # A nested key is often typed without its group: compare the last parts too.
  return min(_edits(a, b), _edits(a.rpartition(".")[2], b.rpartition(".")[2]))


def _edits(a: str, b: str) -> int:
  """Counts the letters to insert, delete or replace (Levenshtein)."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
  return row[-1]
