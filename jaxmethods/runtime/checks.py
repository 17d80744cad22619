"""Checks of a config's fields; each raises a `ValueError` that names the field, the rule and the value.

Infinite values and NaN pass none of them. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from jaxmethods.errors import InputError

if TYPE_CHECKING:
  from jax.sharding import Mesh


# numpy takes no larger one, and jax keeps no more of its bits.
LARGEST_SEED = 2**32 - 1


def sound(config: object) -> None:
  """Checks what holds for every number of a config, in its groups, lists and mappings too.

  It is finite, a temperature aside; not negative, unless its default is; positive, if it is a
  temperature; and a seed is at most `LARGEST_SEED`. Other limits are those of the config itself.
  """
  for name, value, default in _numbers(config, ""):
    last = name.split(".")[-1]
    usual = default if isinstance(default, int | float) else 0
    expected = ""
    if value == math.inf and last.endswith("temperature"):  # even weights
      continue
    if not math.isfinite(value) and math.isfinite(usual):
      expected = "finite"
    elif value < 0 <= usual:
      expected = "at least 0"
    elif last.endswith("temperature") and value == 0:
      expected = "positive"
    elif (last == "seed" or last.endswith("_seed")) and value > LARGEST_SEED:
      expected = f"at most {LARGEST_SEED}"
    if expected:
      raise ValueError(f"{name}: must be {expected}, got {value!r}")


def _numbers(config: object, prefix: str) -> Iterator[tuple[str, float, object]]:
  """Yields (dotted name, value, default of the field) of every number."""
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    value, name = getattr(config, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _numbers(value, f"{name}.")
    elif isinstance(value, Mapping):
      yield from ((f"{name}.{key}", x, 0) for key, x in value.items() if _is_number(x))
    elif isinstance(value, list | tuple):
      yield from ((name, x, 0) for x in value if _is_number(x))
    elif _is_number(value):
      yield name, value, field.default


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def at_least(config: object, least: float, *names: str, prefix: str = "") -> None:
  """Checks that fields are finite and at least `least`.

  Args:
    config: the dataclass.
    least: smallest value allowed.
    *names: fields to check.
    prefix: group of a nested dataclass, such as "desk.".
  """
  for name in names:
    _check(config, name, lambda x: x >= least, f"at least {least:g}", prefix)


def positive(config: object, *names: str, prefix: str = "") -> None:
  """Checks that fields are finite and above 0."""
  for name in names:
    _check(config, name, lambda x: x > 0, "positive", prefix)


def within(config: object, interval: str, *names: str, prefix: str = "") -> None:
  """Checks that fields lie in an interval written as in mathematics: "(0, 1]", "[0, 1)"."""
  low, high = (float(end) for end in interval[1:-1].split(","))
  above = (lambda x: x >= low) if interval[0] == "[" else (lambda x: x > low)
  below = (lambda x: x <= high) if interval[-1] == "]" else (lambda x: x < high)
  for name in names:
    _check(config, name, lambda x: above(x) and below(x), f"in {interval}", prefix)


def require(good: bool, name: str, message: str) -> None:
  """Raises if a rule of its own is broken: "name: message"."""
  if not good:
    raise ValueError(f"{name}: {message}")


def warn_alone(clients: int) -> None:
  """Prints a warning where a federation has one client: it trains alone, and rows agree."""
  if clients == 1:
    print(
      "warning: one client only: there is nobody to share with, and every federated row is local "
      "training",
      file=sys.stderr,
    )


def no_mesh(method: str, mesh: Mesh | None) -> None:
  """Raises where a method would drop the mesh in silence.

  Raises:
    InputError: there is a mesh.
  """
  if mesh is not None:
    raise InputError(f"--mesh: {method} runs on one device; leave the flag out")


def _check(
  config: object, name: str, holds: Callable[[float], bool], expected: str, prefix: str
) -> None:
  value = getattr(config, name)
  if not (math.isfinite(value) and holds(value)):
    raise ValueError(f"{prefix}{name}: must be {expected}, got {value!r}")
