"""A mesh gives the numbers of one device, and published shapes are planned without weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharding_problem as problem
from jax.sharding import AbstractMesh, PartitionSpec

from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.models.sharding import bytes_per_device, param_shardings

WORKER = Path(__file__).with_name("sharding_worker.py")

# Of the published config.json.
QWEN2_7B = {
  "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
  "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
  "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
  "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
QWEN2_7B_PARAMETERS = 7_615_616_512


@pytest.fixture(scope="module")
def one_device():
  return jax.device_get(jax.jit(problem.step)(problem.params(), problem.batch()))


def test_eight_devices_equal_one(one_device):
  root = WORKER.parents[2]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(WORKER.parent)])}
  done = subprocess.run(
    [sys.executable, str(WORKER), "data=2,fsdp=2,tensor=2"],
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  got = json.loads(done.stdout.splitlines()[-1])
  logits, loss, params = one_device
  assert got["shard"] == [3, 8, 16]  # the parameters stay where they were put
  _, mask = problem.batch()
  real = np.asarray(mask)
  np.testing.assert_allclose(np.array(got["logits"])[real], logits[real], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got["loss"], loss, rtol=1e-5)
  for ours, theirs in zip(got["params"], jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_axes_that_do_not_fit_are_left_out():
  shapes = {"key": {"kernel": jax.ShapeDtypeStruct((6, 9), np.float32)}}
  mesh = AbstractMesh((4, 3), ("fsdp", "tensor"))
  assert param_shardings(shapes, mesh)["key"]["kernel"].spec == PartitionSpec(None, "tensor")
  data = AbstractMesh((8,), ("data",))
  assert param_shardings(shapes, data)["key"]["kernel"].spec == PartitionSpec(None, None)
  assert bytes_per_device(shapes, mesh) == 6 * 9 * 4 / 3


def test_qwen2_7b_traces_and_lowers_without_weights():
  model = CausalLM(
    CausalLMConfig.from_hugging_face(QWEN2_7B), scan_layers=True,
    dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
  )  # fmt: skip
  ids = jax.ShapeDtypeStruct((8, 2048), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == QWEN2_7B_PARAMETERS
  run = jax.jit(lambda v, ids: model.apply(v, ids, cache_size=4096, logits="last"))
  logits, _, cache, *_ = run.lower(shapes, ids).out_info
  assert logits.shape == (8, 1, 152064)
  assert cache.keys.shape == (28, 8, 4, 4096, 128)
  # Four of eight chips hold different parts of every large matrix: a little over a fourth each.
  per_chip = bytes_per_device(shapes["params"], AbstractMesh((2, 4), ("data", "fsdp")))
  assert 0.25 * 2 * QWEN2_7B_PARAMETERS < per_chip < 0.251 * 2 * QWEN2_7B_PARAMETERS
