"""Properties of LoRASculpt's masks and of its regulariser."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.adapters import adapter as core, low_rank
from jaxmethods.methods import lorasculpt

IN, OUT, RANK = 14, 10, 3


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layer(seed=0, stack=()):
  kernel = draw(*stack, IN, OUT, seed=seed)
  return kernel, draw(*stack, RANK, IN, seed=seed + 1), draw(*stack, RANK, OUT, seed=seed + 2)


@settings(max_examples=20, deadline=None)
@given(
  ratio=st.floats(0.05, 1.0),
  values=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=20, max_size=40),
)
def test_masks_are_exact_and_keep_the_largest(ratio, values):
  factor = np.array(values, np.float32)
  mask = np.asarray(lorasculpt.magnitude_mask(jnp.asarray(factor), ratio))
  assert mask.sum() == math.floor(ratio * factor.size)
  kept, dropped = np.abs(factor[mask]), np.abs(factor[~mask])
  if dropped.size:
    assert kept.min() >= dropped.max()
    # Ties are broken by position.
    tied = np.flatnonzero(np.abs(factor) == dropped.max())
    assert (np.diff(mask[tied].astype(int)) <= 0).all()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, math.nan])
def test_impossible_densities(ratio):
  with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\]"):
    lorasculpt.magnitude_mask(jnp.ones(8), ratio)


def test_nothing_kept_is_an_error():
  with pytest.raises(ValueError, match=r"keep_ratio 0.1 keeps none of 8 entries"):
    lorasculpt.magnitude_mask(jnp.ones(8), 0.1)


def test_a_stack_is_pruned_layer_by_layer():
  _, a, b = layer(stack=(2,))
  tree = {"layers": {"up": {"a": a, "b": b}}}
  masks = lorasculpt.magnitude_masks(tree, 0.3)
  one = lambda x: jnp.stack([lorasculpt.magnitude_mask(row, 0.3) for row in x])
  np.testing.assert_array_equal(masks["layers"]["up"]["a"], one(a))
  assert lorasculpt.free_entries(tree, 0.3) == sum(int(m.sum()) for m in jax.tree.leaves(masks))


def run(updates, prune_at, keep_ratio, steps=6):
  """Factors that an optimiser moves everywhere, and the masks, in one compiled step."""
  _, a, b = layer()
  tree = {"up": {"a": a, "b": b}}

  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(t, tree, masks):
    tree, masks = lorasculpt.sculpt(t, tree, masks, prune_at=prune_at, keep_ratio=keep_ratio)
    return tree, jax.tree.map(lambda x: x + updates, tree), masks

  masks, seen = lorasculpt.dense_masks(tree), []
  for t in range(steps):
    used, tree, masks = step(t, tree, masks)
    seen.append((used, masks))
  return seen


def test_masks_are_taken_once_and_hold():
  seen = run(0.5, prune_at=2, keep_ratio=0.25)
  assert all(mask.all() for _, masks in seen[:2] for mask in jax.tree.leaves(masks))
  masks = seen[2][1]
  for used, later in seen[2:]:
    jax.tree.map(np.testing.assert_array_equal, later, masks)
    jax.tree.map(lambda x, m: np.testing.assert_array_equal(x[~m], 0), used, masks)
  moved = jax.tree.map(lambda x, y, m: (x != y)[m].all(), seen[2][0], seen[3][0], masks)
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(("prune_at", "ratio"), [(2, 1.0), (99, 0.25)])
def test_without_pruning_it_is_lora(prune_at, ratio):
  free = run(0.5, prune_at=100, keep_ratio=1.0)
  other = run(0.5, prune_at, ratio)
  for (x, _), (y, _) in zip(free, other, strict=True):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_importance():
  kernel, _, _ = layer()
  m = lorasculpt.importance(kernel)
  assert ((m > 0) & (m <= 1)).all()
  order = jnp.argsort(jnp.abs(kernel).ravel())
  assert (jnp.diff(m.ravel()[order]) >= 0).all()
  np.testing.assert_allclose(lorasculpt.importance(7 * kernel), m, rtol=1e-5)
  assert (lorasculpt.importance(kernel, 2.0) > m).all()
  zeros = lorasculpt.importance(jnp.zeros((3, 2)))
  np.testing.assert_allclose(zeros, math.tanh(-1 / math.log(1e-15)), rtol=1e-6)
  assert not jax.grad(lambda k: lorasculpt.importance(k).sum())(kernel).any()


@pytest.mark.parametrize("stack", [(), (3,)])
def test_gradient_equals_autodiff_and_moves_no_kernel(stack):
  kernel, a, b = layer(stack=stack)

  def plain(kernel, a, b):
    axes = (-2, -1)
    weight = jnp.vectorize(lorasculpt.importance, signature="(i,o)->(i,o)")(kernel)
    return jnp.sqrt(jnp.sum((weight * jnp.einsum("...ri,...ro->...io", a, b)) ** 2, axes)).sum()

  ours = lambda *x: lorasculpt.conflict(*x).sum()
  np.testing.assert_allclose(ours(kernel, a, b), plain(kernel, a, b), rtol=1e-5)
  gradients = jax.grad(ours, argnums=(0, 1, 2))(kernel, a, b)
  expected = jax.grad(plain, argnums=(0, 1, 2))(kernel, a, b)
  for actual, wanted in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
  assert not gradients[0].any()
  # One after the other, and all at once.
  if stack:
    each = jnp.stack([lorasculpt.conflict(*x) for x in zip(kernel, a, b, strict=True)])
    np.testing.assert_allclose(lorasculpt.conflict(kernel, a, b), each, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lorasculpt.conflict)(kernel, a, b), each, rtol=1e-5)


def test_at_the_start_it_is_zero_with_zero_gradients():
  kernel, a, _ = layer()
  value, gradients = jax.value_and_grad(lorasculpt.conflict, argnums=(1, 2))(
    kernel, a, jnp.zeros((RANK, OUT))
  )
  assert value == 0
  assert all((g == 0).all() for g in gradients)
  everything_zero = lorasculpt.conflict(jnp.zeros((IN, OUT)), *layer()[1:])
  assert jnp.isfinite(everything_zero)


def test_homogeneous_and_blind_to_how_the_product_is_split():
  kernel, a, b = layer()
  value = lorasculpt.conflict(kernel, a, b)
  np.testing.assert_allclose(lorasculpt.conflict(kernel, 3 * a, b), 3 * value, rtol=1e-5)
  np.testing.assert_allclose(lorasculpt.conflict(kernel, a, -2 * b), 2 * value, rtol=1e-5)
  np.testing.assert_allclose(lorasculpt.conflict(kernel, 5 * a, b / 5), value, rtol=1e-5)


def test_nothing_of_the_kernels_size_is_kept_for_the_backward_pass():
  kernel, a, b = layer(stack=(2,))
  _, pullback = jax.vjp(functools.partial(lorasculpt.conflict, kernel), a, b)
  large = [x for x in jax.tree.leaves(pullback) if x.size >= kernel.size and x is not kernel]
  assert not [x for x in large if not np.array_equal(x, kernel)]
  # The program too: one layer at a time, so its temporaries do not grow with the number of layers.
  size = lambda n: (
    jax.jit(jax.grad(lambda a, b, k: lorasculpt.conflict(k, a, b).sum(), argnums=(0, 1)))
    .lower(*(jax.ShapeDtypeStruct((n, *shape), jnp.float32) for shape in (
      (4, 256), (4, 192), (256, 192)
    )))
    .compile().memory_analysis().temp_size_in_bytes
  )  # fmt: skip
  matrix = 256 * 192 * 4
  assert size(6) - size(2) < matrix


def test_density_of_products_of_random_masks():
  rng = np.random.default_rng(0)
  p, q, r, s_a, s_b = 1000, 1000, 2, 0.15, 0.2
  expected = lorasculpt.product_density(s_a, s_b, r)
  for _ in range(5):
    product = (rng.random((p, r)) < s_b).astype(int) @ (rng.random((r, q)) < s_a)
    deviation = abs((product > 0).mean() - expected)
    assert deviation < 0.1
  assert lorasculpt.density_bound(0.1, p, q, r) == pytest.approx(2 * math.exp(-5))
  assert lorasculpt.density_bound(0.0, p, q, r) == 1
  tree = {"x": {"a": jnp.eye(2, 5), "b": jnp.eye(2, 3)}}
  np.testing.assert_allclose(lorasculpt.update_density(tree), 2 / 15)


def test_published_counts():
  """LLaVA-1.5-7B and a VILA-like model: shapes alone."""

  def blocks(width, inner):
    shapes = {"attention": {k: (width, width) for k in ("query", "key", "value", "out")},
              "mlp": {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}}  # fmt: skip
    return {"layers": jax.tree.map(
      lambda s: {"kernel": jax.ShapeDtypeStruct((32, *s), jnp.bfloat16)},
      shapes, is_leaf=lambda s: isinstance(s, tuple),
    )}  # fmt: skip

  def count(params, rank):
    adapter = low_rank.lora(rank)
    tree = jax.eval_shape(lambda p: adapter.init(jax.random.key(0), p, "kernel"), params)
    return core.num_trainable(adapter, tree), tree

  llava = blocks(4096, 11008)
  for rank, wanted in ((16, 39_976_960), (32, 79_953_920), (64, 159_907_840)):
    assert count(llava, rank)[0] == wanted
  assert count(blocks(2560, 6912), 32)[0] == 50_069_504
  # About 7,995,392: each factor is rounded down by itself.
  assert abs(lorasculpt.free_entries(count(llava, 32)[1], 0.1) - 7_995_392) <= 2 * 7 * 32
