"""Typed configs: dataclass defaults <- YAML file <- its `short:` part <- command line.

YAML says how values are nested; the type of the field says what a word means. So `off`, `010` and `1:30`
are what was typed, and every error is one line that names the key, the value and what was expected.
No jax is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import yaml

from jaxmethods.errors import InputError, hint
from jaxmethods.runtime import commented
from jaxmethods.runtime.experiment import RunConfig, Values

if typing.TYPE_CHECKING:
  from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound=RunConfig)
_Schema: TypeAlias = object  # a type as annotations have it: a class, `int | None`, a Literal

# Top-level names of a config file that are not keys of the config: what `to_yaml` puts first, and
# the part for `--short`.
_METHOD, _SEEDS, _SHORT = "method", "seeds", "short"

_NULL = ("null", "Null", "NULL", "~", "")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_INT = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[+-]?([0-9][0-9_]*)?\.?[0-9]*([eE][+-]?[0-9]+)?|[+-]?\.?inf|\.?nan", re.I)


class _Word(str):
  """A scalar of YAML without quotes: the only kind that can mean null."""


class _Cleared(dict):
  """An empty mapping that was given: it replaces the default, where other mappings add to it."""


class _Words(yaml.BaseLoader):
  """Reads YAML and leaves every scalar the text that it is."""

  def construct_scalar(self, node: yaml.ScalarNode) -> str:
    text = super().construct_scalar(node)
    return text if node.style else _Word(text)

  def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key, _ in node.value:
      if not isinstance(key, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
      if key.value in seen:
        problem = f"found duplicate key {key.value}"
        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
      seen.add(key.value)
    return super().construct_mapping(node, deep)


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
    overrides: (dotted key, text) pairs from the command line, applied last.
    method: if given, a file that says it belongs to another method is refused.

  Raises:
    InputError: unknown key, wrong type or value, unreadable or malformed file.
  """
  contents = _read_yaml(file) if file else {}
  written_by = contents.pop(_METHOD, method)
  if method and written_by != method:
    raise InputError(f"{file}: is a config of method {str(written_by)!r}, not of {method!r}")
  contents.pop(_SEEDS, None)
  shortened = contents.pop(_SHORT, {})
  if not isinstance(shortened, dict):
    raise InputError(f"{file}: {_SHORT}: must be a mapping of config keys, got {shortened!r}")
  if short and not shortened:
    raise InputError(f"--short: {file or 'the config'} has no `{_SHORT}:` part")

  values: Values = {}
  for key, value in _leaves(contents):
    _set(schema, values, key, value, f"{file}: ")
  # The short part is checked even when it is not asked for, so that a typo in it is found early.
  for key, value in _leaves(shortened):
    _set(schema, values if short else {}, key, value, f"{file}: {_SHORT}: ")
  for key, text in overrides:
    _set(schema, values, key, text, "--", typed=True)
  try:
    return typing.cast(ConfigT, _build(schema, values))
  except (ValueError, TypeError, ArithmeticError) as error:  # of a __post_init__
    raise InputError(_first_line(error)) from None


def has_short(file: Path) -> bool:
  """Tells whether a config file has a `short:` part."""
  return bool(_read_yaml(file).get(_SHORT))


def to_yaml(config: RunConfig, **header: object) -> str:
  """Returns the resolved config as YAML, `header` entries (method, ...) first."""
  return _dump({**header, **plain(config)})


def explained(config: RunConfig, **header: object) -> str:
  """Returns `to_yaml` with the choices of every key and the comment that its source has beside it."""
  return (_dump(header) if header else "") + "".join(f"{line}\n" for line in _commented(config, ""))


def plain(config: RunConfig) -> Values:
  """Returns the config as YAML holds it: mappings, lists, numbers, words."""
  return typing.cast(Values, _plain(config))


def differences(
  old: Mapping[str, object], new: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
  """Returns {dotted key: (old value, new value)} for every key that differs."""
  flat_old, flat_new = dict(_leaves(old)), dict(_leaves(new))
  keys = [*flat_new, *(key for key in flat_old if key not in flat_new)]
  pairs = {key: (flat_old.get(key), flat_new.get(key)) for key in keys}
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _plain(value: object) -> object:
  if dataclasses.is_dataclass(value):
    names = [field.name for field in dataclasses.fields(value) if field.init]
    return {name: _plain(getattr(value, name)) for name in names}
  if isinstance(value, Mapping):
    return {key: _plain(inner) for key, inner in value.items()}
  return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _dump(value: object) -> str:
  return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6)


def _commented(config: object, indent: str) -> Iterator[str]:
  """Yields the lines of a config: `key: value  # choices: comment`."""
  schema, notes = _fields(type(config)), commented.notes(type(config))
  for name, kind in schema.items():
    value = getattr(config, name)
    note = "; ".join(filter(None, (_choices(kind), notes.get(name, "")))) or _describe(kind)
    beside = "" if _fields(kind) else f"  # {note}"
    if dataclasses.is_dataclass(value):
      yield f"{indent}{name}:{beside}"
      yield from _commented(value, indent + "  ")
      continue
    first, *others = _dump({name: _plain(value)}).splitlines()
    if others and not first.endswith(":"):  # a text of several lines
      yield f"{indent}{beside[2:]}"
      beside = ""
    yield f"{indent}{first}{beside}"
    yield from (f"{indent}{line}" for line in others)


def _choices(kind: _Schema) -> str:
  """Returns the choices of a field; "" where any value of its type will do."""
  options = typing.get_args(kind)
  if typing.get_origin(kind) is typing.Literal or type(None) in options:
    return _describe(kind)
  return "true or false" if kind is bool else ""


def _read_yaml(file: Path) -> Values:
  try:
    contents = yaml.load(file.read_text(encoding="utf-8-sig"), _Words) or {}
  except OSError as error:
    raise InputError(f"{file}: cannot be read: {error.strerror}") from None
  except UnicodeDecodeError:
    raise InputError(f"{file}: is not a text file") from None
  except RecursionError:
    raise InputError(f"{file}: is nested too deeply") from None
  except yaml.YAMLError as error:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", "") or _first_line(error)
    raise InputError(f"{file}{where}: is not valid YAML: {problem}") from None
  if not isinstance(contents, dict):
    raise InputError(f"{file}: must hold `key: value` lines, got {_brief(contents)}")
  return typing.cast(Values, contents)


def _set(
  schema: _Schema, values: Values, key: str, value: object, source: str, *, typed: bool = False
) -> None:
  """Converts one leaf and puts it into the nested `values`, so that every error knows its key.

  Args:
    schema: the dataclass of the whole config.
    values: {field: converted value or values of the nested dataclass}; changed.
    key: dotted; below a free-form mapping the rest of it is one key, with its dots.
    value: text, or what YAML made of it.
    source: what the error begins with.
    typed: whether `value` is text of the command line, which is YAML for lists and mappings only.
  """
  kind, place, parts = schema, values, key.split(".")
  for depth, part in enumerate(parts):
    fields = _fields(kind)
    if not fields:  # a free-form mapping, whose keys are the user's; or a leaf, which has no parts
      rest = ".".join(parts[depth:])
      kind = _values_of(kind)
      if kind is None or not rest:
        raise InputError(f"{source}{key}: unknown key; {'.'.join(parts[:depth])} has no parts")
      place[rest] = _converted(kind, value, source + key, typed)
      return
    if part not in fields:
      known = ".".join(parts[: depth + 1])
      raise InputError(f"{source}{key}: unknown key; {hint(known, _all_keys(schema), 'keys')}")
    kind = fields[part]
    if depth + 1 < len(parts):
      if not isinstance(place.get(part), dict):
        place[part] = {}
      place = place[part]
  if typed and (_fields(kind) or _values_of(kind)):
    typed, value = False, _parsed(str(value), source + key)
  if isinstance(value, Mapping) and value:
    for inner, leaf in _leaves(value):
      _set(schema, values, f"{key}.{inner}", leaf, source)
  else:
    place[parts[-1]] = _converted(kind, value, source + key, typed)


def _converted(kind: _Schema, value: object, name: str, typed: bool) -> object:
  """Converts a leaf; raises an `InputError` that begins with `name`."""
  if typed and _is_list(kind):
    value = _parsed(str(value), name)
  elif typed and kind is not str:
    value = _Word(str(value).strip())
  try:
    return _convert(kind, value)
  except (ValueError, OverflowError):
    raise InputError(f"{name}: expected {_describe(kind)}, got {_brief(value)}") from None


def _convert(kind: _Schema, value: object) -> object:
  """Returns `value`, text or a list or a mapping of text, as `kind`; raises a `ValueError`."""
  origin, options = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return _convert_to_one(options, value)
  if origin is typing.Literal:
    chosen = [option for option in options if str(option) == value]
    return chosen[0] if chosen else _refuse()
  if origin in (list, tuple) and isinstance(value, list):
    kinds = [options[0]] * len(value) if origin is list or options[1:] == (...,) else options
    return origin(_convert(*pair) for pair in zip(kinds, value, strict=True))
  if (_values_of(kind) or _fields(kind)) and value == {}:
    return _Cleared()
  if not isinstance(value, str) or (isinstance(value, _Word) and value == ""):
    _refuse()
  if kind is str:
    return str(value)
  if kind is bool and value.lower() in _TRUE + _FALSE:
    return value.lower() in _TRUE
  if kind is int and _INT.fullmatch(value):
    return int(value)
  if kind is float and _FLOAT.fullmatch(value) and any(c.isalnum() for c in value):
    return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
  if kind in (typing.Any, object):
    return yaml.safe_load(value) if isinstance(value, _Word) else str(value)
  return _refuse()


def _convert_to_one(options: Sequence[_Schema], value: object) -> object:
  """Converts to the first kind of a union that takes the value; null before all."""
  if type(None) in options and isinstance(value, _Word) and value in _NULL:
    return None
  for option in options:
    if option is not type(None):
      with contextlib.suppress(ValueError, OverflowError):
        return _convert(option, value)
  return _refuse()


def _refuse() -> typing.NoReturn:
  raise ValueError


def _parsed(text: str, name: str) -> object:
  """Reads a list or a mapping of the command line."""
  try:
    return yaml.load(text, _Words)
  except (yaml.YAMLError, RecursionError):
    raise InputError(f"{name}: {text!r} is not a YAML value") from None


def _build(schema: _Schema, values: Mapping[str, object], prefix: str = "") -> object:
  """Makes the dataclass from its defaults and the values that are given."""
  made, kinds, given = _class(schema), _fields(schema), {}
  assert made is not None
  for field in dataclasses.fields(made):
    if not field.init:
      continue
    name, kind = field.name, kinds[field.name]
    default = _default(field)
    if name in values:
      given[name] = _joined(kind, default, values[name], f"{prefix}{name}.")
    elif default is dataclasses.MISSING:
      raise InputError(f"{prefix}{name}: has no value")
  return made(**given)


def _joined(kind: _Schema, default: object, value: object, prefix: str) -> object:
  """Returns what is given for a field, on top of its default where it has parts."""
  if not isinstance(value, dict):
    return value
  if _values_of(kind):
    added_to = {} if isinstance(value, _Cleared) or not isinstance(default, Mapping) else default
    return {**added_to, **value}
  if not dataclasses.is_dataclass(default) or isinstance(default, type):
    return _build(kind, value, prefix)
  parts, kinds = {}, _fields(kind)
  for name, part in value.items():
    parts[name] = _joined(kinds[name], getattr(default, name), part, f"{prefix}{name}.")
  return dataclasses.replace(default, **parts)


def _default(field: dataclasses.Field) -> object:
  factory = field.default_factory
  return field.default if factory is dataclasses.MISSING else factory()


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _class(schema: _Schema) -> type[DataclassInstance] | None:
  """Returns the dataclass of a type (also of an optional one), None for anything else."""
  options = (schema, *typing.get_args(schema))
  return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _fields(schema: _Schema) -> dict[str, _Schema]:
  """Returns {field: type} of a dataclass (also an optional one), {} for anything else."""
  found = _class(schema)
  if found is None:
    return {}
  hints = typing.get_type_hints(found)
  return {field.name: hints[field.name] for field in dataclasses.fields(found) if field.init}


def _values_of(schema: _Schema) -> _Schema | None:
  """Returns the type of the values of a free-form mapping (also an optional one), else None."""
  for option in (schema, *typing.get_args(schema)):
    if typing.get_origin(option) is dict:
      return typing.get_args(option)[1]
  return typing.Any if schema is dict else None


def _is_list(schema: _Schema) -> bool:
  return any(typing.get_origin(o) in (list, tuple) for o in (schema, *typing.get_args(schema)))


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
