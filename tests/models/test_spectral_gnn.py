"""FedSSP's network: what must not change its result, and where its arithmetic could break."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.graphs.packing import pack
from jaxmethods.graphs.spectral import Spectra, laplacian_spectra
from jaxmethods.models.graph_layers import edge_softmax, segment_sum
from jaxmethods.models.spectral_gnn import SpectralGNN
from tests.graphs.random_graphs import from_adjacencies, random_adjacency, random_data

HIDDEN, HEADS = 8, 2
MODEL = SpectralGNN(HIDDEN, HEADS, layers=1, dropout=0.0)
NOISY = SpectralGNN(HIDDEN, HEADS, layers=1, dropout=0.3)
DATA = random_data(num_graphs=7, largest=11, density=0.35)  # some nodes are isolated
EVERYONE = np.arange(7)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def make_batches(data=DATA, batches=(EVERYONE,), lengths=(16,), spectra=None):
  spectra = laplacian_spectra(data.graphs) if spectra is None else spectra
  stacked = pack(data.graphs, data.labels, spectra, batches, HIDDEN, lengths)
  return [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), stacked) for i in range(len(batches))]


def make_batch(*args, **options):
  return make_batches(*args, **options)[0]


@pytest.fixture(scope="module")
def variables():
  """Random parameters, and running statistics that differ from those of any batch."""
  start = MODEL.init(jax.random.key(0), make_batch())
  leaves, tree = jax.tree.flatten(start)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.2 * jax.random.uniform(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, moved)


@jax.jit
def evaluate(variables, batch):
  return MODEL.apply(variables, batch)


def by_graph(variables, *batches):
  """(graphs, H) representations in the order of the graphs' ids."""
  found = {}
  for batch in batches:
    representations = np.asarray(evaluate(variables, batch))
    ids = np.asarray(batch.graphs.globals["id"])
    assert not representations[ids < 0].any()
    found |= {int(k): r for k, r in zip(ids, representations, strict=True) if k >= 0}
  return np.stack([found[k] for k in sorted(found)])


@jax.jit
def train_pass(variables, batch):
  """Loss, gradients and new running statistics in training mode; the loss tells graphs apart."""
  graphs = batch.graphs.globals
  direction = jnp.cos(graphs["id"][:, None] + jnp.arange(HIDDEN))

  def loss(params):
    r, state = MODEL.apply(
      variables | {"params": params}, batch, train=True, mutable=["batch_stats"]
    )
    return jnp.sum(jnp.where(graphs["mask"][:, None], jnp.tanh(r) * direction, 0.0)), state

  (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
  return value, gradient, state


def dense_graphs(data):
  first = np.cumsum(data.graphs.n_node) - data.graphs.n_node
  whole = np.zeros((len(data.graphs.nodes),) * 2)
  whole[data.graphs.senders, data.graphs.receivers] = 1
  parts = [slice(f, f + n) for f, n in zip(first, data.graphs.n_node, strict=True)]
  return [whole[p, p] for p in parts], [data.graphs.nodes[p] for p in parts]


def test_order_of_nodes_does_not_matter(variables):
  rng = np.random.default_rng(0)
  orders = [rng.permutation(n) for n in DATA.graphs.n_node]
  adjacencies, features = dense_graphs(DATA)
  permuted = from_adjacencies(
    [a[np.ix_(o, o)] for a, o in zip(adjacencies, orders, strict=True)],
    [x[o] for x, o in zip(features, orders, strict=True)],
    DATA.labels,
  )
  expected = by_graph(variables, make_batch())
  assert np.ptp(expected, axis=0).min() > 1e-3  # the graphs are told apart
  np.testing.assert_allclose(by_graph(variables, make_batch(permuted)), expected, **CLOSE)


# One row group or two, rows longer than any graph, and slots for a batch twice as large.
LAYOUTS = {
  "longer rows": {"lengths": (40,)},
  "two row groups": {"lengths": (6, 16)},
  "more padding": {"batches": (EVERYONE, np.tile(EVERYONE, 2))},
  "another order": {"batches": (EVERYONE[::-1].copy(),), "lengths": (11,)},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@every_layout
def test_layout_does_not_matter(variables, layout):
  expected = by_graph(variables, make_batch())
  np.testing.assert_allclose(by_graph(variables, make_batch(**layout)), expected, **CLOSE)


@every_layout
def test_layout_does_not_matter_in_training(variables, layout):
  expected, got = train_pass(variables, make_batch()), train_pass(variables, make_batch(**layout))
  chex.assert_trees_all_close(got, expected, rtol=2e-3, atol=2e-4)


def test_splitting_a_batch_does_not_matter(variables):
  pieces = make_batches(batches=(EVERYONE[:2], EVERYONE[2:6], EVERYONE[6:]))
  np.testing.assert_allclose(
    by_graph(variables, *pieces), by_graph(variables, make_batch()), **CLOSE
  )


def test_what_padding_slots_hold_does_not_matter(variables):
  batch = make_batch(lengths=(6, 16))
  nodes, edge_mask = batch.graphs.nodes, batch.edge_mask
  poison = lambda x, mask: jnp.where(mask[:, None], x, 17.0)
  poisoned = batch._replace(
    graphs=batch.graphs._replace(
      nodes=nodes | {"features": poison(nodes["features"], nodes["mask"])}
    ),
    encoding=poison(batch.encoding, nodes["mask"]),
  )
  assert not edge_mask.all()
  chex.assert_trees_all_close(train_pass(variables, poisoned), train_pass(variables, batch))
  np.testing.assert_array_equal(evaluate(variables, poisoned), evaluate(variables, batch))


def symmetric_graphs():
  """Graphs with repeated eigenvalues: a ring, a star, a complete graph, two equal components."""
  ring = np.roll(np.eye(8), 1, 0) + np.roll(np.eye(8), -1, 0)
  star = np.zeros((7, 7))
  star[0, 1:] = star[1:, 0] = 1
  pair = np.kron(np.eye(2), 1 - np.eye(3))
  adjacencies = [ring, star, 1 - np.eye(5), pair]
  rng = np.random.default_rng(3)
  return from_adjacencies(adjacencies, [rng.normal(size=(len(a), 5)) for a in adjacencies], [0] * 4)


@pytest.mark.parametrize("change", ["signs", "basis"])
def test_choice_of_eigenvectors_does_not_matter(variables, change):
  data = symmetric_graphs()
  spectra = laplacian_spectra(data.graphs)
  rng = np.random.default_rng(4)
  first = second = rotated = 0
  vectors = []
  for n in data.graphs.n_node:
    e = spectra.eigenvalues[first : first + n]
    u = spectra.eigenvectors[second : second + n * n].reshape(n, n).copy()
    if change == "signs":
      u *= rng.choice([-1, 1], n)
    else:
      for value in np.unique(e.round(8)):
        space = np.flatnonzero(abs(e - value) < 1e-6)
        u[:, space] @= np.linalg.qr(rng.normal(size=(len(space), len(space))))[0]
        rotated += len(space) > 1
    vectors.append(u.ravel())
    first, second = first + n, second + n * n
  assert change == "signs" or rotated >= 5
  other = Spectra(spectra.eigenvalues, np.concatenate(vectors))
  assert abs(other.eigenvectors - spectra.eigenvectors).max() > 0.1
  np.testing.assert_allclose(
    by_graph(variables, make_batch(data, (np.arange(4),), spectra=other)),
    by_graph(variables, make_batch(data, (np.arange(4),))),
    **CLOSE,
  )


def test_raw_eigenvalues_as_filter_give_the_laplacian():
  """With g = e the filter on an edge is the Laplacian's entry there: -1."""
  batch = make_batch(lengths=(6, 16))
  values, start, found = np.asarray(batch.encoding[:, 0]), 0, []
  for products in batch.products:
    rows, _, length = products.shape
    g = values[start : start + rows * length].reshape(rows, length)
    found.append(np.einsum("rul,rl->ru", products, g).ravel())
    start += rows * length
  found = np.concatenate(found)
  expected = np.zeros_like(found)
  expected[batch.product_of[batch.edge_mask]] = -1.0
  np.testing.assert_allclose(found, expected, atol=1e-5)


@functools.partial(jax.jit, static_argnames="train")
def softmax_of(variables, batch, train):
  """The weights of the edges, and the logits that they are the softmax of."""
  _, seen = MODEL.apply(
    variables, batch, train=train, capture_intermediates=True,
    mutable=["intermediates", "batch_stats"],
  )  # fmt: skip
  seen = seen["intermediates"]
  return seen["edge_softmax"][0], seen["filter_encoder"]["__call__"][0][batch.twin]


@pytest.mark.parametrize("factor", [1, 30, 1e4])
@pytest.mark.parametrize("train", [False, True])
def test_edge_softmax(variables, train, factor):
  batch = make_batch()
  graphs, slots = batch.graphs, len(batch.encoding)
  weights, logits = softmax_of(loud(variables, factor), batch, train)
  assert not weights[~graphs.edges["mask"]].any()
  total = segment_sum(weights, graphs.receivers, slots)
  degree = segment_sum(graphs.edges["mask"].astype(int), graphs.receivers, slots)
  assert (degree == 1).any() and ((degree == 0) & graphs.nodes["mask"]).any()
  np.testing.assert_allclose(
    total, np.broadcast_to(degree[:, None] > 0, total.shape), rtol=1e-5, atol=0
  )
  single = graphs.edges["mask"] & (degree[graphs.receivers] == 1)
  np.testing.assert_allclose(weights[single], 1.0, rtol=1e-5)
  if factor < 1e4:
    expected = edge_softmax(logits, graphs.receivers, slots, graphs.edges["mask"])
    np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-6)


def loud(variables, factor):
  """The same network with filters `factor` times as large before the softmax."""
  filters = variables["params"]["filter_encoder"]
  norm = {name: factor * value for name, value in filters["norm_2"].items()}
  params = variables["params"] | {"filter_encoder": filters | {"norm_2": norm}}
  return variables | {"params": params}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_large_filters_keep_their_gradient(variables):
  """Sums of exponentials span float32's range; their squares, in a gradient, would not."""
  batch, variables = make_batch(), loud(variables, 30)
  assert 100 < softmax_of(variables, batch, True)[1].max() < 140
  _, got, _ = train_pass(variables, batch)
  with jax.enable_x64(True):
    _, expected, _ = train_pass(*jax.tree.map(double, (variables, batch)))
  size = max(abs(leaf).max() for leaf in jax.tree.leaves(expected))
  for (path, want), have in zip(
    jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True
  ):
    atol = 5e-3 * max(abs(want).max(), 1e-2 * size)
    np.testing.assert_allclose(have, want, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def double(x):
  return jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x


@pytest.mark.parametrize("factor", [1e2, 1e8])
def test_enormous_filters_stay_finite(variables, factor):
  chex.assert_tree_all_finite(train_pass(loud(variables, factor), make_batch()))
  assert np.isfinite(by_graph(loud(variables, factor), make_batch())).all()


def test_graphs_without_edges_stay_finite(variables):
  rng = np.random.default_rng(0)
  lonely = from_adjacencies(
    [np.zeros((3, 3)), np.zeros((1, 1)), random_adjacency(rng, 6, 0.8)],
    [rng.normal(size=(n, 5)) for n in (3, 1, 6)],
    [0, 1, 2],
  )
  for ids in (np.arange(3), np.arange(2), np.zeros(0, np.int64)):
    batch = make_batches(lonely, (np.arange(3), ids))[1]
    chex.assert_tree_all_finite(train_pass(variables, batch))
    assert np.isfinite(evaluate(variables, batch)).all()


def test_empty_batch_leaves_running_statistics_alone(variables):
  empty = make_batches(batches=(EVERYONE, np.zeros(0, np.int64)))[1]
  value, gradient, state = train_pass(variables, empty)
  assert value == 0 and not any(g.any() for g in jax.tree.leaves(gradient))
  chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])


def test_vmap_over_clients_is_the_loop():
  clients = make_batches(batches=(EVERYONE[:4], EVERYONE[4:]))
  starts = [NOISY.init(jax.random.key(i), clients[0]) for i in range(2)]
  keys = jax.random.split(jax.random.key(5), 2)

  def one(variables, batch, key):
    def loss(params):
      r, state = NOISY.apply(
        variables | {"params": params}, batch, train=True, mutable=["batch_stats"],
        rngs={"dropout": key},
      )  # fmt: skip
      return jnp.sin(r).sum(), (r, state)

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])

  stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  together = jax.jit(jax.vmap(one))(stack(starts), stack(clients), keys)
  alone = jax.jit(one)
  apart = stack([alone(s, c, k) for s, c, k in zip(starts, clients, keys, strict=True)])
  chex.assert_trees_all_close(together, apart, rtol=1e-3, atol=1e-4)


def test_dropout_draws_from_its_key_in_training_only(variables):
  batch = make_batch()

  @jax.jit
  def run(key):
    stats = ["batch_stats"]
    train = NOISY.apply(variables, batch, train=True, rngs={"dropout": key}, mutable=stats)[0]
    return train, NOISY.apply(variables, batch, rngs={"dropout": key})

  (first, evaluated), (again, _), (other, same) = map(run, map(jax.random.key, (0, 0, 1)))
  np.testing.assert_array_equal(first, again)
  assert abs(first - other).max() > 1e-3
  np.testing.assert_array_equal(evaluated, same)
