"""The small LM that DP-SGD is timed on, in JAX alone: our side and jax-privacy take the same functions.

Pre-LN blocks, learned positions, an untied head; `llm_safety_peers.torch_lm` is its twin.
"""

import jax
import jax.numpy as jnp
import numpy as np


def logits_of(params, embedded, heads):
  """Logits (S, V) of one embedded sequence (S, D), positions not yet added."""
  h = embedded + params["wpe"][: len(embedded)]
  layer = 0
  while f"{layer}.wqkv" in params:
    own = {k.partition(".")[2]: v for k, v in params.items() if k.startswith(f"{layer}.")}
    h = block(own, h, heads)
    layer += 1
  return norm(h, params["lnf_g"], params["lnf_b"]) @ params["head"]


def block(p, h, heads):
  a = norm(h, p["ln1_g"], p["ln1_b"]) @ p["wqkv"]
  q, k, v = (x.reshape(len(h), heads, -1) for x in jnp.split(a, 3, axis=-1))
  scores = jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(q.shape[-1])
  seen = jnp.tril(jnp.ones((len(h), len(h)), bool))
  attention = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
  h += jnp.einsum("hqk,khd->qhd", attention, v).reshape(h.shape) @ p["wo"]
  hidden = jax.nn.gelu(norm(h, p["ln2_g"], p["ln2_b"]) @ p["w1"] + p["b1"], approximate=True)
  return h + hidden @ p["w2"] + p["b2"]


def norm(x, scale, shift):
  centred = x - x.mean(-1, keepdims=True)
  return centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift


def drawn(shape, seed=0):
  """Random parameters for the sizes {"V", "T", "D", "L", "FF"}."""
  width, hidden, draw = shape["D"], shape["FF"], np.random.default_rng(seed)
  normal = lambda *size: jnp.asarray(draw.normal(0, 0.02, size), jnp.float32)
  params = {"wte": normal(shape["V"], width), "wpe": normal(shape["T"], width)}
  params["head"] = normal(width, shape["V"])
  for i in range(shape["L"]):
    sizes = {"wqkv": (width, 3 * width), "wo": (width, width), "w1": (width, hidden)}
    params |= {f"{i}.{name}": normal(*size) for name, size in sizes.items()}
    params |= {f"{i}.w2": normal(hidden, width), f"{i}.b1": jnp.zeros(hidden)}
    params |= {f"{i}.{name}": jnp.zeros(width) for name in ("b2", "ln1_b", "ln2_b")}
    params |= {f"{i}.{name}": jnp.ones(width) for name in ("ln1_g", "ln2_g")}
  return params | {"lnf_g": jnp.ones(width), "lnf_b": jnp.zeros(width)}


def texts(shape, count, seed=1):
  """Random token ids (count, T)."""
  return np.random.default_rng(seed).integers(0, shape["V"], (count, shape["T"]))


def mean_nll(params, row, heads):
  """Mean -log p of the tokens of one row (S,) after the first."""
  log_p = jax.nn.log_softmax(logits_of(params, params["wte"][row], heads)[:-1])
  return -jnp.take_along_axis(log_p, row[1:, None], 1).mean()
