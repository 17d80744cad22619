"""Problems with checkable answers: generated ones, files, and what counts as the answer."""

import json
import re

import numpy as np
import pytest

from jaxmethods.data import arithmetic, problems
from jaxmethods.errors import InputError

SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def test_written_out_arithmetic_is_right():
  drawn = arithmetic.generate(200, 4, np.random.default_rng(0))
  for prompt, solution, answer, operations in zip(*drawn, strict=True):
    start, *steps = arithmetic.decode(prompt).strip().rstrip("?").split(";")
    value, written = int(start), []
    for step in steps:
      result = SIGNS[step[0]](value, int(step[1:]))
      assert 0 <= result <= 99
      written.append(f"{value}{step}={result}")
      value = result
    assert arithmetic.decode(solution).strip() == f"{';'.join(written)}#{value}."
    assert (answer, operations) == (value, len(steps))
  assert set(drawn.operations.tolist()) == {1, 2, 3, 4}


def test_what_is_tested_is_never_trained_on():
  prompts = lambda drawn: {arithmetic.decode(row) for row in drawn.prompts}
  test = prompts(arithmetic.generate(100, 2, np.random.default_rng(0), test=True))
  assert len(test) == 100
  assert not test & prompts(arithmetic.generate(2000, 2, np.random.default_rng(1)))


def test_too_few_problems_are_named():
  with pytest.raises(InputError, match="operations: at most 1 make no 500"):
    arithmetic.generate(500, 1, np.random.default_rng(0), test=True)


def test_word_problems():
  drawn, source = problems.load(problems.GENERATED, 300, seed=1)
  assert not source.real
  assert len({p.question for p in drawn}) == 300
  again, _ = problems.load(problems.GENERATED, 300, seed=1)
  assert [p.question for p in again] == [p.question for p in drawn]
  for problem in drawn:
    a, b, *more = map(int, re.findall(r"\d+", problem.question))
    first = a * b if "boxes" in problem.question else a + b if "buys" in problem.question else a - b
    last = first + sum(-n if "to a friend" in problem.question else n for n in more)
    assert problem.answer == str(last)
    assert last >= 0 and max(a, b, *more) < 40
    assert problem.check(f"{last}.0") and not problem.check(str(last + 1))


@pytest.mark.parametrize(
  ("text", "finished", "answer"),
  [
    ("3 + 4 = 7. Answer: 7", True, "7"),
    ("Answer: 5\nno, Answer: -12.5 coins", True, "-12.5"),
    ("3 + 4 = 7", True, "7"),
    ("3 + 4 = 7", False, None),  # cut off before any answer
    ("the answer: 7 and", False, "7"),
    ("Answer: Paris.", True, "Paris"),
    ("I do not know", True, None),
    ("ANSWER: 1,204", True, "1,204"),
  ],
)
def test_final_answer(text, finished, answer):
  assert problems.final_answer(text, finished) == answer


def test_answers_are_compared_as_numbers():
  assert problems.same("7", "7.0") and problems.same("$1,204", "1204")
  assert not problems.same("-7", "7") and problems.same(" paris", "Paris")
  assert problems.normalised("07") == problems.normalised("7")


BAD_LINES = {
  "not JSON": ("{", "line 1: is not JSON"),
  "no question": ('{"answer": 3}', 'line 1: has no "question"'),
  "not a mapping": ("[1]", 'line 1: has no "question"'),
  "nothing": ("\n", "has no problem in it"),
  "an answer missing": (
    '{"question": "a", "answer": 1}\n{"question": "b"}', 'problem 2 has no "answer"',
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_files(tmp_path, case):
  content, message = BAD_LINES[case]
  (tmp_path / "p.jsonl").write_text(content)
  with pytest.raises(InputError, match=message):
    problems.load(str(tmp_path / "p.jsonl"), 5)


def test_a_file(tmp_path):
  lines = [{"question": "2 + 2?", "answer": 4}, {"question": "3 + 3?", "answer": 6}]
  (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
  found, source = problems.load(str(tmp_path / "p.jsonl"), 1)
  assert [p.question for p in found] == ["2 + 2?"] and found[0].check("4")
  assert source.origin.endswith("p.jsonl")


def test_unknown_and_missing_sources(tmp_path):
  with pytest.raises(InputError, match="cannot be read"):
    problems.load(str(tmp_path / "none.jsonl"), 5)
  with pytest.raises(InputError, match="unknown source 'gsm8k'"):
    problems.load("gsm8k", 5)


def test_reasoning_gym():
  pytest.importorskip("reasoning_gym")
  drawn, source = problems.load("reasoning-gym:basic_arithmetic", 5, seed=3)
  assert len(drawn) == 5 and "reasoning-gym" in source.origin
  assert all(p.check(p.answer) and not p.check("no number") for p in drawn)
  with pytest.raises(InputError, match="no data set 'nothing'"):
    problems.load("reasoning-gym:nothing", 5)
