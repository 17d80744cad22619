"""Which parameters an adapter acts on: a regular expression on their paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from jaxmethods.errors import InputError

# The linear layers of a transformer block, by the names that all our models use. An MLLM has them in
# its vision tower too: put the tower's name in front, e.g. "language_model/.*(query|value)/kernel".
ATTENTION = r"\b(query|key|value|out)/kernel$"
MLP = r"\b(gate|up|down|fc_1|fc_2)/kernel$"
BLOCK = r"\b(query|key|value|out|gate|up|down|fc_1|fc_2)/kernel$"


def matching(paths: Iterable[str], pattern: str) -> list[str]:
  """The paths in which `pattern` is found (`re.search`), sorted.

  Raises:
    InputError: if the pattern is no regular expression or is found nowhere; it names the nearest
      paths.

  >>> jm.adapters.matching(["a/kernel", "a/bias", "b/kernel"], "kernel$")
  ['a/kernel', 'b/kernel']
  """
  paths = sorted(paths)
  try:
    expression = re.compile(pattern)
  except re.error as error:
    raise InputError(f"targets {pattern!r} is not a regular expression: {error}") from None
  found = [path for path in paths if expression.search(path)]
  if not found:
    raise InputError(
      f"targets {pattern!r} matches no parameter path; nearest: {', '.join(_nearest(pattern, paths))}"
    )
  return found


def _nearest(pattern: str, paths: list[str], count: int = 3) -> list[str]:
  """Paths with a part that looks most like one of the words in the pattern."""
  words = re.findall(r"\w+", pattern) or [pattern]

  def likeness(path: str) -> float:
    parts = path.split("/")
    return sum(
      max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts) for word in words
    )

  return sorted(paths, key=likeness, reverse=True)[:count] or ["none, there are no parameters"]
