"""A two-layer causal LM, its batches, and an adapter that has seen some training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.adapters import low_rank
from jaxmethods.adapters.targets import BLOCK
from jaxmethods.adapters.training import IGNORED, next_token_loss, update_step
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig

CONFIG = CausalLMConfig(
  vocab_size=40, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24
)
ADAPTER = low_rank.lora(4, 8.0, dropout=0.0)


def model(**options):
  return CausalLM(CONFIG, **{"scan_layers": True, **options})


def batch(size=8, length=10, seed=0):
  """Ids with left padding, and labels of which some do not count."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, CONFIG.vocab_size, (size, length))
  mask = np.arange(length) >= rng.integers(0, 4, (size, 1))
  prompt = np.arange(length) < rng.integers(3, 7, (size, 1))
  labels = np.where(mask & ~prompt, ids, IGNORED)
  return {name: jnp.asarray(x) for name, x in (("ids", ids), ("mask", mask), ("labels", labels))}


def start(lm, adapter=ADAPTER, targets=BLOCK):
  """(params, adapter tree)."""
  params = jax.jit(lm.init)(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
  return params, jax.jit(adapter.init, static_argnums=2)(jax.random.key(1), params, targets)


def optimiser():
  return optax.adamw(1e-2, weight_decay=0.0)


def step(lm, adapter=ADAPTER, accumulate=1):
  return update_step(adapter, next_token_loss(adapter, lm), optimiser(), accumulate=accumulate)
