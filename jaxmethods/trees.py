"""Names of trees as types, and paths of pytrees: nested dicts as {"a/b/c": leaf}, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax import traverse_util

# The one place where the types that Python cannot spell out are written as `Any`.
PyTree: TypeAlias = (
  Any  # arrays in dicts, tuples, lists, named tuples or dataclasses, however nested
)
Params: TypeAlias = Mapping[str, PyTree]  # nested dicts of arrays by name, which nobody changes
Tree: TypeAlias = dict[str, PyTree]  # the same, just built: may still be filled
Flat: TypeAlias = dict[str, jax.Array]  # {"a/b/c": leaf}
Json: TypeAlias = Mapping[str, Any]  # an object of a JSON or YAML file
Key: TypeAlias = jax.Array  # typed key of jax.random
Predicate: TypeAlias = Callable[[str], bool]  # on the path "a/b/c"


def flatten(tree: Params) -> Flat:
  """Flattens nested dicts to {"a/b/c": leaf}."""
  return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, PyTree]) -> Tree:
  """Nests {"a/b/c": leaf} again, in the order in which jax flattens dicts."""
  return traverse_util.unflatten_dict(dict(sorted(flat.items())), sep="/")


def owner(path: str) -> str:
  """Returns the module that a parameter path belongs to: "a/b" of "a/b/kernel"."""
  return path.rpartition("/")[0]


def below(module: str, name: str) -> str:
  """Returns the path of a module's parameter; the module of the root is ""."""
  return f"{module}/{name}" if module else name


def is_stacked(path: str) -> bool:
  """Tells whether a parameter belongs to scanned layers: its first axis counts them."""
  return "layers" in path.split("/")


def split(params: Params, shared: Predicate) -> tuple[Tree, Tree]:
  """Splits nested dicts into the leaves whose path "a/b/c" satisfies `shared`, and the others.

  Args:
    params: nested dicts of arrays.
    shared: predicate on the path.

  Returns:
    (shared part, local part); dicts that would be empty are left out.
  """

  def part(tree: Params, prefix: str, wanted: bool) -> Tree:
    out = {}
    for name, child in tree.items():
      path = prefix + name
      if isinstance(child, Mapping):
        if inner := part(child, path + "/", wanted):
          out[name] = inner
      elif bool(shared(path)) == wanted:
        out[name] = child
    return out

  return part(params, "", True), part(params, "", False)


def merge(a: Params, b: Params) -> Tree:
  """Joins two nested dicts without common leaves; the inverse of `split`."""
  out = dict(a)
  for name, child in b.items():
    if name not in out:
      out[name] = child
    elif isinstance(child, Mapping) and isinstance(out[name], Mapping):
      out[name] = merge(out[name], child)
    else:
      raise ValueError(f"both parts hold {name!r}")
  # Sorted like jax flattens dicts, so that split and merge give back the very same tree.
  return dict(sorted(out.items()))


def check_alike(**arguments: PyTree) -> None:
  """Checks that trees have the leaves and shapes of the first.

  Raises:
    ValueError: "end: expected shape (2,) at a/w as in start, got (3,)".
  """
  (first, expected), *others = ((name, _shapes(tree)) for name, tree in arguments.items())
  for name, given in others:
    for path in {**expected, **given}:
      want, got = (found.get(path, "nothing") for found in (expected, given))
      if got != want:
        raise ValueError(f"{name}: expected shape {want} at {path} as in {first}, got {got}")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree.leaves_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
  return {path: jax.numpy.shape(x) for path, x in named.items()}


def everything(path: str) -> bool:
  """Shares every parameter (FedAvg)."""
  del path
  return True


def nothing(path: str) -> bool:
  """Shares no parameter (local training)."""
  del path
  return False


def all_but(*names: str) -> Predicate:
  """Shares every parameter except those with one of `names` in their path (FedPer: the head)."""
  return lambda path: not set(names) & set(path.split("/"))
