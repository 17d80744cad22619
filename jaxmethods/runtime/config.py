"""Typed configs: dataclass defaults <- YAML file <- its `short:` part <- command line.

OmegaConf converts and checks the values; this module turns whatever goes wrong into one line that
names the key, the value, what was expected and the nearest valid key. No jax is imported.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxmethods.errors import InputError, hint
from jaxmethods.runtime.experiment import RunConfig, Values

ConfigT = TypeVar("ConfigT", bound=RunConfig)
_Schema: TypeAlias = object  # a type as annotations have it: a class, `int | None`, a Literal

# Top-level names of a config file that are not keys of the config: what `to_yaml` puts first, and
# the part for `--short`.
_METHOD, _SEEDS, _SHORT = "method", "seeds", "short"


def load(
  schema: type[ConfigT],
  file: Path | None,
  *,
  short: bool = False,
  overrides: Sequence[tuple[str, str]] = (),
  method: str | None = None,
) -> ConfigT:
  """Returns the config of a run.

  Args:
    schema: frozen dataclass whose fields are the valid keys.
    file: YAML file on top of the defaults, or None.
    short: whether to apply the file's `short:` part too.
    overrides: (dotted key, YAML value) pairs from the command line, applied last.
    method: if given, a file that says it belongs to another method is refused.

  Raises:
    InputError: unknown key, wrong type or value, unreadable or malformed file.
  """
  config = OmegaConf.structured(schema)
  contents = _read_yaml(file) if file else {}
  written_by = contents.pop(_METHOD, method)
  if method and written_by != method:
    raise InputError(f"{file}: is a config of method {written_by!r}, not of {method!r}")
  contents.pop(_SEEDS, None)
  shortened = contents.pop(_SHORT, {})
  if not isinstance(shortened, dict):
    raise InputError(f"{file}: {_SHORT}: must be a mapping of config keys, got {shortened!r}")
  if short and not shortened:
    raise InputError(f"--short: {file or 'the config'} has no `{_SHORT}:` part")

  for key, value in _leaves(contents):
    config = _set(config, key, value, f"{file}: ")
  # The short part is checked even when it is not asked for, so that a typo in it is found early.
  shorter = config
  for key, value in _leaves(shortened):
    shorter = _set(shorter, key, value, f"{file}: {_SHORT}: ")
  config = shorter if short else config
  for key, text in overrides:
    config = _set(config, key, _parse_value(key, text), "--")
  try:
    if missing := OmegaConf.missing_keys(config):
      raise InputError(f"{min(missing)}: has no value")
    return typing.cast(ConfigT, OmegaConf.to_object(config))
  except (ValueError, OmegaConfBaseException) as error:  # __post_init__, or a broken ${...}
    where = getattr(error, "full_key", None)
    raise InputError(f"{where}: {_first_line(error)}" if where else _first_line(error)) from None


def to_yaml(config: RunConfig, **header: object) -> str:
  """Returns the resolved config as YAML, `header` entries (method, ...) first."""
  body = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
  return (yaml.safe_dump(header, sort_keys=False) if header else "") + body


def differences(
  old: Mapping[str, object], new: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
  """Returns {dotted key: (old value, new value)} for every key that differs."""
  flat_old, flat_new = dict(_leaves(old)), dict(_leaves(new))
  keys = [*flat_new, *(key for key in flat_old if key not in flat_new)]
  pairs = {key: (flat_old.get(key), flat_new.get(key)) for key in keys}
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _read_yaml(file: Path) -> Values:
  try:
    contents = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
  except OSError as error:
    raise InputError(f"{file}: cannot be read: {error.strerror}") from None
  except UnicodeDecodeError:
    raise InputError(f"{file}: is not a text file") from None
  except yaml.YAMLError as error:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", "") or _first_line(error)
    raise InputError(f"{file}{where}: is not valid YAML: {problem}") from None
  if not isinstance(contents, dict):
    raise InputError(f"{file}: must hold `key: value` lines, got {_brief(contents)}")
  return typing.cast(Values, contents)


def _parse_value(key: str, text: str) -> object:
  try:
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
  except yaml.YAMLError:
    raise InputError(f"--{key}: {text!r} is not a YAML value") from None
  return typing.cast(Values, parsed)["value"]


def _set(config: DictConfig, key: str, value: object, source: str) -> DictConfig:
  """Sets one leaf, so that every error knows its key."""
  schema: _Schema = OmegaConf.get_type(config)
  parts = key.split(".")
  for depth, part in enumerate(parts):
    fields = _fields(schema)
    if not fields:
      break  # inside a free-form dict, whose keys are the user's, or below a leaf
    if part not in fields:
      known = ".".join(parts[: depth + 1])
      keys = _all_keys(OmegaConf.get_type(config))
      raise InputError(f"{source}{key}: unknown key; {hint(known, keys, 'keys')}")
    schema = fields[part]
  try:
    nested = value
    if dataclasses.is_dataclass(schema) and not isinstance(value, Mapping):
      raise ValueError
    for part in reversed(parts):
      nested = {part: nested}
    return typing.cast(DictConfig, OmegaConf.merge(config, nested))
  except (ValueError, TypeError, AttributeError, OmegaConfBaseException):
    raise InputError(f"{source}{key}: expected {_describe(schema)}, got {_brief(value)}") from None


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _fields(schema: _Schema) -> dict[str, _Schema]:
  """Returns {field: type} of a dataclass (also an optional one), {} for anything else."""
  for option in (schema, *typing.get_args(schema)):
    if isinstance(option, type) and dataclasses.is_dataclass(option):
      hints = typing.get_type_hints(option)
      return {field.name: hints[field.name] for field in dataclasses.fields(option) if field.init}
  return {}


def _all_keys(schema: _Schema, prefix: str = "") -> Iterator[str]:
  for name, inner in _fields(schema).items():
    if nested := list(_all_keys(inner, f"{prefix}{name}.")):
      yield from nested
    else:
      yield prefix + name


def _describe(schema: _Schema) -> str:
  if fields := _fields(schema):
    return f"a mapping with the keys {', '.join(fields)}"
  if schema is type(None):
    return "null"
  origin, options = typing.get_origin(schema), typing.get_args(schema)
  if origin is typing.Literal:
    return f"one of {', '.join(map(str, options))}"
  if origin in (typing.Union, types.UnionType):
    return " or ".join(map(_describe, options))
  return str(schema) if options else getattr(schema, "__name__", str(schema))


def _brief(value: object, limit: int = 60) -> str:
  text = repr(value)
  return text if len(text) <= limit else text[: limit - 3] + "..."


def _first_line(error: BaseException) -> str:
  return str(error).strip().split("\n", 1)[0]
