"""Properties of ACGKD's equations: limits, invariances, gradients, bad input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.graphs import batching
from jaxmethods.methods import acgkd
from jaxmethods.models.graph_classifier import GraphEncoder, batch_norm_gap
from tests.graphs.random_graphs import from_adjacencies

P, N, F = 5, 7, 3
SIZES = jnp.array([7, 2, 5, 4, 6])
THETA = jnp.linspace(-4, 4, 33)
uniform = lambda seed, shape: jax.random.uniform(jax.random.key(seed), shape)


def problem(seed=0, *, xi=1.0, directed=False, edge_form=False, slots=N):
  """Draws (pairs, weights, features) of random graphs; weights do not depend on the form."""
  keys = jax.random.split(jax.random.key(seed), 3)
  pairs = acgkd.draw_candidates(
    keys[0], SIZES, slots, xi=xi, directed=directed, edge_form=edge_form
  )
  place = jax.random.uniform(keys[1], (P, N, N))
  weights = place[jnp.arange(P)[:, None], pairs.source, pairs.target]
  features = jax.nn.softmax(jax.random.normal(keys[2], (P, N, F)))
  features = jnp.pad(features, ((0, 0), (0, slots - N), (0, 0)), constant_values=3.0)
  return pairs, weights, features


ENCODERS = {
  "gcn": GraphEncoder("gcn", 3, 8),
  "gin": GraphEncoder("gin", 3, 8),
  "projected": GraphEncoder("gcn", 3, 8, projection=6),
}


def variables_of(encoder):
  """Draws parameters, and running statistics that are not the neutral ones."""
  batch = acgkd.assemble(*problem(), SIZES)
  variables = encoder.init(jax.random.key(3), batch)
  moved = encoder.apply(variables, batch, train=True, mutable=["batch_stats"])[1]
  return {"params": variables["params"], **moved}


VARIABLES = {name: variables_of(encoder) for name, encoder in ENCODERS.items()}


# --- concrete -------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 3.0), st.sampled_from(["logistic", "gumbel"]))
def test_concrete_is_increasing_and_its_derivative_is_known(seed, temperature, noise):
  u = jnp.full_like(THETA, uniform(seed, ()))
  sample = lambda theta: acgkd.concrete(theta, u, temperature, noise)
  s, slope = jax.jvp(sample, (THETA,), (jnp.ones_like(THETA),))
  assert ((s >= 0) & (s <= 1)).all() and (jnp.diff(s) >= 0).all()
  np.testing.assert_allclose(slope, s * (1 - s) / temperature, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("noise", "share"),
  [("logistic", jax.nn.sigmoid), ("gumbel", lambda theta: 1 - jnp.exp(-jnp.exp(theta)))],
)
def test_concrete_share_of_edges(noise, share):
  draws = 20_000
  u = uniform(0, (draws, THETA.size))
  s = acgkd.concrete(jnp.broadcast_to(THETA, u.shape), u, 0.5, noise)
  np.testing.assert_allclose((s > 0.5).mean(0), share(THETA), atol=4 * 0.5 / draws**0.5)


def test_concrete_limits():
  u = uniform(1, THETA.shape)
  s = acgkd.concrete(THETA, u, 1e-6)
  np.testing.assert_allclose(s, jnp.round(s), atol=1e-6)
  extremes = acgkd.concrete(jnp.zeros(2), jnp.array([0.0, 1.0]), 0.5)
  assert jnp.isfinite(extremes).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_concrete_refuses_temperature(temperature):
  with pytest.raises(ValueError, match="temperature: must be positive"):
    acgkd.concrete(THETA, THETA, temperature)


def test_concrete_refuses_noise():
  with pytest.raises(ValueError, match="logistic or gumbel"):
    acgkd.concrete(THETA, THETA, 0.5, "normal")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: acgkd.concrete(THETA, THETA[:3], 0.5), "uniform: expected shape (33,), got (3,)"),
    (
      lambda: acgkd.concrete(THETA, THETA, jnp.ones(2)),
      "temperature: expected shape (), got (2,)",
    ),
    (
      lambda: acgkd.draw_candidates(jax.random.key(0), SIZES[None], N),
      "num_nodes: expected shape (P,), got (1, 5)",
    ),
    (
      lambda: acgkd.assemble(*problem(), SIZES[:2]),
      "num_nodes: expected shape (P=5,), got (2,)",
    ),
    (
      lambda: acgkd.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(3, int)),
      "labels: expected shape (P=4,), got (3,)",
    ),
    (
      lambda: acgkd.feature_entropy(jnp.zeros((4, 3, 2)), jnp.ones((4, 2), bool)),
      "mask: expected shape (P=4, N=3), got (4, 2)",
    ),
    (
      lambda: acgkd.antithetic_gradient(
        jnp.zeros((4, 3)), jnp.zeros((4, 3)), lambda e: (e, e.sum())
      ),
      "cross_entropy: expected shape (4,), got (4, 3)",
    ),
    (
      lambda: acgkd.distillation_loss(jnp.zeros((4, 3)), jnp.zeros((4, 2)), 2.0),
      "teacher_logits: expected shape (B=4, C=3), got (4, 2)",
    ),
    (lambda: acgkd.easy_to_hard(jnp.zeros((2, 2))), "complexity: expected shape (P,), got (2, 2)"),
    (
      lambda: acgkd.ascend(jnp.zeros(()), jnp.zeros(2), 0.1, 1.0),
      "gradient: expected shape (), got (2,)",
    ),
  ],
)
def test_wrong_shapes_are_named_in_one_line(call, message):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: acgkd.draw_candidates(jax.random.key(0), SIZES, 1), "max_nodes: must be at least 2"),
    (lambda: acgkd.curriculum_size(0, 10, 0.0), r"first_share: must be in \(0, 1\]"),
    (lambda: acgkd.curriculum_size(0, 10, 0.5, 0), "grow_epochs: must be positive"),
    (lambda: acgkd.inverse_temperature(9.0), r"tau: must be in \(1.0, 8.0\), got 9.0"),
  ],
)
def test_values_out_of_range(call, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    call()


def test_straight_through():
  soft, hard = uniform(0, (4,)), jnp.arange(4.0)
  value, gradient = jax.value_and_grad(
    lambda s: (acgkd.straight_through(s**2, hard) * jnp.arange(1.0, 5)).sum()
  )(soft)
  np.testing.assert_allclose(value, (hard * jnp.arange(1.0, 5)).sum(), rtol=1e-6)
  np.testing.assert_allclose(gradient, 2 * soft * jnp.arange(1.0, 5), rtol=1e-6)


# --- candidates -----------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(st.sampled_from([0.05, 0.3, 0.5, 1.0]), st.booleans(), st.integers(0, 99))
def test_candidates(xi, directed, seed):
  pairs, _, _ = problem(seed, xi=xi, directed=directed)
  all_pairs = SIZES * (SIZES - 1) // (1 if directed else 2)
  expected = np.maximum(1, np.floor(xi * np.asarray(all_pairs) + 0.5))
  np.testing.assert_array_equal(pairs.num_pairs, expected)
  for i, n in enumerate(SIZES):
    ends = np.stack([pairs.source[i], pairs.target[i]], 1)[np.asarray(pairs.mask[i])]
    assert len({tuple(pair) for pair in ends}) == len(ends) == expected[i]
    assert (ends < n).all()
    assert (ends[:, 0] != ends[:, 1]).all() if directed else (ends[:, 0] < ends[:, 1]).all()


def test_candidates_differ_between_seeds_and_graphs():
  first, second = (problem(seed, xi=0.5)[0] for seed in (0, 1))
  assert (first.source != second.source).any()


@pytest.mark.parametrize("xi", [0.0, -0.1, 1.01])
def test_xi_outside_its_range(xi):
  with pytest.raises(ValueError, match=r"xi: must be in \(0, 1\]"):
    acgkd.candidate_count(5, xi)


# --- one batch, two forms -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("directed", [False, True])
def test_dense_and_edge_form_agree(name, directed):
  """So do the gradients for weights and features, also with more padding."""
  encoder, variables = ENCODERS[name], VARIABLES[name]
  results = []
  for edge_form, slots in ((False, N), (True, N), (False, N + 3), (True, N + 3)):
    pairs, weights, features = problem(xi=0.6, directed=directed, edge_form=edge_form, slots=slots)

    @jax.jit
    def value(weights, features, pairs=pairs):
      batch = acgkd.assemble(pairs, weights, features, SIZES, directed=directed)
      pooled, gap = batch_norm_gap(encoder, variables, batch)
      return jnp.sin(pooled).sum() + gap, (pooled, gap)

    (_, out), gradients = jax.value_and_grad(value, (0, 1), has_aux=True)(weights, features)
    d_weights = np.zeros((P, N, N))
    for i, count in enumerate(pairs.num_pairs):
      ends = pairs.source[i, :count], pairs.target[i, :count]
      d_weights[i][*ends] = gradients[0][i, :count]
    assert not np.asarray(gradients[0])[~np.asarray(pairs.mask)].any()
    results.append((out, d_weights, gradients[1][:, :N]))
  first = results[0]
  # With other padding other candidates are drawn: gradients of the same padding are compared.
  chex.assert_trees_all_close(results[1], first, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(results[3], results[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_changes_nothing(name):
  encoder, variables = ENCODERS[name], VARIABLES[name]
  results = []
  for slots in (N, N + 4):
    pairs, weights, features = problem(xi=1.0, slots=slots)
    batch = acgkd.assemble(pairs, weights, features, SIZES)
    results.append(batch_norm_gap(encoder, variables, batch))
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_hard_graphs_equal_jraph_batches(name):
  """Dense layers on an adjacency of 0 and 1 equal sparse layers on the same graphs."""
  encoder, variables = ENCODERS[name], VARIABLES[name]
  pairs, weights, features = problem()
  hard = acgkd.harden(weights - 0.6)
  batch = acgkd.assemble(pairs, hard, features, SIZES)
  adjacency = np.asarray(batch.edges["weight"])
  np.testing.assert_array_equal(adjacency, adjacency.swapaxes(1, 2))
  assert not np.diagonal(adjacency, axis1=1, axis2=2).any()
  data = from_adjacencies(
    [a[:n, :n] for a, n in zip(adjacency, SIZES, strict=True)],
    [x[:n] for x, n in zip(np.asarray(features), SIZES, strict=True)],
    np.zeros(P),
  )
  (sparse,) = batching.batch_graphs(data, range(P))
  ours, theirs = (batch_norm_gap(encoder, variables, b) for b in (batch, sparse))
  np.testing.assert_allclose(ours[0], theirs[0][:P], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


# --- generation -----------------------------------------------------------------------------------


def test_batch_norm_gap_is_zero_where_the_statistics_agree():
  encoder, variables = ENCODERS["gcn"], VARIABLES["gcn"]
  batch = acgkd.assemble(*problem(), SIZES)
  one_layer = GraphEncoder("gcn", 2, 8)
  keep = lambda tree: {k: v for k, v in tree.items() if k in ("conv_0", "norm_0")}
  variables = {name: keep(tree) for name, tree in variables.items()}
  (seen,) = one_layer.apply(variables, batch, capture_intermediates=True)[1]["intermediates"][
    "conv_0"
  ]["__call__"]
  real = np.asarray(seen)[np.asarray(batch.nodes["mask"])]
  variables["batch_stats"] = {"norm_0": {"mean": real.mean(0), "var": real.var(0)}}

  def gap(features):
    nodes = {**batch.nodes, "features": features}
    return batch_norm_gap(one_layer, variables, batch._replace(nodes=nodes))[1]

  value, gradient = jax.value_and_grad(gap)(batch.nodes["features"])
  assert value < 1e-5 and jnp.isfinite(gradient).all()
  assert encoder.layers > one_layer.layers


def test_gap_at_exactly_zero_has_a_gradient():
  from jaxmethods.models import graph_classifier

  gradient = jax.grad(graph_classifier._norm)(jnp.zeros(4))
  np.testing.assert_array_equal(gradient, 0)


def test_a_teacher_without_batch_norm_has_no_gap():
  encoder = GraphEncoder("gin", 3, 8, batch_norm=False)
  batch = acgkd.assemble(*problem(), SIZES)
  variables = encoder.init(jax.random.key(0), batch)
  assert set(variables) == {"params"}
  assert batch_norm_gap(encoder, variables, batch)[1] == 0


def test_feature_entropy():
  mask = jnp.arange(N) < SIZES[:, None]
  uniform_rows = jnp.where(mask[..., None], 0.0, 5 * jnp.arange(F))
  assert acgkd.feature_entropy(uniform_rows, mask) == pytest.approx(np.log(F), rel=1e-6)
  certain = 1e4 * jax.nn.one_hot(jnp.zeros((P, N), int), F)
  value, gradient = jax.value_and_grad(acgkd.feature_entropy)(certain, mask)
  assert value == 0 and jnp.isfinite(gradient).all()


def test_estimator_is_zero_where_both_samples_agree():
  theta = jnp.full((P, 4), 30.0)
  seen = []

  def loss(edges):
    seen.append(edges)
    return edges.sum(-1), edges.sum()

  gradient = acgkd.antithetic_gradient(theta, uniform(0, theta.shape), loss)
  chex.assert_trees_all_equal(*seen)
  assert not gradient.any()


def test_estimator_samples_agree_between_the_thresholds():
  theta, u = THETA[None], uniform(4, (1, THETA.size))
  seen = []
  acgkd.antithetic_gradient(theta, u, lambda e: (seen.append(e), (e.sum(-1), e.sum()))[1])
  low, high = jax.nn.sigmoid(-theta), jax.nn.sigmoid(theta)
  between = (jnp.minimum(low, high) < u) & (u < jnp.maximum(low, high))
  np.testing.assert_array_equal((seen[0] == seen[1])[between], True)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.7])
def test_estimator_points_where_the_expected_loss_rises(theta):
  """One edge that costs 3: the mean estimate is 3 E[(E1 - E2) (U - 1/2)], of the slope's sign."""
  draws = 40_000
  u = uniform(2, (draws, 1))
  gradient = acgkd.antithetic_gradient(
    jnp.full((draws, 1), theta), u, lambda e: (3.0 * e[:, 0], jnp.zeros(())), 0.0
  )
  p = 1 / (1 + np.exp(-theta))
  # E1 - E2 = 1 above max(p, 1 - p), -1 below min(p, 1 - p), else 0.
  top, bottom = max(p, 1 - p), min(p, 1 - p)
  expected = 3 * ((1 - top**2) / 2 - (1 - top) / 2 - (bottom**2 / 2 - bottom / 2))
  assert gradient.mean() == pytest.approx(expected, abs=0.02)
  step = 1e-3
  rise = 3 * (1 / (1 + np.exp(-theta - step)) - 1 / (1 + np.exp(-theta + step)))
  assert np.sign(gradient.mean()) == np.sign(rise)


# --- curriculum -----------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 200), st.floats(0.01, 1.0), st.integers(1, 50))
def test_curriculum_grows_to_everything(num_graphs, first_share, grow):
  sizes = np.asarray(acgkd.curriculum_size(jnp.arange(2 * grow), num_graphs, first_share, grow))
  assert (np.diff(sizes) >= 0).all() and sizes[0] >= 1
  assert (sizes[grow:] == num_graphs).all()
  if first_share == 1:
    assert (sizes == num_graphs).all()


def test_easy_to_hard_keeps_ties_in_order():
  np.testing.assert_array_equal(acgkd.easy_to_hard(jnp.array([2.0, 1, 2, 1, 0])), [4, 1, 3, 0, 2])


# --- distillation ---------------------------------------------------------------------------------


def test_distillation_loss_of_equal_logits():
  logits = jax.random.normal(jax.random.key(0), (6, 3))
  loss = lambda s: acgkd.distillation_loss(s, logits + 4.0, 2.0)
  value, gradient = jax.value_and_grad(loss)(logits)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)
  shifted = acgkd.distillation_loss(2 * logits + jnp.arange(6)[:, None], logits, 2.0)
  np.testing.assert_allclose(shifted, acgkd.distillation_loss(2 * logits, logits, 2.0), rtol=1e-5)
  to_teacher = jax.grad(lambda t: acgkd.distillation_loss(2 * logits, t, 2.0))(logits)
  assert not to_teacher.any()


def test_distillation_loss_ignores_masked_graphs():
  logits = jax.random.normal(jax.random.key(1), (2, 6, 3))
  mask = jnp.arange(6) < 4
  expected = acgkd.distillation_loss(logits[0, :4], logits[1, :4], 3.0)
  changed = logits.at[:, 4:].mul(7.0)
  np.testing.assert_allclose(acgkd.distillation_loss(*changed, 3.0, mask), expected, rtol=1e-6)


@pytest.mark.parametrize("rho", [-3.0, 0.0, 2.0])
def test_ascent_raises_the_loss(rho):
  student, teacher = 3 * jax.random.normal(jax.random.key(2), (2, 6, 3))
  loss = lambda rho: acgkd.distillation_loss(student, teacher, acgkd.adversarial_temperature(rho))
  value, gradient = jax.value_and_grad(loss)(rho)
  assert loss(acgkd.ascend(rho, gradient, 1e-2, 1.0)) >= value
  assert acgkd.ascend(rho, gradient, 1e-2, 0.0) == rho


def test_temperature_stays_inside_its_bounds():
  tau = acgkd.adversarial_temperature(jnp.array([-10.0, 0.0, 10.0]), 1.0, 8.0)
  assert ((tau > 1) & (tau < 8)).all()
  back = acgkd.adversarial_temperature(acgkd.inverse_temperature(2.0))
  assert back == pytest.approx(2.0, rel=1e-6)


def test_reversal_schedule():
  r = acgkd.reversal(jnp.arange(20), 10)
  assert r[0] == 0 and (jnp.diff(r) >= 0).all()
  np.testing.assert_allclose(r[10:], 1)
