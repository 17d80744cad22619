"""The blocks of RAHFL's networks against the published ones (`rahfl.npz`)."""

import re

import flax.traverse_util
import jax
import numpy as np
import pytest

from jaxmethods.models.convnets import MobileNetBlock, ResNetBlock, ShuffleNetBlock
from tests.tensors import below

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
BLOCKS = [
  "resnet_basic_stride1",
  "resnet_basic_stride2",
  "mobilenet_stride1",
  "mobilenet_stride2",
  "shufflenet_stride1",
  "shufflenet_stride2",
]


def variables_of(recorded):
  """Our collections from PyTorch's state."""
  leaves = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
  }
  variables = {}
  for name, value in recorded.items():
    if match := re.fullmatch(r"(?:(conv|bn)(\d)|(shortcut)\.(\d))\.(\w+)", name):
      kind, number, shortcut, place, leaf = match.groups()
      unit = shortcut or f"unit_{number}"
      if kind == "conv" or place == "0":
        variables["params", unit, "conv", "kernel"] = value.transpose(2, 3, 1, 0)
      else:
        collection, ours = leaves[leaf]
        variables[collection, unit, "norm", ours] = value
  return flax.traverse_util.unflatten_dict(variables)


def block_of(name, recorded, inputs, features):
  stride = int(name[-1])
  if name.startswith("resnet"):
    return ResNetBlock(features, stride)
  if name.startswith("mobilenet"):
    return MobileNetBlock(features, stride, recorded["conv1.weight"].shape[0] // inputs)
  return ShuffleNetBlock(features, stride, inputs // recorded["conv1.weight"].shape[1])


@pytest.mark.parametrize("name", BLOCKS)
def test_block(golden_file, name):
  recorded = below(golden_file("rahfl"), f"blocks/{name}/")
  x = recorded["input_nchw"].transpose(0, 2, 3, 1)
  outputs = {k: recorded[f"output_{k}"].transpose(0, 2, 3, 1) for k in ("eval", "train")}
  block = block_of(name, recorded, x.shape[-1], outputs["eval"].shape[-1])
  variables = variables_of(recorded)
  for patches in (True, False):
    module = block.clone(unit=lambda *a, p=patches, **k: block.unit(*a, patches=p, **k))
    made = jax.eval_shape(lambda m=module: m.init(jax.random.key(0), x, None, False))
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, variables)

    @jax.jit
    def run(variables, module=module):
      trained, _ = module.apply(variables, x, None, True, mutable=["batch_stats"])
      return {"eval": module.apply(variables, x, None, False), "train": trained}

    for mode, value in run(variables).items():
      np.testing.assert_allclose(value, outputs[mode], **TOLERANCE, err_msg=f"{mode} {patches}")
