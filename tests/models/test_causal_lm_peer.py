"""What no golden file holds, against transformers itself where PyTorch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data.model_sources import load_causal_lm, save_causal_lm

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers")

SHAPE = {
  "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
  "initializer_range": 0.3, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
  "mistral_window": {"model_type": "mistral", "sliding_window": 4, "tie_word_embeddings": False},
  "qwen3_window": {
    "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 4,
    "max_window_layers": 1, "tie_word_embeddings": True,
  },
  "llama3_rope": {
    "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
    "rope_parameters": {
      "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
  },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_our_export_runs_there_with_the_same_logits(name, tmp_path):
  import json

  loaded = load_causal_lm(f"random:{json.dumps(SHAPE | CONFIGS[name])}", key=jax.random.key(1))
  save_causal_lm(tmp_path, loaded)
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32, attn_implementation="eager"
  )
  ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 12))
  mask = np.ones_like(ids)
  mask[1, :3] = 0
  with torch.no_grad():
    theirs = peer.eval()(
      input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
      position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
    ).logits.numpy()  # fmt: skip
  ours = jax.jit(lambda p: loaded.model.apply({"params": p}, jnp.array(ids), mask=mask).logits)(
    loaded.params
  )
  real = mask.astype(bool)
  np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], rtol=1e-4, atol=2e-4)
