"""Denoiser of motion diffusion: frames of one or two bodies attend to themselves and to another.

The network of InterGen (Liang et al., 2023) as in its published code, with the other stream chosen by
the task: the second person, or tokens of an object or a scene (inferred).
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmethods.models.attention import masked_bias
from jaxmethods.models.transformer import MLP, Attention


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
  """Sines and cosines in turn, of wavelengths up to 10000 * 2 pi: (...) -> (..., width), width even."""
  frequency = 10000.0 ** (-jnp.arange(0, width, 2) / width)
  angle = positions[..., None] * frequency
  return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, width)


class AdaptiveNorm(nn.Module):
  """LN(h) (1 + scale) + shift, both linear in SiLU(e) and zero at the start."""

  @nn.compact
  def __call__(self, h: jax.Array, e: jax.Array) -> jax.Array:
    """Maps h (B, T, D) and the embedding e (B, D) of step and condition to (B, T, D)."""
    zeros = nn.initializers.zeros
    both = nn.Dense(2 * h.shape[-1], kernel_init=zeros, name="modulation")(nn.silu(e))
    scale, shift = jnp.split(both[:, None], 2, axis=-1)
    plain = nn.LayerNorm(1e-6, use_bias=False, use_scale=False, use_fast_variance=False)
    return plain(h) * (1 + scale) + shift


class DenoiserBlock(nn.Module):
  """Attention to oneself, attention to the other, MLP; each after an `AdaptiveNorm`."""

  heads: int
  hidden: int
  drop_rate: float = 0.0

  @nn.compact
  def __call__(
    self, h: jax.Array, other: jax.Array, e: jax.Array, bias: jax.Array, other_bias: jax.Array
  ) -> jax.Array:
    """Maps h (B, T, D) beside other (B, S, D) to (B, T, D); e as in `AdaptiveNorm`."""
    norm = lambda name, x: AdaptiveNorm(name=name)(x, e)
    rate = self.drop_rate
    attend = lambda name: Attention(self.heads, zero_token=True, drop_rate=rate, name=name)
    h = h + attend("attention")(norm("norm_1", h), bias)[0]
    memory = norm("other_norm", other)
    h = h + attend("cross_attention")(norm("norm_2", h), other_bias, memory)[0]
    mlp = MLP(self.hidden, last_init=nn.initializers.zeros, drop_rate=rate, name="mlp")
    return h + mlp(norm("norm_3", h))


class Denoiser(nn.Module):
  """Predicts the clean motion from a noisy one; its output is 0 at the start.

  With two bodies each is the other's other, and all layers have one set of weights for both: swapping
  the bodies swaps the outputs.

  Attributes:
    width: D, even.
    num_layers: number of blocks.
    heads: of the attention.
    hidden: width of the MLPs.
    ordered: whether the tokens of `other` are frames, which have positions, or points, which have none.
    dropout: rate on the weights of the attention and inside the MLPs, in training.

  >>> model = jm.models.Denoiser(width=8, num_layers=1, heads=2, hidden=16)
  >>> two_bodies = jnp.ones((1, 5, 2, 6))
  >>> model.init_with_output(key, two_bodies, jnp.zeros(1, int))[0].shape
  (1, 5, 2, 6)
  """

  width: int
  num_layers: int
  heads: int
  hidden: int
  ordered: bool = True
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    condition: jax.Array | None = None,
    mask: jax.Array | None = None,
    other: jax.Array | None = None,
    other_mask: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Denoises.

    Args:
      x: noisy motion (B, T, E, F) of E bodies, 1 or 2.
      t: diffusion step (B,), counted in the steps of training.
      condition: (B, C); None: unconditional, as a `condition` whose embedding was dropped.
      mask: (B, T), nonzero at real frames; None: all.
      other: what a single body attends to, (B, S, G); not for two.
      other_mask: (B, S), nonzero at real tokens; None: all.
      train: whether to drop; reads the rng stream "dropout".

    Returns:
      (B, T, E, F), without meaning at frames outside `mask`.
    """
    chex.assert_rank(x, 4)
    batch, frames, bodies, features = x.shape
    if bodies not in (1, 2) or (bodies == 1) == (other is None):
      raise ValueError("a denoiser needs two bodies, or one body and the tokens of its other")
    step = nn.Dense(self.width, name="time_1")(sinusoids(t, self.width))
    e = nn.Dense(self.width, name="time_2")(nn.silu(step))
    if condition is not None:
      e = e + nn.Dense(self.width, name="condition")(condition)
    embed = nn.Dense(self.width, name="embed")
    place = sinusoids(jnp.arange(frames), self.width)
    # Bodies are rows of the batch: all of the first, then all of the second.
    h = embed(jnp.moveaxis(x, 2, 0).reshape(bodies * batch, frames, features)) + place
    e = jnp.concatenate([e] * bodies)
    bias = jnp.concatenate([_key_bias(mask, batch, frames, frames)] * bodies)
    if other is None:
      other_bias = bias
    else:
      chex.assert_rank(other, 3)
      tokens = other.shape[1]
      fixed = nn.Dense(self.width, name="other")(other)
      if self.ordered:
        fixed = fixed + sinusoids(jnp.arange(tokens), self.width)
      other_bias = _key_bias(other_mask, batch, frames, tokens)
    rate = self.dropout if train else 0.0
    for i in range(self.num_layers):
      block = DenoiserBlock(self.heads, self.hidden, rate, name=f"layers_{i}")
      # Both bodies look at the other's state of the layer before.
      seen = fixed if other is not None else jnp.roll(h, batch, axis=0)
      h = block(h, seen, e, bias, other_bias)
    out = nn.Dense(features, kernel_init=nn.initializers.zeros, name="out")(h)
    return jnp.moveaxis(out.reshape(bodies, batch, frames, features), 0, 2)


def _key_bias(mask: jax.Array | None, batch: int, queries: int, keys: int) -> jax.Array:
  visible = jnp.ones((batch, keys), bool) if mask is None else mask.astype(bool)
  return masked_bias(jnp.broadcast_to(visible[:, None], (batch, queries, keys)))
