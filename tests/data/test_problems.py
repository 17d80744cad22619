"""Problems with checkable answers: generated ones, files, and what counts as the answer."""

import json
import re

import numpy as np
import pytest

from jaxmethods.data import answers, arithmetic, problems
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
    ("Answer: 5\nno, Answer: -12.5 coins", True, "-12.5 coins"),
    ("3 + 4 = 7", True, "7"),
    ("3 + 4 = 7", False, None),  # cut off before any answer
    ("the answer: 7 and", False, "7 and"),
    ("Answer: Paris.", True, "Paris."),
    ("I do not know", True, None),
    ("ANSWER: 1,204", True, "1,204"),
  ],
)
def test_final_answer(text, finished, answer):
  assert problems.final_answer(text, finished) == answer


RIGHT = [
  ("**72**", "72"), ("72 apples", "72"), ("72", "72 apples"), ("6 * 12 = 72", "72"), ("+5", "5"),
  ("72 (that is 6 dozen)", "72"), ("$1,234.50", "1234.5"), ("1.5 million", "1500000"), ("7th", "7"),
  ("\u22125", "-5"), ("-$72", "-72"), ("- 5", "-5"), ("\u0667\u0662", "72"), ("1\u202f234", "1234"),
  (".5", "0.5"), ("1e5", "100000"), ("1.0e+5", "1e5"), ("3,5", "3.5"), ("0,123", "0.123"),
  ("3/4", "3/4"), ("0.75", "3/4"), ("6/8", "3/4"), ("1 3/4", "7/4"), ("2\u00bd", "2.5"),
  ("$\\frac{3}{4}$", "0.75"), ("$\\boxed{72}$", "72"), ("\\boxed{\\text{(B)}}", "B"),
  ("50", "50%"), ("0.5", "50%"), ("50 percent", "50%"), ("50\\%", "50%"), ("50%", "0.5"),
  ("3 to 5", "3-5"), ("3\u20135", "3-5"), ("10:30 AM", "10:30"), ("3:4", "3:4"),
  ("[1, 2, 3]", "1, 2, 3"), ("1, 2 and 3", "1,2,3"), ("The numbers are 1, 2, 3.", "1, 2, 3"),
  ("72 km", "72 kilometers"), ("72 dollars", "$72"), ("72", "48/2 = <<48/2=24>>24\n#### 72"),
  ("(B)", "B"), ("B) 12 apples", "B"), ("b", "(B)"), ("option B", "B"), ("The answer is (B)", "B"),
  ("yes.", "Yes"), ("No, it is not", "no"), ("true", "True"), ("Paris.\nIt is", "paris"),
  ("x^2 + 1", "x^2+1"), ("x = 5", "5"), ("2024-01-05", "2024-01-05"), ("9" * 5000, "9" * 5000),
  ("10^5", "100000"), ("2**10", "1024"), ("2^{10} bytes", "1024"), ("1_000", "1000"),
  ("1.234,5", "1234.5"), ("1.234.567,25", "1,234,567.25"),
]  # fmt: skip
WRONG = [
  ("71", "72"), ("72/2", "72"), ("3/4", "3"), ("3", "3/4"), ("3/4", "-3/4"), ("5", "-5"),
  ("0.5%", "50%"), ("40%", "50%"), ("3-5", "3"), ("5", "3-5"), ("3-6", "3-5"), ("11:30", "10:30"),
  ("10:30 PM", "10:30 AM"), ("10", "10:30"), ("3, 2, 1", "1, 2, 3"), ("9, 9, 3", "1, 2, 3"),
  ("1, 2", "1, 2, 3"), ("1, 2, 3", "3"), ("1e6", "1e5"), ("1e999999999", "1"), ("0.25", ".5"),
  ("72 km", "72 miles"), ("5x", "5"), ("5", "5x"), ("2^10", "2"), ("sqrt(2)", "2"), ("6 * 12", "6"),
  ("1/0", "2"), ("1,234", "1.234"), ("B) 12 apples", "C"), ("A dog", "A"), ("Because", "B"),
  ("No idea", "no"), ("London", "paris"), ("Paris, France", "paris"), ("5/6/2024", "5/6"),
  ("2**10", "210"), ("3*2^2", "4"), ("2^10", "10"), ("x^2", "4"), ("1.234,5", "1.2345"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "right"), RIGHT)
def test_right_answers_are_right(given, right):
  assert answers.same(problems.final_answer(f"So\nAnswer: {given}"), right)


@pytest.mark.parametrize(("given", "right"), WRONG)
def test_wrong_answers_are_wrong(given, right):
  assert not answers.same(problems.final_answer(f"So\nAnswer: {given}"), right)


@pytest.mark.parametrize(
  "text",
  [
    "**Answer:** 7",
    "**Answer: 7**",
    "__Answer:__ 7",
    "ANSWER : 7",
    "so\n#### 7",
    "\u0130 answer:7",
  ],
)
def test_markers(text):
  assert problems.final_answer(text, finished=False) == "7"


def test_equal_answers_have_one_name():
  equal = [["07", "7", "7 apples"], ["$1,204", "1204.0"], ["Paris.", " paris"], ["(B)", "B) 12"]]
  names = [{answers.normalised(answer) for answer in group} for group in equal]
  assert all(len(group) == 1 for group in names)
  assert len(set.union(*names)) == len(equal)


BAD_LINES = {
  "not JSON": ("{", "line 1: is not JSON"),
  "no question": ('{"answer": 3}', 'line 1: has no "question"'),
  "not a mapping": ("[1]", 'line 1: has no "question"'),
  "no Unicode": ('{"question": "\\ud800"}', "line 1: a string is no Unicode text"),
  "an answer of several": (
    '{"question": "a", "answer": 1}\n{"question": "b", "answer": [1]}', 'line 2: "answer" must be',
  ),
  "an empty answer": ('{"question": "a", "answer": " "}', 'line 1: "answer" must be'),
  "an answer behind ####": ('{"question": "a", "answer": "2 ####"}', 'line 1: "answer" must be'),
  "no number": ('{"question": "a", "answer": NaN}', 'line 1: "answer" must be'),
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


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_lines_end_at_the_line_feed_only(tmp_path, mark):
  line = json.dumps({"question": f"what is{mark} this", "answer": "red"}, ensure_ascii=False)
  (tmp_path / "p.jsonl").write_bytes(f"\ufeff{line}\r\n\n{line}".encode())
  found, _ = problems.load(str(tmp_path / "p.jsonl"), 5)
  assert [p.question for p in found] == [f"what is{mark} this"] * 2


def test_reasoning_gym():
  pytest.importorskip("reasoning_gym")
  drawn, source = problems.load("reasoning-gym:basic_arithmetic", 5, seed=3)
  assert len(drawn) == 5 and "reasoning-gym" in source.origin
  assert all(p.check(p.answer) and not p.check("no number") for p in drawn)
  with pytest.raises(InputError, match="no data set 'nothing'"):
    problems.load("reasoning-gym:nothing", 5)


@pytest.mark.parametrize(
  "name", ["countdown", "mini_sudoku", "time_intervals", "spell_backward", "syllogism"]
)
def test_answers_of_reasoning_gym_are_right_when_they_are_said(name):
  pytest.importorskip("reasoning_gym")
  for problem in problems.load(f"reasoning-gym:{name}", 4, seed=3)[0]:
    assert problem.check(problems.final_answer(f"So.\n**Answer:** {problem.answer}\n"))


def test_a_file_is_known_by_its_contents(tmp_path):
  file = tmp_path / "p.jsonl"

  def digest(answer):
    file.write_text(f'{{"question": "2 + 2?", "answer": {answer}}}\n')
    return problems.load(str(file), 1)[1].digest

  assert digest(4) == digest(4) != digest(55)
  assert problems.load(problems.GENERATED, 1)[1].digest == ""
