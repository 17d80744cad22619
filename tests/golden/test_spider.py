"""SPIDER against vectors from the published score function and selection statements (float64)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.methods import spider


@pytest.fixture
def golden(golden_file):
  with jax.enable_x64(True):
    yield {key: jnp.asarray(value) for key, value in golden_file("spider").items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_importance_and_masks(golden, dtype, tolerance):
  weight, accumulated = (
    golden[f"importance/{name}"].astype(dtype) for name in ("weight", "accumulated_grad")
  )
  pretrained, task = spider.pretrained_importance(weight), spider.task_importance(accumulated)
  close = lambda actual, name: np.testing.assert_allclose(
    actual, golden[f"importance/{name}"], rtol=tolerance, atol=tolerance
  )
  close(pretrained, "expected_P")
  close(task, "expected_G")
  close(spider.allocation(pretrained, task), "expected_mask")
  if dtype == "float64":
    chosen = spider.selected(pretrained, task)
    np.testing.assert_array_equal(chosen, golden["importance/expected_binary_mask"])
    hard = spider.hard(weight, pretrained, accumulated)
    np.testing.assert_array_equal(hard, golden["importance/expected_binary_mask"])


def test_mix(golden):
  actual = spider.mix(*(golden[f"merge/{name}"] for name in ("before", "after", "mask")))
  np.testing.assert_allclose(actual, golden["merge/expected"], rtol=1e-12, atol=1e-12)


def test_no_gradient(golden):
  weight = golden["edge/zero_grad/weight"]
  task = spider.task_importance(jnp.zeros_like(weight))
  np.testing.assert_array_equal(task, golden["edge/zero_grad/expected_G"])
  mask = spider.allocation(spider.pretrained_importance(weight), task)
  np.testing.assert_array_equal(mask, golden["edge/zero_grad/expected_mask"])


def test_zero_weight(golden):
  gradient = golden["edge/zero_weight/grad"]
  pretrained = spider.pretrained_importance(jnp.zeros_like(gradient))
  np.testing.assert_allclose(pretrained, golden["edge/zero_weight/expected_P"], atol=1e-9)
  mask = spider.allocation(pretrained, spider.task_importance(gradient))
  np.testing.assert_allclose(mask, golden["edge/zero_weight/expected_mask"], atol=1e-9)


def test_constant_weight(golden):
  assert golden["edge/constant_weight/official_P_is_nan"]
  gradient = golden["edge/constant_weight/grad"]
  pretrained = spider.pretrained_importance(jnp.ones_like(gradient))
  assert jnp.isfinite(pretrained).all()
  mask = spider.allocation(pretrained, spider.task_importance(gradient))
  np.testing.assert_array_equal(mask, golden["edge/constant_weight/expected_mask"])


def test_magnitude_mask(golden):
  weight = golden["magnitude/weight"]
  frozen = spider.frozen_by_magnitude(weight, float(golden["magnitude/ratio"]))
  np.testing.assert_array_equal(frozen, golden["magnitude/expected_frozen_mask"])
  kept = spider.mix(weight, golden["magnitude/after"], 1 - frozen)
  np.testing.assert_array_equal(kept, golden["magnitude/expected"])


def test_training_run(golden):
  g = {key.removeprefix("traj/"): value for key, value in golden.items() if key.startswith("traj/")}
  names = sorted(key.removesuffix("_init") for key in g if key.endswith("_init"))
  params = {name: g[f"{name}_init"] for name in names}

  def loss(params, x, y):
    hidden = jnp.tanh(x @ params["W1"].T + params["b1"])
    return jnp.mean((hidden @ params["W2"].T + params["b2"] - y) ** 2)

  optimiser = optax.adamw(
    float(g["lr"]), float(g["beta1"]), float(g["beta2"]), float(g["eps"]), weight_decay=0.0
  )

  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(params, state, moments, x, y):
    value, gradients = jax.value_and_grad(loss)(params, x, y)
    updates, moments = optimiser.update(gradients, moments, params)
    tuned = optax.apply_updates(params, updates)
    return *spider.update(state, tuned, gradients), moments, value

  def check(tree, suffix):
    for name in names:
      if (key := f"{name}_{suffix}") in g:
        np.testing.assert_allclose(tree[name], g[key], rtol=1e-7, atol=1e-7)

  assert {f"{names[0]}_{key}" for key in ("mask_step0", "after_step1", "final")} <= set(g)
  state, moments = spider.start(params), optimiser.init(params)
  for t in range(int(g["steps"])):
    params, state, mask, moments, value = step(params, state, moments, g["x"][t], g["y"][t])
    np.testing.assert_allclose(value, g["expected_loss"][t], rtol=1e-7, atol=1e-7)
    check(mask, f"mask_step{t}")
    check(params, f"after_step{t}")
  check(params, "final")
  check(state.accumulated, "accumulated_grad")
