"""LoRASculpt against vectors from the published functions (float64)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.methods import lorasculpt


@pytest.fixture
def golden(golden_file):
  with jax.enable_x64(True):
    yield {key: jnp.asarray(value) for key, value in golden_file("lorasculpt").items()}


def modules(golden, group, of="W"):
  """Names of the modules of a group that have an array `of`."""
  return [key.split("/")[1] for key in golden if key.startswith(f"{group}/") and key.count("/") == 2
          and key.endswith(f"/{of}")]  # fmt: skip


def layers(golden, group, suffix="", names=None):
  """(kernels, factors) of a group in our layout."""
  names = names or modules(golden, group)
  kernels = {name: golden[f"{group}/{name}/W"].T for name in names}
  zeros = lambda name: jnp.zeros(
    (golden[f"{group}/{name}/W"].shape[0], golden[f"{group}/{name}/A{suffix}"].shape[0])
  )
  factors = {
    name: {
      "a": golden[f"{group}/{name}/A{suffix}"],
      "b": golden.get(f"{group}/{name}/B{suffix}", zeros(name)).T,
    }
    for name in names
  }
  return kernels, factors


def test_masks(golden):
  ratio = float(golden["mask/ratio"])
  names = modules(golden, "mask", "param")
  assert names
  for name in names:
    param = golden[f"mask/{name}/param"]
    mask = lorasculpt.magnitude_mask(param, ratio)
    np.testing.assert_array_equal(mask, golden[f"mask/{name}/expected_mask"])
    assert mask.sum() == golden[f"mask/{name}/expected_k"]
    np.testing.assert_array_equal(
      lorasculpt.masked(param, mask), golden[f"mask/{name}/expected_pruned"]
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("group", ["cmr", "cmr_zero_B"])
def test_conflict_mitigation(golden, group, dtype):
  tolerance = {"float64": {"rtol": 1e-9, "atol": 1e-9}, "float32": {"rtol": 1e-5, "atol": 1e-7}}
  close = lambda actual, expected: np.testing.assert_allclose(actual, expected, **tolerance[dtype])
  kernels, factors = jax.tree.map(lambda x: x.astype(dtype), layers(golden, group))
  omega, weight = float(golden["cmr/omega"]), float(golden["cmr/lambda"])
  loss, gradients = jax.value_and_grad(
    lambda factors: weight * lorasculpt.conflict_penalty(kernels, factors, omega)
  )(factors)
  close(loss, golden[f"{group}/expected_loss"])
  for name, gradient in gradients.items():
    close(gradient["a"], golden[f"{group}/{name}/expected_grad_A"])
    close(gradient["b"].T, golden[f"{group}/{name}/expected_grad_B"])
    if group == "cmr":
      close(lorasculpt.importance(kernels[name], omega).T, golden[f"cmr/{name}/expected_M"])
      norm = lorasculpt.conflict(kernels[name], *factors[name].values(), omega)
      close(norm, golden[f"cmr/{name}/expected_norm"])


def test_importance_of_zeros(golden):
  actual = lorasculpt.importance(golden["cmr_zero_W/W"], float(golden["cmr/omega"]))
  np.testing.assert_allclose(actual, golden["cmr_zero_W/expected_M"], rtol=1e-9, atol=1e-9)


def test_density_of_the_product(golden):
  actual = [
    lorasculpt.product_density(float(a), float(b), int(r)) for a, b, r in golden["density/sA_sB_r"]
  ]
  np.testing.assert_allclose(actual, golden["density/expected"], rtol=1e-12, atol=1e-12)


def test_training_run(golden):
  """The whole run in the published order: masks at the start of a step, moments left alone."""
  g = {key.removeprefix("traj/"): value for key, value in golden.items() if key.startswith("traj/")}
  kernels, factors = layers(golden, "traj", "_init", modules(golden, "traj"))
  scale = g["alpha"] / g["rank"]
  prune_at, ratio, omega = int(g["threshold"]), float(g["ratio"]), float(g["omega"])
  regularised = [f"{part}_proj" for part in "qkv"]
  merged = lambda factors: {
    name: kernels[name] + scale * f["a"].T @ f["b"] for name, f in factors.items()
  }

  def losses(factors):
    w = merged(factors)
    x = g["x"]
    gate = jnp.tanh(x @ w["q_proj"]) * (x @ w["k_proj"]) + x @ w["v_proj"]
    out = (gate * jax.nn.sigmoid(x @ w["up_proj"])) @ w["o_proj"]
    inside = {name: factors[name] for name in regularised}
    penalty = g["lam"] * lorasculpt.conflict_penalty(kernels, inside, omega)
    return jnp.mean((out - g["y"]) ** 2) + penalty, penalty

  optimiser = optax.adamw(
    float(g["lr"]), float(g["beta1"]), float(g["beta2"]), float(g["eps"]), weight_decay=0.0
  )

  chex.clear_trace_counter()

  # t passes t_p without another compilation.
  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(t, factors, masks, state):
    factors, masks = lorasculpt.sculpt(t, factors, masks, prune_at=prune_at, keep_ratio=ratio)
    (total, penalty), gradients = jax.value_and_grad(losses, has_aux=True)(factors)
    updates, state = optimiser.update(gradients, state, factors)
    return factors, optax.apply_updates(factors, updates), masks, state, total - penalty, penalty

  def check(tree, suffix):
    for name, f in tree.items():
      for ours, theirs in (("a", f"A{suffix}"), ("b", f"B{suffix}")):
        actual = f[ours].T if ours == "b" else f[ours]
        np.testing.assert_allclose(actual, g[f"{name}/{theirs}"], rtol=1e-7, atol=1e-7)

  masks, state = lorasculpt.dense_masks(factors), optimiser.init(factors)
  for t in range(int(g["steps"])):
    before, factors, masks, state, task, penalty = step(t, factors, masks, state)
    np.testing.assert_allclose(task, g["expected_task_loss"][t], rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(penalty, g["expected_reg_loss"][t], rtol=1e-7, atol=1e-7)
    if t == prune_at:
      check(before, "_at_prune")
  check(masks, "_mask")
  check(factors, "_final_official")
  shipped = lorasculpt.masked(factors, masks)
  check(shipped, "_final")
  for name, kernel in merged(shipped).items():
    np.testing.assert_allclose(kernel.T, g[f"{name}/expected_merged"], rtol=1e-7, atol=1e-7)
    density = lorasculpt.update_density({name: shipped[name]})
    np.testing.assert_allclose(density, g[f"{name}/expected_delta_density"], rtol=1e-7)
