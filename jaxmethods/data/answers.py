"""Answers in the words of a model: where one stands in a text, and whether it is the right one.

The right answer is read as a whole: numbers (one, a list, a range, a time), an option letter, or words.
The given one is searched for the same: prose around a number, a unit behind it or LaTeX do no harm.

| right | also right | wrong |
| --- | --- | --- |
| 72 | 72.0, $72, 72 apples, 6 * 12 = 72, 7.2e1 | 72/2, 7, 72-80 |
| 3/4 | 0.75, 6/8 | 3, 4, 1/4 |
| 50% | 50, 0.5, 50 percent | 0.5% |
| 1, 2, 3 | [1, 2, 3], 1, 2 and 3 | 3, 2, 1 |
| B | (B), B) 12 apples | C) 12 apples |
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

_MARKER = re.compile(r"([*_]*)(?:(?<![a-z])answer\1?\s*[:：]\1?|####)[ \t]*", re.IGNORECASE)


class Marker(NamedTuple):
  """A place "Answer:" or "####" in a text, from `start` to `end`; `emphasis` is left open there."""

  start: int
  end: int
  emphasis: str


def marker(text: str) -> Marker | None:
  """Finds the last place in a text that announces the answer."""
  found = list(_MARKER.finditer(text))
  if not found:
    return None
  emphasis = found[-1][1]
  return Marker(*found[-1].span(), emphasis if found[-1][0].count(emphasis) == 1 else "")


def final_answer(text: str, finished: bool = True) -> str | None:
  """Returns the answer in a text: all that stands behind the last "Answer:".

  Without a marker it is the last boxed formula, or the last number, of a text that came to its end
  (ours: small models forget the marker); a text that was cut off gives None.
  """
  if place := marker(text):
    tail = text[place.end :].strip()
    if place.emphasis:
      tail = tail.replace(place.emphasis, "", 1).strip()
    return tail if tail.strip(" .*\"'") else None
  if not finished:
    return None
  if (boxed := text.rfind(r"\boxed{")) >= 0:
    return text[boxed:].split("\n", 1)[0]
  found = [numbers for numbers in _scan(_leveled(text)) if numbers.values]
  if not found:
    return None
  start = found[-1].last if found[-1].joint == "," else found[-1].start
  return text[start : found[-1].end].strip()


def forms(given: str) -> tuple[str, ...]:
  """Returns a given answer as a checker may want it: raw, its first line, that without LaTeX."""
  first = _first_line(given)
  return tuple(dict.fromkeys((given, first, _plain(first), first.strip(" .*\"'"))))


def same(given: str, right: str) -> bool:
  """Whether a given answer is the right one; see the module docstring."""
  if _words(given) == _words(right):
    return True
  right = _plain(right)
  first = _first_line(_plain(given))
  if _words(first) == _words(right):
    return True
  if (letter := _option(right)) and letter == _said_option(first):
    return True
  if _words(right) in ("yes", "no", "true", "false"):
    return re.split(r"[.,;:!\n]", first.casefold(), maxsplit=1)[0].strip() == _words(right)
  said = [_first_numbers(_behind_equals(text)) for text in _with_decimal_point(first)]
  wanted = [_whole(text) for text in _with_decimal_point(right)]
  return any(_equal(a, b) for a in said for b in wanted if a and b)


def normalised(answer: str) -> str:
  """Returns one text for all answers that are equal: the numbers it is, else its words."""
  plain = _plain(answer)
  first = _first_line(plain)
  if option := _said_option(first):
    return option
  if found := _first_numbers(_behind_equals(first)):
    return found.joint.join(str(value.number) for value in found.values)
  return _words(plain)


def readable(answer: str) -> bool:
  """Whether something is left of an answer that could be right."""
  return bool(_words(_plain(answer)))


# --- texts ----------------------------------------------------------------------------------------

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_CHARACTERS = str.maketrans("−–‒‐‑﹣－٫٬٪％⁄，", "-------.,%%/,")
_WRAPPER = re.compile(
  r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX = (
  (r"\{,\}", ","), (r"\\[()\[\]]|\\left|\\right|\\[!,;: ]", ""), (r"\\([%$#])", r"\1"),
  (r"\\times|\\cdot", "*"), (r"\^\{?\\circ\}?|\\degree", "°"), (r"\$\$?([^$]*)\$\$?", r"\1"),
)  # fmt: skip
_SPACED_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u202f\u2009'’_](?=\d{3}(?!\d))")

_POWER = re.compile(r"(?<![\w.^*,/-])(\d{1,4})\s?(?:\^|\*\*)\s?\{?(\d{1,2})\}?(?![\w.^*,])")


def _leveled(text: str) -> str:
  """Writes digits, minus signs and the like as ASCII, character by character."""
  digit = lambda c: str(unicodedata.decimal(c)) if c.isdecimal() else c
  return "".join(map(digit, text.translate(_CHARACTERS)))


def _plain(text: str) -> str:
  """Takes off solutions, LaTeX and emphasis around an answer."""
  text = _leveled(text.rpartition("####")[2])
  split = lambda c: " " + unicodedata.normalize("NFKC", c).replace("⁄", "/")
  text = "".join(split(c) if "<fraction>" in unicodedata.decomposition(c) else c for c in text)
  text = _SPACED_THOUSANDS.sub("", text)
  before = ""
  while text != before:
    before, text = text, _WRAPPER.sub(r"\1", _FRACTION.sub(r"(\1)/(\2)", text))
  text = re.sub(r"\((\d+)\)/\((\d+)\)", r"\1/\2", text)
  for pattern, replacement in _LATEX:
    text = re.sub(pattern, replacement, text)
  text = _POWER.sub(lambda found: str(int(found[1]) ** int(found[2])), text)
  return re.sub(r"(?<!\d)\*\*|\*\*(?!\d)|__|`", "", text).strip()


def _first_line(text: str) -> str:
  return text.split("\n", 1)[0]


def _behind_equals(text: str) -> str:
  """The result of a calculation that is written out."""
  return re.split(r"[=≈]", text)[-1]


def _words(text: str) -> str:
  """Words in lower case, spaces and punctuation around them left out; formulas without spaces."""
  text = " ".join(text.casefold().split()).strip(" .,!?;:\"'“”‘’*`")
  text = re.sub(r"\s*([,;])\s*", r"\1 ", text)
  if re.search(r"[-+*/^=<>()\[\]{}]", text):
    text = text.replace(" ", "")
  bracket = _BRACKETS.get(text[:1])
  inside = text[1:-1]
  return inside if bracket and text.endswith(bracket) and inside.isalnum() else text


# --- options --------------------------------------------------------------------------------------


def _option(right: str) -> str:
  """The letter of a right answer such as B, (B) or B) 12 apples; else nothing."""
  found = re.fullmatch(r"[(\[]?([A-Za-z])[)\].:]?(?:(?<=[)\].:])\s+\S.*)?", right, re.DOTALL)
  return found[1].upper() if found else ""


def _said_option(line: str) -> str:
  """The letter that a line chooses, else nothing; "A" alone before a word is an article."""
  found = (
    re.match(r"(?:(?i:option|choice)\s+)?[(\[]?([A-Za-z])(?:[)\].:,]|\s*$)", line)
    or re.match(r"(?:(?i:option|choice)\s+)([A-Za-z])\b", line)
    or re.match(r"([B-HJ-Z])\s", line)
    or re.search(r"\(([A-Z])\)", line)
  )
  return found[1].upper() if found else ""


# --- numbers --------------------------------------------------------------------------------------

_LONGEST = 100  # characters of a number that is still read as one
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_ORDINALS = ("st", "nd", "rd", "th")
# Names of one measure each; other words behind a number are not compared.
_MEASURES = (
  "% percent", "$ dollar usd", "€ euro eur", "£ gbp", "¥ yen", "₹ rupee", "¢ cent",
  "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
  "inch inche", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram",
  "oz ounce", "lb pound", "ml milliliter millilitre", "l liter litre", "s sec second",
  "min minute", "h hr hour", "day", "week", "month", "year", "am a.m", "pm p.m", "° degree",
)  # fmt: skip
_MEASURE_OF = {name: names.split()[0] for names in _MEASURES for name in names.split()}

_NUMBER = (
  r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+(?:\.\d+)?|\.\d+)"
  r"(?:[eE][-+]?\d{1,3}(?!\d))?"
)
_VALUE = re.compile(
  r"(?<![\w.])(?<![^\W\d_]\()(?P<sign>[-+]?)\s?(?P<currency>[$€£¥₹]?)\s?(?P<inner>-?)"
  rf"(?:(?P<whole>\d+)\s+(?=\d+\s?/))?(?P<top>{_NUMBER})(?:\s?/\s?(?P<bottom>{_NUMBER}))?"
  r"(?P<unit>\s*[%°$€£¥₹¢]|\s*per\s?cent\b|\s*(?!(?:and|or|to)\b)[^\W\d_](?:[^\W\d_]|\.(?=\w))*)?"
)
_JOINTS = (
  (",", re.compile(r"\s*[,;]\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+")),
  ("-", re.compile(r"\s*-\s*|\s+to\s+")),
  (":", re.compile(r":(?=\d)")),
)
# A comma with three digits behind it is one of thousands, except after a lone zero.
_DECIMAL_COMMA = re.compile(
  r"(?<=\d),(?=(?:\d{1,2}|\d{4,})(?![\d,]))(?<![,\d]\d{3},)|(?<=\b0),(?=\d{3}\b)"
)
_DOTTED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,]*\d)")
# Behind these a number is a part of something larger.
_CALCULATION = re.compile(r"\s*[*×·÷+/]\s*[\d(.]|\s*[\^\\√]|\s*-\s*\(|\s*\d")
_REMAINDER = re.compile(r"[^\d,;=/:^*+]*(?:\(.*\))?[^\d]*", re.DOTALL)


class _Value(NamedTuple):
  """A number with its unit: one of `_MEASURES`, or nothing."""

  number: Fraction
  unit: str


class _Numbers(NamedTuple):
  """Numbers in a text, up to `end`: a list (","), a range ("-"), a time (":") or a single one ("").

  The first begins at `start`, the last at `last`.
  """

  joint: str
  values: tuple[_Value, ...]
  start: int
  last: int
  end: int


def _value(found: re.Match[str]) -> _Value | None:
  """The number that a match of `_VALUE` is; None where it is too long, or part of a word or formula."""
  if len(found[0]) > _LONGEST:
    return None
  number = _fraction(found["top"])
  if found["bottom"]:
    if not (below := _fraction(found["bottom"])):
      return None
    number /= below
  if found["whole"]:
    number += _fraction(found["whole"])
  if (found["sign"] == "-") != (found["inner"] == "-"):
    number = -number
  unit = found["unit"] or ""
  word = re.sub(r"^per\s?cent", "percent", unit.strip().casefold()).rstrip(".")
  known = _MEASURE_OF.get(word) or _MEASURE_OF.get(word.removesuffix("s"), "")
  attached = unit and not unit[0].isspace()
  if attached and not known and word not in _SCALES and word not in _ORDINALS:
    return None
  return _Value(number * _SCALES.get(word, 1), known or _MEASURE_OF.get(found["currency"], ""))


def _fraction(digits: str) -> Fraction:
  return Fraction(digits.replace(",", ""))


def _scan(text: str) -> Iterator[_Numbers]:
  """Yields what numbers a text has, those that are joined together; without values if unreadable."""
  found = _VALUE.search(text)
  while found:
    values, joints, start = [_value(found)], set(), found.start()
    while following := _following(text, found.end()):
      joint, found = following
      joints.add(joint)
      values.append(_value(found))
    known = tuple(value for value in values if value)
    part = len(known) < len(values) or len(joints) > 1 or _CALCULATION.match(text, found.end())
    yield _Numbers("".join(joints), () if part else known, start, found.start(), found.end())
    found = _VALUE.search(text, found.end())


def _first_numbers(text: str) -> _Numbers | None:
  """The first numbers of a text; None without any, or where they are unreadable."""
  found = next(_scan(text), None)
  return found if found and found.values else None


def _with_decimal_point(text: str) -> tuple[str, str]:
  """A text, and the same with 3,5 taken for 3.5, as many languages write it."""
  text = _DOTTED_THOUSANDS.sub(lambda found: found[0].replace(".", "").replace(",", "."), text)
  return text, _DECIMAL_COMMA.sub(".", text)


def _following(text: str, position: int) -> tuple[str, re.Match[str]] | None:
  """The number that is joined to the one that ends here, and how."""
  for name, joint in _JOINTS:
    # A sign that belongs to the next number is no joint.
    if (between := joint.match(text, position)) and (found := _VALUE.match(text, between.end())):
      return name, found
  return None


def _whole(right: str) -> _Numbers | None:
  """The numbers that a right answer is as a whole, but for a unit behind them; else None."""
  text = _behind_equals(right).strip().rstrip(".")
  if _BRACKETS.get(text[:1], "-") == text[-1:]:
    text = text[1:-1].strip()
  found = _first_numbers(text)
  if not found or text[: found.start].strip(" ~") or not _REMAINDER.fullmatch(text, found.end):
    return None
  return found


def _equal(said: _Numbers, right: _Numbers) -> bool:
  """Whether numbers are equal, one by one."""
  alike = said.joint == right.joint and len(said.values) == len(right.values)
  return alike and all(map(_equal_values, said.values, right.values))


def _equal_values(said: _Value, right: _Value) -> bool:
  """Units count where both have one; 50% is 50 and 0.5 beside a number without a unit."""
  if said.unit and right.unit:
    return said == right
  if said.number == right.number:
    return True
  return "%" in (said.unit, right.unit) and _share(said) == _share(right)


def _share(value: _Value) -> Fraction:
  return value.number / 100 if value.unit == "%" else value.number
