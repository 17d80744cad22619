"""What the three entry points share: flags, one-line errors, exit statuses. Imports no jax."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from jaxmethods.errors import InputError, Stopped
from jaxmethods.runtime import failures

if TYPE_CHECKING:
  from jaxmethods.runtime.experiment import Room, RunConfig

# Inside the package in a wheel, beside it in a clone.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(
  (f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir()),
  _PACKAGE / "configs",
)

# Results go to standard output, and so does progress; an error is alone on standard error.


class Entry(Protocol):
  """A line of the registry."""

  @property
  def title(self) -> str: ...
  @property
  def paper(self) -> str: ...
  @property
  def summary(self) -> str: ...


class Registry(Protocol):
  """The methods, `jaxmethods.experiments`."""

  @property
  def METHODS(self) -> Mapping[str, Entry]: ...

  def load(self, name: str) -> Room: ...

  def listing(self) -> str: ...


class _Parser(argparse.ArgumentParser):
  """Reports errors as `InputError`, like everything else that is wrong with the input."""

  def error(self, message: str) -> NoReturn:
    raise InputError(message)


def local(text: str) -> Path:
  """Returns a path of the command line; raises where it means another machine."""
  if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
    raise argparse.ArgumentTypeError(
      f"{text} is no folder of this machine ({scheme[0]}); mount it, or copy the run there afterwards"
    )
  if not text:
    raise argparse.ArgumentTypeError("is empty")
  return Path(text)


def parser(program: str, purpose: str) -> argparse.ArgumentParser:
  """Returns a parser with the flags that every entry point has."""
  result = _Parser(
    prog=f"python -m {program}",
    description=purpose,
    allow_abbrev=False,
    epilog="Any other --key VALUE sets a key of the method's config, e.g. --seed 2 or --model.width 64; "
    "--print_config shows them all.",
  )
  add = result.add_argument
  add("--method", metavar="NAME", help="a method of --list, or package.module of your own")
  add("--config", metavar="FILE", type=local, help="YAML file (default: configs/NAME.yaml)")
  add("--short", action="store_true", help="apply the `short:` part of the config: a quick look")
  add("--workdir", metavar="DIR", type=local, help="where the run is kept (default: under runs/)")
  add("--mesh", metavar="NAME=SIZE,..", default="", help="spread over devices, e.g. clients=8")
  add("--print_config", action="store_true", help="print the resolved config and stop")
  add("--list", action="store_true", help="list the methods and stop")
  add("--debug", action="store_true", help="stop at the first NaN, log compilations; slower")
  add("--no_cache", action="store_true", help="do not keep compiled programs between runs")
  hosts = result.add_argument_group("several processes (default: from the environment)")
  add = hosts.add_argument
  env = os.environ.get
  add(
    "--coordinator", metavar="HOST:PORT", default=env("JAX_COORDINATOR_ADDRESS"), help="or `auto`"
  )
  add("--num_processes", metavar="N", type=int, default=env("JAX_NUM_PROCESSES"))
  add("--process_id", metavar="I", type=int, default=env("JAX_PROCESS_ID"))
  return result


def parse(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
  """Returns the flags, and the (config key, value) pairs that are left."""
  words = list(sys.argv[1:] if argv is None else argv)
  for word in words:
    if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
      raise InputError(f"{word!a}: is not valid UTF-8")
  args, rest = parser.parse_known_args(words)
  overrides = []
  rest.reverse()
  while rest:
    word = rest.pop()
    if not word.startswith("--") or word == "--":
      raise InputError(f"unexpected argument {word!r}: everything is --key VALUE")
    key, equals, value = word[2:].partition("=")
    if not equals:
      if not rest or rest[-1].startswith("--"):
        raise InputError(f"--{key}: needs a value")
      value = rest.pop()
    overrides.append((key, value))
  if not args.method and not args.list:
    raise InputError("--method: is needed; --list shows the methods")
  return args, overrides


class Asked(NamedTuple):
  """A command line before any config is read: its flags, the method, and the keys it sets."""

  args: argparse.Namespace
  method: Room
  overrides: Sequence[tuple[str, str]]
  words: str  # the command, as a shell reads it
  entry: Entry | None  # None for a method of one's own
  default: Path | None  # the config file where --config names none


class Given(NamedTuple):
  """A command line understood: its flags, the method, the config and the file it came from."""

  args: argparse.Namespace
  method: Room
  config: RunConfig
  file: Path | None
  asked: Asked


def read(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None, experiments: Registry
) -> Given | None:
  """Loads what the command line names; None if it wanted a list or a config, which is printed here."""
  asked = ask(parser, argv, experiments)
  if asked is None or printed(found := given(asked)):
    return None
  return found


def ask(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None, experiments: Registry
) -> Asked | None:
  """Finds the method; None if the command line wanted the list, which is printed here.

  Args:
    parser: from `parser`.
    argv: the words of the command line; None: of this process.
    experiments: the registry.
  """
  args, overrides = parse(parser, argv)
  if args.list:
    print(experiments.listing())
    return None
  method, entry = experiments.load(args.method), experiments.METHODS.get(args.method)
  words = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
  default = CONFIGS / f"{args.method}.yaml"
  if entry and not args.config and not default.is_file():
    raise InputError(f"{default}: is missing; install jaxmethods anew, or give --config FILE")
  kept = default if default.is_file() else None
  return Asked(args, method, overrides, words, entry, kept)


def given(asked: Asked) -> Given:
  """Loads the config of `--config`, or the default of the method."""
  file = shipped(asked.args.config) or asked.default
  return Given(asked.args, asked.method, load(asked, file, short=asked.args.short), file, asked)


def shipped(file: Path | None) -> Path | None:
  """Returns `file`; where `configs/NAME.yaml` is not here, the one that is installed."""
  if file and not file.exists() and file.parts[0] == "configs":
    installed = CONFIGS.joinpath(*file.parts[1:])
    return installed if installed.is_file() else file
  return file


def load(asked: Asked, file: Path | None, *, short: bool = False) -> RunConfig:
  """Loads a config file under the keys of the command line."""
  from jaxmethods.runtime import config as config_lib

  return config_lib.load(
    asked.method.Config, file, short=short, overrides=asked.overrides, method=asked.args.method
  )


def changed(given: Given) -> dict[str, tuple[object, object]]:
  """Returns {key: (default, value)} of the settings that are not those of the default config."""
  from jaxmethods.runtime import config as config_lib

  usual = config_lib.load(given.method.Config, given.asked.default, method=given.args.method)
  return config_lib.differences(config_lib.plain(usual), config_lib.plain(given.config))


def is_short(given: Given) -> bool:
  """Tells whether a config has what `--short` sets: an evaluation may have it from its run."""
  if given.args.short or given.asked.default is None:
    return given.args.short
  from jaxmethods.runtime import config as config_lib

  schema, file = given.method.Config, given.asked.default
  if not config_lib.has_short(file):
    return False
  usual, shorter = (config_lib.load(schema, file, short=short) for short in (False, True))
  keys = config_lib.differences(config_lib.plain(usual), config_lib.plain(shorter))
  other = config_lib.differences(config_lib.plain(shorter), config_lib.plain(given.config))
  return bool(keys) and not keys.keys() & other.keys()


def printed(given: Given) -> bool:
  """Prints the config if `--print_config` asks for it, and tells whether it did."""
  from jaxmethods.runtime import config as config_lib

  if given.args.print_config:
    print(config_lib.explained(given.config, method=given.args.method), end="")
  return given.args.print_config


def workdir(given: Given, kind: str = "") -> Path:
  """Returns `--workdir`, else runs/METHOD/`default`, `paper`, ...: the config file; short runs apart."""
  args, file = given.args, given.file
  stem = file.stem if file else args.method
  name = "default" if stem == args.method else stem.removeprefix(f"{args.method}_")
  default = Path("runs", args.method, kind + name + ("-short" if args.short else ""))
  return args.workdir or default


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
  """Calls `main` and returns the exit status; whatever goes wrong is one line on standard error.

  The one place where that is decided: 2 for bad input, 1 for a machine that fails or a fault of ours.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show
      stream.reconfigure(errors="backslashreplace")
  with failures.Threads() as threads:
    try:
      status = main(argv)
      for error in threads.errors:
        print(f"warning: {failures.explain(error).line}", file=sys.stderr)
      return status
    except Stopped as stopped:
      print(stopped, flush=True)
      return stopped.status
    except KeyboardInterrupt:
      return 130
    except BrokenPipeError:  # `... --list | head`
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    except Exception as error:
      failure = failures.explain(error)
      print(f"error: {failure.line}", file=sys.stderr)
      return failure.status
