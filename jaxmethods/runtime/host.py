"""Draws made by numpy, in functions that may be traced."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from jaxmethods.trees import PyTree


def call(function: Callable[..., PyTree], shapes: PyTree, *arrays: jax.Array) -> PyTree:
  """Calls a numpy function; where its arguments are traced, as a callback of the program.

  Args:
    function: arrays -> tree of arrays. Called at once, its errors reach the caller as they are.
    shapes: the shapes and types of its result, which must not depend on values.
    *arrays: its arguments.
  """
  if any(isinstance(array, jax.core.Tracer) for array in arrays):
    return jax.pure_callback(lambda *a: jax.tree.map(np.asarray, function(*a)), shapes, *arrays)
  return jax.tree.map(jax.numpy.asarray, function(*map(np.asarray, arrays)))
