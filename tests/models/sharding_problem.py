"""What test_sharding.py computes on one device and sharding_worker.py on eight."""

import jax
import jax.numpy as jnp
import optax

from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig, table

CONFIG = CausalLMConfig(
  vocab_size=32, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24,
  qkv_bias=True, qk_norm=True, init_std=0.3,
)  # fmt: skip
MODEL = CausalLM(CONFIG, scan_layers=True, remat=True)
TABLE = table(CONFIG)


def params():
  return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def batch():
  ids = jax.random.randint(jax.random.key(1), (8, 7), 0, CONFIG.vocab_size)
  return ids, jnp.arange(7) >= jnp.arange(8)[:, None] % 3  # left padding of 0 to 2 tokens


def step(params, batch):
  """Logits, loss and the parameters after one step of SGD."""
  ids, mask = batch

  def loss_of(params):
    logits = MODEL.apply({"params": params}, ids, mask=mask).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return losses.mean(where=mask[:, :-1]), logits

  (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
  return logits, loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
