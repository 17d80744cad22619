"""Low-rank updates of linear layers: LoRA and its relatives.

Notation of the papers: W (out, in) is a frozen weight, A (rank, in) and B (out, rank) are its factors.
Here `kernel` is W^T, `a` is A as it stands (so that its gradient is a fast matrix product: on a CPU
x^T t with a narrow t runs at an eighth of the speed), and `b` is B^T, (rank, out).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmethods.adapters.adapter import Adapter, Factors, Linear, Rule, on_linears
from jaxmethods.errors import InputError
from jaxmethods.models.init import torch_linear

Init = Callable[[jax.Array, Linear, str], dict[str, jax.Array]]


def lora(
  rank: int = 32, alpha: float = 64.0, dropout: float = 0.05, *, rank_stabilised: bool = False
) -> Adapter:
  """LoRA: y + s x A^T B^T with s = alpha / rank (Hu et al., arXiv 2106.09685).

  A starts as PyTorch's linear layers do, B at zero.

  Args:
    rank: of the update.
    alpha: numerator of its scale.
    dropout: on the input of the branch, while training.
    rank_stabilised: s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).

  >>> tree = jm.adapters.lora(rank=2, alpha=4).init(key, params, "kernel")
  >>> tree["dense_0"]["a"].shape, tree["dense_0"]["b"].shape
  ((2, 4), (2, 16))
  """
  kind = "rslora" if rank_stabilised else "lora"
  scale = _scale(kind, alpha, rank) * (math.sqrt(rank) if rank_stabilised else 1.0)

  def forward(f: Factors, x, linear, dense, drop):
    if jax.default_backend() == "cpu" and _worth_joining(x, linear):
      return _joined(drop, x, linear, f["a"].astype(x.dtype), (scale * f["b"]).astype(x.dtype))
    return dense(x) + low_rank(drop(x), f["a"], f["b"], scale)

  def merge(f: Factors, linear: Linear) -> Linear:
    return linear._replace(kernel=linear.kernel + scale * f["a"].T @ f["b"])

  settings = {"kind": kind, "rank": rank, "alpha": alpha, "dropout": dropout}
  return on_linears(Rule(_zero_start(kind, rank), forward, merge), dropout, **settings)


def rslora(rank: int = 32, alpha: float = 64.0, dropout: float = 0.05) -> Adapter:
  """LoRA with the scale alpha / sqrt(rank).

  >>> adapter = jm.adapters.rslora(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  76
  """
  return lora(rank, alpha, dropout, rank_stabilised=True)


def dora(rank: int = 32, alpha: float = 64.0, dropout: float = 0.05) -> Adapter:
  """DoRA: direction V = W + s B A and magnitude m apart, y = m x V^T / ||V|| + bias.

  Norms are over the inputs of each output, and constants in the gradient (Liu et al., arXiv 2402.09353,
  section 4.3). m starts as the norms of W. An output whose V is zero gives its bias.

  >>> adapter = jm.adapters.dora(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  94
  """
  scale = _scale("dora", alpha, rank)
  start = _zero_start("dora", rank)

  def init(key, linear, path):
    return start(key, linear, path) | {"magnitude": _norms(linear.kernel.astype(jnp.float32))}

  def direction(f: Factors, kernel: jax.Array) -> jax.Array:
    return kernel + scale * f["a"].T @ f["b"]

  def ratio(f: Factors, kernel: jax.Array) -> jax.Array:
    norms = jax.lax.stop_gradient(_norms(direction(f, kernel)))
    return jnp.where(norms > 0, f["magnitude"] / jnp.where(norms > 0, norms, 1), 0)

  def forward(f: Factors, x, linear, dense, drop):
    bias = 0 if linear.bias is None else linear.bias.astype(x.dtype)
    along = dense(x) - bias + low_rank(drop(x), f["a"], f["b"], scale)
    return along * ratio(f, linear.kernel).astype(x.dtype) + bias

  def merge(f: Factors, linear: Linear) -> Linear:
    return linear._replace(kernel=direction(f, linear.kernel) * ratio(f, linear.kernel))

  settings = {"kind": "dora", "rank": rank, "alpha": alpha, "dropout": dropout}
  return on_linears(Rule(init, forward, merge), dropout, **settings)


def vera(rank: int = 256, initial: float = 0.1, dropout: float = 0.0) -> Adapter:
  """VeRA: y + ((x A^T * d) B^T) * l, with A and B random, frozen and shared by all layers.

  Kopiczko et al., arXiv 2310.11454. Layers narrower than the widest take the leading rows and columns.

  Args:
    rank: of the projections.
    initial: value that d starts with; l starts at zero.
    dropout: on the input of the branch, while training.

  >>> adapter = jm.adapters.vera(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  22
  """
  _require_rank("vera", rank)

  def init(key, linear, path):
    _check_rank("vera", rank, linear, path)
    return {
      "scale_rank": jnp.full(rank, initial, jnp.float32),
      "scale_out": jnp.zeros(linear.kernel.shape[1], jnp.float32),
    }

  def shared(key, inputs, outputs):
    key_a, key_b = jax.random.split(key)
    # Kaiming-uniform with gain sqrt(2), fan-in being the second axis of A and of B (code of PEFT).
    uniform = lambda key, shape, fan_in: jax.random.uniform(
      key, shape, minval=-math.sqrt(6 / fan_in), maxval=math.sqrt(6 / fan_in)
    )
    return {
      "a": uniform(key_a, (rank, inputs), inputs),
      "b": uniform(key_b, (rank, outputs), rank),
    }

  def factors(f: Factors, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    return f["a"][:, :inputs] * f["scale_rank"][:, None], f["b"][:, :outputs] * f["scale_out"]

  def forward(f: Factors, x, linear, dense, drop):
    return dense(x) + low_rank(drop(x), *factors(f, *linear.kernel.shape))

  def merge(f: Factors, linear: Linear) -> Linear:
    a, b = factors(f, *linear.kernel.shape)
    return linear._replace(kernel=linear.kernel + a.T @ b)

  settings = {"kind": "vera", "rank": rank, "dropout": dropout}
  return on_linears(Rule(init, forward, merge, shared, frozenset({"a", "b"})), dropout, **settings)


def moslora(rank: int = 32, alpha: float = 64.0, dropout: float = 0.05) -> Adapter:
  """MoSLoRA: y + s x A^T M^T B^T with a trained mixer M (rank, rank) (Wu et al., arXiv 2406.11909).

  M starts as a random orthogonal matrix.

  >>> adapter = jm.adapters.moslora(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  84
  """
  scale = _scale("moslora", alpha, rank)
  start = _zero_start("moslora", rank)

  def init(key, linear, path):
    mixer = jax.nn.initializers.orthogonal()(jax.random.fold_in(key, 1), (rank, rank), jnp.float32)
    return start(key, linear, path) | {"mixer": mixer}

  def forward(f: Factors, x, linear, dense, drop):
    return dense(x) + low_rank(drop(x), f["a"], f["mixer"].T @ f["b"], scale)

  def merge(f: Factors, linear: Linear) -> Linear:
    return linear._replace(kernel=linear.kernel + scale * f["a"].T @ (f["mixer"].T @ f["b"]))

  settings = {"kind": "moslora", "rank": rank, "alpha": alpha, "dropout": dropout}
  return on_linears(Rule(init, forward, merge), dropout, **settings)


def pissa(rank: int = 32, alpha: float = 64.0, dropout: float = 0.05) -> Adapter:
  """PiSSA: train the `rank` largest singular components of W, freeze the rest (arXiv 2404.02948).

  >>> adapter = jm.adapters.pissa(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  76
  """
  return _singular("largest", rank, alpha, dropout)


def milora(rank: int = 32, alpha: float = 64.0, dropout: float = 0.05) -> Adapter:
  """MiLoRA: train the `rank` smallest singular components, freeze the rest (arXiv 2406.09044).

  >>> adapter = jm.adapters.milora(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  76
  """
  return _singular("smallest", rank, alpha, dropout)


def _singular(
  which: Literal["largest", "smallest"], rank: int, alpha: float, dropout: float
) -> Adapter:
  """LoRA on the residual W - s B_0 A_0, where s B_0 A_0 are singular components of W.

  The parameters of the model stay as they are: the start B_0 A_0 is kept beside them and subtracted on
  the way, so that any number of adapters share one model.
  """
  kind = {"largest": "pissa", "smallest": "milora"}[which]
  scale = _scale(kind, alpha, rank)

  def init(key, linear, path):
    _check_rank(kind, rank, linear, path)
    u, s, vt = jnp.linalg.svd(_at_least_float32(linear.kernel), full_matrices=False)
    part = slice(None, rank) if which == "largest" else slice(s.size - rank, None)
    root = jnp.sqrt(s[part] / scale)[:, None]
    a, b = root * u[:, part].T, root * vt[part]
    # Both pairs of arrays are the same: a donated tree must not hold one buffer twice.
    return {"a": a, "b": b, "start_a": jnp.copy(a), "start_b": jnp.copy(b)}

  def forward(f: Factors, x, linear, dense, drop):
    residual = dense(x) - low_rank(x, f["start_a"], f["start_b"], scale)
    return residual + low_rank(drop(x), f["a"], f["b"], scale)

  def merge(f: Factors, linear: Linear) -> Linear:
    update = f["a"].T @ f["b"] - f["start_a"].T @ f["start_b"]
    return linear._replace(kernel=linear.kernel + scale * update)

  settings = {"kind": kind, "rank": rank, "alpha": alpha, "dropout": dropout}
  frozen = frozenset({"start_a", "start_b"})
  return on_linears(Rule(init, forward, merge, None, frozen), dropout, **settings)


def adalora(rank: int = 12, dropout: float = 0.0) -> Adapter:
  """AdaLoRA: y + x Q^T diag(lam) P^T, ranks pruned in training (Zhang et al., arXiv 2303.10512).

  P (out, rank) and Q (rank, in) start normal with deviation 0.02 (code of PEFT), lam at zero; there is
  no scale. `jaxmethods.adapters.adalora` has the penalty, the scores and the pruning.
  """
  _require_rank("adalora", rank)

  def init(key, linear, path):
    _check_rank("adalora", rank, linear, path)
    inputs, outputs = linear.kernel.shape
    key_a, key_b = jax.random.split(key)
    return {
      "a": 0.02 * jax.random.normal(key_a, (rank, inputs)),
      "b": 0.02 * jax.random.normal(key_b, (rank, outputs)),
      "lam": jnp.zeros(rank),
    }

  def forward(f: Factors, x, linear, dense, drop):
    return dense(x) + low_rank(drop(x), f["a"], f["lam"][:, None] * f["b"])

  def merge(f: Factors, linear: Linear) -> Linear:
    return linear._replace(kernel=linear.kernel + f["a"].T @ (f["lam"][:, None] * f["b"]))

  settings = {"kind": "adalora", "rank": rank, "dropout": dropout}
  return on_linears(Rule(init, forward, merge), dropout, **settings)


def loramoe(
  rank: int = 32, alpha: float = 64.0, dropout: float = 0.05, experts: int = 4
) -> Adapter:
  """LoRAMoE: y + s sum_e softmax(x R^T)_e x A_e^T B_e^T (Dou et al., arXiv 2312.09979).

  The router R (experts, in) looks at the input, so nothing can be merged.

  >>> adapter = jm.adapters.loramoe(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  384
  """
  scale = _scale("loramoe", alpha, rank)
  start = _zero_start("loramoe", rank)

  def init(key, linear, path):
    each = jax.vmap(lambda key: start(key, linear, path))(jax.random.split(key, experts))
    return each | {"router": _router(key, experts, linear.kernel.shape[0])}

  def forward(f: Factors, x, linear, dense, drop):
    a, b = (f[name].astype(x.dtype) for name in ("a", "b"))
    gate = _gate(f, x) * scale
    inner = jnp.einsum("...i,eri->...er", drop(x), a) * gate[..., None]
    return dense(x) + jnp.einsum("...er,ero->...o", inner, b)

  settings = {
    "kind": "loramoe", "rank": rank, "alpha": alpha, "dropout": dropout, "experts": experts
  }  # fmt: skip
  return on_linears(Rule(init, forward, None), dropout, **settings)


def hydralora(
  rank: int = 32, alpha: float = 64.0, dropout: float = 0.05, experts: int = 4
) -> Adapter:
  """HydraLoRA: y + s sum_e softmax(x R^T)_e (x A^T) B_e^T: LoRAMoE with one A for all experts.

  Tian et al., arXiv 2404.19245. Nothing can be merged.

  >>> adapter = jm.adapters.hydralora(rank=2)
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "kernel"))
  264
  """
  scale = _scale("hydralora", alpha, rank)
  start = _zero_start("hydralora", rank)

  def init(key, linear, path):
    inputs, outputs = linear.kernel.shape
    return {
      "a": start(key, linear, path)["a"],
      "b": jnp.zeros((experts, rank, outputs), jnp.float32),
      "router": _router(key, experts, inputs),
    }

  def forward(f: Factors, x, linear, dense, drop):
    gate = _gate(f, x) * scale
    inner = jnp.einsum("...i,ri->...r", drop(x), f["a"].astype(x.dtype))
    inner = inner[..., None, :] * gate[..., None]
    return dense(x) + jnp.einsum("...er,ero->...o", inner, f["b"].astype(x.dtype))

  settings = {
    "kind": "hydralora", "rank": rank, "alpha": alpha, "dropout": dropout, "experts": experts
  }  # fmt: skip
  return on_linears(Rule(init, forward, None), dropout, **settings)


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: float = 1.0) -> jax.Array:
  """The update x A^T B^T, scaled, in the dtype of `x`.

  Args:
    x: (..., in).
    a: (rank, in).
    b: (rank, out).
    scale: multiplies the narrow product.

  Returns:
    (..., out).
  """
  return _product(x, a.astype(x.dtype), scale * b.astype(x.dtype))


@jax.custom_vjp
def _product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """The product x A^T B^T; in its backward pass the narrow factor of a sum over tokens comes first.

  Autodiff puts the output's cotangent first in the gradient of B. XLA on a CPU transposes the first
  factor, and computes all that was fused into it again, column by column.
  """
  return _product_forward(x, a, b)[0]


def _product_forward(x, a, b):
  inner = jnp.einsum("...i,ri->...r", x, a)
  return inner @ b, (x, a, b, inner)


def _product_backward(residuals, d_y):
  x, a, b, inner = residuals
  d_inner = jnp.einsum("...o,ro->...r", d_y, b)
  tokens = (tuple(range(x.ndim - 1)),) * 2
  return d_inner @ a, jnp.tensordot(d_inner, x, tokens), jnp.tensordot(inner, d_y, tokens)


_product.defvjp(_product_forward, _product_backward)


def _worth_joining(x: jax.Array, linear: Linear) -> bool:
  """Whether `_joined` saves more memory in the outputs than it takes for the kernel's copy."""
  inputs, outputs = linear.kernel.shape
  return outputs > inputs and x.size // inputs > inputs


def _joined(
  drop: Callable[[jax.Array], jax.Array], x: jax.Array, linear: Linear, a: jax.Array, b: jax.Array
) -> jax.Array:
  """The layer and its update as one product and the bias: [x, drop(x) A^T] [W^T; B^T].

  XLA on a CPU does not keep the sum of two products for the backward pass: it keeps both, and adds
  them up again wherever the sum is needed. Here the sum is a product itself, and what it costs, a copy
  of W^T, is gone after it (10 layers of width 256, MLP 688, 512 tokens: 152 instead of 179 MiB;
  no difference in time beyond the noise).
  """
  inner = jnp.einsum("...i,ri->...r", drop(x), a)
  y = _stacked_product(x, inner, linear.kernel.astype(x.dtype), b)
  return y if linear.bias is None else y + linear.bias.astype(x.dtype)


@jax.custom_vjp
def _stacked_product(x, inner, kernel, b):
  both = jnp.concatenate([x, inner], axis=-1)
  return both @ jnp.concatenate([kernel, b])


def _stacked_product_forward(x, inner, kernel, b):
  return _stacked_product(x, inner, kernel, b), (x, inner, kernel, b)


def _stacked_product_backward(residuals, d_y):
  # Factor by factor: the stacked kernel is not kept.
  x, inner, kernel, b = residuals
  d_x = jnp.einsum("...o,io->...i", d_y, kernel)
  d_inner = jnp.einsum("...o,ro->...r", d_y, b)
  tokens = (tuple(range(x.ndim - 1)),) * 2
  return d_x, d_inner, jnp.tensordot(x, d_y, tokens), jnp.tensordot(inner, d_y, tokens)


_stacked_product.defvjp(_stacked_product_forward, _stacked_product_backward)


def _router(key: jax.Array, experts: int, inputs: int) -> jax.Array:
  uniform = torch_linear(inputs)["kernel_init"]
  return uniform(jax.random.fold_in(key, 1), (experts, inputs), jnp.float32)


def _gate(f: Factors, x: jax.Array) -> jax.Array:
  """Shares of the experts (..., E), in the dtype of `x`."""
  scores = jnp.einsum("...i,ei->...e", x, f["router"].astype(x.dtype))
  return jax.nn.softmax(_at_least_float32(scores)).astype(x.dtype)


def _zero_start(kind: str, rank: int) -> Init:
  """A like PyTorch's linear layers, B zero."""

  def init(key: jax.Array, linear: Linear, path: str) -> dict[str, jax.Array]:
    if rank > min(linear.kernel.shape):  # wasteful, not wrong
      warnings.warn(_too_large(kind, rank, linear, path), stacklevel=2)
    inputs, outputs = linear.kernel.shape
    a = torch_linear(inputs)["kernel_init"](key, (rank, inputs), jnp.float32)
    return {"a": a, "b": jnp.zeros((rank, outputs), jnp.float32)}

  return init


def _scale(kind: str, alpha: float, rank: int) -> float:
  _require_rank(kind, rank)
  if not alpha > 0:
    raise InputError(f"{kind}: alpha must be positive, got {alpha}")
  return alpha / rank


def _require_rank(kind: str, rank: int) -> None:
  if rank < 1:
    raise InputError(f"{kind}: rank must be at least 1, got {rank}")


def _check_rank(kind: str, rank: int, linear: Linear, path: str) -> None:
  if rank > min(linear.kernel.shape):
    raise InputError(_too_large(kind, rank, linear, path))


def _too_large(kind: str, rank: int, linear: Linear, path: str) -> str:
  return f"{kind}: rank {rank} exceeds the kernel of {path}, {linear.kernel.shape}"


def _norms(kernel: jax.Array) -> jax.Array:
  """Norms over the inputs, (out,)."""
  return jnp.linalg.norm(kernel, axis=0)


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
