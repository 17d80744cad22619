"""Properties of GGEUR's statistics, shapes and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods import ggeur

C, D = 3, 6


def examples(seed=0, n=60):
  rng = np.random.default_rng(seed)
  y = rng.integers(0, C, n)
  x = rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) + 3 * y[:, None]
  return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def stacked_moments(x, y, owner, clients):
  one = lambda k: ggeur.class_moments(x, y, C, owner == k)
  return jax.tree.map(lambda *a: jnp.stack(a), *map(one, range(clients)))


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_aggregation_equals_the_pooled_moments(clients):
  with jax.enable_x64(True):
    x, y = examples()
    x = x.astype(jnp.float64)
    owner = jnp.asarray(np.random.default_rng(1).integers(0, clients, len(y)))
    # The last client has one example of class 0, the first none of class 1.
    owner = jnp.where((y == 1) & (owner == 0), clients - 1, owner)
    pooled = ggeur.aggregate(stacked_moments(x, y, owner, clients))
    whole = ggeur.class_moments(x, y, C)
    np.testing.assert_array_equal(pooled.counts, whole.counts)
    np.testing.assert_allclose(pooled.mean, whole.mean, atol=1e-10)
    np.testing.assert_allclose(pooled.covariance, whole.covariance, atol=1e-10)
    # Invariant to a shift of all embeddings; the trace is the mean squared distance.
    shifted = ggeur.class_moments(x + 7.0, y, C)
    np.testing.assert_allclose(shifted.covariance, whole.covariance, atol=1e-9)
    spread = [((x[y == c] - x[y == c].mean(0)) ** 2).sum(1).mean() for c in range(C)]
    np.testing.assert_allclose(jnp.trace(whole.covariance, axis1=1, axis2=2), spread, rtol=1e-9)


def test_moments_of_absent_and_single_examples_are_finite():
  x, y = examples()
  moments = ggeur.class_moments(x, y, C, (y == 0) & (jnp.cumsum(y == 0) == 1))
  np.testing.assert_array_equal(moments.counts, [1, 0, 0])
  assert all(np.isfinite(part).all() for part in moments)
  np.testing.assert_array_equal(moments.covariance, 0)
  shape = ggeur.geometric_shape(moments.covariance)
  np.testing.assert_array_equal(shape.eigenvalues, 0)


def test_what_is_shared():
  x, y = examples(n=9)
  moments = ggeur.class_moments(x, y, C)
  kept = ggeur.share(moments, min_count=int(moments.counts.min()) + 1)
  rare = int(moments.counts.argmin())
  assert kept.counts[rare] == 0
  np.testing.assert_array_equal(kept.mean[rare], 0)
  np.testing.assert_array_equal(kept.covariance[rare], 0)
  noisy = ggeur.share(moments, noise=0.1, key=jax.random.key(0))
  np.testing.assert_allclose(noisy.covariance, noisy.covariance.mT)
  assert not np.allclose(noisy.mean, moments.mean)
  with pytest.raises(ValueError, match="key"):
    ggeur.share(moments, noise=0.1)


def test_nothing_but_moments_leaves_a_client():
  x, y = examples()
  upload = ggeur.share(ggeur.class_moments(x, y, C))
  assert [leaf.shape for leaf in jax.tree.leaves(upload)] == [(C,), (C, D), (C, D, D)]


def test_guided_set_is_the_shortest_prefix_of_the_largest_clients():
  counts = jnp.array([[5, 0], [3, 4], [2, 6], [0, 0]])
  np.testing.assert_array_equal(ggeur.guided_set(counts, 1.0), counts > 0)
  expected = np.array([[True, False], [True, True], [False, True], [False, False]])
  np.testing.assert_array_equal(ggeur.guided_set(counts, 0.8), expected)


def test_shape_follows_rotation_and_scale():
  x, y = examples()
  rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0], jnp.float32)
  shape = ggeur.geometric_shape(ggeur.class_moments(x, y, C).covariance)
  turned = ggeur.geometric_shape(ggeur.class_moments(2 * x @ rotation, y, C).covariance)
  np.testing.assert_allclose(turned.eigenvalues, 4 * shape.eigenvalues, rtol=1e-3, atol=1e-4)
  for c in range(C):
    similarity = ggeur.shape_similarity(rotation.T @ shape.eigenvectors[c], turned.eigenvectors[c])
    np.testing.assert_allclose(similarity, D, rtol=1e-2)
  with pytest.raises(ValueError, match="top_scaling"):
    ggeur.geometric_shape(jnp.eye(2)[None], "largest")


@pytest.mark.parametrize("scale", ["sqrt", "lambda"])
def test_generated_embeddings_have_the_promised_moments(scale):
  values = jnp.array([4.0, 1.0, 0.0])
  vectors = jnp.asarray(np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0], jnp.float32)
  epsilon = jax.random.normal(jax.random.key(0), (50_000, 3))
  new = ggeur.perturb(jnp.ones(3), epsilon, values, vectors, scale)
  power = values if scale == "sqrt" else values**2
  np.testing.assert_allclose(new.mean(0), 1.0, atol=0.1)
  np.testing.assert_allclose(jnp.cov(new.T), (vectors * power) @ vectors.T, atol=0.4)
  # Nothing leaves the span of the eigenvectors whose eigenvalue is not zero.
  np.testing.assert_allclose((new - 1.0) @ vectors[:, 2], 0, atol=1e-5)
  with pytest.raises(ValueError, match="scale"):
    ggeur.perturb(jnp.ones(3), epsilon, values, vectors, "root")


@pytest.mark.parametrize(("total", "wanted"), [(1, 1), (7, 7), (40, 25), (10**6, 30), (3, 20)])
def test_distinct_integers(total, wanted):
  drawn = ggeur.distinct_integers(jax.random.key(total), jnp.int32(total), 30, wanted)
  first = np.asarray(drawn)[:wanted]
  assert (drawn >= 0).all()
  assert (drawn < total).all()
  assert len(set(first.tolist())) == wanted or total < wanted


def test_distinct_integers_prefer_none():
  draw = lambda key: ggeur.distinct_integers(key, jnp.int32(6), 4, 4)
  drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), 6000))
  share = np.bincount(np.asarray(drawn).ravel(), minlength=6) / len(drawn)
  np.testing.assert_allclose(share, 4 / 6, atol=0.03)


@pytest.mark.parametrize("target", [10, 45])
def test_single_domain_counts(target):
  x, y = examples(n=40)
  mask = jnp.arange(40) < 37
  mask &= y != 2  # a class that this client lacks
  shape = ggeur.geometric_shape(ggeur.class_moments(x, y, C).covariance)
  run = lambda seed: ggeur.enlarge(
    jax.random.key(seed), x, y, mask, shape, target=target, rows=max(target, 40)
  )
  made = run(0)
  for c in range(C):
    own = np.asarray(x)[np.asarray((y == c) & mask)]
    expected = max(target, len(own)) if len(own) else 0
    assert made.mask[c].sum() == expected
    np.testing.assert_array_equal(made.x[c][: len(own)], own)
    np.testing.assert_array_equal(made.x[c][~np.asarray(made.mask[c])], 0)
  np.testing.assert_array_equal(run(0).x, made.x)
  # With enough of every class nothing is drawn.
  assert np.array_equal(run(1).x, made.x) == (target == 10)


def test_zero_eigenvalues_give_copies_of_the_anchors():
  x, y = examples(n=20)
  flat = ggeur.Shape(jnp.zeros((C, D)), jnp.broadcast_to(jnp.eye(D), (C, D, D)))
  made = ggeur.enlarge(
    jax.random.key(0), x, y, jnp.ones(20, bool), flat, target=30, rows=30
  )  # fmt: skip
  for c in range(C):
    rows = {tuple(row) for row in np.asarray(made.x[c]).tolist()}
    assert rows == {tuple(row) for row in np.asarray(x[y == c]).tolist()}


def test_across_domains():
  x, y = examples(n=40)
  mask = y != 2
  flat = ggeur.Shape(jnp.zeros((C, D)), jnp.broadcast_to(jnp.eye(D), (C, D, D)))
  prototypes = 100.0 + jnp.arange(2 * C * D, dtype=jnp.float32).reshape(2, C, D)
  available = jnp.array([[True, False, True], [True, False, False]])
  options = {
    "target": 60, "own_samples": 20, "own_per_anchor": 5, "prototype_samples": 40, "rows": 60,
  }  # fmt: skip
  made = ggeur.enlarge_across_domains(
    jax.random.key(0), x, y, mask, flat, prototypes, available, **options
  )
  np.testing.assert_array_equal(made.mask.sum(1), 60)
  generated = [np.asarray(made.x[c][int((y == c).sum()) :]) for c in range(2)]
  assert (generated[0] > 50).any()  # class 0: around both prototypes and around its own
  assert (generated[0] < 50).any()
  assert (generated[1] < 50).all()  # class 1: nobody else has it
  # Class 2: only the first prototype is there, and it is all that this client gets.
  np.testing.assert_array_equal(made.x[2], np.broadcast_to(prototypes[0, 2], (60, D)))

  few = ggeur.enlarge_across_domains(
    jax.random.key(0), x, y, mask, flat, prototypes, available, **(options | {"target": 5})
  )
  np.testing.assert_array_equal(few.mask.sum(1), 5)
  own = {tuple(row) for row in np.asarray(x[y == 0]).tolist()}
  assert len({tuple(row) for row in np.asarray(few.x[0][:5]).tolist()} & own) == 5

  nobody = jnp.zeros_like(available)
  alone = ggeur.enlarge_across_domains(
    jax.random.key(0), x, y, mask, flat, prototypes, nobody, **options
  )
  assert alone.mask[2].sum() == 0


def test_double_softmax_cannot_fall_below_its_floor():
  logits, labels = 1e3 * jnp.eye(4), jnp.arange(4)
  real = jnp.ones(4, bool)
  assert ggeur.cross_entropy(logits, labels, real) < 1e-6
  floor = np.log(1 + 3 / np.e)
  np.testing.assert_allclose(ggeur.cross_entropy(logits, labels, real, True), floor, rtol=1e-5)
