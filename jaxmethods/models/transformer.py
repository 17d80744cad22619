"""The transformer encoder behind ViT, both towers of CLIP and BERT.

One block serves two forms: scanned (deep, TPU/GPU: compile time is constant in depth) and unrolled
(shallow, CPU). What a method wants to know about the layers (`Probe`) is reduced inside them: an array
(layers, batch, tokens, width) never leaves the encoder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike

from jaxmethods.errors import InputError, hint
from jaxmethods.models.attention import (
  attention,
  attention_rows,
  attention_with_dropout,
  masked_bias,
)
from jaxmethods.models.probe import Probe
from jaxmethods.stats.activations import gelu
from jaxmethods.stats.dropout import dropout
from jaxmethods.trees import PyTree

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_new": nn.gelu,
  "gelu_pytorch_tanh": nn.gelu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "relu": nn.relu,
  "silu": nn.silu,
}


def check_activation(name: str) -> None:
  """Raises `InputError` unless `ACTIVATIONS` has the name."""
  if name not in ACTIVATIONS:
    advice = hint(name, ACTIVATIONS, "activations")
    raise InputError(f"activation: {name!r} is not known; {advice}")


# (hidden state before a block, this block's slice of `inputs`) -> hidden state, such as one with
# this layer's prompts put in.
Edit = Callable[[jax.Array, PyTree], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """Shape of an encoder, and how it is computed.

  Attributes:
    width: D of the hidden state.
    num_layers: L.
    heads: H, which divides the width.
    hidden: width of the MLP.
    activation: of the MLP, a name in `ACTIVATIONS`.
    epsilon: of the layer norms.
    norm: "pre" (ViT, CLIP: before attention and MLP) or "post" (BERT: after each residual sum).
    drop_path: rate at which the last block drops its branches in training, per example; earlier
      blocks do it in proportion to their place.
    dropout: rate on the embeddings and on what each branch adds, in training.
    attention_dropout: rate on the weights of the attention, in training.
    scan_layers: whether the blocks are one `nn.scan` or a Python loop.
    remat: whether the backward pass computes each block again instead of keeping it.
    dtype: of the computation; softmax and norms are float32 in any case. None: as the parameters.
  """

  width: int
  num_layers: int
  heads: int
  hidden: int
  activation: str = "gelu"
  epsilon: float = 1e-5
  norm: Literal["pre", "post"] = "pre"
  drop_path: float = 0.0
  dropout: float = 0.0
  attention_dropout: float = 0.0
  scan_layers: bool = False
  remat: bool = False
  dtype: DTypeLike | None = None

  def __post_init__(self) -> None:
    for name in ("width", "num_layers", "heads", "hidden"):
      if getattr(self, name) < 1:
        raise InputError(f"{name}: must be at least 1, got {getattr(self, name)}")
    if self.width % self.heads:
      raise InputError(f"width: must be a multiple of {self.heads} heads, got {self.width}")
    check_activation(self.activation)
    for name in ("drop_path", "dropout", "attention_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise InputError(f"{name}: must be in [0, 1), got {getattr(self, name)}")


class Encoded(NamedTuple):
  """What an encoder gives.

  Attributes:
    hidden: (B, T, D).
    states: `Probe.states` of the input and of every block's output, stacked: (L + 1, ...).
    attention: `Probe.attention` of every block, stacked: (L, ...).
  """

  hidden: jax.Array
  states: PyTree = None
  attention: PyTree = None


class Attention(nn.Module):
  """Multi-head attention with biases; Dense layers query, key, value, out.

  Attributes:
    heads: H, which divides the width.
    zero_token: whether every query may also look at a token whose key and value are zero.
    drop_rate: dropout on the weights; reads the rng stream "dropout".
    dtype: of the computation.
  """

  heads: int
  zero_token: bool = False
  drop_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array, memory: jax.Array | None = None
  ) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Looks around in `memory`, or in `x` itself.

    Args:
      x: (B, T, D).
      bias: (B or 1, T, S), see `masked_bias`.
      memory: (B, S, any width).

    Returns:
      (B, T, D), and a function from queries (B, R) to their rows of weights (B, H, R, S).
    """

    def split(name: str, source: jax.Array) -> jax.Array:
      y = nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(source)
      return y.reshape(*y.shape[:2], self.heads, -1).swapaxes(1, 2)

    memory = x if memory is None else memory
    query, key, value = split("query", x), split("key", memory), split("value", memory)
    if self.zero_token:
      key, value = (jnp.pad(y, ((0, 0), (0, 0), (0, 1), (0, 0))) for y in (key, value))
      bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 1)))
    query = (query * query.shape[-1] ** -0.5)[:, :, None]
    if self.drop_rate:
      rng = self.make_rng("dropout")
      mixed = attention_with_dropout(query, key, value, bias, self.drop_rate, rng)
    else:
      mixed = attention(query, key, value, bias)
    mixed = mixed[:, :, 0].swapaxes(1, 2).reshape(x.shape)
    rows = functools.partial(attention_rows, query, key, bias)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(mixed), rows


class MLP(nn.Module):
  """fc_2(activation(fc_1(x))), back to the width of x.

  Attributes:
    hidden: width in between.
    activation: a name in `ACTIVATIONS`.
    last_init: initialiser of the kernel of fc_2.
    drop_rate: dropout in between; reads the rng stream "dropout".
    dtype: of the computation.
  """

  hidden: int
  activation: str = "gelu"
  last_init: Initializer = nn.linear.default_kernel_init
  drop_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., D) to (..., D)."""
    hidden = nn.Dense(self.hidden, dtype=self.dtype, name="fc_1")(x)
    out = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.last_init, name="fc_2")
    hidden = ACTIVATIONS[self.activation](hidden)
    if self.drop_rate:
      hidden = dropout(hidden, self.drop_rate, self.make_rng("dropout"))
    return out(hidden)


class Block(nn.Module):
  """Attention and MLP with residual sums; see `Encoder` for the attributes."""

  config: EncoderConfig
  depth: int
  train: bool
  edit: Edit | None
  probe: Probe

  @nn.compact
  def __call__(
    self, x: jax.Array, index: jax.Array | int, inputs: PyTree, bias: jax.Array
  ) -> tuple[jax.Array, PyTree]:
    """The hidden state (B, T, D) after block `index`, and what the probe keeps of it."""
    before = x
    if self.edit is not None:
      x = self.edit(x, inputs)
    config = self.config
    drop_rate = config.attention_dropout if self.train else 0.0
    attend = Attention(config.heads, drop_rate=drop_rate, dtype=config.dtype, name="attention")
    mlp = MLP(config.hidden, config.activation, dtype=config.dtype, name="mlp")
    norm_1, norm_2 = layer_norm(config, "norm_1"), layer_norm(config, "norm_2")
    if config.norm == "pre":
      mixed, rows = attend(norm_1(x), bias)
      x = x + self._drop(mixed, index)
      x = x + self._drop(mlp(norm_2(x)), index)
    else:
      mixed, rows = attend(x, bias)
      x = norm_1(x + self._drop(mixed, index))
      x = norm_2(x + self._drop(mlp(x), index))
    if self.depth < config.num_layers:
      # A scan cannot stop early: the blocks that nobody wants hand their input on.
      x = jnp.where(index < self.depth, x, before)
    probe = self.probe
    return x, (
      None if probe.states is None else probe.states(x),
      None if probe.queries is None else probe.attention(rows(probe.queries)),
    )

  def _drop(self, branch: jax.Array, index: jax.Array | int) -> jax.Array:
    if not self.train:
      return branch
    if self.config.dropout:
      branch = dropout(branch, self.config.dropout, self.make_rng("dropout"))
    if not self.config.drop_path:
      return branch
    rate = self.config.drop_path * index / max(self.config.num_layers - 1, 1)
    shape = (branch.shape[0], *(1,) * (branch.ndim - 1))
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, shape)
    return jnp.where(keep, branch / (1.0 - rate), 0.0).astype(branch.dtype)


class Encoder(nn.Module):
  """A stack of blocks: parameters `layers/...` with a leading layer axis, or `layers_0/...`, ..."""

  config: EncoderConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    visible: jax.Array | None = None,
    *,
    depth: int | None = None,
    edit: Edit | None = None,
    inputs: PyTree = None,
    probe: Probe | None = None,
    train: bool = False,
  ) -> Encoded:
    """Runs the blocks.

    Args:
      x: (B, T, D).
      visible: bool, broadcast to (B, T, T); true where a query may look. None: everywhere.
      depth: how many blocks to run; None: all.
      edit: changes the hidden state before each block.
      inputs: pytree of arrays (L, ...), one slice for each call of `edit`.
      probe: what to keep of the layers.
      train: whether to drop; reads the rng stream "dropout".

    Returns:
      See `Encoded`, whose L is `depth`.
    """
    total = self.config.num_layers
    depth = total if depth is None else depth
    if not 0 <= depth <= total:
      raise ValueError(f"depth: must be in [0, {total}], got {depth}")
    probe = probe or Probe()
    if train and self.config.dropout:
      x = dropout(x, self.config.dropout, self.make_rng("dropout"))
    first = None if probe.states is None else probe.states(x)
    length = x.shape[1]
    visible = jnp.ones((1, 1, 1), bool) if visible is None else visible
    bias = masked_bias(jnp.broadcast_to(visible, (len(visible), length, length)))
    block: Callable = Block
    if self.config.remat:
      block = nn.remat(Block, prevent_cse=not self.config.scan_layers)
    if self.config.scan_layers:
      block = nn.scan(
        block,
        variable_axes={"params": 0, "adapter": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, 0, nn.broadcast),
        length=total,
      )
      layers = block(self.config, depth, train, edit, probe, name="layers")
      x, kept = layers(x, jnp.arange(total), inputs, bias)
      later, rows = jax.tree.map(lambda leaf: leaf[:depth], kept)
      return Encoded(
        x, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later), rows
      )
    states, attentions = [first], []
    # Parameters are made for every block, also for those that are not run.
    for i in range(total if self.is_initializing() else depth):
      layer = block(self.config, total, train, edit, probe, name=f"layers_{i}")
      x, (state, rows) = layer(x, i, jax.tree.map(lambda leaf, i=i: leaf[i], inputs), bias)
      states.append(state)
      attentions.append(rows)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if trees else None
    return Encoded(x, stack(states), stack(attentions))


def layer_norm(config: EncoderConfig, name: str | None = None) -> nn.LayerNorm:
  """The layer norm of an encoder; E[x^2] - E[x]^2 would cancel where the mean is large."""
  return nn.LayerNorm(config.epsilon, dtype=config.dtype, use_fast_variance=False, name=name)


def normalise(x: jax.Array) -> jax.Array:
  """Scales the last axis to length 1; a zero vector stays zero, and so does its gradient."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
