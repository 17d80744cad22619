"""Shapes checked at the door of a function, in one line that names the argument."""

from __future__ import annotations

import chex
import jax
from jax.typing import ArrayLike
from numpy import shape as shape_of

from jaxmethods.trees import PyTree


def check(**arguments: tuple[ArrayLike, str]) -> None:
  """Checks arrays against shapes whose axes have names.

  An axis of one name has one size in all arguments of a call; a number stands for itself; a leading
  "..." for any axes: `check(logits=(logits, "B C"), labels=(labels, "B"), pixels=(x, "... 28 28"))`.

  Args:
    **arguments: name -> (array, shape).

  Raises:
    ValueError: "labels: expected shape (B=4,), got (3,)".
  """
  sizes: dict[str, int] = {}
  for name, (array, axes) in arguments.items():
    expected, given = axes.split(), shape_of(array)
    named = [axis for axis in expected if axis != "..."]
    own = dict(zip(reversed(named), reversed(given), strict=False))
    known = own | sizes | {axis: int(axis) for axis in named if axis.isdigit()}
    wanted = [... if axis == "..." else known.get(axis) for axis in expected]
    try:
      chex.assert_shape(array, tuple(wanted))
    except AssertionError:
      shown = [f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in expected]
      inside = ", ".join(shown) + ("," if len(shown) == 1 else "")
      raise ValueError(f"{name}: expected shape ({inside}), got {given}") from None
    sizes |= {axis: size for axis, size in known.items() if not axis.isdigit()}


def check_leading(size: int, **trees: PyTree) -> None:
  """Checks that every array of some trees has `size` rows.

  Raises:
    ValueError: "uploads: expected 4 rows, got an array of shape (3, 2)".
  """
  for name, tree in trees.items():
    for x in jax.tree.leaves(tree):
      if shape_of(x)[:1] != (size,):
        raise ValueError(f"{name}: expected {size} rows, got an array of shape {shape_of(x)}")


def same(**arguments: ArrayLike) -> None:
  """Checks that all arrays have the shape of the first.

  Args:
    **arguments: name -> array.

  Raises:
    ValueError: "mask: expected the shape (4, 3) of weight, got (3,)".
  """
  (first, array), *others = arguments.items()
  expected = shape_of(array)
  for name, other in others:
    if (given := shape_of(other)) != expected:
      raise ValueError(f"{name}: expected the shape {expected} of {first}, got {given}")
