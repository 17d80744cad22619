"""What linear layers are fed: a pass over some examples that keeps a summary of every layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import flax.linen as nn
import jax

from jaxmethods.adapters.adapter import Params
from jaxmethods.adapters.targets import matching
from jaxmethods.errors import InputError
from jaxmethods.trees import flatten, owner

Summary = TypeVar("Summary")


def linear_inputs(
  run: Callable[[], object],
  params: Params,
  targets: str,
  add: Callable[[Summary, jax.Array, jax.Array | None], Summary],
  start: Mapping[str, Summary],
  masks: Sequence[jax.Array | None] = (None,),
) -> dict[str, Summary]:
  """Applies a model and adds up what its linear layers are fed; to be jitted by the caller.

  Args:
    run: applies the model with `params`; its layers must not be scanned.
    params: of the model.
    targets: regular expression on kernel paths, as for an adapter.
    add: (summary, inputs (..., in), which of them count (...) or None for all) -> summary.
    start: the summary so far, by the path of the layer.
    masks: of the first, second, ... call of each layer within `run`.

  Returns:
    The summaries by the path of the layer.

  Raises:
    InputError: a layer is scanned, or was not called once for each mask.
  """
  paths = {owner(path) for path in linear_targets(params, targets)}
  calls = dict.fromkeys(paths, 0)
  summaries = dict(start)

  def intercept(next_fun, args, kwargs, context):
    path = "/".join(context.module.path)
    if context.method_name == "__call__" and path in paths:
      if calls[path] < len(masks):
        summaries[path] = add(summaries[path], args[0], masks[calls[path]])
      calls[path] += 1
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(intercept):
    run()
  for path, count in calls.items():
    if count != len(masks):
      raise InputError(f"{path}: was called {count} times in the preview, expected {len(masks)}")
  return summaries


def linear_targets(params: Params, targets: str) -> list[str]:
  """Paths of the kernels (in, out) that `targets` is found in.

  Raises:
    InputError: it is found nowhere, or one of them is a stack of scanned layers.
  """
  flat = flatten(params)
  kernels = [path for path in flat if path.split("/")[-1] == "kernel"]
  for path in (found := matching(kernels, targets)):
    if flat[path].ndim != 2:
      raise InputError(f"{path}: a preview needs layers that are not scanned")
  return found
