"""Checks of a config's fields; each raises a `ValueError` that names the field, the rule and the value.

Infinite values and NaN pass none of them. Imports no jax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxmethods.errors import InputError

if TYPE_CHECKING:
  from jax.sharding import Mesh


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
