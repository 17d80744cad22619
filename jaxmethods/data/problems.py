"""Problems in words with answers that can be checked, by name.

| name | what |
| --- | --- |
| `generated:word-problems` | one- and two-step arithmetic stories, drawn from a seed by this module |
| `reasoning-gym:NAME` | a data set of the package reasoning-gym, with its own checker |
| `FILE.jsonl` | lines of {"question": ..., "answer": ...}; without answers nothing can be judged |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmethods import folders
from jaxmethods.data.records import Source
from jaxmethods.errors import InputError

MARKER = "answer:"
GENERATED = "generated:word-problems"
_GYM = "reasoning-gym:"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Problem(NamedTuple):
  """A question.

  Attributes:
    question: as it is put to the model.
    answer: what is right, None where it is not known.
    check: whether a given answer is right.
  """

  question: str
  answer: str | None
  check: Callable[[str], bool]


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
    return _file(file)[:count], Source(name, str(file), "none stated", "", True)
  raise InputError(
    f"problems: unknown source {name!r}: sources are {GENERATED}, {_GYM}NAME, FILE.jsonl"
  )


def final_answer(text: str, finished: bool = True) -> str | None:
  """The answer in a text: its last number behind the last "Answer:", or whatever stands there.

  Without a marker it is the last number of a text that came to its end (ours: small models forget the
  marker); a text that was cut off gives None.
  """
  start = text.lower().rfind(MARKER)
  if start < 0 and not finished:
    return None
  tail = text[start + len(MARKER) :] if start >= 0 else text
  if numbers := _NUMBER.findall(tail):
    return numbers[-1]
  words = tail.strip().split("\n")[0].strip(" .*\"'")
  return words or None if start >= 0 else None


def same(given: str, right: str) -> bool:
  """Whether two answers are the same number, or the same words."""
  numbers = [_number(text) for text in (given, right)]
  if None in numbers:
    return normalised(given) == normalised(right)
  return numbers[0] == numbers[1]


def normalised(answer: str) -> str:
  """Equal for equal answers: the number it is, else its words in lower case."""
  number = _number(answer)
  return answer.strip().lower() if number is None else repr(number)


def _number(text: str) -> float | None:
  found = _NUMBER.fullmatch(text.strip().lstrip("$"))
  return float(found[0].replace(",", "")) if found else None


# --- sources --------------------------------------------------------------------------------------

_NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Omar", "Nina", "Jack", "Ella")
_THINGS = ("apples", "pencils", "marbles", "stickers", "books", "coins", "shells", "cards")

# What there is at first, and what happens then; both with the number that comes of it.
_Step = tuple[str, Callable[[int, int], int]]
_OPENINGS: tuple[_Step, ...] = (
  ("{name} has {a} {things} and buys {b} more.", lambda a, b: a + b),
  ("{name} has {a} {things} and gives away {b}.", lambda a, b: a - b),
  ("{name} has {a} {things} and loses {b} of them.", lambda a, b: a - b),
  ("{name} buys {a} boxes with {b} {things} each.", lambda a, b: a * b),
)
_CHANGES: tuple[_Step, ...] = (
  ("Then {name} finds {b} more {things}.", lambda a, b: a + b),
  ("Then a friend gives {name} {b} {things}.", lambda a, b: a + b),
  ("Then {name} gives {b} {things} to a friend.", lambda a, b: a - b),
)


def generated(count: int, seed: int) -> list[Problem]:
  """Stories of one or two steps with numbers below 40; no two are the same."""
  rng = np.random.default_rng(seed)
  found: dict[str, int] = {}
  while len(found) < count:
    pick = lambda options: options[int(rng.integers(len(options)))]
    names = {"name": pick(_NAMES), "things": pick(_THINGS)}
    opening, first = pick(_OPENINGS)
    a, b = map(int, rng.integers(2, 10 if "boxes" in opening else 40, 2))
    story, total = [opening.format(a=a, b=b, **names)], first(a, b)
    if rng.integers(2) and total >= 0:
      change, then = pick(_CHANGES)
      b = int(rng.integers(2, 40))
      story.append(change.format(b=b, **names))
      total = then(total, b)
    if total >= 0:
      story.append("How many {things} does {name} have now?".format(**names))
      found[" ".join(story)] = total
  return [_problem(question, str(total)) for question, total in found.items()]


def _problem(question: str, answer: str | None) -> Problem:
  return Problem(question, answer, lambda given: answer is not None and same(given, answer))


def _file(file: Path) -> list[Problem]:
  try:
    lines = file.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"problems: {file} cannot be read: {error}") from None
  problems = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
    except ValueError:
      raise InputError(f"problems: {file}, line {number}: is not JSON") from None
    question = entry.get("question") if isinstance(entry, dict) else None
    if not isinstance(question, str) or not question.strip():
      raise InputError(f'problems: {file}, line {number}: has no "question"')
    answer = entry.get("answer")
    problems.append(_problem(question, None if answer is None else str(answer)))
  if not problems:
    raise InputError(f"problems: {file} has no problem in it")
  missing = [n for n, problem in enumerate(problems, 1) if problem.answer is None]
  if missing and len(missing) < len(problems):
    raise InputError(f'problems: {file}: problem {missing[0]} has no "answer", others have one')
  return problems


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

  def problem(entry) -> Problem:
    check = lambda given: dataset.score_answer(given, entry) >= 1
    return Problem(entry["question"], str(entry["answer"]), check)

  origin = f"reasoning-gym {getattr(reasoning_gym, '__version__', '')}".strip()
  source = Source(name, origin, "Apache-2.0", "Stojanovski et al., arXiv 2505.24760", False)
  return [problem(dataset[i]) for i in range(len(dataset))], source
