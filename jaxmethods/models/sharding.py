"""Where parameters live on a mesh: one table from parameter paths to axes.

Axes: "data" splits the batch only; "fsdp" splits the batch and the parameters, which are gathered layer
by layer; "tensor" splits heads and hidden units. A mesh may have any of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from jaxmethods.models.weights import LAYERS, Place
from jaxmethods.trees import Params, Tree

Rules = Sequence[tuple[str, P]]

# The first pattern found in a path counts. Layers into heads and hidden units are split by their
# outputs and those back by their inputs, so that a block needs one sum over "tensor" per half.
RULES: Rules = (
  (r"embed/embedding$", P("tensor", "fsdp")),
  (r"(query|key|value|gate|up|fc_1|head)/kernel$", P("fsdp", "tensor")),
  (r"(query|key|value|gate|up|fc_1)/bias$", P("tensor")),
  (r"(out|down|fc_2)/kernel$", P("tensor", "fsdp")),
  (r"", P()),  # norms, the other biases, what is small: everywhere
)


def param_shardings(shapes: Params, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Tree:
  """The sharding of every parameter.

  An axis that the mesh lacks is left out, and so is one that does not divide its dimension (three
  key heads on two devices): that dimension is whole on every device.

  Args:
    shapes: parameters or their `jax.eval_shape`; the layer axis of stacked ones is never split.
    mesh: with the axes "data", "fsdp", "tensor" or some of them.
    rules: path patterns (`re.search`) and the axes of one layer's dimensions.

  Returns:
    A `NamedSharding` in place of every leaf.
  """
  flat = flatten_dict(shapes, sep="/")
  return unflatten_dict(
    {path: _sharding(path, leaf.shape, mesh, rules) for path, leaf in flat.items()}, sep="/"
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits arrays with the batch first over all devices but those of "tensor"."""
  return NamedSharding(mesh, P(tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)))


def placement(shapes: Params, mesh: Mesh, rules: Rules = RULES, *, jit: Callable) -> Place:
  """Streams a checkpoint to a mesh, as `weights.import_params` wants it.

  Stacked parameters are allocated on the devices and filled layer by layer, so that the host holds
  one tensor at a time.

  Args:
    shapes: of all parameters.
    mesh: where to.
    rules: see `param_shardings`.
    jit: compiles the one program there is, such as `jax.jit`.

  Returns:
    The `place` argument of `import_params`.
  """
  flat = flatten_dict(shapes, sep="/")

  def place(path: str, tensors: Iterator[np.ndarray], stacked: bool) -> jax.Array:
    shape = flat[path].shape
    sharding = _sharding(path, shape, mesh, rules)
    if not stacked:
      return jax.device_put(next(tensors), sharding)
    one_layer = NamedSharding(mesh, P(*sharding.spec[1:]))
    # The one program here: written in place, since the stack may be half of the device's memory.
    write = jit(lambda stack, x, i: stack.at[i].set(x), donate_argnums=0, out_shardings=sharding)
    stack = None
    for i, tensor in enumerate(tensors):
      if stack is None:
        stack = jnp.zeros(shape, tensor.dtype, device=sharding)
      stack = write(stack, jax.device_put(tensor, one_layer), i)
    assert stack is not None
    return stack

  return place


def bytes_per_device(shapes: Params, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> int:
  """Memory that the parameters take on each device; an `AbstractMesh` needs no devices."""
  flat = flatten_dict(shapes, sep="/")
  return sum(
    math.prod(_sharding(path, leaf.shape, mesh, rules).shard_shape(leaf.shape))
    * leaf.dtype.itemsize
    for path, leaf in flat.items()
  )


def _sharding(
  path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules
) -> NamedSharding:
  axes = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
  if axes is None:
    raise ValueError(f"{path}: no sharding rule is for this parameter")
  if LAYERS in path.split("/"):
    axes = P(None, *axes)
  fits = lambda axis, size: axis in mesh.shape and size % mesh.shape[axis] == 0
  kept = [axis if fits(axis, size) else None for axis, size in zip(axes, shape, strict=False)]
  return NamedSharding(mesh, P(*kept))
