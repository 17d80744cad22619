"""The suite: the one step, posterior edits, penalties, masks, metrics; on a net of two linear layers."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.adapters import low_rank, selective as masks
from jaxmethods.errors import InputError
from jaxmethods.tuning import metrics, posterior, selective, suite, tuner as tuners

RATES = {"decoder": 0.02, "projector": 0.01, "adapter": 0.02, "adapter_b": 0.3}
STEPS = 12


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + nn.Dense(x.shape[-1], use_bias=False, name="gate")(jnp.tanh(x))


class Language(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name="head")(Layer(name="layers_0")(x))


class Net(nn.Module):
  """The paths of a multimodal model, around two linear layers."""

  @nn.compact
  def __call__(self, x):
    return Language(name="language")(nn.Dense(6, name="projector")(x))


MODEL = Net()
BATCH = {
  "x": jax.random.normal(jax.random.key(1), (10, 4)),
  "y": 3 * jax.random.normal(jax.random.key(2), (10, 3)),
}
PARAMS = MODEL.init(jax.random.key(0), BATCH["x"])["params"]


def loss(run, batch, key):
  del key
  return jnp.sum((run(batch["x"]) - batch["y"]) ** 2), jnp.float32(batch["y"].size)


def trained(tuner, steps=STEPS, rates=RATES, probe=BATCH, **options):
  """State after some steps, and the states before each."""
  optimiser = tuners.adamw(rates, tuner.rates, STEPS)
  state = tuners.init_state(tuner, optimiser, jax.random.key(3), PARAMS, probe)
  step = jax.jit(tuners.tuning_step(tuner, MODEL, optimiser, loss, **options))
  history = [state]
  for _ in range(steps):
    state, _ = step(state, BATCH)
    history.append(state)
  return state, history


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


# --- the step -------------------------------------------------------------------------------------


def test_what_is_frozen_stays_and_the_rest_learns():
  tuner = tuners.selected(suite.LAYERS)
  state, history = trained(tuner)
  assert same(state.tuner.frozen, history[0].tuner.frozen)
  assert set(state.tuner.frozen["language"]) == {"head"}
  before, after = (tuner.finalize(*s.tuner) for s in (history[0], state))
  assert same(before, PARAMS)
  run = lambda params: functools.partial(MODEL.apply, {"params": params})
  assert loss(run(after), BATCH, None)[0] < 0.9 * loss(run(before), BATCH, None)[0]
  again, _ = trained(tuner)
  assert same(state, again)


def test_the_schedule_is_optax_own_and_groups_have_their_rates():
  state, _ = trained(tuners.selected(suite.LAYERS), rates=RATES | {"projector": 0.02})
  schedule = optax.warmup_cosine_decay_schedule(1.0, 1.0, 0, STEPS)
  optimiser = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(lambda count: 0.02 * schedule(count))
  )
  params, frozen = tuners.split_params(PARAMS, suite.LAYERS)
  opt_state = optimiser.init(params)
  run = lambda params: functools.partial(
    MODEL.apply, {"params": tuners.together(params, frozen, {})}
  )
  gradient = jax.jit(jax.grad(lambda p: jnp.divide(*loss(run(p), BATCH, None))))
  for _ in range(STEPS):
    updates, opt_state = optimiser.update(gradient(params), opt_state, params)
    params = optax.apply_updates(params, updates)
  for ours, theirs in zip(
    jax.tree.leaves(state.tuner.trainable), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
  still, history = trained(tuners.selected(suite.LAYERS), rates=RATES | {"projector": 0.0})
  assert same(still.tuner.trainable["projector"], history[0].tuner.trainable["projector"])
  assert not same(still.tuner.trainable["language"], history[0].tuner.trainable["language"])
  with pytest.raises(ValueError, match="no learning rate for the group 'decoder'"):
    tuners.adamw({"projector": 1.0}, tuners.own_rates, 3).init(PARAMS)


def test_hooks_see_what_they_should():
  """`pre_step` comes before the forward pass, `post_step` sees gradients before and after clipping."""
  base = tuners.selected(suite.LAYERS)

  def init(key, params, probe):
    state = base.init(key, params, probe)
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    extra = {"norms": jnp.zeros(2), "before": zeros}
    return state._replace(extra=extra)

  def pre_step(step, trainable, frozen, extra):
    return jax.tree.map(lambda p: p + (step == 1), trainable), extra

  def post_step(step, gradients, before, trainable, frozen, extra):
    norms = jnp.stack([optax.tree.norm(gradients.raw), optax.tree.norm(gradients.clipped)])
    return jax.tree.map(lambda p: 2 * p, trainable), {"norms": norms, "before": before}

  tuner = base._replace(init=init, pre_step=pre_step, post_step=post_step)
  _, (start, one, two) = trained(tuner, 2, clip=0.5)
  raw, clipped = one.tuner.extra["norms"]
  assert raw > 1
  np.testing.assert_allclose(clipped, 0.5, rtol=1e-4)
  assert same(one.tuner.extra["before"], start.tuner.trainable)
  moved = jax.tree.map(lambda p: p + 1, one.tuner.trainable)
  assert same(two.tuner.extra["before"], moved)


def test_targets_that_match_nothing():
  with pytest.raises(InputError, match="matches no parameter path"):
    trained(tuners.selected("^vision/"), 0)


# --- posterior edits ------------------------------------------------------------------------------


def weights(seed=0, shape=(8, 6)):
  rng = np.random.default_rng(seed)
  before = rng.normal(size=shape)
  return jnp.asarray(before), jnp.asarray(before + 0.3 * rng.normal(size=shape))


def test_dare_keeps_the_mean():
  before, after = weights()
  kept = posterior.dare(before, after, jnp.zeros(before.shape, bool), 0.0)
  np.testing.assert_allclose(kept, after, rtol=1e-6)
  dropped = jax.random.bernoulli(jax.random.key(0), 0.7, (20000, *before.shape))
  mean = posterior.dare(before, after, dropped, 0.7).mean(0)
  np.testing.assert_allclose(mean, after, atol=0.03)
  with pytest.raises(InputError, match="dare: the rate must be in"):
    posterior.dare(before, after, dropped[0], 1.0)


@given(share=st.floats(0.01, 1.0))
@settings(max_examples=15, deadline=None)
def test_grafting_and_ties_of_one_update(share):
  before, after = weights()
  new = posterior.grafting(before, after, share)
  changed = np.asarray(new != before)
  assert changed.sum() == math.floor(share * before.size)
  np.testing.assert_array_equal(new[changed], after[changed])
  if changed.any() and not changed.all():
    distance = np.abs(after - before)
    assert distance[changed].min() >= distance[~changed].max()
  np.testing.assert_allclose(
    posterior.ties(before, (after - before)[None], share), new, rtol=1e-6, atol=1e-7
  )


def test_limits_of_the_edits():
  before, after = weights()
  np.testing.assert_array_equal(posterior.grafting(before, after, 0.0), before)
  np.testing.assert_array_equal(posterior.grafting(before, after, 1.0), after)
  np.testing.assert_allclose(posterior.interpolate(before, after, 1.0), after, rtol=1e-6)
  np.testing.assert_array_equal(posterior.interpolate(before, after, 0.0), before)
  # Updates that disagree: the sign of the sum wins, the other does not count.
  updates = jnp.stack([jnp.full((2, 2), 3.0), jnp.full((2, 2), -1.0)])
  np.testing.assert_array_equal(posterior.ties(jnp.zeros((2, 2)), updates, 1.0), 3.0)
  for call in (
    lambda: posterior.grafting(before, after, 1.1),
    lambda: posterior.ties(jnp.zeros((2, 2)), updates, 0.0),
    lambda: posterior.interpolate(before, after, -0.1),
    lambda: posterior.tailor(before, after, jnp.eye(6), 1.0),
  ):
    with pytest.raises(InputError, match="must be in"):
      call()


@pytest.mark.parametrize("block", [4, 128])
def test_tailor(block):
  before, after = weights()
  x = np.random.default_rng(1).normal(size=(200, 6)) @ np.random.default_rng(2).normal(size=(6, 6))
  hessian = posterior.hessian(jnp.asarray(x.T @ x), len(x))
  unchanged = posterior.tailor(before, before, hessian, 0.5, block=block)
  np.testing.assert_array_equal(unchanged, before)  # constant scores are no NaN
  edit = functools.partial(posterior.tailor, before, after, hessian, 0.5, block=block)
  plus, minus = edit(), edit(sign="minus")
  for new in (plus, minus):
    put_back = np.asarray(new == before).sum()
    assert abs(put_back - 0.5 * before.size) <= 3  # one more in every block, and ties
  if block == 128:
    # The usual sign makes up for what was put back: less error than putting the same back alone.
    plain = jnp.where(minus == before, before, after)
    error = lambda w: float(jnp.sum((x @ (w - after).T) ** 2))
    assert error(minus) < 0.9 * error(plain)
    assert error(plus) > error(minus)


EDITS = {
  "dare": suite.dare(0.9),
  "half": suite.half(),
  "grafting": suite.grafting(0.1),
  "ties": suite.ties(0.2, 1.0),
  "wise": suite.interpolated(0.5),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_leave_an_untrained_model_as_it_is(name):
  tuner = EDITS[name]
  state, history = trained(tuner)
  assert same(tuner.finalize(*history[0].tuner), PARAMS)
  final = tuner.finalize(*state.tuner)
  plain, _ = trained(tuners.selected(suite.LAYERS))
  assert same(plain.tuner.trainable, state.tuner.trainable)  # the edit is no part of the training
  assert same(final["language"]["head"], PARAMS["language"]["head"])
  assert not same(final, tuners.together(*state.tuner))
  assert not same(final["projector"], PARAMS["projector"])


# --- penalties and masks --------------------------------------------------------------------------


def test_penalties_hold_the_weights_back():
  free, _ = trained(tuners.selected(suite.LAYERS))
  distance = lambda state: float(
    optax.tree.norm(
      jax.tree.map(
        jnp.subtract, state.tuner.trainable, tuners.split_params(PARAMS, suite.LAYERS)[0]
      )
    )
  )
  for tuner in (suite.l2_sp(10.0), suite.ewc(10.0, MODEL, loss)):
    held, history = trained(tuner)
    assert tuner.penalty(*history[0].tuner) == 0
    assert distance(held) < 0.9 * distance(free)


def test_fisher_is_the_mean_of_squared_gradients():
  fisher = trained(suite.ewc(1.0, MODEL, loss), 0)[0].tuner.extra["fisher"]
  params, frozen = tuners.split_params(PARAMS, suite.LAYERS)

  def one(params, k):
    run = functools.partial(MODEL.apply, {"params": tuners.together(params, frozen, {})})
    return jnp.divide(*loss(run, {name: x[k : k + 1] for name, x in BATCH.items()}, None))

  gradients = [jax.grad(one)(params, k) for k in range(len(BATCH["x"]))]
  expected = jax.tree.map(lambda *g: jnp.mean(jnp.stack(g) ** 2, 0), *gradients)
  for ours, theirs in zip(jax.tree.leaves(fisher), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


TARGETS = r"^language/.*gate/kernel$"


@pytest.mark.parametrize("kind", ["magnitude", "gradient", "random"])
def test_masks_hold_their_share(kind):
  tuner = {
    "magnitude": lambda: suite.masked(0.25, masks.by_magnitude, TARGETS),
    "gradient": lambda: suite.gradient_masked(0.25, MODEL, loss, TARGETS),
    "random": lambda: suite.masked(0.25, masks.at_random, TARGETS),
  }[kind]()
  state, history = trained(tuner)
  before, after = (tuner.finalize(*s.tuner) for s in (history[0], state))
  assert same(before, PARAMS)
  old, new = (tree["language"]["layers_0"]["gate"]["kernel"] for tree in (before, after))
  changed = np.asarray(old != new)
  assert changed.sum() == old.size // 4
  if kind == "magnitude":
    assert np.abs(old)[changed].max() <= np.abs(old)[~changed].min()
  if kind == "gradient":
    plain = tuners.selected(TARGETS)
    start = plain.init(jax.random.key(0), PARAMS, {})
    one = lambda t, sample: loss(
      functools.partial(plain.apply, MODEL, t, start.frozen, {}),
      {name: x[None] for name, x in sample.items()},
      None,
    )[0]
    scores = selective.absolute_gradients(one, start.trainable, BATCH)
    (scores,) = jax.tree.leaves(scores)
    assert scores[changed].min() >= scores[~changed].max()


def test_lora_plus_and_adalora():
  plus = suite.lora_plus(2, 4.0, 0.0)
  plus = plus._replace(init=tuners.adapted(low_rank.lora(2, 4.0, 0.0), TARGETS).init)
  labels = plus.rates(plus.init(jax.random.key(0), PARAMS, {}).trainable)
  assert labels["adapter"]["language"]["layers_0"]["gate"] == {"a": "adapter", "b": "adapter_b"}
  assert set(jax.tree.leaves(labels["params"])) == {"projector"}

  tuner = suite.adalora(2, 0.0, 0.1, STEPS, targets=TARGETS)
  state, history = trained(tuner)
  lam = [s.tuner.trainable["adapter"]["language"]["layers_0"]["gate"]["lam"] for s in history]
  assert lam[0].shape == (3,)
  assert np.count_nonzero(lam[1]) == 3
  assert np.count_nonzero(lam[-1]) == 2
  assert tuner.penalty(*state.tuner) > 0


def test_the_frozen_row_is_the_pretrained_model():
  tuner = suite.frozen()
  state, _ = trained(tuner, 1)
  assert not jax.tree.leaves(state.tuner.trainable)
  assert same(tuner.finalize(*state.tuner), PARAMS)


# --- metrics --------------------------------------------------------------------------------------


@given(
  scores=st.lists(st.floats(0, 100), min_size=1, max_size=6),
  target=st.floats(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_metrics(scores, target):
  before = jnp.asarray(scores)
  still = metrics.summary(before, before, jnp.float32(target), jnp.float32(target))
  assert still["E"] == still["F"] == still["O"] == 0
  result = metrics.summary(before, before[::-1] / 2, jnp.float32(0), jnp.float32(target))
  again = metrics.summary(before[::-1], before / 2, jnp.float32(0), jnp.float32(target))
  for name, value in result.items():
    np.testing.assert_allclose(value, again[name], rtol=1e-4, atol=1e-4)
  assert result["F"] <= 0
  assert result["H"] <= result["Avg"] + 1e-3
  np.testing.assert_allclose(result["O"], result["E"] + result["F"], rtol=1e-5, atol=1e-4)


def test_metrics_need_an_upstream_task():
  with pytest.raises(ValueError, match="no upstream task"):
    metrics.summary(jnp.zeros(0), jnp.zeros(0), jnp.float32(0), jnp.float32(0))
