"""The update of an adapter: exact under accumulation, remat and meshes; no memory for frozen weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_lm
from jax.test_util import check_grads

from jaxmethods.adapters.adapter import split
from jaxmethods.adapters.training import next_token_loss, token_cross_entropy
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.stats.losses import IGNORED
from jaxmethods.trees import flatten

WORKER = Path(__file__).with_name("devices_worker.py")


@pytest.fixture(scope="module")
def problem():
  """Parameters, and a tree whose B is not zero: after three updates of the plain step."""
  lm = tiny_lm.model()
  params, tree = tiny_lm.start(lm)
  state = tiny_lm.optimiser().init(tree)
  update = jax.jit(tiny_lm.step(lm))
  losses = []
  for _ in range(3):
    tree, state, metrics = update(tree, state, params, tiny_lm.batch(), None)
    losses.append(metrics["loss"])
  return params, tree, state, jnp.stack(losses)


def test_it_learns_and_leaves_the_parameters_alone(problem):
  params, tree, _, losses = problem
  again, start = tiny_lm.start(tiny_lm.model())
  chex.assert_trees_all_equal(params, again)
  assert (jnp.diff(losses) < 0).all()
  assert all(
    (a != b).any() for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(start), strict=True)
  )


@pytest.mark.parametrize("variant", ["accumulate", "remat", "unrolled"])
def test_the_same_update_by_other_means(problem, variant):
  params, tree, state, _ = problem
  plain = jax.jit(tiny_lm.step(tiny_lm.model()))(tree, state, params, tiny_lm.batch(), None)
  if variant == "unrolled":
    apart = lambda x: {
      **{name: branch for name, branch in x.items() if name != "layers"},
      **{f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], x["layers"]) for i in range(2)},  # noqa: B023
    }
    lm = tiny_lm.model(scan_layers=False)
    flat_state = jax.tree.map(
      lambda x: apart(x) if isinstance(x, dict) else x, state, is_leaf=lambda x: isinstance(x, dict)
    )
    other = jax.jit(tiny_lm.step(lm))(apart(tree), flat_state, apart(params), tiny_lm.batch(), None)
    plain = (apart(plain[0]), None, plain[2])
    other = (other[0], None, other[2])
  else:
    lm = tiny_lm.model(remat=variant == "remat")
    update = tiny_lm.step(lm, accumulate=4 if variant == "accumulate" else 1)
    other = jax.jit(update)(tree, state, params, tiny_lm.batch(), None)
  # Adam divides by the size of a gradient: where that is small, rounding shows in the step.
  chex.assert_trees_all_close(plain, other, rtol=1e-4, atol=1e-5)


def test_parts_need_not_weigh_the_same():
  """The mean is over all tokens that count, not over means of parts."""
  logits = jax.random.normal(jax.random.key(0), (4, 3, 5))
  labels = jnp.asarray([[1, 2, 3], [IGNORED] * 3, [0, IGNORED, 4], [IGNORED, IGNORED, 2]])
  total, count = token_cross_entropy(logits, labels)
  log_probability = jax.nn.log_softmax(logits)
  expected = [
    -log_probability[i, j, labels[i, j]] for i in range(4) for j in range(3) if labels[i, j] >= 0
  ]
  assert count == len(expected) == 6
  np.testing.assert_allclose(total, sum(expected), rtol=1e-6)


def test_a_label_behind_padding_does_not_count():
  """Neither its value nor the ids at padding matter; the gradient is that of finite differences."""
  lm, batch = tiny_lm.model(), tiny_lm.batch(4)
  params, tree = tiny_lm.start(lm)
  tree = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), tree)
  first = jnp.argmax(batch["mask"], axis=1)
  assert (first > 0).any()
  labelled = batch | {"labels": jnp.where(batch["mask"], batch["ids"], IGNORED)}
  silent = jnp.arange(10) == first[:, None]
  unlabelled = labelled | {"labels": jnp.where(silent, IGNORED, labelled["labels"])}
  other = labelled | {"ids": jnp.where(batch["mask"], batch["ids"], 7)}
  loss = next_token_loss(tiny_lm.ADAPTER, lm)
  value, count = loss(params, tree, labelled, None)
  assert count == batch["mask"].sum() - 4
  for same in (unlabelled, other):
    np.testing.assert_allclose(loss(params, tree, same, None)[0], value, rtol=1e-6)
  mean = jax.jit(lambda tree: jnp.divide(*loss(params, tree, labelled, None)))
  check_grads(mean, (tree,), 1, modes=["rev"], atol=3e-3, rtol=1e-2, eps=1e-3)


def test_nothing_counts():
  total, count = token_cross_entropy(jnp.ones((2, 3)), jnp.full(2, IGNORED))
  assert total == count == 0
  lm = tiny_lm.model()
  params, tree = tiny_lm.start(lm)
  batch = tiny_lm.batch() | {"labels": jnp.full((8, 10), IGNORED)}
  update = jax.jit(tiny_lm.step(lm))
  new, _, metrics = update(tree, tiny_lm.optimiser().init(tree), params, batch, None)
  chex.assert_trees_all_equal(new, tree)
  assert metrics["loss"] == metrics["grad_norm"] == 0


def test_bfloat16_compute_keeps_float32_trees(problem):
  params, tree, state, _ = problem
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  update = jax.jit(tiny_lm.step(tiny_lm.model(dtype=jnp.bfloat16)))
  new, new_state, metrics = update(tree, state, low, tiny_lm.batch(), None)
  plain = jax.jit(tiny_lm.step(tiny_lm.model()))(tree, state, params, tiny_lm.batch(), None)
  chex.assert_trees_all_equal_dtypes((new, new_state), (tree, state))
  assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("float32")}
  np.testing.assert_allclose(metrics["loss"], plain[2]["loss"], rtol=2e-2)


def test_dropout_follows_the_key(problem):
  from jaxmethods.adapters import low_rank

  params, tree, state, _ = problem
  update = jax.jit(tiny_lm.step(tiny_lm.model(), low_rank.lora(4, 8.0, dropout=0.5)))
  first, again, other = (
    update(tree, state, params, tiny_lm.batch(), jax.random.key(seed))[2]["loss"]
    for seed in (0, 0, 1)
  )
  assert first == again != other


def test_frozen_kernels_get_no_gradient_buffers():
  """Few tokens and wide layers, so that a buffer of a kernel's size would show in the temporaries."""
  config = CausalLMConfig(64, 128, 4, 4, 4, 32, 512)
  batch = {"ids": jnp.zeros((1, 4), int), "labels": jnp.zeros((1, 4), int)}
  optimiser = tiny_lm.optimiser()

  def temporaries(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

  def of_adapter(scan):
    lm = CausalLM(config, scan_layers=scan)
    params, tree = jax.eval_shape(lambda: tiny_lm.start(lm))
    state = jax.eval_shape(optimiser.init, split(tiny_lm.ADAPTER, tree)[0])
    return params, temporaries(tiny_lm.step(lm), tree, state, params, batch, None)

  def all_gradients(params):
    def loss(params):
      logits = CausalLM(config, scan_layers=True).apply({"params": params}, batch["ids"]).logits
      return token_cross_entropy(logits, batch["labels"])[0]

    return optax.tree.norm(jax.grad(loss)(params))

  bytes_of = lambda params: [
    4 * leaf.size for path, leaf in flatten(params).items() if re.search(r"layers.*kernel", path)
  ]
  params, temporary = of_adapter(scan=False)
  assert temporary < min(bytes_of(params))
  params, temporary = of_adapter(scan=True)
  stacked = sum(bytes_of(params))
  assert temporary < 1.2 * stacked / config.num_layers  # the slice of the layer that is at work
  assert temporaries(all_gradients, params) > stacked


def test_a_batch_that_does_not_divide():
  with pytest.raises(InputError, match="accumulate: must be at least 1, got 0"):
    tiny_lm.step(tiny_lm.model(), accumulate=0)
  lm = tiny_lm.model()
  params, tree = tiny_lm.start(lm)
  state = tiny_lm.optimiser().init(tree)
  with pytest.raises(InputError, match="a batch of 8 cannot be worked off in 3 parts"):
    tiny_lm.step(lm, accumulate=3)(tree, state, params, tiny_lm.batch(), None)


def test_eight_devices_equal_one():
  root = WORKER.parents[2]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(WORKER.parent)])}
  done = subprocess.run(
    [sys.executable, str(WORKER)], env=env, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-3000:]
  there = json.loads(done.stdout.splitlines()[-1])
  lm = tiny_lm.model()
  params, tree = tiny_lm.start(lm)
  state = tiny_lm.optimiser().init(tree)
  update = jax.jit(tiny_lm.step(lm))
  losses = []
  for seed in range(3):
    tree, state, metrics = update(tree, state, params, tiny_lm.batch(16, seed=seed), None)
    losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(there["losses"], losses, rtol=1e-5)
  for ours, theirs in zip(jax.tree.leaves(tree), there["tree"], strict=True):
    np.testing.assert_allclose(ours, np.array(theirs), rtol=1e-3, atol=1e-5)
