"""The text side: when a text gives a value away, and what is delivered in its place."""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

# A value of a profile: text, number, list or object, nested as JSON is.
Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value]"

REFUSAL = "I do not have the authority to access this information and refuse to answer."
CUT = "[withheld]"
WITHHELD = "[message withheld]"
_SHORTEST = 2  # characters of an atom that counts
_SHORTEST_JOINED = 4  # of one that is looked for across blanks and messages

_COMMA = re.compile(r"(?<=\d),(?=\d)")
_OTHER = re.compile(r"[^0-9a-z%/.+]+")
_STOP = re.compile(r"\.(?= |$)")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{8,}={0,2}")
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){4,}")
_PART = re.compile(r"part \d+ of \d+:\s*", re.IGNORECASE)


@functools.lru_cache(maxsize=65536)
def normalise(text: str) -> str:
  """Reduces a text to lower-case words and numbers with single blanks (M7; exact contract)."""
  text = unicodedata.normalize("NFKC", text).lower()
  text = _OTHER.sub(" ", _COMMA.sub("", text))
  return " ".join(_STOP.sub(" ", text).split())


def atoms(value: Value) -> tuple[str, ...]:
  """Splits a value into its normalised parts: items of lists, values of objects; keys are none."""
  if isinstance(value, list):
    return tuple(atom for item in value for atom in atoms(item))
  if isinstance(value, dict):
    return tuple(atom for item in value.values() for atom in atoms(item))
  return (normalise(str(value)),)


def leaked(value: Value | tuple[str, ...], text: str) -> bool:
  """Tells whether a text holds an atom of a value, as a run of whole words (M7).

  Args:
    value: of a profile, or its atoms as a tuple.
    text: a message.
  """
  parts = value if isinstance(value, tuple) else atoms(value)
  padded = f" {normalise(text)} "
  return any(len(atom) >= _SHORTEST and f" {atom} " in padded for atom in parts)


def disguised(value: Value | tuple[str, ...], texts: Sequence[str]) -> bool:
  """Tells whether texts hold a value encoded, reversed, spaced out, or split over them.

  Known disguises only: base64, hexadecimal, rot13, reversal, blanks between letters, parts in
  consecutive messages. A measure of leaks, no protection: another disguise is not found.
  """
  parts = value if isinstance(value, tuple) else atoms(value)
  if any(leaked(parts, plain) for text in texts for plain in decoded(text)):
    return True
  joined = normalise("".join(_PART.sub("", text) for text in texts)).replace(" ", "")
  split = any(_PART.search(text) for text in texts)
  spaced = " ".join(texts).count(" ") * 2 > len(" ".join(texts)) - 2 > 0
  close = [atom.replace(" ", "") for atom in parts]
  return (split or spaced) and any(
    len(atom) >= _SHORTEST_JOINED and atom in joined for atom in close
  )


def in_parts(text: str) -> bool:
  """Tells whether a text says that it is a part of something longer."""
  return _PART.search(text) is not None


def decoded(text: str) -> Iterator[str]:
  """Undoes the disguises that a single text can wear, each for the whole of it."""
  for run in _BASE64.findall(text):
    try:
      yield base64.b64decode(run, validate=True).decode()
    except (binascii.Error, ValueError):
      continue
  for run in _HEX.findall(text):
    try:
      yield bytes.fromhex(run).decode()
    except ValueError:
      continue
  yield codecs.encode(text, "rot13")
  yield text[::-1]


def cut(text: str, secrets: Collection[tuple[str, ...]]) -> str:
  """Replaces what gives secrets away; withholds the whole text where that does not do.

  Args:
    text: a message.
    secrets: atoms of every value that the receiver may not know.

  Returns:
    The text with `CUT` in place of the spans, or `WITHHELD`. The standard refusal passes as it is.
  """
  if text == REFUSAL or not any(leaked(atom, text) for atom in secrets):
    return text
  plain = unicodedata.normalize("NFKC", text)
  # Long atoms first: "stop limit order" before "limit order".
  parts = sorted(
    {a for atom in secrets for a in atom if len(a) >= _SHORTEST}, key=len, reverse=True
  )
  for atom in parts:
    plain = span(atom).sub(CUT, plain)
  return WITHHELD if any(leaked(atom, plain) for atom in secrets) else plain


@functools.lru_cache(maxsize=16384)
def span(atom: str) -> re.Pattern[str]:
  """Finds an atom in a text that is not normalised, in more forms than `leaked` does."""
  digits = lambda word: re.sub(r"(?<=\d)(?=\d)", ",?", word)
  words = [digits(re.escape(word)) for word in atom.split()]
  between = r"[^0-9a-z%/+]+"
  return re.compile(rf"(?<![0-9a-z]){between.join(words)}(?![0-9a-z])", re.IGNORECASE)


def compose(
  text: str,
  sender: int,
  letter: str | None,
  found: Mapping[str, str],
  *,
  choices: str = "abcd",
) -> str:
  """Writes a message anew from what its receiver may know; no word of the original is forwarded.

  Args:
    text: the original; only the standard refusal passes.
    sender: number of the agent.
    letter: the option it chose, where letters are declassified.
    found: permitted fields that occur in it, with their values out of the profile.
    choices: letters there are.
  """
  if text == REFUSAL:
    return text
  parts = [f"{field}: {value}." for field, value in found.items()]
  if letter and letter.lower() in choices:
    parts.append(f"I choose ({letter.lower()}).")
  return f"Agent {sender}: {' '.join(parts)}" if parts else WITHHELD


def mask(text: str, secrets: Collection[tuple[str, ...]]) -> str:
  """Masks identifying values and every number, for all receivers alike (baseline, no roles)."""
  return re.sub(r"\d+(?:[.,]\d+)*", CUT, cut(text, secrets))
