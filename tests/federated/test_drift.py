"""SCAFFOLD, FedDyn, MOON and FedNTD: limiting cases, and that they train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.federated import algorithms, corrections, engine, guidance
from jaxmethods.federated.batching import shuffled

K, N, D, C = 3, 12, 4, 3


def federation(seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(K, N, D)).astype(np.float32)
  y = (x @ rng.normal(size=(D, C)) + np.eye(K)[:, None, :]).argmax(-1)  # skewed labels
  mask = np.arange(N) < np.array([12, 9, 5])[:, None]
  return {"x": jnp.asarray(x), "y": jnp.asarray(y), "mask": jnp.asarray(mask)}


DATA = federation()
WEIGHTS = DATA["mask"].sum(1).astype(jnp.float32)
PARAMS = {"head": {"kernel": jnp.zeros((D, C)), "bias": jnp.zeros(C)}}
LOCAL = {"local_epochs": 2, "batches": shuffled(4)}


def logits_of(params, batch):
  return batch["x"] @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, model_state, batch, key):
  del key
  losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(params, batch), batch["y"])
  return (losses * batch["mask"]).sum() / batch["mask"].sum(), (model_state, {})


def run(algorithm, client, rounds):
  clients = jax.tree.map(lambda a: jnp.broadcast_to(a, (K, *a.shape)), client)
  server = algorithm.init(PARAMS, jax.random.key(0))

  @jax.jit
  def step(server, clients, key):
    server, (clients,), metrics = engine.federated_round(
      algorithm, server, (clients,), (DATA,), (WEIGHTS,), key
    )
    return server, clients, metrics

  losses = []
  for r in range(rounds):
    server, clients, metrics = step(server, clients, jax.random.key(r))
    losses.append(float(metrics["loss"].mean()))
  return server, clients, losses


def fedavg_params(rounds):
  algorithm = algorithms.fedavg(loss, optax.sgd(0.1), weighted=False, **LOCAL)
  return run(algorithm, algorithms.init_client(PARAMS), rounds)[0].params


def assert_same(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(tolerance or {"atol": 1e-6})), a, b)


def test_scaffold_starts_as_fedavg_and_its_controls_add_up():
  algorithm = corrections.scaffold(loss, 0.1, **LOCAL)
  server, clients, losses = run(algorithm, corrections.init_client(PARAMS), 1)
  assert_same(server.params, fedavg_params(1))
  # c is the mean of the clients' controls, whose sum of corrections is therefore zero.
  mean = jax.tree.map(lambda c: c.mean(0), clients.correction)
  assert_same(mean, server.correction)
  server, _, losses = run(algorithm, corrections.init_client(PARAMS), 15)
  assert losses[-1] < 0.6 * losses[0]
  assert (
    np.abs(np.asarray(server.params["head"]["kernel"]) - fedavg_params(15)["head"]["kernel"]).max()
    > 1e-3
  )


def test_feddyn_without_regulariser_is_fedavg():
  start = corrections.init_client(PARAMS)
  tiny = corrections.feddyn(loss, optax.sgd(0.1), 1e-6, **LOCAL)
  _, _, losses = run(corrections.feddyn(loss, optax.sgd(0.1), 0.1, **LOCAL), start, 15)
  assert losses[-1] < losses[0]
  # h = -alpha mean(w_k - w_g), so -h / alpha adds the mean step once more: one round moves twice.
  server = run(tiny, start, 1)[0]
  doubled = jax.tree.map(lambda w: 2 * w, fedavg_params(1))
  assert_same(server.params, doubled, atol=1e-4)


@pytest.mark.parametrize("method", ["moon", "fedntd"])
def test_guidance_of_weight_zero_is_fedavg(method):
  make = {
    "moon": lambda weight: guidance.moon(
      loss, optax.sgd(0.1), logits_of, weight, weighted=False, **LOCAL
    ),
    "fedntd": lambda weight: guidance.fedntd(
      loss, optax.sgd(0.1), logits_of, beta=weight, weighted=False, **LOCAL
    ),
  }[method]
  client = algorithms.init_client(PARAMS, keep_previous=True)
  assert_same(run(make(0.0), client, 3)[0].params, fedavg_params(3))
  server, clients, losses = run(make(1.0), client, 3)
  assert np.isfinite(losses).all()
  changed = jnp.abs(server.params["head"]["kernel"] - fedavg_params(3)["head"]["kernel"]).max()
  assert changed > 1e-4
  # Each client keeps its own last parameters, not the average.
  assert jnp.abs(clients.previous["head"]["kernel"] - server.params["head"]["kernel"]).max() > 1e-4


def test_model_contrast_prefers_the_global_model():
  z = jnp.eye(3)
  near = guidance.model_contrast(z, z, -z)
  far = guidance.model_contrast(z, -z, z)
  assert (near < 0.1).all()
  assert (far > 3).all()
  np.testing.assert_allclose(guidance.model_contrast(z, z, z), np.log(2), rtol=1e-6)


def test_not_true_divergence_ignores_the_true_class():
  teacher = jnp.array([[1.0, 2.0, 3.0]])
  label = jnp.array([1])
  student = teacher.at[0, 1].add(5.0)
  np.testing.assert_allclose(guidance.not_true_divergence(student, teacher, label), 0, atol=1e-6)
  other = teacher.at[0, 2].add(5.0)
  assert guidance.not_true_divergence(other, teacher, label)[0] > 0.1
  gradient = jax.grad(lambda s: guidance.not_true_divergence(s, teacher, label).sum())(other)
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(gradient[0, 1], 0, atol=1e-7)
