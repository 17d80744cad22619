"""`jaxmethods train|eval|compare|export ARGUMENTS`: the entry points as one command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jaxmethods.errors import InputError
from jaxmethods.runtime import command, launch

COMMANDS = {
  "train": "train.run",
  "eval": "eval.run",
  "compare": "eval.compare",
  "export": "train.export",
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `python -m MODULE` of a command's name and returns the exit status.

  Args:
    argv: command and its arguments; default: those of the process.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  if words[:1] in ([], ["-h"], ["--help"]):
    print("usage: jaxmethods " + "|".join(COMMANDS) + " --method NAME ...")
    print("\n".join(f"  {name:8} python -m {module}" for name, module in COMMANDS.items()))
    return 0
  if words[0] not in COMMANDS:
    known = ", ".join(COMMANDS)
    return command.run(_refuse(f"jaxmethods: expected one of {known}, got {words[0]!r}"), words)
  launch.set_allocator()
  return command.run(importlib.import_module(COMMANDS[words[0]]).main, words[1:])


def _refuse(message: str):
  """A command that only says what is wrong."""

  def refuse(_: Sequence[str] | None) -> int:
    raise InputError(message)

  return refuse
