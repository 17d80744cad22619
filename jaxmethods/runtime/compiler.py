"""How the programs of a run are compiled: `jax.jit` with the options that pay on this backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# Dense products and reductions by Eigen and XLA's own emitters instead of the YNN library, which is
# the default of jaxlib 0.10: FedSSP step on NCI1, one thread, 175 to 189 ms against 195 to 239
# (best of 60 steps, four interleaved runs), 140 MB of temporaries against 188; compilation takes 30 %
# longer.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


def jit(function: Callable, **options: Any) -> Callable:
  """`jax.jit(function, **options)` with the compiler options of the default backend."""
  return jax.jit(function, compiler_options=_compiler_options(), **options)


def num_bytes(function: Callable, *args: object) -> int | None:
  """Bytes a device holds while a jitted function runs: arguments, results, temporaries.

  Nothing is compiled if the function has been called with such arguments. None where the backend does
  not tell, and for a function made of several programs.
  """
  if not hasattr(function, "lower"):
    return None
  found = function.lower(*args).compile().memory_analysis()
  if found is None:
    return None
  kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return kept + found.temp_size_in_bytes


@functools.cache
def _compiler_options() -> dict[str, str] | None:
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda x: x, compiler_options=_CPU).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:  # a jaxlib without this option
    return None
  return _CPU
