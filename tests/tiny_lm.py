"""The language model of the golden file: pre-LN blocks, learned positions, an untied head."""

import jax
import jax.numpy as jnp


def logits_of(params, embedded, heads):
  """Logits (S, V) of one embedded sequence (S, D), positions not yet added."""
  h = embedded + params["wpe"][: len(embedded)]
  layer = 0
  while f"{layer}.wqkv" in params:
    own = {k.partition(".")[2]: v for k, v in params.items() if k.startswith(f"{layer}.")}
    h = block(own, h, heads)
    layer += 1
  return norm(h, params["lnf_g"], params["lnf_b"]) @ params["head"]


def apply(params, ids, heads):
  """Logits (B, S, V) of token ids (B, S)."""
  return jax.vmap(lambda row: logits_of(params, params["wte"][row], heads))(ids)


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
