"""The denoiser against InterGen's network (`human_interaction.npz`)."""

import jax
import numpy as np
import pytest

from jaxmethods.models.denoiser import Denoiser
from jaxmethods.models.hugging_face import dense, join_in_proj, split_in_proj
from jaxmethods.models.weights import export_params, import_params
from tests.tensors import assert_same_bytes, below

BLOCK = {
  "norm_1/modulation": "sa_block.norm.emb_layers.1",
  "norm_2/modulation": "ca_block.norm.emb_layers.1",
  "other_norm/modulation": "ca_block.xf_norm.emb_layers.1",
  "norm_3/modulation": "ffn.norm.emb_layers.1",
  "mlp/fc_1": "ffn.linear1",
  "mlp/fc_2": "ffn.linear2",
} | {
  f"{ours}/{name}": f"{theirs}.attention.{part}"
  for ours, theirs in (("attention", "sa_block"), ("cross_attention", "ca_block"))
  for name, part in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out_proj"))
}
WHOLE = {
  "time_1": "embed_timestep.time_embed.0",
  "time_2": "embed_timestep.time_embed.2",
  "condition": "text_embed",
  "embed": "motion_embed",
  "out": "out.linear",
}
TABLE = [
  rule
  for ours, theirs in (
    *WHOLE.items(),
    *((f"layers/{k}", f"blocks.{{i}}.{v}") for k, v in BLOCK.items()),
  )
  for rule in dense(ours, theirs)
]


@pytest.fixture
def case(golden_file):
  """(recorded arrays, model, params, motion in our layout)."""
  recorded = below(golden_file("human_interaction"), "net/")
  features, width, layers, heads, hidden, _ = map(int, recorded["config"])
  model = Denoiser(width, layers, heads, hidden)
  x = recorded["x"].reshape(*recorded["x"].shape[:2], 2, features)
  made = jax.eval_shape(model.init, jax.random.key(0), x, recorded["t"], recorded["cond"])
  tensors = {k.removeprefix("params/"): v for k, v in recorded.items() if k.startswith("params/")}
  params = import_params(split_in_proj(tensors), TABLE, made["params"])
  assert_same_bytes(join_in_proj(export_params(params, TABLE)), tensors)
  return recorded, model, params, x


def test_forward_and_swap(case):
  recorded, model, params, x = case
  mask = recorded["mask"][..., 0]
  run = jax.jit(lambda x: model.apply({"params": params}, x, recorded["t"], recorded["cond"], mask))
  out, real = np.asarray(run(x)), mask.astype(bool)
  expected = recorded["out"].reshape(out.shape)
  np.testing.assert_allclose(out[real], expected[real], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(run(x[:, :, ::-1])[:, :, ::-1][real], out[real], rtol=0, atol=1e-5)
