"""Properties of SPIDER's scores, masks and steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.methods import spider


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e4))
def test_scores(seed, scale):
  x = draw(6, 5, seed=seed)
  score = spider.normalised_magnitude(x)
  assert ((score > 0) & (score < 1)).all()
  signs = jnp.where(draw(6, 5, seed=seed + 1) > 0, 1, -1)
  np.testing.assert_allclose(spider.normalised_magnitude(scale * signs * x), score, atol=1e-5)
  order = jnp.argsort(jnp.abs(x).ravel())
  assert (jnp.diff(score.ravel()[order]) >= 0).all()
  mean = jnp.abs(x).mean()
  assert ((score > 0.5) == (jnp.abs(x) > mean)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_masks(seed):
  p = spider.pretrained_importance(draw(7, 5, seed=seed))
  g = spider.task_importance(draw(7, 5, seed=seed + 1))
  mask, chosen = spider.allocation(p, g), spider.selected(p, g)
  np.testing.assert_array_equal(mask > 0, p < g)
  assert ((mask >= 0) & (mask <= 1)).all()
  if chosen.any():
    assert mask.max() == 1
    assert mask[chosen].mean() <= 1


def test_a_constant_tensor_never_moves():
  g = spider.task_importance(draw(4, 3))
  for constant in (jnp.ones((4, 3)), jnp.full((1,), 0.3), -0.1 * jnp.ones(7)):
    p = spider.pretrained_importance(constant)
    assert jnp.isfinite(p).all()
    task = spider.task_importance(draw(*constant.shape, seed=3))
    assert not spider.allocation(p, task).any()
  # A gradient of one magnitude says nothing either.
  assert not spider.allocation(spider.pretrained_importance(draw(4, 3)), 0 * g).any()
  np.testing.assert_array_equal(spider.task_importance(jnp.full((3,), 2.0)), 0)


def test_zero_weights_are_trained_freely():
  gradient = draw(4, 5)
  mask = spider.soft(jnp.zeros((4, 5)), jnp.zeros((4, 5)), gradient)
  np.testing.assert_array_equal(mask, 1)


def problem(seed=0):
  rng = np.random.default_rng(seed)
  params = {"w": rng.normal(size=(6, 4)), "b": rng.normal(size=(4,))}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  x, y = draw(3, 20, 6, seed=seed + 1), draw(3, 20, 4, seed=seed + 2)
  loss = lambda p, x, y: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) - y) ** 2)
  return params, x, y, loss


def train(params, x, y, loss, steps=5, **options):
  """AdamW with or without the update after it; returns all parameters on the way."""
  optimiser = optax.adamw(0.05, weight_decay=0.0)
  every = options.get("update_every", 1)
  recompute = options.pop("recompute_importance", False)
  state = spider.start(params, recompute_importance=recompute, update_every=every)

  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(t, params, state, moments, x, y):
    gradients = jax.grad(loss)(params, x, y)
    updates, moments = optimiser.update(gradients, moments, params)
    tuned = optax.apply_updates(params, updates)
    return *spider.update(state, tuned, gradients, updates=t, **options), moments

  moments, path, masks = optimiser.init(params), [params], []
  for t in range(steps):
    params, state, mask, moments = step(t, params, state, moments, x[t % 3], y[t % 3])
    path.append(params)
    masks.append(mask)
  return path, masks, state


def test_what_is_not_selected_is_exactly_pretrained():
  params, *rest = problem()
  path, masks, _ = train(params, *rest)
  for now, mask in zip(path[1:], masks, strict=True):
    for name, mask_of in mask.items():
      frozen = mask_of == 0
      assert 0 < frozen.sum() < frozen.size
      np.testing.assert_array_equal(now[name][frozen], params[name][frozen])


def test_a_mask_of_ones_is_plain_adamw():
  params, *rest = problem()
  path, _, _ = train(params, *rest, rule=lambda theta0, p, s: jnp.ones_like(s))
  x, y, loss = rest
  optimiser = optax.adamw(0.05, weight_decay=0.0)

  @jax.jit
  def step(params, moments, x, y):
    updates, moments = optimiser.update(jax.grad(loss)(params, x, y), moments, params)
    return optax.apply_updates(params, updates), moments

  moments = optimiser.init(params)
  for t in range(5):
    params, moments = step(params, moments, x[t % 3], y[t % 3])
    jax.tree.map(np.testing.assert_array_equal, params, path[t + 1])


def test_options_that_change_nothing():
  whole = train(*problem())[0][-1]
  recomputed = train(*problem(), recompute_importance=True)[0][-1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, recomputed)
  path, masks, state = train(*problem(), update_every=2)
  assert state.mask is not None
  jax.tree.map(np.testing.assert_array_equal, masks[0], masks[1])
  assert any((masks[1][name] != masks[2][name]).any() for name in masks[1])
  # The first step is the same: its mask is due in any case.
  first = train(*problem(), steps=1)[0][-1]
  jax.tree.map(np.testing.assert_array_equal, path[1], first)


def test_the_first_mask_knows_only_this_gradient():
  params, x, y, loss = problem()
  _, masks, _ = train(params, x, y, loss, steps=1)
  gradients = jax.grad(loss)(params, x[0], y[0])
  expected = jax.tree.map(
    lambda w, g: spider.soft(w, spider.pretrained_importance(w), g), params, gradients
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), masks[0], expected)


def test_without_gradients_everything_returns_to_the_anchor():
  params, *_ = problem()
  state = spider.start(params)
  moved = jax.tree.map(lambda x: x + 1.0, params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  back, _, _ = spider.update(state, moved, zeros)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  # With a mask that is held in (0, 1) the deviation shrinks by it at every step.
  half = lambda theta0, p, s: jnp.full_like(s, 0.5)
  once, state, _ = spider.update(state, moved, zeros, rule=half)
  twice, _, _ = spider.update(state, once, zeros, rule=half)
  np.testing.assert_allclose(twice["w"] - params["w"], 0.25, rtol=1e-5)


def test_layers_of_a_stack_are_tensors_of_their_own():
  w, g = draw(2, 5, 4), draw(2, 5, 4, seed=1) * jnp.array([1.0, 100.0])[:, None, None]
  stacked, _, _ = spider.update(
    spider.start({"layers": {"w": w}}), {"layers": {"w": w + 1}}, {"layers": {"w": g}}
  )
  for i in range(2):
    alone, _, _ = spider.update(spider.start({"w": w[i]}), {"w": w[i] + 1}, {"w": g[i]})
    np.testing.assert_allclose(stacked["layers"]["w"][i], alone["w"], rtol=1e-6)


def test_many_seeds_at_once_equal_a_loop():
  w, g = draw(3, 5, 4), draw(3, 5, 4, seed=1)
  one = lambda w, g: spider.update(spider.start({"w": w}), {"w": w + 1}, {"w": g})[0]["w"]
  np.testing.assert_allclose(
    jax.vmap(one)(w, g), jnp.stack([one(*x) for x in zip(w, g, strict=True)]), rtol=1e-5
  )


def test_bad_input():
  params, *_ = problem()
  state = spider.start(params)
  with pytest.raises(ValueError, match=r"[Ss]truct|[Mm]ismatch|key"):
    spider.update(state, params, {"w": params["w"]})
  # NaN is not hidden behind a mask of 0: it reaches the parameters, and the loop stops at the loss.
  broken = jax.tree.map(lambda x: x * jnp.nan, params)
  new, _, _ = spider.update(state, broken, broken)
  assert all(jnp.isnan(x).all() for x in jax.tree.leaves(new))
  # Counters among the parameters stay what they are.
  with_step = params | {"step": jnp.int32(3)}
  new, state, _ = spider.update(spider.start(with_step), with_step, with_step)
  assert new["step"] == 3
  assert "step" not in state.anchor


def test_rival_masks():
  w, s = draw(6, 5), draw(6, 5, seed=1)
  frozen = spider.frozen_by_magnitude(w, 0.5)
  assert frozen.sum() == 15
  assert jnp.abs(w)[frozen].min() >= jnp.abs(w)[~frozen].max()
  mask = spider.by_gradient(0.2)(w, w, s)
  assert mask.sum() == 6
  assert jnp.abs(s)[mask == 1].min() >= jnp.abs(s)[mask == 0].max()
