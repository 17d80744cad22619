"""Initialisers of the published PyTorch code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from jaxmethods.trees import PyTree


class LinearInit(TypedDict):
  """The two initialisers of a linear layer, as keywords of `nn.Dense`."""

  kernel_init: Initializer
  bias_init: Initializer


def torch_linear(fan_in: int) -> LinearInit:
  """PyTorch's default for a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias.

  This is what `kaiming_uniform_(a=sqrt(5))` comes to.

  Args:
    fan_in: number of inputs (the bias has no other way to know it).

  Returns:
    Keywords for `nn.Dense(width, **torch_linear(x.shape[-1]))`.
  """
  bound = 1.0 / math.sqrt(fan_in) if fan_in > 0 else 0.0

  def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return {"kernel_init": uniform, "bias_init": uniform}


def draw_variables(init: Callable[..., PyTree], key: jax.Array, *shapes: PyTree) -> PyTree:
  """`init(key, *arrays)` for an initialiser that reads the shapes of the arrays alone.

  Only what the result needs is run, one operation after the other. Flax's `lazy_init` also compiles an
  empty program for most operations of the forward pass: for ten clients' graph transformers 200 of 310
  programs, each kept with a MB of memory.

  Args:
    init: such as `module.init`.
    key: random key.
    *shapes: pytrees of `jax.ShapeDtypeStruct` or arrays.

  Raises:
    ValueError: the result needs more than shapes.
  """
  traced, shape = jax.make_jaxpr(init, return_shape=True)(key, *shapes)
  needed, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
  if any(used[1:]):
    raise ValueError("the initialiser reads the values of its inputs, not just their shapes")
  arguments = [key] if used[0] else []
  drawn = jaxpr_as_fun(ClosedJaxpr(needed, traced.consts))(*arguments)
  return jax.tree.unflatten(jax.tree.structure(shape), drawn)


def draw_on_host(shapes: PyTree, random: np.random.Generator) -> PyTree:
  """Variables whose layers all start as `torch_linear`, norms as identities, without compiling.

  Compiling the initialiser of a convnet of fifty layers takes half a minute, drawing its numbers none.

  Args:
    shapes: of `jax.eval_shape(net.init, ...)`: a layer has `kernel` (..., out), perhaps `bias`, a norm
      `scale` and `bias`, and in `batch_stats` `mean` and `var`.
    random: numpy's generator.
  """

  def fill(tree: PyTree) -> PyTree:
    if not any(hasattr(leaf, "shape") for leaf in tree.values()):
      return {name: fill(inner) for name, inner in tree.items()}
    fan_in = math.prod(tree["kernel"].shape[:-1]) if "kernel" in tree else None
    return {name: jnp.asarray(value(name, leaf.shape, fan_in)) for name, leaf in tree.items()}

  def value(name: str, shape: tuple[int, ...], fan_in: int | None) -> np.ndarray:
    if fan_in is None:
      return np.full(shape, {"scale": 1, "var": 1, "bias": 0, "mean": 0}[name], np.float32)
    bound = 1 / math.sqrt(fan_in)
    return random.uniform(-bound, bound, shape).astype(np.float32)

  return fill(shapes)
