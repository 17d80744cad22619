"""Generated arithmetic in steps that are written out, one character a token.

A problem is a number and what is to be done with it, one thing after the other: `7;+8;-3;*2?`. Its
solution writes every step, then the answer: `7+8=15;15-3=12;12*2=24#24.`. `#` ends the thinking, `.` the
text; all numbers stay within 0 to 99. Whether an answer is right can be computed.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from jaxmethods.errors import InputError

CHARACTERS = " 0123456789+-*=;?#."  # the first is padding
END_OF_THINKING, END = CHARACTERS.index("#"), CHARACTERS.index(".")
ZERO, EQUALS = CHARACTERS.index("0"), CHARACTERS.index("=")
_LARGEST = 99
_PATIENCE = 200  # draws for each problem that is wanted
_TEST_SHARE = 8  # one problem in so many is never trained on


class Problems(NamedTuple):
  """Problems with one solution each.

  Attributes:
    prompts: (n, P) int32, padded on the left.
    solutions: (n, N) int32, padded on the right.
    answers: (n,) int32.
    operations: (n,) int32.
  """

  prompts: np.ndarray
  solutions: np.ndarray
  answers: np.ndarray
  operations: np.ndarray


def sizes(operations: int) -> tuple[int, int]:
  """Columns P of prompts and N of solutions with at most so many operations."""
  return len("99;") + 3 * operations, len("99*9=99;") * operations + len("99.")


def generate(
  count: int,
  operations: int,
  rng: np.random.Generator,
  *,
  test: bool = False,
  exactly: int = 0,
) -> Problems:
  """Draws problems of 1 to `operations` operations.

  Args:
    count: n.
    operations: the most.
    rng: of the draws.
    test: whether to draw from the share that is never trained on, each problem once.
    exactly: operations of every problem, up to `operations`; 0: from 1 on.

  Raises:
    InputError: there are not so many different ones to test on.
  """
  seen: set[str] = set()
  drawn: list[tuple[str, str, int, int]] = []
  for _ in range(_PATIENCE * count):
    problem = _draw(exactly or int(rng.integers(1, operations + 1)), rng)
    prompt = problem[0]
    if test != (zlib.crc32(prompt.encode()) % _TEST_SHARE == 0) or (test and prompt in seen):
      continue
    seen.add(prompt)
    drawn.append(problem)
    if len(drawn) == count:
      break
  else:
    raise InputError(
      f"operations: at most {operations} make no {count} different problems to test on"
    )
  prompts, solutions, answers, steps = zip(*drawn, strict=True)
  prompt_size, solution_size = sizes(operations)
  return Problems(
    np.stack([encode(text.rjust(prompt_size)) for text in prompts]),
    np.stack([encode(text.ljust(solution_size)) for text in solutions]),
    np.array(answers, np.int32),
    np.array(steps, np.int32),
  )


def encode(text: str) -> np.ndarray:
  """Tokens of a text of `CHARACTERS`."""
  return np.array([CHARACTERS.index(character) for character in text], np.int32)


def decode(tokens: np.ndarray) -> str:
  """The text of tokens."""
  return "".join(CHARACTERS[int(token)] for token in tokens)


def _draw(operations: int, rng: np.random.Generator) -> tuple[str, str, int, int]:
  """One problem: prompt, solution, answer, number of operations."""
  value = int(rng.integers(0, 21))
  prompt, steps = str(value), []
  for _ in range(operations):
    number = int(rng.integers(2, 10))
    results = {"+": value + number, "-": value - number, "*": value * number}
    possible = [sign for sign, result in results.items() if 0 <= result <= _LARGEST]
    sign = possible[int(rng.integers(len(possible)))]
    prompt += f";{sign}{number}"
    steps.append(f"{value}{sign}{number}={results[sign]}")
    value = results[sign]
  return prompt + "?", f"{';'.join(steps)}#{value}.", value, operations
