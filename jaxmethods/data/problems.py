"""Problems in words with answers that can be checked, by name.

| name | what |
| --- | --- |
| `generated:word-problems` | one- and two-step arithmetic stories, drawn from a seed by this module |
| `reasoning-gym:NAME` | a data set of the package reasoning-gym, with its own checker |
| `FILE.jsonl` | lines of {"question": ..., "answer": ...}; without answers nothing can be judged |
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from jaxmethods import folders
from jaxmethods.data import answers, json_lines
from jaxmethods.data.answers import final_answer as final_answer
from jaxmethods.data.files import digest
from jaxmethods.data.records import Source, own_source
from jaxmethods.errors import InputError
from jaxmethods.trees import Json

GENERATED = "generated:word-problems"
_GYM = "reasoning-gym:"


class Problem(NamedTuple):
  """A question.

  Attributes:
    question: as it is put to the model.
    answer: what is right, None where it is not known.
    check: whether a given answer, all that `final_answer` returns, is right.
    working: the steps written out, such as "14 + 5 = 19."; "" where they are not known.
  """

  question: str
  answer: str | None
  check: Callable[[str], bool]
  working: str = ""


def load(name: str, count: int, seed: int = 0) -> tuple[list[Problem], Source]:
  """Returns at most `count` problems of a source, and where they come from.

  Args:
    name: see the module docstring.
    count: how many; a file may have fewer.
    seed: of what is generated.

  Raises:
    InputError: an unknown source, a missing package, or a file that cannot be used.
  """
  if name == GENERATED:
    return generated(count, seed), Source(
      name, "drawn by jaxmethods.data.problems", "none", "", False
    )
  if name.startswith(_GYM):
    return _reasoning_gym(name, count, seed)
  if name.endswith(".jsonl"):
    file = folders.expanded(name)
    found = _file(file)[:count]
    return found, own_source(name, str(file))._replace(digest=digest(file))
  raise InputError(
    f"problems: unknown source {name!r}: sources are {GENERATED}, {_GYM}NAME, FILE.jsonl"
  )


# --- sources --------------------------------------------------------------------------------------

_NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Omar", "Nina", "Jack", "Ella")
_THINGS = ("apples", "pencils", "marbles", "stickers", "books", "coins", "shells", "cards")

# What there is at first, and what happens then; both with the operation that it stands for.
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
  "+": operator.add, "-": operator.sub, "*": operator.mul,
}  # fmt: skip
_OPENINGS = (
  ("{name} has {a} {things} and buys {b} more.", "+"),
  ("{name} has {a} {things} and gives away {b}.", "-"),
  ("{name} has {a} {things} and loses {b} of them.", "-"),
  ("{name} buys {a} boxes with {b} {things} each.", "*"),
)
_CHANGES = (
  ("Then {name} finds {b} more {things}.", "+"),
  ("Then a friend gives {name} {b} {things}.", "+"),
  ("Then {name} gives {b} {things} to a friend.", "-"),
)


def generated(count: int, seed: int) -> list[Problem]:
  """Stories of one or two steps with numbers below 40; no two are the same."""
  rng = np.random.default_rng(seed)
  found: dict[str, tuple[int, str]] = {}
  while len(found) < count:
    pick = lambda options: options[int(rng.integers(len(options)))]
    names = {"name": pick(_NAMES), "things": pick(_THINGS)}
    opening, symbol = pick(_OPENINGS)
    a, b = map(int, rng.integers(2, 10 if "boxes" in opening else 40, 2))
    story, total = [opening.format(a=a, b=b, **names)], _OPERATIONS[symbol](a, b)
    working = [f"{a} {symbol} {b} = {total}."]
    if rng.integers(2) and total >= 0:
      change, symbol = pick(_CHANGES)
      b = int(rng.integers(2, 40))
      story.append(change.format(b=b, **names))
      before, total = total, _OPERATIONS[symbol](total, b)
      working.append(f"{before} {symbol} {b} = {total}.")
    if total >= 0:
      story.append("How many {things} does {name} have now?".format(**names))
      found[" ".join(story)] = total, " ".join(working)
  return [
    _problem(question, str(total))._replace(working=working)
    for question, (total, working) in found.items()
  ]


def _problem(question: str, answer: str | None) -> Problem:
  return Problem(question, answer, lambda given: answer is not None and answers.same(given, answer))


def _file(file: Path) -> list[Problem]:
  lines = list(json_lines.read(file, name="problems"))
  if not lines:
    raise InputError(f"problems: {file} has no problem in it")
  problems = []
  for where, entry in lines:
    question = entry.get("question") if isinstance(entry, dict) else None
    if not isinstance(question, str) or not question.strip():
      raise InputError(f'{where}: has no "question"')
    problems.append(_problem(question, _answer(entry.get("answer"), where)))
  missing = [n for n, problem in enumerate(problems) if problem.answer is None]
  if missing and len(missing) < len(problems):
    first = missing[0]
    raise InputError(f'{lines[first].where}: problem {first + 1} has no "answer", others have one')
  return problems


def _answer(answer: object, where: str) -> str | None:
  """The right answer of a line as text; None where it is not known."""
  if answer is None:
    return None
  plain = isinstance(answer, str | int) or (isinstance(answer, float) and math.isfinite(answer))
  if not plain or not answers.readable(str(answer)):
    raise InputError(
      f'{where}: "answer" must be a text, a number or true or false, got {answer!r:.80}'
    )
  return str(answer)


class _Checker(Protocol):
  """A data set of reasoning-gym."""

  def score_answer(self, answer: str, entry: Json) -> float: ...


def _accepts(dataset: _Checker, given: str, entry: Json) -> bool:
  """Whether a checker of reasoning-gym takes an answer; some fail at texts that they do not expect."""
  try:
    return dataset.score_answer(given, entry) >= 1
  except Exception:
    return False


def _reasoning_gym(name: str, count: int, seed: int) -> tuple[list[Problem], Source]:
  try:
    import reasoning_gym
  except ImportError:
    raise InputError(
      f"{name}: the package reasoning-gym is not installed: pip install 'jaxmethods[reasoning]'"
    ) from None
  which = name.removeprefix(_GYM)
  try:
    dataset = reasoning_gym.create_dataset(which, size=count, seed=seed)
  except ValueError:
    raise InputError(f"problems: reasoning-gym has no data set {which!r}") from None

  def problem(entry: Json) -> Problem:
    check = lambda given: any(_accepts(dataset, form, entry) for form in answers.forms(given))
    return Problem(entry["question"], str(entry["answer"]), check)

  origin = f"reasoning-gym {getattr(reasoning_gym, '__version__', '')}".strip()
  source = Source(name, origin, "Apache-2.0", "Stojanovski et al., arXiv 2505.24760", False)
  return [problem(dataset[i]) for i in range(len(dataset))], source
