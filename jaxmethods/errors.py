"""The one exception that a user's mistake raises, and the guess at what was meant."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """Bad input: a key, file, client or value that cannot be used.

  The entry points print its message as one line and exit with status 2; it must name what is wrong
  (which key, file, client, value) and what was expected.
  """


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns the entry of `valid` that looks most like `name`."""
  valid = list(valid)
  # A nested key is often typed without its group: compare the last parts too.
  last = {key: key.rsplit(".", 1)[-1] for key in valid}

  def likeness(key: str) -> float:
    whole = difflib.SequenceMatcher(None, name, key).ratio()
    tail = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], last[key]).ratio()
    return max(whole, tail) + 0.01 * whole

  return max(valid, key=likeness)
