"""A GPT small enough to train in seconds: pre-LN blocks, learned positions, an untied head.

Plain functions over a flat dict of parameters, so that a method can put a change in at a layer (ROME),
read what stands between layers (RMU, spectral filters), or feed mixtures of embeddings (GCG). Padding
stands at the end: attention is causal, so it never changes what comes before it.

Parameters: wte (V, D), wpe (T, D), "0.wqkv" (D, 3D), "0.wo" (D, D), "0.w1" (D, F), "0.b1", "0.w2"
(F, D), "0.b2", "0.ln1_g", "0.ln1_b", "0.ln2_g", "0.ln2_b", ..., lnf_g, lnf_b, head (D, V).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.trees import Key, Params

_EPSILON = 1e-5  # of the layer norms


class Shape(NamedTuple):
  """Sizes of a model: V, T, D, number of blocks and heads, F."""

  vocabulary: int
  context: int
  width: int
  layers: int
  heads: int
  hidden: int


class Nudge(NamedTuple):
  """A change of what one MLP puts out.

  Attributes:
    layer: of the MLP.
    where: tokens that it is added to, (B, S).
    change: d, (D,).
  """

  layer: int
  where: Bool[Array, "B S"]
  change: Float[Array, " D"]


class Seen(NamedTuple):
  """What a pass computes; what nobody takes is not computed under jit.

  Attributes:
    logits: (B, S, V), position t speaks of token t + 1.
    hidden: output of every block, (B, S, D) each.
    keys: input of every second MLP matrix, (B, S, F) each.
    values: its output, (B, S, D) each, without a nudge.
  """

  logits: Float[Array, "B S V"]
  hidden: tuple[Float[Array, "B S D"], ...]
  keys: tuple[Float[Array, "B S F"], ...]
  values: tuple[Float[Array, "B S D"], ...]


def init(key: Key, shape: Shape) -> Params:
  """Draws weights N(0, 0.02^2); those that write into the stream are scaled by 1 / sqrt(2 layers)."""
  v, t, d, layers, heads, f = shape
  if d % heads:
    raise ValueError(f"width: must be a multiple of the {heads} heads, got {d}")
  sizes = {"wte": (v, d), "wpe": (t, d), "head": (d, v)}
  params: dict[str, Array] = {"lnf_g": jnp.ones(d), "lnf_b": jnp.zeros(d)}
  for i in range(layers):
    sizes |= {f"{i}.wqkv": (d, 3 * d), f"{i}.wo": (d, d), f"{i}.w1": (d, f), f"{i}.w2": (f, d)}
    params |= {f"{i}.b1": jnp.zeros(f), f"{i}.b2": jnp.zeros(d)}
    params |= {f"{i}.{norm}_g": jnp.ones(d) for norm in ("ln1", "ln2")}
    params |= {f"{i}.{norm}_b": jnp.zeros(d) for norm in ("ln1", "ln2")}
  for one, (name, size) in zip(jax.random.split(key, len(sizes)), sizes.items(), strict=True):
    writes = name.endswith((".wo", ".w2"))
    scale = 0.02 / (2 * layers) ** 0.5 if writes else 0.02
    params[name] = scale * jax.random.normal(one, size)
  return params


def num_layers(params: Params) -> int:
  """Counts the blocks."""
  return sum(name.endswith(".wqkv") for name in params)


def read(params: Params, ids: Int[Array, "B S"], heads: int, nudge: Nudge | None = None) -> Seen:
  """Reads token ids."""
  return read_embedded(params, params["wte"][ids], heads, nudge)


def read_embedded(
  params: Params, embedded: Float[Array, "B S D"], heads: int, nudge: Nudge | None = None
) -> Seen:
  """Reads embedded tokens, positions not yet added."""
  length, context = embedded.shape[-2], len(params["wpe"])
  if length > context:
    raise ValueError(f"ids: expected at most {context} tokens, got {length}")
  h = embedded + params["wpe"][:length]
  hidden, keys, values = [], [], []
  for i in range(num_layers(params)):
    own = {k.partition(".")[2]: v for k, v in params.items() if k.startswith(f"{i}.")}
    h += _attend(own, _norm(h, own["ln1_g"], own["ln1_b"]), heads)
    before = _norm(h, own["ln2_g"], own["ln2_b"]) @ own["w1"] + own["b1"]
    keys.append(jax.nn.gelu(before, approximate=True))
    values.append(keys[-1] @ own["w2"] + own["b2"])
    h += values[-1]
    if nudge is not None and nudge.layer == i:
      h += nudge.where[..., None] * nudge.change
    hidden.append(h)
  logits = _norm(h, params["lnf_g"], params["lnf_b"]) @ params["head"]
  return Seen(logits, tuple(hidden), tuple(keys), tuple(values))


def _attend(own: Params, x: Float[Array, "B S D"], heads: int) -> Float[Array, "B S D"]:
  length = x.shape[-2]
  split = lambda part: part.reshape(*part.shape[:-1], heads, -1)
  q, k, v = map(split, jnp.split(x @ own["wqkv"], 3, axis=-1))
  scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / jnp.sqrt(q.shape[-1])
  seen = jnp.tril(jnp.ones((length, length), bool))
  attention = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
  mixed = jnp.einsum("...hqk,...khd->...qhd", attention, v)
  return mixed.reshape(x.shape) @ own["wo"]


def _norm(x: Array, scale: Array, shift: Array) -> Array:
  centred = x - x.mean(-1, keepdims=True)
  return centred / jnp.sqrt(x.var(-1, keepdims=True) + _EPSILON) * scale + shift
