"""Texts on disk hold no value of a profile: marks stand in their place, and can be undone in memory."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

from jaxmethods.methods.epeagent import minimise

Atoms = list[list[tuple[str, ...]]]  # [user][field]
_MARK = re.compile(r"\[\[(\d+)\]\]")
_SHORTEST, _SHORTEST_DISGUISED = 2, 4
_WORD = re.compile(r"[0-9a-z]+")


def _vocabulary(atoms: Atoms) -> list[str]:
  """All atoms of all users, long ones first: the same profiles give the same list."""
  distinct = {atom for own in atoms for parts in own for atom in parts if len(atom) >= _SHORTEST}
  return sorted(distinct, key=lambda atom: (-len(atom), atom))


def hider(atoms: Atoms) -> Callable[[str], str]:
  """Makes the function that puts numbered marks in the place of values; see `restorer`."""
  return _hider(_vocabulary(atoms), lambda number: f"[[{number}]]")


def namer(atoms: Atoms, fields: Sequence[str]) -> Callable[[str], str]:
  """Makes the function that puts the name of a field in the place of its values, for people to read."""
  words = _vocabulary(atoms)
  owner = {atom: f for own in atoms for f, parts in zip(fields, own, strict=True) for atom in parts}
  hide = _hider(words, lambda number: f"[[{number}]]")
  name = lambda mark: f"[{owner[words[int(mark[1])]]}]"
  return functools.lru_cache(maxsize=65536)(lambda text: _MARK.sub(name, hide(text)))


def _hider(words: list[str], mark: Callable[[int], str]) -> Callable[[str], str]:
  """Marks that a text brings along are taken out first.

  A text in which a value can still be found, in a form that `minimise.leaked` or `minimise.decoded`
  knows, or that is a part of something, is replaced as a whole.
  """
  by_first: dict[str, list[tuple[int, str]]] = {}
  for number, atom in enumerate(words):
    first = _WORD.search(atom)
    by_first.setdefault(first[0] if first else "", []).append((number, atom))

  def candidates(text: str) -> list[tuple[int, str]]:
    there = {*_WORD.findall(minimise.normalise(text)), ""}
    return sorted(pair for word in there for pair in by_first.get(word, ()))

  def hide(text: str) -> str:
    plain = _MARK.sub(minimise.CUT, unicodedata.normalize("NFKC", text))
    for number, atom in candidates(plain):
      plain = _outside(plain, minimise.span(atom), mark(number))
    bare = _MARK.sub(" | ", plain)
    left = any(minimise.leaked((atom,), bare) for _, atom in candidates(bare))
    return minimise.WITHHELD if left or minimise.in_parts(bare) or disguised(bare) else plain

  def disguised(text: str) -> bool:
    return any(
      len(atom) >= _SHORTEST_DISGUISED and minimise.leaked((atom,), plain)
      for plain in minimise.decoded(text)
      for _, atom in candidates(plain)
    )

  return hide


def _outside(text: str, pattern: re.Pattern[str], mark: str) -> str:
  """Replaces a pattern everywhere but inside of marks."""
  parts = re.split(r"(\[\[\d+\]\])", text)
  return "".join(p if _MARK.fullmatch(p) else pattern.sub(mark, p) for p in parts)


def restorer(atoms: Atoms) -> Callable[[str], str]:
  """Makes the function that undoes `hider`, up to capitals and punctuation inside of values."""
  word = functools.partial(_word, _vocabulary(atoms))
  return lambda text: _MARK.sub(word, text)


def _word(words: Sequence[str], mark: re.Match[str]) -> str:
  number = int(mark[1])
  return words[number] if number < len(words) else minimise.CUT
