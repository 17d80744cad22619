"""Decoder-only language models of the Llama, Mistral, Qwen2 and Qwen3 families.

One block serves two forms: layers scanned (`scan_layers=True`: parameters stacked under "layers",
compile time constant in depth; for deep models and accelerators) or unrolled ("layers_0", ...; faster
for small models on CPU). Prompts are padded on the left. What a method wants to know about the layers
(`Probe`) is reduced inside the scan, so nothing of shape (layers, batch, tokens, width) is ever kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jaxmethods.models.attention import attention, attention_rows, masked_bias
from jaxmethods.models.causal_lm_config import CausalLMConfig
from jaxmethods.models.probe import Probe
from jaxmethods.models.weights import Rule, Table
from jaxmethods.stats.activations import swiglu
from jaxmethods.trees import PyTree


def table(
  config: CausalLMConfig,
  *,
  under: str = "",
  prefixes: tuple[str, ...] = ("model.",),
  heads: tuple[str, ...] = ("lm_head.weight",),
) -> Table:
  """Names of the parameters in Hugging Face checkpoints.

  Args:
    config: of the model; a tied head is another name of the embedding.
    under: our path of the language model inside a larger model, e.g. "language/".
    prefixes: what stands before "layers.0..." there; the first is written, the others read too.
    heads: names of the head, likewise.

  Returns:
    The rules.
  """

  def rule(theirs: str, ours: str, transposed: bool = False, others: tuple[str, ...] = ()) -> Rule:
    first, *rest = (prefix + theirs for prefix in prefixes)
    return Rule(first, under + ours, "transpose" if transposed else "as_is", (*rest, *others))

  linear = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
  }
  norms = {
    "input_layernorm": "norm_1",
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
    "post_attention_layernorm": "norm_2",
  }
  layer = "layers.{i}."
  rules = [rule("embed_tokens.weight", "embed/embedding", others=heads if config.tied else ())]
  for theirs, ours in linear.items():
    rules.append(rule(f"{layer}{theirs}.weight", f"layers/{ours}/kernel", transposed=True))
    rules.append(rule(f"{layer}{theirs}.bias", f"layers/{ours}/bias"))
  rules += [
    rule(f"{layer}{theirs}.weight", f"layers/{ours}/scale") for theirs, ours in norms.items()
  ]
  rules.append(rule("norm.weight", "norm/scale"))
  if not config.tied:
    rules.append(Rule(heads[0], f"{under}head/kernel", "transpose", heads[1:]))
  return rules


# Tensors of old checkpoints that are no parameters.
BUFFERS = ("*.rotary_emb.inv_freq",)


class Cache(NamedTuple):
  """Keys and values of the tokens so far, in slots that are allocated once.

  Attributes:
    keys, values: scanned: one array (L, B, K, S, d); unrolled: L arrays (1, B, K, S, d).
    valid: (B, S), slots that hold a token (not padding).
    length: (), slots filled in every row.
  """

  keys: PyTree
  values: PyTree
  valid: jax.Array
  length: jax.Array | int

  def repeated(self, n: int) -> Cache:
    """Every row n times, one after the other: continuations that share what came before."""
    each = functools.partial(jnp.repeat, repeats=n)
    keys, values = (
      jax.tree.map(lambda x: each(x, axis=1), part) for part in (self.keys, self.values)
    )
    return Cache(keys, values, each(self.valid, axis=0), self.length)


class Output(NamedTuple):
  """What a forward pass gives.

  Attributes:
    logits: (B, T, V), (B, 1, V) or None, as asked for.
    hidden: (B, T, D), after the final norm.
    cache: with these tokens added, if there was one or one was asked for.
    states: `Probe.states` of the embedding and of every block's output, stacked: (L + 1, ...).
    final: `Probe.states` of `hidden`: transformers gives this in place of the last of `states`.
    attention: `Probe.attention` of every layer, stacked: (L, ...).
    folded: `Probe.fold` over the embedding and every block's output.
  """

  logits: jax.Array | None
  hidden: jax.Array
  cache: Cache | None = None
  states: PyTree = None
  final: PyTree = None
  attention: PyTree = None
  folded: PyTree = None


class _Context(NamedTuple):
  """What all layers share in one forward pass.

  Attributes:
    cos, sin: (B, T, d / 2).
    bias: (B or 1, T, S).
    window_bias: the same for layers that slide, None if there are none.
    start: first slot of these tokens in the cache.
  """

  cos: jax.Array
  sin: jax.Array
  bias: jax.Array
  window_bias: jax.Array | None
  start: jax.Array | int


class Attention(nn.Module):
  """Rotary attention with grouped queries; Dense layers query, key, value, out.

  Attributes:
    config: shapes.
    dtype, param_dtype: as in `CausalLM`.
    fresh: the cache was empty: these tokens see only themselves, not all its slots.
  """

  config: CausalLMConfig
  dtype: DTypeLike
  param_dtype: DTypeLike
  fresh: bool

  @nn.compact
  def __call__(self, x, cache, index, bias, context: _Context):
    """Maps x (B, T, D) to ((B, T, D), cache, queries -> attention rows)."""
    c = self.config
    batch, length, width = x.shape

    def heads(name: str, count: int, rotated: bool) -> jax.Array:
      y = _dense(c, self, count * c.head_dim, name, c.qkv_bias)(x)
      y = y.reshape(batch, length, count, c.head_dim)
      if rotated and c.qk_norm:
        y = _norm(c, self, f"{name}_norm")(y)
      y = y.swapaxes(1, 2)
      return rotate(y, context.cos[:, None], context.sin[:, None]) if rotated else y

    query = heads("query", c.num_heads, True) * c.head_dim**-0.5
    query = query.reshape(batch, c.num_kv_heads, -1, length, c.head_dim)
    key = heads("key", c.num_kv_heads, True)
    value = heads("value", c.num_kv_heads, False)
    if cache is not None:
      place = (index, 0, 0, context.start, 0)
      cache = tuple(
        jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), place)
        for stack, new in zip(cache, (key, value), strict=True)
      )
      if not self.fresh:
        key, value = (
          jax.lax.dynamic_index_in_dim(stack, index, keepdims=False).astype(x.dtype)
          for stack in cache
        )
    mixed = attention(query, key, value, bias)
    mixed = mixed.reshape(batch, c.num_heads, length, c.head_dim).swapaxes(1, 2)
    out = _dense(c, self, width, "out", c.out_bias)(mixed.reshape(batch, length, -1))
    return out, cache, functools.partial(attention_rows, query, key, bias)


class MLP(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  config: CausalLMConfig
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    gate = _dense(c, self, c.mlp_width, "gate", c.mlp_bias)(x)
    up = _dense(c, self, c.mlp_width, "up", c.mlp_bias)(x)
    return _dense(c, self, x.shape[-1], "down", c.mlp_bias)(swiglu(gate, up))


class Block(nn.Module):
  """One pre-norm layer, with the signature that `nn.scan` wants."""

  config: CausalLMConfig
  dtype: DTypeLike
  param_dtype: DTypeLike
  fresh: bool
  probe: Probe

  @nn.compact
  def __call__(self, carry, layer, context: _Context):
    """Maps ((B, T, D), cache, fold) and (index in the cache, whether it slides) to these, a summary."""
    c, (x, cache, folded), (index, slides) = self.config, carry, layer
    bias = context.bias
    if context.window_bias is not None:
      bias = jnp.where(slides, context.window_bias, bias)
    common = (c, self.dtype, self.param_dtype)
    mixed, cache, rows = Attention(*common, self.fresh, name="attention")(
      _norm(c, self, "norm_1")(x), cache, index, bias, context
    )
    x = x + mixed
    x = x + MLP(*common, name="mlp")(_norm(c, self, "norm_2")(x))
    probe = self.probe
    summary = (
      None if probe.states is None else probe.states(x),
      None if probe.queries is None else probe.attention(rows(probe.queries)),
    )
    return (x, cache, None if probe.fold is None else probe.fold(folded, x)), summary


class CausalLM(nn.Module):
  """A decoder-only language model.

  Parameters: "embed", "layers" or "layers_0", ..., "norm", and "head" unless tied.

  Attributes:
    config: shapes.
    scan_layers: stacked parameters and `lax.scan`, or numbered ones and a loop.
    dtype: of the computation; scores, norms and rotations are float32 inside.
    param_dtype: of random parameters (imported ones keep theirs).
    remat: recompute every layer in the backward pass.

  >>> model = jm.models.CausalLM(tiny)
  >>> out, _ = jax.eval_shape(model.init_with_output, key, jnp.zeros((1, 5), int))
  >>> out.logits.shape
  (1, 5, 11)
  """

  config: CausalLMConfig
  scan_layers: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: bool = False

  def setup(self) -> None:
    c = self.config
    self.embed = nn.Embed(
      c.vocab_size, c.width, dtype=self.dtype, param_dtype=self.param_dtype,
      embedding_init=nn.initializers.normal(c.init_std),
    )  # fmt: skip
    self.norm = _norm(c, self, None)
    if not c.tied:
      self.head = _dense(c, self, c.vocab_size, None, False)

  @nn.compact
  def __call__(
    self,
    ids: jax.Array | None = None,
    *,
    embeddings: jax.Array | None = None,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
    cache_size: int | None = None,
    probe: Probe | None = None,
    logits: Literal["all", "last", "none"] = "all",
  ) -> Output:
    """Runs the model on the next tokens.

    Args:
      ids: (B, T) token ids, or None if `embeddings` are given.
      embeddings: (B, T, D), in place of the embedded ids (images among text).
      mask: (B, T), 0 at padding; default: no padding.
      positions: (B, T); default: counted over the tokens that are no padding, the cached ones too.
      segments: (B, T), numbers of the texts that are packed into a row: a token sees its own text
        only. Without a cache; positions should begin anew in every text.
      cache: of the tokens before these. It must have T free slots: that can only be checked here
        when its length is no traced value, `generate` always checks.
      cache_size: S, to begin a cache with these tokens.
      probe: what to keep of the layers.
      logits: of which positions. "last" is the last column, the newest token of left-padded rows.

    Returns:
      See `Output`. Values at padded positions mean nothing.

    Raises:
      ValueError: more tokens than the cache has slots.
    """
    if (ids is None) == (embeddings is None):
      raise ValueError("exactly one of ids and embeddings is needed")
    c, probe = self.config, probe or Probe()
    x = self.embed(ids) if embeddings is None else embeddings.astype(self.dtype)
    batch, length = x.shape[:2]
    fresh = cache is None
    if cache is None and cache_size is not None:
      cache = empty_cache(c, batch, cache_size, self.dtype, scan_layers=self.scan_layers)
    mask = jnp.ones((batch, length), bool) if mask is None else mask.astype(bool)
    if cache is not None:
      if segments is not None:
        raise ValueError("segments: packed rows have no cache")
      _check_room(cache, length)
    context, valid = self._context(mask, positions, segments, cache, fresh)
    states = [] if probe.states is None else [probe.states(x)]
    folded = None if probe.fold is None else probe.fold(None, x)

    block = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
    attributes = (c, self.dtype, self.param_dtype, fresh, probe)
    slides = [window is not None for window in c.windows] or [False] * c.num_layers
    slots: PyTree = None if cache is None else (cache.keys, cache.values)
    if self.scan_layers:
      scanned = nn.scan(
        block,
        variable_axes={"params": 0, "adapter": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=c.num_layers,
      )
      layers = scanned(*attributes, name="layers")
      each = (jnp.arange(c.num_layers), jnp.array(slides))
      (x, slots, folded), (later, rows) = layers((x, slots, folded), each, context)
      states = [jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), s, later) for s in states]
    else:
      summaries, used = [], []
      for i in range(c.num_layers):
        slot = None if slots is None else (slots[0][i], slots[1][i])
        layer = block(*attributes, name=f"layers_{i}")
        (x, slot, folded), summary = layer((x, slot, folded), (0, slides[i]), context)
        used.append(slot)
        summaries.append(summary)
      later, rows = zip(*summaries, strict=True)
      stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
      states = [stack([s, *later]) for s in states]
      rows = None if probe.queries is None else stack(rows)
      slots = None if slots is None else tuple(zip(*used, strict=True))

    x = self.norm(x)
    if cache is not None:
      cache = Cache(slots[0], slots[1], valid, jnp.asarray(cache.length + length, jnp.int32))
    return Output(
      None if logits == "none" else self.logits(x[:, -1:] if logits == "last" else x),
      x,
      cache,
      states[0] if states else None,
      None if probe.states is None else probe.states(x),
      rows,
      folded,
    )

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) of hidden states (..., D) that are normed."""
    return self.embed.attend(hidden) if self.config.tied else self.head(hidden)

  def embed_tokens(self, ids: jax.Array) -> jax.Array:
    """Embeddings (B, T, D) of ids (B, T), to be mixed with others."""
    return self.embed(ids)

  def _context(self, mask, positions, segments, cache, fresh) -> tuple[_Context, jax.Array]:
    """Rotations and masks of tokens with mask (B, T), and which slots are valid with them."""
    length = mask.shape[1]
    start: jax.Array | int = 0 if fresh else cache.length
    before = jnp.zeros((len(mask), 1), int) if fresh else cache.valid.sum(1, keepdims=True)
    if positions is None:
      positions = jnp.maximum(before + jnp.cumsum(mask, axis=1) - 1, 0)
    valid = mask if cache is None else jax.lax.dynamic_update_slice(cache.valid, mask, (0, start))
    keys = mask if fresh else valid
    query_slot = (start + jnp.arange(length))[:, None]
    key_slot = jnp.arange(keys.shape[1])
    seen = keys[:, None] & (key_slot <= query_slot)
    if segments is not None:
      seen &= segments[:, :, None] == segments[:, None]
    window_bias = None
    if window := next(filter(None, self.config.windows), None):
      window_bias = masked_bias(seen & (query_slot - key_slot < window))
    cos, sin = self.config.rope.angles(positions, self.config.head_dim)
    return _Context(cos, sin, masked_bias(seen), window_bias, start), valid


def empty_cache(
  config: CausalLMConfig, batch: int, size: int, dtype: DTypeLike, *, scan_layers: bool
) -> Cache:
  """A cache of `size` slots for `batch` rows."""
  shape = (batch, config.num_kv_heads, size, config.head_dim)

  def zeros() -> PyTree:
    if scan_layers:
      return jnp.zeros((config.num_layers, *shape), dtype)
    return tuple(jnp.zeros((1, *shape), dtype) for _ in range(config.num_layers))

  return Cache(zeros(), zeros(), jnp.zeros((batch, size), bool), 0)


def prefix_cache(
  prefix: Mapping[str, jax.Array],
  config: CausalLMConfig,
  batch: int,
  room: int,
  dtype: DTypeLike = jnp.float32,
  *,
  scan_layers: bool,
) -> Cache:
  """Begins a cache with learned keys and values: `model.apply(variables, ids, cache=...)` sees them.

  Every layer sees its own prefix, unrotated, from every query. Positions are counted on from the
  length of the prefix, as PEFT does, unless they are given.

  Args:
    prefix: {"keys", "values"}, (L, K, length, d) each; see `adapters.prompts.init_prefix`.
    config: shape of the model.
    batch: number of rows, B.
    room: slots for the tokens to come.
    dtype: type of the computation.
    scan_layers: form of the model.
  """
  length = prefix["keys"].shape[2]
  cache = empty_cache(config, batch, length + room, dtype, scan_layers=scan_layers)

  def fill(slots: jax.Array, learned: jax.Array) -> jax.Array:
    return slots.at[..., :length, :].set(learned[:, None].astype(dtype))

  def filled(slots: Any, learned: jax.Array) -> Any:
    if scan_layers:
      return fill(slots, learned)
    return tuple(fill(slot, learned[i : i + 1]) for i, slot in enumerate(slots))

  return Cache(
    filled(cache.keys, prefix["keys"]),
    filled(cache.values, prefix["values"]),
    cache.valid.at[:, :length].set(True),
    length,
  )


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the halves of the last axis (..., d) against each other by angles (..., d / 2)."""
  full = x.astype(jnp.float32)
  turned = full * jnp.concatenate([cos, cos], -1) + _quarter(full) * jnp.concatenate([sin, sin], -1)
  return turned.astype(x.dtype)


def _quarter(x: jax.Array) -> jax.Array:
  """The halves (a, b) of the last axis of (..., T, d) as (-b, a): a rotation by a quarter."""
  if jax.default_backend() == "cpu" and x.shape[-2] > 1:
    # A product with a signed permutation, which is exact: XLA on a CPU computes what it fuses with a
    # concatenation number by number, forwards and backwards. For one token it does not matter.
    turn = np.kron([[0, 1], [-1, 0]], np.eye(x.shape[-1] // 2)).astype(x.dtype)
    return jnp.matmul(x, turn)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([-second, first], axis=-1)


def _check_room(cache: Cache, length: int) -> None:
  size = cache.valid.shape[1]
  used = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
  if used + length > size:
    raise ValueError(f"a sequence of {used + length} tokens is longer than the cache of {size}")


class _Typed(Protocol):
  """A module that says what its layers compute and keep."""

  dtype: DTypeLike
  param_dtype: DTypeLike


def _dense(c: CausalLMConfig, module: _Typed, width: int, name: str | None, bias: bool) -> nn.Dense:
  return nn.Dense(
    width,
    use_bias=bias,
    dtype=module.dtype,
    param_dtype=module.param_dtype,
    kernel_init=nn.initializers.normal(c.init_std),
    name=name,
  )


def _norm(c: CausalLMConfig, module: _Typed, name: str | None) -> nn.RMSNorm:
  return nn.RMSNorm(c.norm_eps, dtype=module.dtype, param_dtype=module.param_dtype, name=name)
