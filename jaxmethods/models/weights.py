"""Weights of published checkpoints, by one table per model family.

A table says for every parameter under which name others store it and in which layout; import reads
it forwards, export backwards. Arrays in, arrays out: a `Mapping` that reads a tensor when it is asked
for (`jaxmethods.data.weights_files`) makes this a stream, one tensor in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxmethods.trees import Params, PyTree, Tree

Layout = Literal["as_is", "transpose", "conv"]

# Axes that bring their layout to ours: (out, in) -> (in, out), OIHW -> HWIO. Their inverses undo it.
_AXES = {"transpose": (1, 0), "conv": (2, 3, 1, 0)}

LAYERS = "layers"  # the part of a path that has the layer axis, or that is numbered: layers_0, ...


class Rule(NamedTuple):
  """Where one parameter is found.

  Attributes:
    theirs: name in a checkpoint, `{i}` for the number of the layer; the name that export writes.
    ours: "/"-joined path of one layer's parameter, with "layers" where the layer axis is.
    layout: of the stored tensor; "transpose" is (out, in), "conv" is (out, in, height, width).
    aliases: other names for the same tensor (older releases, tied weights). A checkpoint may have
      several of them if they agree.
  """

  theirs: str
  ours: str
  layout: Layout = "as_is"
  aliases: tuple[str, ...] = ()


Table = Sequence[Rule]

# (path, tensors of the layers in order, whether they are to be stacked) -> parameter.
Place = Callable[[str, Iterator[np.ndarray], bool], PyTree]


def on_host(path: str, tensors: Iterator[np.ndarray], stacked: bool) -> np.ndarray:
  """The default placement: numpy arrays, layers stacked on axis 0."""
  del path
  return np.stack(list(tensors)) if stacked else next(tensors)


def import_params(
  tensors: Mapping[str, np.ndarray],
  table: Table,
  shapes: Params,
  *,
  ignore: Collection[str] = (),
  place: Place = on_host,
) -> Tree:
  """Fills a model's parameters from a checkpoint.

  Args:
    tensors: name -> tensor; each is read once, when its turn comes.
    table: rules of the family. Rules whose parameter the model does not have are passed over.
    shapes: the model's parameters, or their `jax.eval_shape`; layers stacked or numbered.
    ignore: patterns (`*.inv_freq`) of tensors that are no parameters.
    place: puts a parameter where it is to live, e.g. `sharding.placement`.

  Returns:
    Parameters in the structure of `shapes` and the dtypes of the checkpoint.

  Raises:
    ValueError: a tensor is missing, left over, of the wrong shape, or differs from its alias.
  """
  flat = flatten_dict(shapes, sep="/")
  slots = {path: tensor_names(path, leaf.shape, table) for path, leaf in flat.items()}
  # All names first: a wrong checkpoint is refused before gigabytes of it are read.
  known = set()
  for path, names in slots.items():
    for options in names:
      if not any(name in tensors for name in options):
        raise ValueError(f"{options[0]}: the checkpoint has no such tensor, which {path} needs")
      known.update(options)
  for name in tensors:
    if name not in known and not any(fnmatchcase(name, pattern) for pattern in ignore):
      raise ValueError(f"{name}: the model has no place for this tensor of the checkpoint")

  def read(path: str) -> Iterator[np.ndarray]:
    rule, shape = _rule(path, table), tuple(flat[path].shape)
    shape = shape[1:] if _is_stacked(path) else shape
    for options in slots[path]:
      name, *others = (name for name in options if name in tensors)
      tensor = tensors[name]
      for other in others:
        if not np.array_equal(tensor, tensors[other]):
          raise ValueError(f"{other}: differs from {name}, but the model has one tensor for both")
      axes = _AXES.get(rule.layout)
      theirs = shape if axes is None else tuple(shape[axes.index(k)] for k in range(len(axes)))
      if tuple(tensor.shape) != theirs:
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, the model needs {theirs}")
      yield tensor if axes is None else np.transpose(tensor, axes)

  placed = {path: place(path, read(path), _is_stacked(path)) for path in flat}
  return unflatten_dict(placed, sep="/")


def export_params(params: Params, table: Table) -> dict[str, np.ndarray]:
  """The tensors of a checkpoint, under the first name of each rule: `import_params` undone.

  Args:
    params: parameters, layers stacked or numbered.
    table: rules of the family.

  Returns:
    Name -> tensor, contiguous, dtypes unchanged, in the order of the table and the layers.
  """
  tensors = {}
  order = {rule.ours: k for k, rule in enumerate(table)}
  flat = flatten_dict(params, sep="/")
  for path in sorted(flat, key=lambda path: order.get(_of_one_layer(path)[0], -1)):
    names = tensor_names(path, flat[path].shape, table)
    value = np.asarray(jax.device_get(flat[path]))
    for (name, *_), tensor in zip(names, value if _is_stacked(path) else [value], strict=True):
      axes = _AXES.get(_rule(path, table).layout)
      tensor = tensor if axes is None else np.transpose(tensor, np.argsort(axes))
      tensors[name] = np.asarray(tensor, order="C")  # ascontiguousarray: no scalars
  return tensors


def _of_one_layer(path: str) -> tuple[str, str | None]:
  """("a/layers/b", "3") of "a/layers_3/b"; the path itself and None without a number."""
  match = re.search(rf"(?:^|/){LAYERS}_(\d+)(?:/|$)", path)
  if not match:
    return path, None
  return path[: match.start(1) - 1] + path[match.end(1) :], match[1]


def _is_stacked(path: str) -> bool:
  return LAYERS in path.split("/")


def _rule(path: str, table: Table) -> Rule:
  """The rule of a parameter."""
  ours = _of_one_layer(path)[0]
  for rule in table:
    if rule.ours == ours:
      return rule
  raise ValueError(f"{path}: no rule of the table is for this parameter")


def tensor_names(path: str, shape: Sequence[int], table: Table) -> list[list[str]]:
  """The names that a parameter's tensors may have, one list for each layer in it."""
  rule, number = _rule(path, table), _of_one_layer(path)[1]
  layers = map(str, range(shape[0])) if _is_stacked(path) else [number or ""]
  options = (rule.theirs, *rule.aliases)
  return [[name.replace("{i}", layer) for name in options] for layer in layers]
