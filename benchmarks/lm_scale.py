"""What depth and size cost before any weight is read: compile time of 4 and 32 layers, plans for 7B.

Nothing is allocated for the 7B model: it is traced and lowered with abstract arrays.

  python -m benchmarks.lm_scale
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.models.sharding import bytes_per_device

RESULTS = Path(__file__).parent / "results"
SMALL = CausalLMConfig(
  vocab_size=4096, width=256, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=32, mlp_width=688
)
# Published config.json of Qwen2-7B, and its published number of parameters.
QWEN2_7B = {
  "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
  "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
  "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_7B_PARAMETERS = 7_615_616_512
BATCH, TOKENS = 8, 4096
PLANS = {
  "v5e-8 (16 GiB each), data=8": AbstractMesh((8,), ("data",)),
  "v5e-8, fsdp=8": AbstractMesh((8,), ("fsdp",)),
  "v5e-8, fsdp=4, tensor=2": AbstractMesh((4, 2), ("fsdp", "tensor")),
  "one H100 (80 GiB)": AbstractMesh((1,), ("data",)),
}


def abstract(model: CausalLM) -> dict:
  """Shapes of the parameters."""
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def compile_seconds(layers: int, scan_layers: bool) -> tuple[float, float]:
  """CPU seconds to trace and lower, and to compile, loss and gradient of 4 x 128 tokens."""
  model = CausalLM(dataclasses.replace(SMALL, num_layers=layers), scan_layers=scan_layers)
  ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)

  def loss(params, ids):
    return jax.nn.logsumexp(model.apply({"params": params}, ids).logits, axis=-1).mean()

  begin = time.process_time()
  lowered = jax.jit(jax.grad(loss)).lower(abstract(model), ids)
  middle = time.process_time()
  lowered.compile()
  return middle - begin, time.process_time() - middle


def main() -> None:
  """Measures, checks the published size and writes the results."""
  jax.config.update("jax_enable_compilation_cache", False)
  compile_seconds(1, True)  # jax itself wakes up
  rows = ["| layers | form | trace, CPU s | compile, CPU s |", "| --- | --- | --- | --- |"]
  for layers, scan in ((4, True), (32, True), (4, False), (12, False)):
    seconds = " | ".join(f"{s:.1f}" for s in compile_seconds(layers, scan))
    rows.append(f"| {layers} | {'scanned' if scan else 'unrolled'} | {seconds} |")

  config = CausalLMConfig.from_hugging_face(QWEN2_7B)
  model = CausalLM(config, scan_layers=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  shapes = abstract(model)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == QWEN2_7B_PARAMETERS, count
  ids = jax.ShapeDtypeStruct((BATCH, TOKENS // 2), jnp.int32)
  run = lambda params, ids: model.apply({"params": params}, ids, cache_size=TOKENS, logits="last")
  begin = time.process_time()
  lowered = jax.jit(run).lower(shapes, ids)
  seconds = time.process_time() - begin
  cache = jax.tree.leaves((lowered.out_info.cache.keys, lowered.out_info.cache.values))
  cache_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in cache)
  gib = lambda n: f"{n / 2**30:.2f}"
  plans = ["| device | parameters, GiB | cache, GiB |", "| --- | --- | --- |"]
  for name, mesh in PLANS.items():
    split = math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
    plans.append(f"| {name} | {gib(bytes_per_device(shapes, mesh))} | {gib(cache_bytes / split)} |")
  text = "\n".join(
    [
      "# Language models: depth and size",
      "Loss and gradient of a Llama-shaped model, width 256, 4 x 128 tokens, no compilation cache, "
      f"jax {jax.__version__} on CPU, machine load {os.getloadavg()[0]:.1f}.",
      "",
      *rows,
      "",
      f"Qwen2-7B, abstract: {count:,} parameters (the published number); prefill of {BATCH} x "
      f"{TOKENS // 2} tokens into a cache of {TOKENS} lowers in {seconds:.1f} CPU s. What each device "
      "holds in bfloat16 (activations and, for training, optimiser state come on top):",
      "",
      *plans,
      "",
    ]
  )
  print(text)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / "lm_scale.md").write_text(text)


if __name__ == "__main__":
  main()
