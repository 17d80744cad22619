"""Properties of ThanoRA's preview, ranks, blocks and regulariser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.adapters import low_rank
from jaxmethods.experiments.thanora import config as thanora_config, rows as thanora_rows
from jaxmethods.methods import thanora

IN, OUT = 10, 8


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


entropies = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(entropies=entropies, extra=st.integers(0, 60), tau=st.floats(0.01, 10.0))
def test_ranks_use_the_budget(entropies, extra, tau):
  rank = len(entropies) + 1 + extra
  ranks, shared = thanora.allocate(entropies, rank, tau)
  assert ranks.sum() + shared == rank
  assert shared == rank // (len(entropies) + 1)
  assert ranks.min() >= 1
  # More entropy never means less, but for the one unit that keeps a task alive.
  for i, h in enumerate(entropies):
    for j, other in enumerate(entropies):
      if h > other:
        assert ranks[i] >= ranks[j] - 1
  equal, _ = thanora.allocate([0.4] * len(entropies), rank, tau)
  assert equal.max() - equal.min() <= 1


def test_temperature():
  hot, _ = thanora.allocate([0.2, 0.9, 0.5], 40, 1e6)
  assert hot.max() - hot.min() <= 1
  cold, shared = thanora.allocate([0.2, 0.9, 0.5], 40, 1e-3)
  np.testing.assert_array_equal(cold, [1, 40 - shared - 2, 1])
  alone, shared = thanora.allocate([0.2, 0.9], 9, 0.1, cooperative=False)
  assert shared == 0
  assert alone.sum() == 9


@pytest.mark.parametrize(("rank", "tau", "said"), [(2, 0.1, "too small"), (8, 0.0, "temperature")])
def test_impossible_budgets(rank, tau, said):
  with pytest.raises(ValueError, match=said):
    thanora.allocate([0.5, 0.5], rank, tau)


def test_entropy():
  flat = thanora.spectral_entropy(jnp.ones(7))
  np.testing.assert_allclose(flat, 1, rtol=1e-6)
  assert thanora.spectral_entropy(jnp.array([3.0, 0, 0])) == 0
  assert thanora.spectral_entropy(jnp.zeros(4)) == 0
  assert thanora.spectral_entropy(jnp.ones(1)) == 0
  values = jnp.array([3.0, 2.0, 0.5])
  np.testing.assert_allclose(
    thanora.spectral_entropy(10 * values), thanora.spectral_entropy(values), rtol=1e-5
  )
  squared = thanora.spectral_entropy(values, "sv2")
  np.testing.assert_allclose(squared, thanora.spectral_entropy(values**2), rtol=1e-6)
  assert squared < thanora.spectral_entropy(values)


def moment(x, mask=None, parts=1):
  total = thanora.no_inputs(x.shape[-1])
  masks = [None] * parts if mask is None else jnp.split(mask, parts)
  for part, of in zip(jnp.split(x, parts), masks, strict=True):
    total = thanora.add_inputs(total, part, of)
  return thanora.second_moment(total)


def test_streaming_moments():
  x = draw(12, 5, IN)
  whole = moment(x)
  flat = x.reshape(-1, IN)
  np.testing.assert_allclose(whole, flat.T @ flat / 60, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(moment(x[::-1], parts=4), whole, rtol=1e-4, atol=1e-5)
  mask = draw(12, 5, seed=1) > 0
  padded = jnp.where(mask[..., None], x, 1e6)
  real = x[mask]
  np.testing.assert_allclose(
    moment(padded, mask, 3), real.T @ real / len(real), rtol=1e-4, atol=1e-5
  )
  assert not thanora.second_moment(thanora.no_inputs(3)).any()


def test_damping_makes_every_moment_invertible():
  x = draw(2, IN)  # two inputs: rank-deficient
  for c in (moment(x), jnp.zeros((IN, IN))):
    fixed = thanora.damped(c)
    error = jnp.linalg.norm(fixed @ jnp.linalg.inv(fixed) - jnp.eye(IN))
    assert error < 0.05
    parts = thanora.decompose(draw(IN, OUT, seed=2), fixed)
    assert all(jnp.isfinite(x).all() for x in parts)


def started(ranks=(2, 3), shared=2, **options):
  kernel = draw(IN, OUT, seed=3)
  parts = [
    thanora.decompose(kernel, thanora.damped(moment(draw(50, IN, seed=t)))) for t in range(2)
  ]
  blocks = thanora.task_blocks(parts, ranks, gain=0.5)
  rank = sum(ranks) + shared
  layer = thanora.start_layer(jax.random.key(0), kernel, blocks, rank, scale=2.0, **options)
  return kernel, parts, layer


def test_a_block_of_full_rank_is_the_weight():
  kernel, parts, _ = started()
  a, b = thanora.oriented_block(parts[0], OUT, gain=1.0)
  np.testing.assert_allclose(a.T @ b, kernel, atol=1e-5)
  last, _ = thanora.oriented_block(parts[0], 2, which="last")
  np.testing.assert_allclose(last, thanora.oriented_block(parts[0], OUT)[0][-2:], rtol=1e-5)
  with pytest.raises(ValueError, match="rank 9 of a matrix with 8 components"):
    thanora.oriented_block(parts[0], 9)


def test_nothing_changes_at_the_start():
  kernel, _, layer = started()
  x = draw(6, IN, seed=9)
  y = x @ layer.kernel + low_rank.low_rank(x, layer.a, layer.b, 2.0)
  np.testing.assert_allclose(y, x @ kernel, atol=1e-5)
  assert jnp.abs(layer.kernel - kernel).max() > 0.1
  common = layer.owner == thanora.COOPERATIVE
  assert not layer.b[common].any()
  assert layer.a[common].any()
  kernel, _, layer = started(compensate=False)
  np.testing.assert_array_equal(layer.kernel, kernel)
  assert not layer.b.any()


@pytest.mark.parametrize(("ranks", "shared"), [((12, 3), 2), ((OUT + 1, OUT + 4), 0)])
def test_a_task_of_more_rows_than_components(ranks, shared):
  """The whole decomposition is kept; the rest are rows of zeros that get no gradient."""
  kernel, parts, layer = started(ranks, shared)
  assert len(layer.owner) == len(layer.a) == sum(ranks) + shared
  for task, rank in enumerate(ranks):
    rows = layer.owner == task
    assert rows.sum() == min(rank, OUT)
    a, b = thanora.oriented_block(parts[task], min(rank, OUT), 0.5)
    np.testing.assert_allclose(layer.a[rows].T @ layer.b[rows], a.T @ b, atol=1e-5)
  rest = layer.owner == thanora.NOBODY
  assert rest.sum() == sum(max(rank - OUT, 0) for rank in ranks)
  assert not layer.a[rest].any()
  assert not layer.b[rest].any()
  x = draw(6, IN, seed=9)

  def loss(ab):
    y = x @ layer.kernel + low_rank.low_rank(x, *ab, 2.0)
    return (y**2).sum() + thanora.cross_talk(*ab, layer.owner)

  np.testing.assert_allclose(
    x @ layer.kernel + low_rank.low_rank(x, layer.a, layer.b, 2.0), x @ kernel, atol=1e-4
  )
  for gradient in jax.grad(loss)((layer.a, layer.b)):
    assert not gradient[rest].any()


def test_merging_is_adding_and_blocks_have_no_order():
  _, _, layer = started()
  x = draw(6, IN, seed=9)
  merged = layer.kernel + 2.0 * layer.a.T @ layer.b
  y = x @ layer.kernel + low_rank.low_rank(x, layer.a, layer.b, 2.0)
  np.testing.assert_allclose(x @ merged, y, atol=1e-5)
  order = np.random.default_rng(0).permutation(len(layer.owner))
  turned = low_rank.low_rank(x, layer.a[order], layer.b[order], 2.0)
  np.testing.assert_allclose(x @ layer.kernel + turned, y, atol=1e-5)


def blocks(ranks=(2, 3, 1), shared=2):
  rank = sum(ranks) + shared
  owner = jnp.asarray(thanora.owners(ranks, shared))
  return draw(rank, IN, seed=4), draw(rank, OUT, seed=5), owner


def double_sum(a, b, owner):
  total, tasks = 0.0, int(owner.max()) + 1
  for i in range(tasks):
    for j in range(i + 1, tasks):
      total += jnp.sum((a[owner == i] @ a[owner == j].T) ** 2)
      total += jnp.sum((b[owner == i] @ b[owner == j].T) ** 2)
  return total


def test_cross_talk():
  a, b, owner = blocks()
  value = thanora.cross_talk(a, b, owner)
  np.testing.assert_allclose(value, double_sum(a, b, owner), rtol=1e-4)
  parts = [thanora.cross_talk(a, b, owner, on) for on in ("A", "B")]
  np.testing.assert_allclose(value, sum(parts), rtol=1e-5)
  # The cooperative block does not count, and turning the rows inside a block changes nothing.
  common = (owner == thanora.COOPERATIVE)[:, None]
  np.testing.assert_allclose(thanora.cross_talk(a + 3 * common, b, owner), value, rtol=1e-5)
  rows = np.flatnonzero(owner == 1)
  turn = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0], jnp.float32)
  turned = thanora.cross_talk(a.at[rows].set(turn @ a[rows]), b.at[rows].set(turn @ b[rows]), owner)
  np.testing.assert_allclose(turned, value, rtol=1e-4)
  # One task, or orthogonal blocks: nothing to pay.
  assert thanora.cross_talk(a, b, jnp.zeros_like(owner)) == 0
  rank = len(owner)
  assert thanora.cross_talk(jnp.eye(rank, 20), jnp.eye(rank, 20), owner) == 0


def test_layers_of_a_stack_count_one_by_one():
  a, b, owner = blocks()
  stack = lambda x: jnp.stack([x, 2 * x])
  owners = jnp.stack([owner, owner])
  each = thanora.cross_talk(stack(a), stack(b), owners)
  alone = [thanora.cross_talk(k * a, k * b, owner) for k in (1, 2)]
  np.testing.assert_allclose(each, alone, rtol=1e-5)
  whole = thanora.subspace_penalty({"x": {"a": stack(a), "b": stack(b)}}, {"x": owners})
  np.testing.assert_allclose(whole, each.mean(), rtol=1e-5)


def test_centred_moments_are_covariances():
  x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (50, 4)), jnp.float32)
  moment = thanora.no_inputs(4, centred=True)
  for part in (x[:20], x[20:]):
    moment = thanora.add_inputs(moment, part)
  np.testing.assert_allclose(thanora.second_moment(moment), np.cov(x.T, bias=True), atol=2e-5)
  plain = thanora.add_inputs(thanora.no_inputs(4), x)
  np.testing.assert_allclose(thanora.second_moment(plain), x.T @ x / 50, rtol=1e-5)


def test_weights_by_share():
  heights = [0.2, 0.6]
  np.testing.assert_allclose(thanora.task_weights(heights, 0.1, "share"), [0.25, 0.75])
  np.testing.assert_allclose(
    thanora.task_weights([2.0, 6.0], 0.1, "share"), [0.25, 0.75]
  )  # a common factor changes nothing
  for form in ("softmax", "share"):
    np.testing.assert_allclose(thanora.task_weights([0.5, 0.5], 0.1, form), [0.5, 0.5])
  np.testing.assert_allclose(thanora.task_weights([0.0, 0.0], 0.1, "share"), [0.5, 0.5])
  assert thanora.allocate(heights, 16, weights="share")[0].tolist() == [3, 8]


def test_dropout_leaves_pretrained_weights_alone():
  config = thanora_config.Config(rank=16, alpha=32.0)
  made = thanora_config.rows(config)
  rates = {name: thanora_rows.dropout_of(row) for name, row in made.items()}
  assert rates["thanora"] == rates["corda"] == 0.0
  assert rates["lora"] == rates["spr_only"] == config.dropout
  free = dataclasses.replace(config, compensated_dropout=True)
  assert thanora_rows.dropout_of(free) == config.dropout
  assert thanora_rows.gain_of(made["thanora"]) == 1 / 2
  assert thanora_rows.gain_of(made["scaled_gain"]) == 1 / 4
