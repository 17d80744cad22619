"""EfficientNet-Lite0: inverted bottlenecks without squeeze and excitation, for frozen features.

Tan & Le, arXiv 1905.11946; the Lite variants are Google's for small devices. Batch statistics are part
of the kernels (`fold`). A depthwise convolution is a sum of shifted products: on CPU 5 times faster
than a grouped `lax.conv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmethods.models.conv import patches, shifted
from jaxmethods.trees import Params, Tree

_EPSILON = 1e-3  # of the batch norms


class Stage(NamedTuple):
  """Blocks of one width; the first has the stride."""

  repeats: int
  size: int
  stride: int
  expansion: int
  features: int


LITE0 = (
  Stage(1, 3, 1, 1, 16),
  Stage(2, 3, 2, 6, 24),
  Stage(2, 5, 2, 6, 40),
  Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112),
  Stage(4, 5, 2, 6, 192),
  Stage(1, 3, 1, 6, 320),
)
WIDTH = 1280  # of the features


class Depthwise(nn.Module):
  """A filter for each channel: kernel (size, size, channels) and bias."""

  size: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (B, height, width, C) to (B, ceil(height / stride), ceil(width / stride), C)."""
    channels = x.shape[-1]
    kernel = self.param("kernel", nn.initializers.normal(0.3), (self.size, self.size, channels))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    shifts = shifted(same_padded(x, self.size, self.stride), self.size, self.stride, 0)
    taps = kernel.reshape(-1, channels)
    return sum((s * tap for s, tap in zip(shifts, taps, strict=True)), start=bias)


class EfficientNet(nn.Module):
  """Features, and the head that classifies them."""

  stages: tuple[Stage, ...] = LITE0
  num_classes: int = 1000

  @nn.compact
  def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes images.

    Args:
      pixels: (B, height, width, 3), see `normalised`.

    Returns:
      Features (B, 1280), the mean over all places, and logits (B, classes) of the head.
    """
    stem = patches(same_padded(pixels, 3, 2), 3, 2)
    x = nn.relu6(nn.Dense(32, name="stem")(stem))
    index = 0
    for stage in self.stages:
      for repeat in range(stage.repeats):
        stride = stage.stride if repeat == 0 else 1
        x = _Block(stage._replace(stride=stride), name=f"blocks_{index}")(x)
        index += 1
    features = nn.relu6(nn.Dense(WIDTH, name="head")(x)).mean((1, 2))
    return features, nn.Dense(self.num_classes, name="classifier")(features)


class _Block(nn.Module):
  """Widens, filters, narrows; added to its input where the shape stays."""

  stage: Stage

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    stage, y = self.stage, x
    if stage.expansion > 1:
      y = nn.relu6(nn.Dense(x.shape[-1] * stage.expansion, name="expand")(y))
    y = nn.relu6(Depthwise(stage.size, stage.stride, name="depthwise")(y))
    y = nn.Dense(stage.features, name="project")(y)
    return x + y if x.shape == y.shape else y


def same_padded(x: jax.Array, size: int, stride: int) -> jax.Array:
  """Pads (B, height, width, C) so that ceil(n / stride) outputs fit; the odd zero comes last."""
  totals = (max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[1:3])
  return jnp.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)))


def normalised(images: jax.Array) -> jax.Array:
  """Pixels as the weights expect them: 0..255 to about -1..1, float32."""
  return (images.astype(jnp.float32) - 127) / 128


def fold(tensors: Mapping[str, np.ndarray]) -> Tree:
  """Parameters of `EfficientNet` from the tensors of the published checkpoint.

  Args:
    tensors: `_conv_stem.weight`, `_blocks.0._bn1.running_var`, ...: convolutions (out, in, height,
      width) without bias, each followed by a batch norm, which is multiplied into it.

  Returns:
    Nested dict of float32 arrays.

  Raises:
    KeyError: a tensor is missing.
  """
  at: dict[str, tuple[str, str]] = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
  params: Tree = {}
  index = 0
  while f"_blocks.{index}._project_conv.weight" in tensors:
    block = f"_blocks.{index}."
    parts = {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
    if f"{block}_expand_conv.weight" in tensors:
      parts["expand"] = ("_expand_conv", "_bn0")
    params[f"blocks_{index}"] = {
      name: _folded(tensors, block + conv, block + norm) for name, (conv, norm) in parts.items()
    }
    index += 1
  params |= {name: _folded(tensors, conv, norm) for name, (conv, norm) in at.items()}
  head = {"kernel": np.ascontiguousarray(tensors["_fc.weight"].T), "bias": tensors["_fc.bias"]}
  return params | {"classifier": head}


def _folded(tensors: Mapping[str, np.ndarray], conv: str, norm: str) -> Params:
  weight = tensors[f"{conv}.weight"]
  scale, bias, mean, variance = (
    tensors[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
  )
  factor = scale / np.sqrt(variance + _EPSILON)
  kernel = (weight * factor[:, None, None, None]).transpose(2, 3, 1, 0)  # OIHW to HWIO
  # A depthwise one stays; 1x1 and the stem are products, of places or patches.
  kernel = kernel[:, :, 0] if weight.shape[1] == 1 else kernel.reshape(-1, kernel.shape[-1])
  return {"kernel": np.ascontiguousarray(kernel), "bias": bias - mean * factor}
