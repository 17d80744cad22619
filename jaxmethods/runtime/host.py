"""Functions of the host (draws by numpy, texts judged) in functions that may be traced."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from jaxmethods.trees import PyTree


def call(function: Callable[..., PyTree], shapes: PyTree, *arrays: jax.Array) -> PyTree:
  """Calls a function of the host; where its arguments are traced, as a callback of the program.

  Args:
    function: arrays -> tree of arrays. Called at once, its errors reach the caller as they are.
    shapes: the shapes and types of its result, which must not depend on values.
    *arrays: its arguments.
  """
  if any(isinstance(array, jax.core.Tracer) for array in arrays):
    on_host = lambda *a: jax.tree.map(np.asarray, function(*a))
    return jax.pure_callback(on_host, shapes, *arrays, vmap_method="sequential")
  return jax.tree.map(jax.numpy.asarray, function(*map(np.asarray, arrays)))
