"""GIN and FedStar backbones against a plain numpy pass, and what federated methods rely on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.graphs import batching
from jaxmethods.graphs.structure import structure_features
from jaxmethods.models.fedstar import FedStarBackbone
from jaxmethods.models.gin import GINBackbone
from jaxmethods.models.init import torch_linear
from tests.graphs.random_graphs import dense, random_data

DATA = random_data(num_graphs=9)
STRUCTURE = {"structure": structure_features(DATA.graphs)}
BATCH = batching.batch_graphs(DATA, range(9), 9, node_data=STRUCTURE)[0]
PADDED = batching.batch_graphs(
  DATA, range(9), 12, node_multiple=131, edge_multiple=401, node_data=STRUCTURE
)[0]
MODELS = {"gin": GINBackbone(3, hidden=8), "fedstar": FedStarBackbone(3, hidden=8)}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def linear(p, x):
  return x @ p["kernel"] + p["bias"]


def relu(x):
  return np.maximum(x, 0)


def reference(name, p, batch):
  a, x = dense(batch), batch.nodes["features"]
  loops = a + np.eye(len(a))
  normalised = loops / np.sqrt(np.outer(loops.sum(1), loops.sum(1)))
  h = linear(p["embed"], x)
  if name == "fedstar":
    s = linear(p["structure"]["embed"], batch.nodes["structure"])
  for layer in range(3):
    if name == "fedstar":
      h = np.concatenate([h, s], 1)
      conv = p["structure"][f"conv_{layer}"]
      s = np.tanh(normalised @ s @ conv["kernel"] + conv["bias"])
    conv = p[f"conv_{layer}"]
    h = relu(linear(conv["linear_1"], relu(linear(conv["linear_0"], loops @ h))))
  if name == "fedstar":
    h = linear(p["merge"], np.concatenate([h, s], 1))
  member = batch.nodes["graph"][None] == np.arange(len(batch.n_node))[:, None]
  h = (member & batch.nodes["mask"]) @ h
  return linear(p["head"], relu(linear(p["readout"], h)))


@pytest.mark.parametrize("name", MODELS)
def test_against_numpy(name):
  variables = MODELS[name].init(jax.random.key(0), BATCH)
  logits = jax.jit(MODELS[name].apply)(variables, BATCH)
  expected = reference(name, jax.tree.map(np.asarray, variables["params"]), BATCH)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@every_model
def test_padding_changes_neither_logits_nor_gradients(model):
  variables = model.init(jax.random.key(0), BATCH)

  @jax.jit
  def loss(variables, batch):
    logits = model.apply(variables, batch)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch.globals["label"])
    return jnp.where(batch.globals["mask"], ce, 0).sum(), logits[:9]

  results = [jax.value_and_grad(loss, has_aux=True)(variables, b) for b in (BATCH, PADDED)]
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)


@every_model
def test_dropout_is_random_in_training_and_absent_in_evaluation(model):
  variables = model.init(jax.random.key(0), BATCH)

  @jax.jit
  def train(key):
    return model.apply(variables, BATCH, train=True, rngs={"dropout": key})[:9]

  a, b, c = (train(jax.random.key(seed)) for seed in (1, 1, 2))
  chex.assert_trees_all_equal(a, b)
  assert not np.allclose(a, c)
  still = model.copy(dropout=0.0)
  np.testing.assert_allclose(
    still.apply(variables, BATCH, train=True), model.apply(variables, BATCH), atol=1e-6
  )
  for generator in ("hash", "threefry"):
    own = model.copy(generator=generator)
    assert np.isfinite(
      own.apply(variables, BATCH, train=True, rngs={"dropout": jax.random.key(0)})
    ).all()


def test_parameter_names_say_what_is_shared():
  p = {k: m.init(jax.random.key(0), BATCH)["params"] for k, m in MODELS.items()}
  convs = {"conv_0", "conv_1", "conv_2"}
  assert set(p["gin"]) == convs | {"embed", "readout", "head"}
  assert set(p["fedstar"]) == convs | {"embed", "merge", "readout", "head", "structure"}
  assert set(p["fedstar"]["structure"]) == convs | {"embed"}
  # Clients of other widths differ in embed and head only.
  other = batching.batch_graphs(random_data(width=2), range(3), 3)[0]
  shapes = jax.tree.map(
    jnp.shape, GINBackbone(7, hidden=8).init(jax.random.key(0), other)["params"]
  )
  ours = jax.tree.map(jnp.shape, p["gin"])
  assert {name for name in ours if ours[name] != shapes[name]} == {"embed", "head"}


@every_model
def test_vmap_over_clients_equals_a_loop(model):
  batches = batching.batch_graphs(DATA, range(9), 3, node_data=STRUCTURE)
  init = jax.jit(lambda key: model.init(key, batches[0]))
  variables = [init(jax.random.key(i)) for i in range(3)]
  apply = jax.jit(model.apply)
  loop = jnp.stack([apply(v, b) for v, b in zip(variables, batches, strict=True)])
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
  mapped = jax.jit(jax.vmap(model.apply))(stacked, batching.stack(batches))
  np.testing.assert_allclose(mapped, loop, rtol=1e-4, atol=1e-5)


def test_default_initialisation_is_torchs():
  init = torch_linear(16)
  for key in ("kernel_init", "bias_init"):
    values = np.asarray(init[key](jax.random.key(0), (16, 4000), jnp.float32))
    assert np.abs(values).max() <= 0.25
    np.testing.assert_allclose(values.std(), 0.25 / np.sqrt(3), rtol=0.01)
  embed = MODELS["gin"].init(jax.random.key(0), BATCH)["params"]["embed"]
  assert 0 < np.abs(embed["bias"]).max() <= 5**-0.5


@every_model
def test_learns_to_tell_dense_from_sparse_graphs(model):
  thin, thick = random_data(20, seed=1, density=0.15), random_data(20, seed=2, density=0.8)
  batches = []
  for label, data in enumerate((thin, thick)):
    data = data._replace(labels=np.full(20, label, np.int32))
    batches += batching.batch_graphs(
      data,
      range(20),
      20,
      node_multiple=256,
      edge_multiple=2048,
      node_data={"structure": structure_features(data.graphs)},
    )
  variables = model.init(jax.random.key(0), batches[0])
  optimiser = optax.adam(1e-2)

  def loss(params, batch, key):
    logits = model.apply({"params": params}, batch, train=True, rngs={"dropout": key})
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch.globals["label"])
    return jnp.where(batch.globals["mask"], ce, 0).sum()

  @jax.jit
  def step(params, state, key):
    grads = jax.tree.map(jnp.add, *(jax.grad(loss)(params, b, key) for b in batches))
    updates, state = optimiser.update(grads, state)
    return optax.apply_updates(params, updates), state

  params, state = variables["params"], optimiser.init(variables["params"])
  for key in jax.random.split(jax.random.key(1), 60):
    params, state = step(params, state, key)
  right = [model.apply({"params": params}, b)[:20].argmax(-1) == i for i, b in enumerate(batches)]
  assert np.mean(right) > 0.85
