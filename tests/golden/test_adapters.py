"""Adapters against vectors recorded from the PEFT library or computed independently (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmethods.adapters import adalora, adapter as core, bottleneck, low_rank, prompts, scaling

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def golden(golden_file):
  with jax.enable_x64(True):
    yield {key: jnp.asarray(value) for key, value in golden_file("mllm_tuning").items()}


def close(actual, expected, tolerance=TOLERANCE):
  np.testing.assert_allclose(actual, expected, **tolerance)


def model_of(golden, width="W"):
  """A single linear layer named "layer" with the recorded weight and bias, and its parameters."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(golden[width].shape[0], param_dtype=x.dtype, name="layer")(x)

  return Net(), {"layer": {"kernel": golden[width].T, "bias": golden["b"]}}


def factors_of(golden, kind, **ours):
  """Recorded arrays under our names: (name there, transpose?) by our name."""
  return {
    name: golden[f"{kind}/{theirs}"].T if turn else golden[f"{kind}/{theirs}"]
    for name, (theirs, turn) in ours.items()
  }


def check(golden, adapter, own, kind, shared=None):
  """Unmerged and merged output equal the recorded ones."""
  net, params = model_of(golden)
  tree = {"layer": own} | ({core.SHARED: shared} if shared else {})
  y = core.apply(adapter, net, params, tree, golden["x"])
  close(y, golden[f"{kind}/expected_y"])
  if adapter.merge is None:
    return
  merged = adapter.merge(params, tree)
  if f"{kind}/expected_merged" in golden:
    close(merged["layer"]["kernel"].T, golden[f"{kind}/expected_merged"])
  close(net.apply({"params": merged}, golden["x"]), golden[f"{kind}/expected_y"])


def test_base(golden):
  net, params = model_of(golden)
  close(net.apply({"params": params}, golden["x"]), golden["base/expected_y"])


@pytest.mark.parametrize(
  ("kind", "constructor"),
  [
    ("lora", low_rank.lora),
    ("rslora", low_rank.rslora),
    ("dora", low_rank.dora),
    ("dora_perturbed", low_rank.dora),
    ("moslora", low_rank.moslora),
  ],
)
def test_scaled_factors(golden, kind, constructor):
  adapter = constructor(int(golden["rank"]), float(golden["alpha"]), dropout=0.0)
  names = {"a": ("A", False), "b": ("B", True)}
  if kind.startswith("dora"):
    names["magnitude"] = ("magnitude", False)
  if kind == "moslora":
    names["mixer"] = ("mixer", False)
  check(golden, adapter, factors_of(golden, kind, **names), kind)


def test_vera(golden):
  own = factors_of(golden, "vera", scale_rank=("lambda_d", False), scale_out=("lambda_b", False))
  shared = factors_of(golden, "vera", a=("A", False), b=("B", True))
  check(golden, low_rank.vera(int(golden["rank"])), own, "vera", shared)


def test_ia3(golden):
  check(golden, scaling.ia3(), {"scale_out": golden["ia3/scale"].ravel()}, "ia3")


@pytest.mark.parametrize("kind", ["pissa", "milora"])
def test_singular_components(golden, kind):
  rank, alpha = int(golden["rank"]), float(golden["alpha"])
  adapter = getattr(low_rank, kind)(rank, alpha, dropout=0.0)
  _, params = model_of(golden)
  tree = adapter.init(jax.random.key(0), params, "layer")
  own = tree["layer"]
  tolerance = {"rtol": 1e-8, "atol": 1e-8}
  product = alpha / rank * (own["a"].T @ own["b"]).T
  close(product, golden[f"{kind}/expected_scaled_product"], tolerance)
  # Without what is trained, the frozen residual is left.
  without = {"layer": own | {"a": jnp.zeros_like(own["a"])}}
  residual = adapter.merge(params, without)["layer"]["kernel"].T
  close(residual, golden[f"{kind}/expected_residual"], tolerance)


def test_adalora(golden):
  own = factors_of(golden, "adalora", a=("Q", False), b=("P", True), lam=("lam", False))
  adapter = low_rank.adalora(own["lam"].size)
  net, params = model_of(golden)
  tree = {"layer": own}
  delta = adapter.merge(params, tree)["layer"]["kernel"] - params["layer"]["kernel"]
  close(delta.T, golden["adalora/expected_delta"])
  y = core.apply(adapter, net, params, tree, golden["x"])
  close(y, golden["base/expected_y"] + golden["x"] @ golden["adalora/expected_delta"].T)
  close(adalora.orthogonality(tree), golden["adalora/expected_orth"])


def test_oft(golden):
  skew = golden["oft/skew_blocks"]
  size = skew.shape[-1]
  close(scaling.orthogonal(skew), golden["oft/expected_R"])
  rows, columns = np.triu_indices(size, 1)
  upper = skew[:, rows, columns]
  close(scaling.skew_symmetric(upper, size), skew)
  check(golden, scaling.oft(size), {"skew": upper}, "oft")


def test_loramoe(golden):
  experts, rank, _ = golden["loramoe/A"].shape
  adapter = low_rank.loramoe(rank, float(golden["alpha"]), 0.0, experts)
  own = {
    "a": golden["loramoe/A"],
    "b": golden["loramoe/B"].swapaxes(1, 2),
    "router": golden["loramoe/router"],
  }
  gate = jax.nn.softmax(golden["x"] @ own["router"].T)
  close(gate, golden["loramoe/expected_gate"])
  check(golden, adapter, own, "loramoe")


def test_serial_adapter(golden):
  own = factors_of(
    golden, "adapter", down=("W_down", True), down_bias=("b_down", False), up=("W_up", True),
    up_bias=("b_up", False),
  )  # fmt: skip
  h = golden["adapter/h"]
  width = h.shape[1]
  adapter = bottleneck.serial(own["down"].shape[1])
  net = nn.Dense(width, param_dtype=h.dtype)
  # The identity in front, so that the recorded input is the output of a linear layer.
  params = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
  y = core.apply(adapter, net, params, own, h)
  close(y, golden["adapter/expected_y"])


def test_prefix(golden):
  q, k, v, prefix_k, prefix_v = (
    golden[f"prefix/{name}"] for name in ("q", "k", "v", "prefix_k", "prefix_v")
  )
  close(prompts.prefix_attention(q, k, v, prefix_k, prefix_v), golden["prefix/expected_out"])
  empty = prefix_k[:0]
  plain = jax.nn.softmax(q @ k.T / np.sqrt(q.shape[-1])) @ v
  close(prompts.prefix_attention(q, k, v, empty, empty), plain)
