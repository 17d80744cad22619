"""Texts to tune a causal LM on, by name.

| name | what |
| --- | --- |
| `jsonl:FILE` | lines of {"prompt", "completion"}, {"question", "answer"}, {"messages"} or {"text"} |
| `generated:word-problems` | stories with their working, drawn from a seed (`data.problems`) |
| `reasoning-gym:NAME` | problems of the package reasoning-gym |
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from jaxmethods import folders
from jaxmethods.data import json_lines, problems
from jaxmethods.data.records import sealed
from jaxmethods.errors import InputError
from jaxmethods.trees import Json, PyTree

FILE = "jsonl:"
_CLIENT = "client"
_PAIRS = (("prompt", "completion"), ("question", "answer"))
_ROLES = ("system", "user", "assistant")
_FORMS = '"prompt" and "completion", "question" and "answer", "messages", or "text"'


class Turn(NamedTuple):
  """What somebody says: role "system", "user" or "assistant"."""

  role: str
  content: str


class Example(NamedTuple):
  """A text.

  Attributes:
    turns: of a conversation, the last one the assistant's; () for plain text.
    text: plain text, all of which counts; "" for a conversation.
    where: place it comes from, for errors.
    client: who holds it; "" where the file does not say, or was not asked.
  """

  turns: tuple[Turn, ...]
  text: str
  where: str
  client: str = ""

  @property
  def answer(self) -> str:
    """What the assistant says last; "" of a plain text."""
    return self.turns[-1].content if self.turns else ""


class Texts(NamedTuple):
  """Examples, and the words that reports use for them."""

  examples: list[Example]
  about: str


def load(name: str, count: int, seed: int, *, clients: bool = False) -> Texts:
  """Reads at most `count` examples.

  Args:
    name: see the module docstring.
    count: how many; a file may have fewer. 0: all of a file.
    seed: of what is generated.
    clients: whether the field "client" of a file is read.

  Raises:
    InputError: an unknown source, an empty file, or a line that cannot be used.
  """
  if name.startswith(FILE):
    return _file(folders.expanded(name.removeprefix(FILE)), count, clients)
  if name != problems.GENERATED and not name.startswith("reasoning-gym:"):
    raise InputError(
      f"data: unknown source {name!r}: sources are {FILE}FILE, {problems.GENERATED}, "
      "reasoning-gym:NAME"
    )
  if count < 1:
    raise InputError(f"data: {name} has no end: num_train and num_test must say how many")
  found, _ = problems.load(name, count, seed)
  examples = [
    Example((Turn("user", p.question), Turn("assistant", _written(p))), "", f"{name}, {n}")
    for n, p in enumerate(found, 1)
  ]
  return Texts(examples, f"{len(examples)} problems of {name}, seed {seed}")


def _written(problem: problems.Problem) -> str:
  return f"{problem.working} Answer: {problem.answer}".strip()


def _file(path: Path, count: int, clients: bool) -> Texts:
  """Reads a file; its digest is over the text of all lines."""
  digest, examples, ignored = hashlib.sha256(), [], set()
  for line in json_lines.read(path, name="data"):
    example, used = _example(line.where, line.entry)
    if clients and _CLIENT in line.entry:
      example = example._replace(client=_text(line.where, line.entry, _CLIENT))
      used = {*used, _CLIENT}
    examples.append(example)
    ignored |= set(line.entry) - used
    digest.update(json.dumps(line.entry, sort_keys=True).encode())
  if not examples:
    raise InputError(f"data: {path} has no example in it")
  used_of = examples[:count] if count else examples
  of = "" if len(used_of) == len(examples) else f" of {len(examples)}"
  left_out = f"; fields not used: {', '.join(sorted(ignored))}" if ignored else ""
  named = sealed(str(path), digest.hexdigest(), f"{len(used_of)}{of} examples")
  return Texts(used_of, named + left_out)


def _example(where: str, entry: PyTree) -> tuple[Example, set[str]]:
  """Reads a line; returns the names of the fields that were used, too."""
  if not isinstance(entry, dict):
    raise InputError(f"{where}: expected an object with {_FORMS}")
  for ask, reply in _PAIRS:
    if ask in entry:
      if reply not in entry:
        raise InputError(f'{where}: has no answer: "{ask}" needs "{reply}"')
      turns = (
        Turn("user", _text(where, entry, ask)),
        Turn("assistant", _text(where, entry, reply)),
      )
      return Example(turns, "", where), {ask, reply}
  if "messages" in entry:
    return Example(_turns(where, entry["messages"]), "", where), {"messages"}
  if "text" in entry:
    return Example((), _text(where, entry, "text"), where), {"text"}
  raise InputError(
    f"{where}: expected an object with {_FORMS}, it has {', '.join(entry) or 'none'}"
  )


def _text(where: str, entry: Json, field: str) -> str:
  value = entry[field]
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise InputError(f'{where}: "{field}" must be a text, got {value!r:.80}')
  if not value.strip():
    lacks = "has no answer" if field in ("completion", "answer") else "is incomplete"
    raise InputError(f'{where}: {lacks}: "{field}" is empty')
  return value


def _turns(where: str, messages: PyTree) -> tuple[Turn, ...]:
  if not isinstance(messages, list) or not messages:
    raise InputError(f'{where}: "messages" must be a list of objects with role and content')
  turns = []
  for message in messages:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
      raise InputError(
        f"{where}: a message must have role and content and nothing else, got {message!r:.80}"
      )
    if message["role"] not in _ROLES:
      raise InputError(f"{where}: role {message['role']!r} is none of {', '.join(_ROLES)}")
    turns.append(Turn(message["role"], _text(where, message, "content")))
  if turns[-1].role != "assistant":
    raise InputError(f"{where}: has no answer: the last message is the {turns[-1].role}'s")
  return tuple(turns)
