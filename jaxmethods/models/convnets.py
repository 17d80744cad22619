"""Small convolutional networks of different kinds, for clients that do not share an architecture.

ResNet, MobileNetV2 and ShuffleNet for 32x32 images as in the published code of RAHFL (Fang et al., TPAMI
2025), and narrow ones of the same blocks. Batch statistics are those of the real samples of a batch: a
`mask` (B,) says which they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxmethods.errors import InputError, hint
from jaxmethods.models.conv import Conv, shifted
from jaxmethods.models.graph_layers import MaskedBatchNorm
from jaxmethods.models.init import torch_linear

# group: two groups of channels, which keep no statistics (Reddi et al. 2021 for federated learning).
Norm = Literal["batch", "group"]
_GROUPS = 2


class ConvNorm(nn.Module):
  """Convolution without bias that keeps the size (stride 1), then normalisation.

  Attributes:
    features: output channels.
    size: of the kernel, odd.
    stride: of the convolution.
    groups: of channels that do not see each other.
    patches: as in `Conv`.
    dtype: of the convolution.
    norm: by the batch, or by groups of an image's channels.
  """

  features: int
  size: int = 1
  stride: int = 1
  groups: int = 1
  patches: bool | None = None
  dtype: DTypeLike | None = None
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """Maps (B, height, width, channels) to (B, height', width', features)."""
    fan_in = self.size**2 * x.shape[-1] // self.groups
    y = Conv(
      self.features,
      self.size,
      self.stride,
      padding=self.size // 2,
      groups=self.groups,
      use_bias=False,
      kernel_init=torch_linear(fan_in)["kernel_init"],
      patches=self.patches,
      dtype=self.dtype,
      name="conv",
    )(x)
    if self.norm == "group":
      return nn.GroupNorm(num_groups=_GROUPS, dtype=self.dtype, name="norm")(y)
    pixels = None if mask is None else jnp.repeat(mask, y.shape[1] * y.shape[2])
    rows = y.reshape(-1, self.features)
    return MaskedBatchNorm(name="norm")(rows, pixels, train=train).reshape(y.shape)


# What a block makes its convolutions with: `ConvNorm` with patches and dtype filled in.
Unit = Callable[..., ConvNorm]


class ResNetBlock(nn.Module):
  """relu(unit_2(relu(unit_1(x))) + shortcut), both 3x3."""

  features: int
  stride: int = 1
  unit: Unit = ConvNorm

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """Maps (B, height, width, channels) to (B, height / stride, width / stride, features)."""
    y = nn.relu(self.unit(self.features, 3, self.stride, name="unit_1")(x, mask, train))
    y = self.unit(self.features, 3, name="unit_2")(y, mask, train)
    if self.stride > 1 or x.shape[-1] != self.features:
      x = self.unit(self.features, 1, self.stride, name="shortcut")(x, mask, train)
    return nn.relu(y + x)


class MobileNetBlock(nn.Module):
  """Expansion, depthwise 3x3, projection without ReLU; a shortcut where the size stays."""

  features: int
  stride: int = 1
  expansion: int = 6
  unit: Unit = ConvNorm

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """Maps (B, height, width, channels) to (B, height / stride, width / stride, features)."""
    wide = self.expansion * x.shape[-1]
    y = nn.relu(self.unit(wide, name="unit_1")(x, mask, train))
    y = nn.relu(self.unit(wide, 3, self.stride, groups=wide, name="unit_2")(y, mask, train))
    y = self.unit(self.features, name="unit_3")(y, mask, train)
    if self.stride > 1:
      return y
    if x.shape[-1] != self.features:
      x = self.unit(self.features, name="shortcut")(x, mask, train)
    return y + x


class ShuffleNetBlock(nn.Module):
  """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1; concatenated with pooling at stride 2.

  Attributes:
    features: output channels, of branch and shortcut together.
    stride: 1 or 2.
    groups: of the first convolution; the last one has 2.
    unit: what it is made of.
  """

  features: int
  stride: int = 1
  groups: int = 2
  unit: Unit = ConvNorm

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """Maps (B, height, width, channels) to (B, height / stride, width / stride, features)."""
    branch = self.features - (x.shape[-1] if self.stride == 2 else 0)
    middle = branch // 4
    y = nn.relu(self.unit(middle, groups=self.groups, name="unit_1")(x, mask, train))
    y = shuffle_channels(y, self.groups)
    y = nn.relu(self.unit(middle, 3, self.stride, groups=middle, name="unit_2")(y, mask, train))
    y = self.unit(branch, groups=2, name="unit_3")(y, mask, train)
    if self.stride == 1:
      return nn.relu(y + x)
    pooled = sum(shifted(x, size=3, stride=2, padding=1)) / 9  # the padding counts
    return nn.relu(jnp.concatenate([y, pooled], axis=-1))


def shuffle_channels(x: jax.Array, groups: int) -> jax.Array:
  """Deals the channels (..., C) of each group out to all groups."""
  split = x.reshape(*x.shape[:-1], groups, -1)
  return split.swapaxes(-1, -2).reshape(x.shape)


class Trunk(nn.Module):
  """A stem, blocks, perhaps a last 1x1 unit, and the mean over the image.

  Attributes:
    stem: channels and kernel size of the first unit.
    blocks: one function of `unit` and `name` for each block.
    last: channels of the last unit, None for no such unit.
    patches: as in `Conv`.
    dtype: of the convolutions.
    norm: as in `ConvNorm`.
  """

  stem: tuple[int, int]
  blocks: Sequence[Callable[..., nn.Module]]
  last: int | None = None
  patches: bool | None = None
  dtype: DTypeLike | None = None
  norm: Norm = "batch"

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
  ) -> jax.Array:
    """Maps images (B, height, width, channels) to features (B, d)."""
    unit = functools.partial(ConvNorm, patches=self.patches, dtype=self.dtype, norm=self.norm)
    channels, size = self.stem
    x = nn.relu(unit(channels, size, name="stem")(x, mask, train))
    for i, block in enumerate(self.blocks):
      x = block(unit=unit, name=f"block_{i}")(x, mask, train)
    if self.last is not None:
      x = nn.relu(unit(self.last, name="last")(x, mask, train))
    return x.mean((1, 2))


class Classifier(nn.Module):
  """Features by a trunk, logits by the linear layer "head".

  Running means and variances are in the collection `batch_stats`.
  """

  trunk: nn.Module
  num_classes: int

  def __call__(self, *args, **keywords) -> jax.Array:
    """Logits (B, num_classes); arguments as in `features`."""
    return self.logits(self.features(*args, **keywords))

  def features(
    self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
  ) -> jax.Array:
    """Embeds images.

    Args:
      x: (B, height, width, channels).
      mask: (B,) bool, the real samples; None: all.
      train: whether to normalise by this batch and move the running values.

    Returns:
      (B, d), without meaning where `mask` is false.
    """
    return self.trunk(x, mask, train=train)

  @nn.compact
  def logits(self, features: jax.Array) -> jax.Array:
    """Logits (B, num_classes) of features (B, d)."""
    return nn.Dense(self.num_classes, name="head", **torch_linear(features.shape[-1]))(features)


def resnet(
  blocks: Sequence[int],
  narrow: int,
  stages: int | None,
  patches: bool | None,
  dtype: DTypeLike | None,
) -> Trunk:
  """Four stages of `blocks` basic blocks each, 64 to 512 channels."""
  made = [
    functools.partial(ResNetBlock, _divide(64 << stage, narrow), 2 if stage and not i else 1)
    for stage, count in enumerate(blocks[:stages])
    for i in range(1 if stages else count)
  ]
  return Trunk((_divide(64, narrow), 3), made, patches=patches, dtype=dtype)


def mobilenet(
  narrow: int, stages: int | None, patches: bool | None, dtype: DTypeLike | None
) -> Trunk:
  """MobileNetV2 for 32x32 images: ReLU, and stride 2 three times."""
  table = (  # expansion, channels, blocks, stride of the first
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
  )  # fmt: skip
  made = [
    functools.partial(MobileNetBlock, _divide(channels, narrow), 1 if i else stride, expansion)
    for expansion, channels, count, stride in table[:stages]
    for i in range(1 if stages else count)
  ]
  return Trunk((_divide(32, narrow), 3), made, _divide(1280, narrow), patches, dtype)


def shufflenet(
  narrow: int, stages: int | None, patches: bool | None, dtype: DTypeLike | None
) -> Trunk:
  """ShuffleNet with two groups: stages of 4, 8 and 4 blocks, 200 to 800 channels."""
  made = [
    functools.partial(
      ShuffleNetBlock,
      _divide(channels, narrow),
      stride=1 if i else 2,
      groups=2 if stage or i else 1,  # the stem is too thin to be grouped
    )
    for stage, (channels, count) in enumerate(((200, 4), (400, 8), (800, 4))[:stages])
    for i in range(1 if stages else count)
  ]
  return Trunk((_divide(24, narrow), 1), made, patches=patches, dtype=dtype)


ARCHITECTURES: dict[str, Callable[..., Trunk]] = {
  "resnet10": functools.partial(resnet, (1, 1, 1, 1)),
  "resnet12": functools.partial(resnet, (2, 1, 1, 1)),
  "shufflenet": shufflenet,
  "mobilenet": mobilenet,
}


def classifier(
  architecture: str,
  num_classes: int,
  *,
  narrow: int = 1,
  stages: int | None = None,
  patches: bool | None = None,
  dtype: DTypeLike | None = None,
  norm: Norm = "batch",
) -> Classifier:
  """Returns a network of RAHFL, or a narrow one of the same blocks.

  Args:
    architecture: a name in `ARCHITECTURES`.
    num_classes: number of logits.
    narrow: what all channels are divided by, rounded down to multiples of 8, at least 8.
    stages: one block of each of so many stages, from the first; None: the whole network.
    patches: as in `Conv`.
    dtype: of the convolutions.
    norm: "batch", or "group": no statistics that a client would have to keep.

  Raises:
    InputError: unknown architecture, or `narrow` or `stages` below 1.

  >>> net = jm.models.classifier("resnet10", 10, narrow=16)
  >>> jax.eval_shape(net.init, key, jnp.ones((1, 16, 16, 3)))["params"]["head"]["kernel"].shape[1]
  10
  """
  if architecture not in ARCHITECTURES:
    advice = hint(architecture, ARCHITECTURES, "architectures")
    raise InputError(f"architecture: {architecture!r} is not known; {advice}")
  for name, value in (("narrow", narrow), ("stages", stages)):
    if value is not None and value < 1:
      raise InputError(f"{name}: must be at least 1, got {value}")
  trunk = ARCHITECTURES[architecture](narrow=narrow, stages=stages, patches=patches, dtype=dtype)
  return Classifier(trunk.clone(norm=norm), num_classes)


def _divide(channels: int, narrow: int) -> int:
  return max(channels // narrow // 8, 1) * 8
