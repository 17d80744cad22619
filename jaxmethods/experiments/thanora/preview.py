"""Second moments of the inputs of all layers, over a preview of every task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxmethods.adapters import preview
from jaxmethods.methods import thanora as method
from jaxmethods.runtime import compiler
from jaxmethods.trees import Params, flatten, owner

Batch = TypeVar("Batch")
# What applies the model, and the masks of the calls of a layer: see `adapters.preview`.
Reading = tuple[Callable[[], Any], Sequence[jax.Array | None]]


def second_moments(
  params: Params,
  tasks: Iterable[Iterable[Batch]],
  read: Callable[[Params, Batch], Reading],
  targets: str,
  *,
  together: bool = False,
  begin: Callable[[int], method.Moment] = method.no_inputs,
) -> dict[str, np.ndarray]:
  """Measures the second moments of the inputs of every layer, over all tokens but padding.

  Args:
    params: parameters of the model.
    tasks: batches of every task.
    read: maps parameters and a batch to a reading.
    targets: regular expression on kernel paths.
    together: whether all tasks have one moment (CorDA).
    begin: maps the width of a layer to the moment before any input.

  Returns:
    By the path of the layer (T, in, in), or (1, in, in); on the host.
  """
  flat = flatten(params)
  widths = {owner(path): flat[path].shape[0] for path in preview.linear_targets(params, targets)}

  @functools.partial(compiler.jit, donate_argnums=1)
  def add(params, summaries, batch):
    run, masks = read(params, batch)
    return preview.linear_inputs(run, params, targets, method.add_inputs, summaries, masks)

  seen = []
  for batches in tasks:
    summaries = {path: begin(width) for path, width in widths.items()}
    for batch in batches:
      summaries = add(params, summaries, batch)
    seen.append(jax.device_get(summaries))
  if together:
    seen = [jax.tree.map(lambda *x: sum(x), *seen)]
  second = lambda moment: np.asarray(method.second_moment(moment))
  return {path: np.stack([second(summaries[path]) for summaries in seen]) for path in widths}
