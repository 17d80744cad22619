"""What an adapter is: a few functions over a tree that lies beside the frozen parameters.

An adapter never touches model code. Its tree mirrors the paths of the parameters it acts on; as the
variable collection "adapter" it travels with the model through `nn.scan`, and an interceptor on
`nn.Dense` applies it:

    adapter = lora(rank=8, alpha=16)
    tree = adapter.init(key, params, r"(query|value)/kernel")
    logits = apply(adapter, model, params, tree, tokens)
    plain = adapter.merge(params, tree)            # model.apply({"params": plain}, tokens)

The same tree serves kernels (in, out) of unrolled layers and stacks (layers, in, out) of scanned ones.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmethods import trees
from jaxmethods.adapters.targets import matching
from jaxmethods.errors import InputError
from jaxmethods.stats.dropout import dropout
from jaxmethods.trees import Json, Params, PyTree, Tree, below, flatten, owner, unflatten

Factors = Mapping[str, jax.Array]
Interceptor = Callable[[Callable, tuple, dict, nn.module.InterceptorContext], PyTree]

COLLECTION = "adapter"
# The entry of a tree for what all its layers have in common (VeRA's projections).
SHARED = "shared"


class Adapter(NamedTuple):
  """One way to adapt a model.

  Attributes:
    init: (key, params, targets) -> tree. `targets` is a regular expression on parameter paths such as
      "layers/attention/query/kernel" that must be found in some (`re.search`). Given the same key a
      target starts the same whatever the other targets are.
    variables: (params, tree) -> the variables that `model.apply` takes. Raises `InputError` for a tree
      of another model.
    interceptor: tree -> interceptor of linen methods under which the model has to be applied.
    merge: (params, tree) -> params of the plain model that computes the same, in float32 or better
      and cast back; None if there is none.
    frozen: names of the leaves that are no parameters: they are not trained.
    settings: what the adapter was made with, "kind" first; for files.
  """

  init: Callable[[jax.Array, Params, str], Tree]
  variables: Callable[[Params, Tree], Tree]
  interceptor: Callable[[Tree], Interceptor]
  merge: Callable[[Params, Tree], Tree] | None
  frozen: frozenset[str]
  settings: Json


class Linear(NamedTuple):
  """The frozen parameters of one linear layer: kernel (in, out), bias (out,) or None."""

  kernel: jax.Array
  bias: jax.Array | None = None


Merge = Callable[[Factors, Linear], Linear]


class Rule(NamedTuple):
  """What an adapter does to one linear layer `dense: x -> x kernel + bias`.

  Attributes:
    init: (key, linear, path of the layer) -> factors.
    forward: (factors, x, linear, dense, drop) -> output of the adapted layer. `x` has the dtype of the
      computation; `drop` is dropout on the adapter's own branch.
    merge: (factors, linear) -> the plain linear layer that computes the same, or None.
    shared: (key, largest in, largest out) -> factors that all layers have in common, or None.
    frozen: names of the factors that are not trained.
  """

  init: Callable[[jax.Array, Linear, str], dict[str, jax.Array]]
  forward: Callable[[Factors, jax.Array, Linear, Callable, Callable], jax.Array]
  merge: Merge | None
  shared: Callable[[jax.Array, int, int], dict[str, jax.Array]] | None = None
  frozen: frozenset[str] = frozenset()


def on_linears(rule: Rule, drop_rate: float = 0.0, **settings: object) -> Adapter:
  """The adapter that applies `rule` to every target that is a linear layer.

  Args:
    rule: of one layer.
    drop_rate: dropout on the adapter's branch, active when the model is applied with an rng stream
      "dropout".
    **settings: recorded in the adapter, "kind" first.

  Raises:
    InputError: if `drop_rate` is outside [0, 1).
  """
  if not 0.0 <= drop_rate < 1.0:
    raise InputError(f"{settings['kind']}: dropout must be in [0, 1), got {drop_rate}")

  part = functools.partial
  return Adapter(
    part(_init, rule),
    part(_variables, rule),
    part(_interceptor, rule, drop_rate),
    part(_merge, rule) if rule.merge else None,
    rule.frozen,
    settings,
  )


def _init(rule: Rule, key: jax.Array, params: Params, targets: str) -> Tree:
  """Starts the adapter of every linear layer that `targets` names."""
  linears = _linears(params)
  found = matching((below(path, "kernel") for path in linears), targets)
  return unflatten(_start(rule, key, {path: linears[path] for path in map(owner, found)}))


def _start(rule: Rule, key: jax.Array, chosen: Mapping[str, Linear]) -> dict[str, jax.Array]:
  """Draws the leaves of chosen layers, and those that all of them share."""
  tree = {
    below(path, name): leaf
    for path, linear in chosen.items()
    for name, leaf in _start_one(rule, key_of(key, path), linear, path).items()
  }
  if rule.shared:
    widths = [linear.kernel.shape[-2:] for linear in chosen.values()]
    common = rule.shared(key_of(key, SHARED), *map(max, zip(*widths, strict=True)))
    tree |= {below(SHARED, name): leaf for name, leaf in common.items()}
  return tree


def _start_one(rule: Rule, key: jax.Array, linear: Linear, path: str) -> dict[str, jax.Array]:
  stack = linear.kernel.shape[:-2]
  keys = jax.random.split(key, stack) if stack else key
  return _over_stack(lambda key, linear: rule.init(key, linear, path), linear)(keys, linear)


def _variables(rule: Rule, params: Params, tree: Tree) -> Tree:
  _check(rule, params, tree)
  own = {name: branch for name, branch in tree.items() if name != SHARED}
  return {"params": params, COLLECTION: own}


def _check(rule: Rule, params: Params, tree: Tree) -> None:
  """Refuses a tree that has other leaves or shapes than `init` would give it."""
  linears, modules = _linears(params), layers_of(tree)
  if strangers := sorted(set(modules) - set(linears)):
    raise InputError(f"the adapter acts on {strangers[0]}, which is no linear layer of this model")
  chosen = {path: linears[path] for path in modules}
  start = functools.partial(_start, rule)
  expected, found = jax.eval_shape(start, jax.random.key(0), chosen), flatten(tree)
  for path in sorted({*expected, *found}):
    needed, given = (jnp.shape(x[path]) if path in x else None for x in (expected, found))
    if needed != given:
      raise InputError(f"the adapter's {path} has shape {given}, this model needs {needed}")


def _interceptor(rule: Rule, drop_rate: float, tree: Tree) -> Interceptor:
  """Returns what stands for the call of every linear layer; those without factors go on as they are."""
  shared = tree.get(SHARED, {})

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    adapts = isinstance(module, nn.Dense) and context.method_name == "__call__"
    factors = module.variables.get(COLLECTION) if adapts else None
    if not factors:
      return next_fun(*args, **kwargs)
    (x,) = args
    own = module.variables["params"]
    linear = Linear(own["kernel"], own.get("bias"))
    dtype = jnp.result_type(x, linear.kernel) if module.dtype is None else module.dtype
    drop = functools.partial(_drop, module, drop_rate)
    return rule.forward({**factors, **shared}, x.astype(dtype), linear, next_fun, drop)

  return intercept


def _drop(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
  """Drops entries of the branch of a layer, where it is applied with an rng stream."""
  if rate == 0.0 or not module.has_rng("dropout"):
    return x
  return dropout(x, rate, module.make_rng("dropout"))


def _merge(rule: Rule, params: Params, tree: Tree) -> Tree:
  """Puts the adapter into the layers' own parameters."""
  _check(rule, params, tree)
  assert rule.merge is not None
  plain = rule.merge
  linears, shared = _linears(params), tree.get(SHARED, {})
  flat = flatten(params)
  for path, factors in layers_of(tree).items():
    old = linears[path]
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), old)
    one = lambda factors, linear: plain({**factors, **shared}, linear)
    new = _over_stack(one, old)(factors, wide)
    if new.bias is not None and old.bias is None:
      raise InputError(f"{path} has no bias that this adapter could be merged into")
    for name, before, after in zip(Linear._fields, old, new, strict=True):
      if before is not None:
        flat[below(path, name)] = after.astype(before.dtype)
  return unflatten(flat)


@contextlib.contextmanager
def applied(adapter: Adapter, tree: Tree) -> Iterator[None]:
  """Within this context, models applied to `adapter.variables(params, tree)` are adapted.

  >>> tree = lora.init(key, params, "kernel")
  >>> with jm.adapters.applied(lora, tree):
  ...   out = net.apply(lora.variables(params, tree), x)
  >>> out.shape
  (8, 2)
  """
  with nn.intercept_methods(adapter.interceptor(tree)):
    yield


def apply(
  adapter: Adapter, model: nn.Module, params: Params, tree: Tree, *args: PyTree, **kwargs: PyTree
) -> PyTree:
  """`model.apply` of the adapted model; an rng stream "dropout" turns the adapter's dropout on.

  >>> tree = lora.init(key, params, "kernel")
  >>> tuned = jm.adapters.apply(lora, net, params, tree, x)
  >>> bool(jnp.allclose(tuned, net.apply({"params": params}, x), rtol=1e-6))  # at the start
  True
  """
  with applied(adapter, tree):
    return model.apply(adapter.variables(params, tree), *args, **kwargs)


def split(adapter: Adapter, tree: Tree) -> tuple[Tree, Tree]:
  """(what is trained, what is not); `join` puts them together again.

  >>> trained, frozen = jm.adapters.split(lora, lora.init(key, params, "kernel"))
  >>> sorted(trained["dense_0"])
  ['a', 'b']
  """
  return trees.split(tree, lambda path: _is_trained(adapter, path))


join = trees.merge


def trainable(adapter: Adapter, tree: Tree) -> Tree:
  """The tree's mask: True for every leaf that is trained."""
  return unflatten({path: _is_trained(adapter, path) for path in flatten(tree)})


def num_trainable(adapter: Adapter, tree: Tree) -> int:
  """Number of trained parameters; of masked leaves only what the mask leaves free.

  >>> jm.adapters.num_trainable(lora, lora.init(key, params, "dense_0/kernel"))  # 2 x (4 + 16)
  40
  """
  flat = flatten(split(adapter, tree)[0])
  masks = {owner(path): leaf for path, leaf in flatten(tree).items() if path.endswith("/mask")}
  return sum(
    int(masks[owner(path)].sum()) if owner(path) in masks else math.prod(leaf.shape)
    for path, leaf in flat.items()
  )


def _is_trained(adapter: Adapter, path: str) -> bool:
  return path.split("/")[-1] not in adapter.frozen


def _linears(params: Params) -> dict[str, Linear]:
  """All linear layers by path: kernels (in, out), or (layers, in, out) below a scan."""
  flat = flatten(params)
  return {
    owner(path): Linear(leaf, flat.get(below(owner(path), "bias")))
    for path, leaf in flat.items()
    if path.split("/")[-1] == "kernel" and leaf.ndim in (2, 3)
  }


def layers_of(tree: Tree) -> dict[str, dict[str, jax.Array]]:
  """Factors by the path of the layer they belong to."""
  grouped: dict[str, dict[str, jax.Array]] = {}
  for path, leaf in flatten(tree).items():
    if owner(path) != SHARED:
      grouped.setdefault(owner(path), {})[path.split("/")[-1]] = leaf
  return grouped


def _over_stack(function: Callable, linear: Linear) -> Callable:
  """`function` of one layer, mapped over the axes of the stack that `linear` is."""
  for _ in linear.kernel.shape[:-2]:
    function = jax.vmap(function)
  return function


def key_of(key: jax.Array, path: str) -> jax.Array:
  return jax.random.fold_in(key, zlib.crc32(path.encode()))
