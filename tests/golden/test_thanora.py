"""ThanoRA against an independent float64 computation of its equations (there is no published code)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.adapters import adapter as core, low_rank
from jaxmethods.methods import thanora


@pytest.fixture
def golden(golden_file):
  with jax.enable_x64(True):
    yield {key: jnp.asarray(value) for key, value in golden_file("thanora").items()}


def close(actual, expected, tolerance):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def each_layer(golden):
  """(arrays of a layer, number of tasks), layer by layer."""
  for layer in range(int(golden["num_layers"])):
    prefix = f"layer{layer}/"
    own = {key.removeprefix(prefix): x for key, x in golden.items() if key.startswith(prefix)}
    yield own, int(golden["num_tasks"])


def previews(golden, g, tasks):
  """Moments and decompositions of the tasks of one layer, from the recorded inputs."""
  width = g["W"].shape[1]
  moments = [
    thanora.second_moment(thanora.add_inputs(thanora.no_inputs(width), g[f"task{t}/X"].T))
    for t in range(tasks)
  ]
  damped = [thanora.damped(c, float(golden["damp"])) for c in moments]
  return moments, [thanora.decompose(g["W"].T, c) for c in damped]


def test_preview_and_ranks(golden):
  for g, tasks in each_layer(golden):
    moments, parts = previews(golden, g, tasks)
    entropies = [float(thanora.spectral_entropy(p.values)) for p in parts]
    for t in range(tasks):
      close(moments[t], g[f"task{t}/expected_cov"], 1e-8)
      close(parts[t].values, g[f"task{t}/expected_singular_values"], 1e-8)
      close(entropies[t], g[f"task{t}/expected_entropy"], 1e-8)
    tau = float(golden["tau"])
    close(thanora.task_weights(entropies, tau), g["expected_weights"], 1e-8)
    ranks, shared = thanora.allocate(entropies, int(golden["r_total"]), tau)
    np.testing.assert_array_equal(ranks, g["expected_ranks"])
    assert shared == g["expected_coop_rank"]


def test_start(golden):
  rank, alpha = int(golden["r_total"]), float(golden["alpha"])
  for g, tasks in each_layer(golden):
    _, parts = previews(golden, g, tasks)
    ranks, shared = np.asarray(g["expected_ranks"]), int(g["expected_coop_rank"])
    blocks = thanora.task_blocks(parts, ranks, float(golden["gamma"]))
    assert shared == rank - len(blocks.owner)
    layer = thanora.start_layer(jax.random.key(0), g["W"].T, blocks, rank, scale=alpha / rank)
    for t in range(tasks):
      rows = layer.owner == t
      assert rows.sum() == min(ranks[t], *g["W"].shape)  # the rest is nobody's
      close((layer.a[rows].T @ layer.b[rows]).T, g[f"task{t}/expected_init_product"], 1e-6)
    close(layer.kernel.T, g["expected_residual_weight"], 1e-6)


def recorded_blocks(g, tasks):
  """The recorded blocks as one pair of factors, and whose each row is."""
  a = jnp.concatenate([*(g[f"spr/A{t}"] for t in range(tasks)), g["spr/A_coop"]])
  b = jnp.concatenate([*(g[f"spr/B{t}"].T for t in range(tasks)), g["spr/B_coop"].T])
  ranks = [len(g[f"spr/A{t}"]) for t in range(tasks)]
  return {"a": a, "b": b}, jnp.asarray(thanora.owners(ranks, len(g["spr/A_coop"])))


def test_regulariser(golden):
  for g, tasks in each_layer(golden):
    factors, owner = recorded_blocks(g, tasks)
    penalty = lambda f, on="both", owner=owner: thanora.subspace_penalty(
      {"layer": f}, {"layer": owner}, on
    )
    close(penalty(factors, "A"), g["spr/expected_loss_A"], 1e-8)
    close(penalty(factors, "B"), g["spr/expected_loss_B"], 1e-8)
    value, gradient = jax.value_and_grad(penalty)(factors)
    close(value, g["spr/expected_loss"], 1e-8)
    for t in range(tasks):
      close(gradient["a"][owner == t], g[f"spr/expected_grad_A{t}"], 1e-8)
      close(gradient["b"][owner == t].T, g[f"spr/expected_grad_B{t}"], 1e-8)
    shared = owner == thanora.COOPERATIVE
    assert not gradient["a"][shared].any()
    assert not gradient["b"][shared].any()


def test_composition(golden):
  for g, tasks in each_layer(golden):
    factors, _ = recorded_blocks(g, tasks)
    adapter = low_rank.lora(int(golden["r_total"]), float(golden["alpha"]), 0.0)
    params = {"layer": {"kernel": g["W"].T}}
    merged = adapter.merge(params, {"layer": factors})["layer"]["kernel"]
    close(merged.T, g["forward/expected_merged"], 1e-9)
    scale = float(golden["alpha"]) / int(golden["r_total"])
    x = g["forward/x"]
    y = x @ g["W"].T + low_rank.low_rank(x, factors["a"], factors["b"], scale)
    close(y, g["forward/expected_y"], 1e-9)
    close(x @ merged, g["forward/expected_y"], 1e-9)
    assert core.num_trainable(adapter, {"layer": factors}) == sum(x.size for x in factors.values())


def test_allocation(golden):
  cases = sorted({key.split("/")[1] for key in golden if key.startswith("alloc/")})
  assert cases
  for case in cases:
    g = {key.split("/")[2]: x for key, x in golden.items() if key.startswith(f"alloc/{case}/")}
    entropies, tau = np.asarray(g["entropy"]), float(g["tau"])
    ranks, shared = thanora.allocate(entropies, int(g["r_total"]), tau)
    np.testing.assert_array_equal(ranks, g["expected_ranks"])
    assert shared == g["expected_coop_rank"]
    close(thanora.task_weights(entropies, tau), g["expected_weights"], 1e-9)


def test_entropy(golden):
  cases = sorted({key.split("/")[1] for key in golden if key.startswith("entropy/")})
  assert cases
  for case in cases:
    actual = thanora.spectral_entropy(golden[f"entropy/{case}/singular_values"])
    close(actual, golden[f"entropy/{case}/expected"], 1e-12)
