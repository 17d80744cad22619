"""Layers against dense numpy, and that padding, order of nodes and vmap change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings, strategies as st

from jaxmethods.graphs import batching
from jaxmethods.models import graph_layers as layers
from tests.graphs.random_graphs import (
  dense,
  from_adjacencies,
  random_adjacency,
  random_data,
)

DATA = random_data()
BATCH = batching.batch_graphs(DATA, range(10), 10, node_multiple=1, edge_multiple=1)[0]
PADDED = batching.batch_graphs(DATA, range(10), 14, node_multiple=97, edge_multiple=301)[0]
REAL = np.asarray(BATCH.nodes["mask"])
NUM_REAL = int(REAL.sum())


def call(layer, variables, batch, x=None, weights=None, **kwargs):
  x = batch.nodes["features"] if x is None else x
  mask = batch.edges["mask"]
  return layer.apply(variables, x, batch.senders, batch.receivers, weights, mask, **kwargs)


def initialise(layer, batch=BATCH):
  args = batch.nodes["features"], batch.senders, batch.receivers, None, batch.edges["mask"]
  return layer.init(jax.random.key(0), *args)


def edge_weights(batch):
  """Weights that depend on the edge's ends only, so that padding does not move them."""
  return 0.2 + jnp.abs(jnp.sin(batch.senders + 3.0 * batch.receivers))


def weighted(batch):
  a, w = np.zeros((len(REAL),) * 2), np.asarray(edge_weights(batch))
  real = batch.edges["mask"]
  a[batch.receivers[real], batch.senders[real]] = w[real]
  return a


@pytest.fixture(params=["ones", "weights"])
def edges(request):
  """(weights or None, dense matrix) of BATCH."""
  if request.param == "ones":
    return None, dense(BATCH)
  return edge_weights(BATCH), weighted(BATCH)


# --- segment reductions and pooling


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_pool(how, is_sorted):
  x = np.asarray(jax.random.normal(jax.random.key(1), (len(REAL), 4))) - 3.0
  graph, order = np.asarray(BATCH.nodes["graph"]), np.arange(len(REAL))
  if not is_sorted:
    order = np.random.default_rng(0).permutation(order)
  args = x[order], graph[order], 11, REAL[order]
  pooled = layers.pool(*map(jnp.asarray, args[:2]), 11, args[3], how, is_sorted=is_sorted)
  for g in range(10):
    expected = getattr(np, how)(x[graph == g], axis=0)
    np.testing.assert_allclose(pooled[g], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(pooled[10], 0)  # nothing but padding


def test_pool_names_the_choices():
  with pytest.raises(ValueError, match="sum, mean, max"):
    layers.pool(jnp.ones((2, 1)), jnp.zeros(2, int), 1, how="median")


@pytest.mark.parametrize("how", ["csr", "segments", None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_neighbour_sum_and_its_gradients(how, symmetric, edges):
  weights, a = edges
  if weights is not None and symmetric:
    a = a + a.T
    weights = np.where(BATCH.edges["mask"], a[BATCH.receivers, BATCH.senders], 7.0)
    weights = jnp.asarray(weights, jnp.float32)
  x, target = np.random.default_rng(0).normal(size=(2, len(a), 40)).astype(np.float32)
  mask = BATCH.edges["mask"]

  @jax.jit
  def f(x, weights):
    args = x, BATCH.senders, BATCH.receivers, weights, mask
    y = layers.neighbour_sum(*args, symmetric=symmetric, how=how)
    return (y * target).sum(), y

  (dx, d_weights), y = jax.grad(f, (0, 1), has_aux=True)(x, weights)
  np.testing.assert_allclose(y, a @ x, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx, a.T @ target, rtol=1e-4, atol=1e-4)
  if d_weights is not None:
    expected = (x[BATCH.senders] * target[BATCH.receivers]).sum(1) * mask
    np.testing.assert_allclose(d_weights, expected, rtol=1e-4, atol=1e-4)


def test_csr_sum_under_vmap_and_padding():
  batches = batching.batch_graphs(DATA, range(10), 5)
  stacked = batching.stack(batches)
  x = jax.random.normal(jax.random.key(0), (2, stacked.nodes["mask"].shape[1], 40))

  @functools.partial(jax.jit, static_argnums=2)
  def f(x, batch, how):
    mask = batch.edges["mask"]
    y = layers.neighbour_sum(x, batch.senders, batch.receivers, None, mask, symmetric=True, how=how)
    return jnp.sin(y).sum()

  def both(how):
    return jax.vmap(jax.value_and_grad(lambda x, b: f(x, b, how)))(x, stacked)

  chex.assert_trees_all_close(both("csr"), both("segments"), rtol=1e-3, atol=1e-4)


# --- edge softmax


def test_edge_softmax_against_dense():
  logits = jax.random.normal(jax.random.key(0), (len(BATCH.senders), 3)) * 5
  a = dense(BATCH)
  soft = layers.edge_softmax(logits, BATCH.receivers, len(a), BATCH.edges["mask"])
  full = np.full((*a.shape, 3), -np.inf)
  full[BATCH.receivers, BATCH.senders] = logits
  full[a == 0] = -np.inf
  for i in np.flatnonzero(a.sum(1)):
    expected = np.exp(full[i] - full[i].max(0))
    expected /= expected.sum(0)
    into = (BATCH.receivers == i) & BATCH.edges["mask"]
    np.testing.assert_allclose(soft[into], expected[BATCH.senders[into]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(soft[into].sum(0), 1, rtol=1e-6)
  np.testing.assert_array_equal(soft[~BATCH.edges["mask"]], 0)


@settings(max_examples=20, deadline=None)
@given(
  st.lists(st.integers(0, 5), min_size=12, max_size=12), st.floats(1e-3, 1e4), st.integers(0, 12)
)
def test_edge_softmax_adds_up_and_stays_finite(receivers, scale, hidden):
  receivers = jnp.sort(jnp.array(receivers, jnp.int32))
  mask = jnp.arange(len(receivers)) < len(receivers) - hidden
  logits = jnp.sin(jnp.arange(1.0, len(receivers) + 1)) * scale

  def f(logits):
    soft = layers.edge_softmax(logits, receivers, 6, mask)
    return (soft * jnp.cos(jnp.arange(len(receivers)))).sum(), soft

  (_, soft), grad = jax.value_and_grad(f, has_aux=True)(logits)
  assert np.isfinite(grad).all() and not np.any(np.where(mask, 0, grad))
  total = np.asarray(layers.segment_sum(soft, receivers, 6))
  has = np.bincount(np.asarray(receivers)[np.asarray(mask)], minlength=6) > 0
  np.testing.assert_allclose(total, has.astype(float), atol=1e-5)


def test_single_neighbour_gets_one_and_isolated_nodes_no_nan():
  # 0 - 1, node 2 alone, slot 3 padding with a masked self loop of infinite logit.
  senders, receivers = jnp.array([1, 0, 3]), jnp.array([0, 1, 3])
  mask = jnp.array([True, True, False])

  def f(x):
    logits = (x[senders] * x[receivers]).at[2].set(jnp.inf)
    return layers.edge_softmax(logits, receivers, 4, mask)

  soft, pull = jax.vjp(f, jnp.array([1.0, 2.0, 3.0, 4.0]))
  np.testing.assert_array_equal(soft, [1, 1, 0])
  assert np.isfinite(pull(jnp.ones(3))[0]).all()


# --- batch normalisation


def torch_batch_norm(x, running_mean, running_var, momentum=0.1, eps=1e-5, count=None):
  """Forward of torch.nn.BatchNorm1d in training mode, float64."""
  n = len(x) if count is None else count
  mean, var = x.mean(0), x.var(0)
  y = (x - mean) / np.sqrt(var + eps)
  unbiased = var * n / (n - 1)
  running_mean = (1 - momentum) * running_mean + momentum * mean
  return y, running_mean, (1 - momentum) * running_var + momentum * unbiased


@pytest.mark.parametrize("count", [None, 200])
def test_batch_norm_follows_torch(count):
  rng = np.random.default_rng(0)
  mask = rng.random(40) < 0.7
  norm = layers.MaskedBatchNorm()
  variables = norm.init(jax.random.key(0), jnp.ones((40, 3)), mask, train=True)
  np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)  # init does not count
  variables["params"] = {"scale": jnp.array([1.0, 2.0, -1.0]), "bias": jnp.array([0.0, 1.0, 5.0])}
  mean, var = np.zeros(3), np.ones(3)
  for step in range(3):
    x = rng.normal(size=(40, 3)) * [1, 10, 0.1] + [0, 50, step]
    y, state = norm.apply(
      variables, jnp.asarray(x), mask, train=True, count=count, mutable="batch_stats"
    )
    variables = {**variables, **state}
    expected, mean, var = torch_batch_norm(x[mask], mean, var, count=count)
    expected = expected * [1, 2, -1] + [0, 1, 5]
    np.testing.assert_allclose(y[mask], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["batch_stats"]["var"], var, rtol=1e-5)
  y = norm.apply(variables, jnp.asarray(x), mask, train=False)
  expected = (x - mean) / np.sqrt(var + 1e-5) * [1, 2, -1] + [0, 1, 5]
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_gradient_is_that_of_the_formula():
  x = jax.random.normal(jax.random.key(0), (30, 4)) * 3 + 1
  target, mask = jax.random.normal(jax.random.key(1), (30, 4)), jnp.arange(30) % 4 > 0
  norm = layers.MaskedBatchNorm()
  params = {"scale": jnp.arange(1.0, 5.0), "bias": jnp.ones(4)}
  stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

  def ours(params, x):
    variables = {"params": params, "batch_stats": stats}
    y, _ = norm.apply(variables, x, mask, train=True, mutable="batch_stats")
    return jnp.where(mask[:, None], jnp.sin(y) * target, 0).sum()

  def formula(params, x):
    mean, var, _ = layers.masked_moments(x, mask)  # autodiff all the way
    y = (x - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    return jnp.where(mask[:, None], jnp.sin(y) * target, 0).sum()

  grads, expected = (jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (ours, formula))
  chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_ignores_whatever_padding_holds():
  x = jax.random.normal(jax.random.key(0), (20, 3))
  mask = jnp.arange(20) < 15
  norm = layers.MaskedBatchNorm()
  variables = norm.init(jax.random.key(0), x, mask, train=True)

  @jax.jit
  def run(x, mask):
    def loss(x):
      y, state = norm.apply(variables, x, mask, train=True, mutable="batch_stats")
      return (jnp.where(mask[:, None], y, 0) ** 3).sum(), (y, state)

    (_, (y, state)), grad = jax.value_and_grad(loss, has_aux=True)(x)
    return y[:15], state, grad[:15], grad[15:]

  y, state, grad, _ = run(x[:15], mask[:15])
  for rubbish in (1e30, jnp.nan, jnp.inf):
    other = run(x.at[15:].set(rubbish), mask)
    chex.assert_trees_all_close((y, state, grad), other[:3], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other[3], 0)


def test_batch_norm_of_an_all_padding_batch_leaves_running_values_alone():
  norm, x = layers.MaskedBatchNorm(), jnp.ones((4, 2)) * 7
  stats = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([3.0, 4.0])}
  params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
  variables = {"params": params, "batch_stats": stats}
  y, state = norm.apply(variables, x, jnp.zeros(4, bool), train=True, mutable="batch_stats")
  chex.assert_trees_all_equal(state["batch_stats"], stats)
  assert np.isfinite(y).all()
  one = jnp.arange(4) == 0  # a single row: the unbiased variance does not exist
  _, state = norm.apply(variables, x, one, train=True, mutable="batch_stats")
  chex.assert_tree_all_finite(state)


def test_batch_norm_half_precision_and_large_offsets():
  x = jnp.arange(64.0)[:, None] / 64 + 1e3
  norm = layers.MaskedBatchNorm()
  variables = norm.init(jax.random.key(0), x, train=True)
  y, _ = norm.apply(variables, x, train=True, mutable="batch_stats")
  np.testing.assert_allclose(y.var(), 1.0, rtol=1e-3)
  y, _ = norm.apply(variables, x.astype(jnp.bfloat16), train=True, mutable="batch_stats")
  assert y.dtype == jnp.bfloat16


# --- convolutions against dense algebra


def test_gin_against_dense(edges):
  weights, a = edges
  layer = layers.GIN(6, epsilon=0.5)
  variables = initialise(layer)
  p = jax.tree.map(np.asarray, variables["params"])
  x = BATCH.nodes["features"]
  h = (1.5 * x + a @ x) @ p["linear_0"]["kernel"] + p["linear_0"]["bias"]
  expected = np.maximum(h, 0) @ p["linear_1"]["kernel"] + p["linear_1"]["bias"]
  np.testing.assert_allclose(call(layer, variables, BATCH, weights=weights), expected, atol=1e-5)


@pytest.mark.parametrize("features", [3, 8])  # narrower and wider than the input: both orders
def test_gcn_against_dense(features, edges):
  weights, a = edges
  layer = layers.GCN(features)
  variables = initialise(layer)
  p = jax.tree.map(np.asarray, variables["params"])
  loops = a + np.eye(len(a))
  d = loops.sum(1) ** -0.5
  expected = d[:, None] * loops * d @ BATCH.nodes["features"] @ p["kernel"] + p["bias"]
  np.testing.assert_allclose(call(layer, variables, BATCH, weights=weights), expected, atol=1e-5)


def test_gat_against_dense(edges):
  weights, a = edges
  layer = layers.GAT(4, heads=2)
  variables = initialise(layer)
  p = jax.tree.map(np.asarray, variables["params"])
  z = (BATCH.nodes["features"] @ p["kernel"]).reshape(-1, 2, 4)
  source, target = (z * p["source"]).sum(-1), (z * p["target"]).sum(-1)
  e = target[:, None] + source[None]  # [receiver, sender, head]
  attention = (a + np.eye(len(a)))[:, :, None] * np.exp(np.where(e > 0, e, 0.2 * e))
  attention /= attention.sum(1, keepdims=True)
  expected = np.einsum("ijh,jhf->ihf", attention, z).reshape(-1, 8) + p["bias"]
  np.testing.assert_allclose(call(layer, variables, BATCH, weights=weights), expected, atol=1e-5)


def test_gcn_gradient_reaches_edge_weights_at_zero():
  """An isolated node has degree exactly 1, where a maximum would halve the gradient."""
  layer, x = layers.GCN(2), jnp.array([[1.0, -2.0], [3.0, 0.5]])
  senders, receivers = jnp.array([1, 0]), jnp.array([0, 1])
  variables = layer.init(jax.random.key(0), x, senders, receivers)

  @jax.jit
  def f(w):
    return (layer.apply(variables, x, senders, receivers, w) ** 2).sum()

  step = 1e-3
  numeric = [(f(jnp.eye(2)[i] * step) - f(jnp.zeros(2))) / step for i in range(2)]
  np.testing.assert_allclose(jax.grad(f)(jnp.zeros(2)), numeric, rtol=2e-2)


LAYERS = {
  "gin": layers.GIN(6),
  "gin_norm": layers.GIN(6, batch_norm=True),
  "gcn": layers.GCN(6),
  "gcn_csr": layers.GCN(40),  # wide enough for the sparse product
  "gat": layers.GAT(3, heads=2),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@functools.partial(jax.jit, static_argnums=0)
def run(layer, variables, batch):
  """Output, gradients and new statistics of a training pass."""
  kwargs = {}
  if isinstance(layer, layers.GIN):
    kwargs = {"node_mask": batch.nodes["mask"], "train": True}

  def loss(params, x):
    y, state = call(
      layer,
      {**variables, "params": params},
      batch,
      x,
      edge_weights(batch),
      mutable="batch_stats",
      **kwargs,
    )
    real = batch.nodes["mask"][:, None]
    return jnp.where(real, jnp.sin(y), 0).sum(), (y[:NUM_REAL], state)

  x = jnp.asarray(batch.nodes["features"])
  (_, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
  return aux, grads[0], grads[1][:NUM_REAL]


@every_layer
def test_padding_changes_nothing(layer):
  variables = initialise(layer)
  assert batching.batch_shape(PADDED) > batching.batch_shape(BATCH)
  chex.assert_trees_all_close(
    run(layer, variables, BATCH), run(layer, variables, PADDED), rtol=1e-4, atol=1e-5
  )


@every_layer
def test_permuting_the_nodes_permutes_the_result(layer):
  rng = np.random.default_rng(1)
  adjacency, x = random_adjacency(rng, 9, 0.4), rng.normal(size=(9, 5))
  order = rng.permutation(9)
  batches = [
    batching.batch_graphs(from_adjacencies([a], [h], [0]), [0], 1)[0]
    for a, h in ((adjacency, x), (adjacency[order][:, order], x[order]))
  ]
  variables = initialise(layer, batches[0])
  y, permuted = (call(layer, variables, batch)[:9] for batch in batches)
  np.testing.assert_allclose(y[order], permuted, atol=1e-5)


@every_layer
def test_vmap_over_clients_equals_a_loop(layer):
  batches = batching.batch_graphs(DATA, range(10), 5)
  models = [layer.init(jax.random.key(i), *_arguments(b)) for i, b in enumerate(batches)]

  def forward(variables, batch):
    kwargs = {}
    if isinstance(layer, layers.GIN):
      kwargs = {"node_mask": batch.nodes["mask"], "train": True}
    return call(layer, variables, batch, mutable="batch_stats", **kwargs)

  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
  mapped = jax.vmap(forward)(stacked, batching.stack(batches))
  loop = [forward(v, b) for v, b in zip(models, batches, strict=True)]
  chex.assert_trees_all_close(
    mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop), rtol=1e-4, atol=1e-5
  )


def _arguments(batch):
  return batch.nodes["features"], batch.senders, batch.receivers, None, batch.edges["mask"]


def test_an_edge_of_weight_zero_is_no_edge():
  senders, receivers = jnp.array([1, 0, 2]), jnp.array([0, 1, 1])
  x = jax.random.normal(jax.random.key(0), (3, 4))
  for layer in (layers.GIN(3), layers.GCN(3), layers.GAT(3)):
    assert isinstance(layer, nn.Module)
    variables = layer.init(jax.random.key(1), x, senders, receivers)
    soft = layer.apply(variables, x, senders, receivers, jnp.array([1.0, 1.0, 0.0]))
    hard = layer.apply(variables, x, senders[:2], receivers[:2])
    np.testing.assert_allclose(soft, hard, atol=1e-6)
