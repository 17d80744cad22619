"""The transformer encoder behind ViT, both towers of CLIP and BERT.

One block serves two forms: scanned (deep, TPU/GPU: compile time is constant in depth) and unrolled
(shallow, CPU). Whatever a method wants to know about the layers it computes inside them, with a
`Summarize` hook; an (layers, batch, tokens, width) array never leaves the encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmethods.errors import InputError, nearest
from jaxmethods.stats.activations import gelu
from jaxmethods.stats.dropout import dropout

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_new": nn.gelu,
  "gelu_pytorch_tanh": nn.gelu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "relu": nn.relu,
  "silu": nn.silu,
}

# (hidden state after a block (B, T, D), its attention weights (B, H, T, T)) -> any pytree.
Summarize = Callable[[jax.Array, jax.Array], Any]
# (hidden state before a block, this block's slice of `inputs`) -> hidden state, such as one with
# this layer's prompts put in.
Edit = Callable[[jax.Array, Any], jax.Array]


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
  scan_layers: bool = False
  remat: bool = False
  dtype: jnp.dtype | None = None

  def __post_init__(self) -> None:
    for name in ("width", "num_layers", "heads", "hidden"):
      if getattr(self, name) < 1:
        raise InputError(f"{name}: must be at least 1, got {getattr(self, name)}")
    if self.width % self.heads:
      raise InputError(f"width: must be a multiple of {self.heads} heads, got {self.width}")
    if self.activation not in ACTIVATIONS:
      near = nearest(self.activation, ACTIVATIONS)
      raise InputError(f"activation: {self.activation!r} is not known, the nearest is {near!r}")
    if not 0 <= self.drop_path < 1:
      raise InputError(f"drop_path: must be in [0, 1), got {self.drop_path}")


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, heads: int, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Multi-head scaled dot-product attention; its softmax is float32 in every dtype.

  Args:
    query: (B, T, D).
    key: (B, S, D).
    value: (B, S, D).
    heads: H.
    mask: bool, broadcast to (B, H, T, S); true where a query may look.

  Returns:
    The mixed values (B, T, D) and the weights (B, H, T, S).
  """
  query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
  scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  weights = jax.nn.softmax(scores).astype(value.dtype)
  mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
  return mixed.reshape(*mixed.shape[:2], -1), weights


class EncoderBlock(nn.Module):
  """Attention and MLP with residual sums; see `Encoder` for the arguments."""

  config: EncoderConfig
  depth: int
  train: bool
  edit: Edit | None
  summarize: Summarize | None

  @nn.compact
  def __call__(
    self, x: jax.Array, index: jax.Array | int, inputs: Any, mask: jax.Array | None
  ) -> tuple[jax.Array, Any]:
    """The hidden state (B, T, D) after block `index`, and its summary."""
    before = x
    if self.edit is not None:
      x = self.edit(x, inputs)
    weights: jax.Array
    if self.config.norm == "pre":
      mixed, weights = self._attend(self._norm("norm_1", x), mask)
      x = x + self._drop_path(mixed, index)
      x = x + self._drop_path(self._mlp(self._norm("norm_2", x)), index)
    else:
      mixed, weights = self._attend(x, mask)
      x = self._norm("norm_1", x + self._drop_path(mixed, index))
      x = self._norm("norm_2", x + self._drop_path(self._mlp(x), index))
    if self.depth < self.config.num_layers:
      # A scan cannot stop early: the blocks that nobody wants hand their input on.
      x = jnp.where(index < self.depth, x, before)
    return x, None if self.summarize is None else self.summarize(x, weights)

  def _dense(self, name: str, width: int) -> nn.Dense:
    return nn.Dense(width, dtype=self.config.dtype, name=name)

  def _norm(self, name: str, x: jax.Array) -> jax.Array:
    return layer_norm(self.config, name)(x)

  def _attend(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    width = self.config.width
    query, key, value = (self._dense(name, width)(x) for name in ("query", "key", "value"))
    mixed, weights = attention(query, key, value, self.config.heads, mask)
    return self._dense("out", width)(mixed), weights

  def _mlp(self, x: jax.Array) -> jax.Array:
    x = ACTIVATIONS[self.config.activation](self._dense("fc_1", self.config.hidden)(x))
    return self._dense("fc_2", self.config.width)(x)

  def _drop_path(self, branch: jax.Array, index: jax.Array | int) -> jax.Array:
    if not self.train or self.config.drop_path == 0.0:
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
    mask: jax.Array | None = None,
    *,
    depth: int | None = None,
    edit: Edit | None = None,
    inputs: Any = None,
    summarize: Summarize | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, Any]:
    """Runs the blocks.

    Args:
      x: (B, T, D).
      mask: bool, broadcast to (B, H, T, T); true where a query may look.
      depth: how many blocks to run; None: all.
      edit: changes the hidden state before each block.
      inputs: pytree of arrays (L, ...), one slice for each call of `edit`.
      summarize: what to keep of each block.
      train: whether to drop paths; reads the rng stream "dropout".

    Returns:
      The hidden state (B, T, D) and the summaries, stacked on a leading axis of `depth`.
    """
    total = self.config.num_layers
    depth = total if depth is None else depth
    if not 0 <= depth <= total:
      raise ValueError(f"depth: must be in [0, {total}], got {depth}")
    block: Any = EncoderBlock
    if self.config.remat:
      block = nn.remat(EncoderBlock, prevent_cse=not self.config.scan_layers)
    if self.config.scan_layers:
      block = nn.scan(
        block,
        variable_axes={"params": 0, "adapter": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, 0, nn.broadcast),
        length=total,
      )
      layers = block(self.config, depth, train, edit, summarize, name="layers")
      x, summaries = layers(x, jnp.arange(total), inputs, mask)
      return x, jax.tree.map(lambda s: s[:depth], summaries)
    kept = []
    # Parameters are made for every block, also for those that are not run.
    for i in range(total if self.is_initializing() else depth):
      layer = block(self.config, total, train, edit, summarize, name=f"layers_{i}")
      x, summary = layer(x, i, jax.tree.map(lambda a, i=i: a[i], inputs), mask)
      kept.append(summary)
    return x, jax.tree.map(lambda *s: jnp.stack(s), *kept[:depth]) if kept[:depth] else None


def layer_norm(config: EncoderConfig, name: str | None = None) -> nn.LayerNorm:
  """The layer norm of an encoder; E[x^2] - E[x]^2 would cancel where the mean is large."""
  return nn.LayerNorm(config.epsilon, dtype=config.dtype, use_fast_variance=False, name=name)


def mean_of_tokens(mask: jax.Array | None = None) -> Summarize:
  """A hook: the mean hidden state (B, D) over the tokens that `mask` (B, T) keeps, default all."""
  return lambda hidden, weights: masked_mean(hidden, mask)


def attention_rows(queries: jax.Array) -> Summarize:
  """A hook: the weights (B, H, T) with which one query per example, `queries` (B,), looks around."""
  return lambda hidden, weights: jnp.take_along_axis(
    weights, queries[:, None, None, None], axis=2
  ).squeeze(2)


def masked_mean(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Mean (B, D) of the rows of (B, T, D) that `mask` (B, T) keeps, 0 where it keeps none."""
  if mask is None:
    return hidden.mean(1)
  kept = mask[..., None]
  return jnp.where(kept, hidden, 0).sum(1) / jnp.maximum(kept.sum(1), 1)


def normalise(x: jax.Array) -> jax.Array:
  """Scales the last axis to length 1; a zero vector stays zero, and so does its gradient."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
