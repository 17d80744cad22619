"""The study's questions as arms and levels. Imports no jax.

The paper's tables were not at hand: the questions are the abstract's, the directions hypotheses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jaxmethods.runtime.experiment import RunConfig
from jaxmethods.runtime.studies import Cell, Claim, Study

Rows: TypeAlias = Mapping[str, RunConfig]

_ARMS = {"LPT": "lpt", "VPT": "vpt", "both": "both", "zero-shot": "zero_shot"}
# Its first words are the hand-written prompt; so every length starts from one.
_PHRASE = "a picture of a picture of a picture of a"
_ACCURACY, _WORST, _DRIFT = "test_accuracy", "worst_domain", "agreement"


def studies(rows: Rows) -> dict[str, Study]:
  """Returns H1 .. H6 for rows that have the data, the model, the rates and the budget."""
  return {
    "H1": _label_skew(rows),
    "H2": _domain_shift(rows),
    "H3": _both_skews(rows),
    "H4": _number_of_clients(rows),
    "H5": _aggregation(rows),
    "H6": _prompt_length(rows),
  }


def _label_skew(rows: Rows) -> Study:
  levels = {"0 (even)": {"alpha": 0.0}, "0.5": {"alpha": 0.5}, "0.1": {"alpha": 0.1}}
  cells = _cells(rows, ("LPT", "VPT"), levels, skew="labels")
  fall = lambda arm, sign=1.0: {(arm, "0 (even)"): sign, (arm, "0.1"): -sign}
  return Study(
    "H1: does LPT lose less than VPT under stronger label skew?", "beta", cells,
    [
      Claim("LPT loses less than VPT from beta 0 to 0.1", _ACCURACY, fall("VPT") | fall("LPT", -1)),
      Claim("LPT loses accuracy", _ACCURACY, fall("LPT")),
      Claim("VPT loses accuracy", _ACCURACY, fall("VPT")),
    ],
    (_ACCURACY, _DRIFT),
  )  # fmt: skip


def _domain_shift(rows: Rows) -> Study:
  levels = {"domains": {"skew": "both", "alpha": 0.0}}
  cells = _cells(rows, ("zero-shot", "LPT", "VPT"), levels)
  ahead = {("VPT", "domains"): 1.0, ("LPT", "domains"): -1.0}
  return Study(
    "H2: is VPT at least as good as LPT under domain shift?", "shift", cells,
    [
      Claim("VPT is better than LPT, mean of the domains", _ACCURACY, ahead),
      Claim("VPT is better than LPT in the worst domain", _WORST, ahead),
      *(
        Claim(f"{arm} is better than zero-shot", _ACCURACY,
              {(arm, "domains"): 1.0, ("zero-shot", "domains"): -1.0})
        for arm in ("LPT", "VPT")
      ),
    ],
    (_ACCURACY, _WORST, _DRIFT),
  )  # fmt: skip


def _both_skews(rows: Rows) -> Study:
  levels = {"0.5": {"alpha": 0.5}}
  cells = _cells(rows, ("LPT", "VPT", "both"), levels, skew="both")
  claims = [
    Claim(f"both prompts are better than {arm}", _ACCURACY,
          {("both", level): 1.0, (arm, level): -1.0})
    for level in levels
    for arm in ("LPT", "VPT")
  ]  # fmt: skip
  return Study(
    "H3: do both prompts beat the better single one when labels and domains differ?",
    "beta", cells, claims, (_ACCURACY, _WORST),
  )  # fmt: skip


def _number_of_clients(rows: Rows) -> Study:
  levels = {str(n): {"clients": n} for n in (4, 7, 28)}
  cells = _cells(rows, ("LPT", "VPT"), levels, skew="labels", alpha=0.5)
  fall = lambda arm, sign=1.0: {(arm, "4"): sign, (arm, "28"): -sign}
  return Study(
    "H4: does accuracy fall as the same data are spread over more clients?", "clients", cells,
    [
      Claim("LPT falls from 4 to 28 clients", _ACCURACY, fall("LPT")),
      Claim("VPT falls from 4 to 28 clients", _ACCURACY, fall("VPT")),
      Claim("the falls differ", _ACCURACY, fall("VPT") | fall("LPT", -1), "different"),
    ],
    (_ACCURACY, _DRIFT),
  )  # fmt: skip


def _aggregation(rows: Rows) -> Study:
  # 0: equal sizes up to one example. Labels skewed by 0.1: sizes differ several times over.
  levels = {"equal sizes": {"alpha": 0.0}, "unequal sizes": {"alpha": 0.1}}
  cells: dict[Cell, RunConfig] = {}
  for arm in ("LPT", "VPT"):
    for how, weighted in (("weight", True), ("equal", False)):
      made = _cells(rows, (arm,), levels, skew="labels", weighted=weighted)
      cells |= {(f"{arm} {how}", level): cell for (_, level), cell in made.items()}
  claims = [
    Claim(f"{arm}: the two differ with {level}", _ACCURACY,
          {(f"{arm} weight", level): 1.0, (f"{arm} equal", level): -1.0}, "different")
    for arm in ("LPT", "VPT")
    for level in levels
  ]  # fmt: skip
  return Study(
    "H5: do the weights of the average matter where clients are of unequal size?",
    "clients of", cells, claims, (_ACCURACY,),
  )  # fmt: skip


def _prompt_length(rows: Rows) -> Study:
  lengths = (1, 4, 10)
  phrase = lambda n: " ".join(_PHRASE.split()[:n])
  levels = {
    str(n): {"text_prompts": n, "vision_prompts": n, "initial_phrase": phrase(n)} for n in lengths
  }
  cells = _cells(rows, ("LPT", "VPT"), levels, skew="labels", alpha=0.5)
  more = lambda arm, a, b: {(arm, a): 1.0, (arm, b): -1.0}
  claims = []
  for arm in ("LPT", "VPT"):
    claims += [
      Claim(f"{arm}: clients agree less with 10 prompts than with 1", _DRIFT, more(arm, "1", "10")),
      Claim(f"{arm}: 1 prompt and 10 differ in accuracy", _ACCURACY, more(arm, "10", "1"), "different"),
      Claim(f"{arm}: 4 prompts and 10 differ in accuracy", _ACCURACY, more(arm, "10", "4"), "different"),
    ]  # fmt: skip
  return Study(
    "H6: is the best prompt length a flat optimum, and do longer prompts drift more?",
    "prompts", cells, claims, (_ACCURACY, _DRIFT),
  )  # fmt: skip


def _cells(
  rows: Rows, arms: Sequence[str], levels: Mapping[str, Mapping[str, Any]], **common: Any
) -> dict[Cell, RunConfig]:
  """A config for every arm at every level."""
  return {
    (arm, level): dataclasses.replace(rows[_ARMS[arm]], **{**common, **changes})
    for arm in arms
    for level, changes in levels.items()
  }
