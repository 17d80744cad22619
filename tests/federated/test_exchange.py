"""Learning from each other's answers on public examples, with small dense networks of two kinds."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.federated import exchange
from jaxmethods.federated.exchange import Peer
from jaxmethods.methods import rahfl

C, D, B, STEPS = 3, 4, 5, 2
ADAM = optax.adam(0.01)
SIZES = (2, 1)  # clients of either kind


def linear(params, model_state, x, train):
  del train
  return x, x @ params["w"], {"seen": model_state["seen"] + 1}


def wide(params, model_state, x, train):
  del train
  h = jnp.tanh(x @ params["v"])
  return h, h @ params["w"], {"seen": model_state["seen"] + 1}


NETWORKS = (linear, wide)


def peers(seed=0):
  random = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  kinds = ({"w": draw(2, D, C)}, {"v": draw(1, D, 6), "w": draw(1, 6, C)})
  return tuple(
    Peer(params, {"seen": jnp.zeros(size, jnp.int32)}, jax.vmap(ADAM.init)(params))
    for params, size in zip(kinds, SIZES, strict=True)
  )


def by_accuracy(accuracy, answers, present):
  allowed = rahfl.knowledge_transfer(accuracy) & present[None, :]
  return rahfl.mixed_teachers(answers[:, 0], rahfl.transfer_weights(allowed))


@pytest.fixture(scope="module")
def run():
  @jax.jit
  def run(accuracy, clients, batches):
    weights = [jnp.ones(size) for size in SIZES]
    return exchange.exchange(
      NETWORKS, by_accuracy, ADAM, accuracy, clients, weights, batches, jax.random.key(0)
    )

  return run


BATCHES = jax.random.normal(jax.random.key(1), (STEPS, 1, B, D))


def test_the_strict_best_client_is_left_exactly_as_it_was(run):
  before = peers()
  after, metrics = run(jnp.array([0.2, 0.9, 0.5]), before, BATCHES)
  for old, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after[0]), strict=True):
    np.testing.assert_array_equal(old[1], new[1])
  assert (after[0].params["w"][0] != before[0].params["w"][0]).any()
  assert (after[1].params["w"] != before[1].params["w"]).any()
  np.testing.assert_array_equal(after[1].model_state["seen"], STEPS)
  assert metrics["distillation"][1] == 0 and (metrics["distillation"][jnp.array([0, 2])] > 0).all()


def test_a_fresh_adam_step_has_the_size_of_its_rate(run):
  before = peers()
  after, _ = run(jnp.array([0.2, 0.9, 0.5]), before, BATCHES[:1])
  moved = jnp.abs(after[1].params["w"] - before[1].params["w"])
  np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_the_step_is_that_of_the_papers_loss(run):
  """Client 0 learns from both others: one mixed teacher gives the gradient of L_col."""
  before, accuracy = peers(), jnp.array([0.1, 0.5, 0.9])
  x = BATCHES[0, 0]
  others = [linear({"w": before[0].params["w"][1]}, {"seen": 0}, x, True)[1]]
  others.append(wide(jax.tree.map(lambda a: a[0], before[1].params), {"seen": 0}, x, True)[1])
  weights = rahfl.transfer_weights(rahfl.knowledge_transfer(accuracy))

  def loss(w):
    return rahfl.collaboration(jnp.stack([x @ w, *others]), weights)[0]

  w = before[0].params["w"][0]
  gradient = jax.grad(loss)(w)
  teacher = rahfl.mixed_teachers(
    jax.nn.log_softmax(jnp.stack([x @ w, *others])), weights
  ).probabilities[0]
  ours = jax.grad(lambda w: exchange.divergence(teacher, x @ w))(w)
  np.testing.assert_allclose(ours, gradient, rtol=1e-5, atol=1e-7)
  after, _ = run(accuracy, before, BATCHES[:1])
  updates, _ = ADAM.update(gradient, ADAM.init(w))
  np.testing.assert_allclose(after[0].params["w"][0], w + updates, rtol=1e-5)


def test_an_answer_that_is_not_finite_teaches_nobody(run):
  before = peers()
  broken = before[0].params["w"].at[1].set(jnp.nan)
  accuracy = jnp.array([0.2, 0.9, 0.5])
  after, metrics = run(accuracy, (before[0]._replace(params={"w": broken}), before[1]), BATCHES)
  np.testing.assert_array_equal(metrics["rejected"], [False, True, False])
  # Client 0 now learns from client 2 alone, which has nobody better left.
  assert (after[0].params["w"][0] != before[0].params["w"][0]).any()
  assert np.isfinite(after[0].params["w"][0]).all()
  np.testing.assert_array_equal(after[1].params["w"], before[1].params["w"])
  alone, _ = run(jnp.array([0.2, 0.1, 0.5]), before, BATCHES)
  np.testing.assert_array_equal(after[0].params["w"][0], alone[0].params["w"][0])


def test_only_answers_are_sent_and_one_teacher_comes_back(run):
  _, metrics = run(jnp.array([0.2, 0.9, 0.5]), peers(), BATCHES)
  np.testing.assert_array_equal(metrics["bytes_up"], STEPS * B * C * 4)
  np.testing.assert_array_equal(metrics["bytes_down"], STEPS * B * C * 4)


def test_the_order_of_the_clients_does_not_matter(run):
  accuracy, before = jnp.array([0.2, 0.9, 0.5]), peers()
  swapped = (jax.tree.map(lambda a: a[::-1], before[0]), before[1])
  after, _ = run(accuracy, before, BATCHES)
  again, _ = run(accuracy[jnp.array([1, 0, 2])], swapped, BATCHES)
  np.testing.assert_allclose(again[0].params["w"][::-1], after[0].params["w"], rtol=1e-6)
  np.testing.assert_allclose(again[1].params["w"], after[1].params["w"], rtol=1e-6)


def test_clients_spread_over_devices():
  """In a process of its own: the number of devices is fixed when jax starts."""
  worker = Path(__file__).with_name("exchange_worker.py")
  folders = [str(worker.parents[2]), str(worker.parent)]
  done = subprocess.run(
    [sys.executable, str(worker)],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    capture_output=True,
    text=True,
  )
  assert done.stdout.splitlines()[-1:] == ["same on 2 devices"], done.stderr[-3000:]
