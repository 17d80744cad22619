"""Exports the model of a run: `python -m train.export --workdir DIR --format peft|hf|merged`.

peft    adapter files that PEFT loads on the base model
hf      the base model as transformers loads it, with these in its folder `adapter`
merged  one checkpoint with tokenizer and config

Every export has a card with data, settings and figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from jaxmethods import experiments
from jaxmethods.errors import InputError
from jaxmethods.runtime import command, launch

FORMATS = ("peft", "hf", "merged")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  parser = command.parser("train.export", "Exports the model of a run in the formats of others.")
  parser.add_argument("--format", choices=FORMATS, help="what is written", required=True)
  parser.add_argument(
    "--to", metavar="FOLDER", type=command.local, help="default: DIR/export-FORMAT"
  )
  words = list(sys.argv[1:] if argv is None else argv)
  asked = command.ask(parser, [*words, *_method(words)], experiments)
  if asked is None:
    return 0

  from jaxmethods.runtime import session, workdir as workdir_lib

  args = asked.args
  workdir = command.workdir(command.given(asked))
  session.require_checkpoints(workdir)
  file = args.config or workdir / workdir_lib.CONFIG
  given = command.given(asked)._replace(config=command.load(asked, file), file=file)
  run = session.start(given, workdir)
  session.check_export(run, args.format)
  folder = args.to or workdir / f"export-{args.format}"
  session.export(run, session.restore(run), args.format, folder)
  if run.writer:
    print(f"see {folder}")
  return 0


def _method(words: Sequence[str]) -> list[str]:
  """Finds the method of a run in its folder, where the command line does not name it."""
  if any(word == "--method" or word.startswith("--method=") for word in words):
    return []
  place = next((i for i, word in enumerate(words) if word.split("=")[0] == "--workdir"), None)
  if place is None:
    return []
  _, equals, folder = words[place].partition("=")
  folder = folder if equals else "".join(words[place + 1 : place + 2])
  try:
    kept = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    return ["--method", str(kept["method"])]
  except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
    raise InputError(f"--workdir {folder}: there is no run with a checkpoint") from None


if __name__ == "__main__":
  launch.set_allocator()
  sys.exit(command.run(main))
