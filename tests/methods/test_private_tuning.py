"""DP-LoRA: against a loop over examples, against planted bugs, and against a membership attack."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.adapters import low_rank
from jaxmethods.adapters.training import mean_of_parts
from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import privacy, private_tuning
from jaxmethods.testbeds.language import privacy as private_runs
from jaxmethods.testbeds.language.settings import PrivacySettings
from jaxmethods.trees import flatten
from jaxmethods.tuning import tuner as tuners

WIDTH, ROWS = 8, 12
CLIP, SIGMA, EXPECTED = 0.5, 0.8, 5.0


class Net(nn.Module):
  """Two linear layers with the paths of a language model."""

  @nn.compact
  def __call__(self, x, rngs=None):
    hidden = nn.tanh(nn.Dense(WIDTH, name="up")(x))
    return nn.Dense(3, name="down")(hidden)


MODEL = Net()
BATCH = {
  "x": jax.random.normal(jax.random.key(1), (ROWS, 4)),
  "y": 3 * jax.random.normal(jax.random.key(2), (ROWS, 3)),
  "real": jnp.arange(ROWS) < 9,
}
PARAMS = MODEL.init(jax.random.key(0), BATCH["x"])["params"]
LORA = tuners.adapted(low_rank.lora(2, 4.0, 0.0), r"kernel$", also=None)


def loss(run, batch, key):
  del key
  return jnp.sum((run(batch["x"]) - batch["y"]) ** 2), jnp.float32(batch["y"].size)


def started(tuner=LORA):
  """State of the tuner whose second factors are not zero."""
  state = tuner.init(jax.random.key(3), PARAMS, {})
  warm = jax.tree.map(
    lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape) % 0.7, state.trainable
  )
  return state._replace(trainable=warm)


def gradient_of(tuner, state, batch, *keys):
  """What the tuner takes for the gradient of the task, one for each key, in one program."""

  def task(trainable, batch, key):
    run = functools.partial(tuner.apply, MODEL, trainable, state.frozen, state.extra)
    return loss(run, batch, key)

  program = jax.jit(lambda t, b, k: tuner.gradient(task, t, b, k)[1])
  return [program(state.trainable, batch, key) for key in keys]


def private(sigma=SIGMA, **options):
  settings = {"clip_norm": CLIP, "noise_multiplier": sigma, "expected_batch_size": EXPECTED}
  return private_tuning.private(LORA, **(settings | options))


def by_loop(state):
  """Clipped sum over the real examples, one at a time, divided by the expected size."""
  total = jax.tree.map(jnp.zeros_like, state.trainable)
  for row in range(9):
    one = {name: BATCH[name][row : row + 1] for name in ("x", "y")}

    def mean(trainable, one=one):
      run = functools.partial(LORA.apply, MODEL, trainable, state.frozen, state.extra)
      return jnp.divide(*loss(run, one, None))

    found = jax.grad(mean)(state.trainable)
    norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(found)))
    total = jax.tree.map(lambda t, g, norm=norm: t + g * min(1.0, CLIP / norm), total, found)
  return jax.tree.map(lambda t: t / EXPECTED, total)


def check_mechanism(tuner):
  """Noiseless it is the loop; its noise has the deviation sigma C / (q n)."""
  state = started()
  exact = by_loop(state)
  drawn = gradient_of(tuner, state, BATCH, *map(jax.random.key, range(40)))
  noises = [jax.tree.map(jnp.subtract, found, exact) for found in drawn]
  flat = np.concatenate([np.ravel(x) for noise in noises for x in jax.tree.leaves(noise)])
  assert abs(flat.mean()) < 0.1 * SIGMA * CLIP / EXPECTED
  np.testing.assert_allclose(flat.std(), SIGMA * CLIP / EXPECTED, rtol=0.05)


@pytest.mark.parametrize("microbatch", [None, 1, 4])
def test_without_noise_it_is_a_loop_over_examples(microbatch):
  state = started()
  (found,) = gradient_of(private(0.0, microbatch=microbatch), state, BATCH, jax.random.key(5))
  for path, value in flatten(by_loop(state)).items():
    np.testing.assert_allclose(flatten(found)[path], value, rtol=1e-4, atol=1e-7)


def test_noise_stands_in_the_sum():
  check_mechanism(private())


def noise_after_averaging(total, normal, *, clip_norm, noise_multiplier, expected_batch_size):
  return jax.tree.map(
    lambda s, z: s / expected_batch_size + noise_multiplier * clip_norm * z, total, normal
  )


def mean_is_clipped(gradients, clip_norm, real):
  total = jax.tree.map(lambda g: jnp.where(real[:, None, None], g, 0).sum(0), gradients)
  norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(total))) / real.sum()
  return jax.tree.map(lambda x: x * jnp.minimum(1, clip_norm / norm), total)


@pytest.mark.parametrize(
  ("name", "bug"), [("noisy_mean", noise_after_averaging), ("clipped_sum", mean_is_clipped)]
)
def test_planted_bugs_are_caught(monkeypatch, name, bug):
  monkeypatch.setattr(privacy, name, bug)
  with pytest.raises(AssertionError):
    check_mechanism(private())


def test_frozen_weights_get_no_gradient_and_steps_learn():
  tuner = private(0.1, clip_norm=5.0)
  optimiser = tuners.adamw({"adapter": 0.02}, tuner.rates, 60)
  state = tuners.init_state(tuner, optimiser, jax.random.key(3), PARAMS, {"secret": jnp.ones(3)})
  assert state.tuner.extra == {}
  before = jax.device_get(state.tuner.frozen)
  step = tuners.tuning_step(tuner, MODEL, optimiser, loss, clip=float("inf"))
  lowered = jax.make_jaxpr(step)(state, BATCH)
  # No kernel-shaped array with a leading axis of examples is ever made.
  assert not any(
    v.aval.shape[:1] == (ROWS,) and v.aval.shape[1:] == (4, WIDTH)
    for eqn in lowered.eqns
    for v in eqn.outvars
  )
  step, losses = jax.jit(step), []
  for _ in range(60):
    state, metrics = step(state, BATCH)
    losses.append(float(metrics["task_loss"]))
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.tuner.frozen))
  assert losses[-1] < 0.8 * losses[0]


def test_accumulated_parts_are_the_whole():
  batch = {name: x[:8] for name, x in BATCH.items()}
  state = started()
  (whole,) = gradient_of(tuners.accumulated(LORA, 2), state, batch, jax.random.key(0))

  def task(trainable, part, key):
    run = functools.partial(LORA.apply, MODEL, trainable, state.frozen, state.extra)
    return loss(run, part, key)

  of_part = jax.value_and_grad(task, has_aux=True)
  _, once = mean_of_parts(of_part, state.trainable, batch, jax.random.key(0), 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, once)
  assert tuners.accumulated(LORA, 1) is LORA
  with pytest.raises(InputError, match="accumulate: must be at least 1"):
    tuners.accumulated(LORA, 0)


# --- guarantees -----------------------------------------------------------------------------------


class Settings(PrivacySettings):
  """Without the Config that it is inherited by."""

  def __post_init__(self):
    pass


def test_a_plan_keeps_its_epsilon():
  plan = private_runs.plan(Settings(dp_epsilon=8.0), 500, 50, 100)
  assert 7.9 < plan.epsilon <= 8.0
  assert plan.delta == 500**-1.1
  assert plan.epsilon == privacy.epsilon(0.1, plan.noise_multiplier, 100, plan.delta)
  again = private_runs.plan(Settings(dp_noise=plan.noise_multiplier), 500, 50, 100)
  assert again.epsilon == plan.epsilon
  parts = private_runs.plan(Settings(dp_epsilon=8.0, dp_microbatch=16), 500, 50, 100)
  assert parts.capacity % 16 == 0
  assert 0 <= parts.capacity - plan.capacity < 16
  assert "(8, 0.00107)-DP" in str(plan)


def test_batches_of_a_plan():
  plan = private_runs.plan(Settings(dp_noise=1.0, dp_microbatch=8), 60, 20, 10)
  drawn = private_runs.poisson_rows(plan, 60, 0, 0)
  batches = [next(drawn) for _ in range(50)]
  assert {rows.shape for rows, _ in batches} == {(plan.capacity,)}
  sizes = [int(real.sum()) for _, real in batches]
  assert abs(np.mean(sizes) - 20) < 2
  assert len(set(sizes)) > 5
  for rows, real in batches:
    assert len(set(rows[real])) == real.sum()
  again = next(private_runs.poisson_rows(plan, 60, 0, 3))
  np.testing.assert_array_equal(again[0], batches[3][0])


def test_bad_plans():
  for settings, sizes, message in (
    ({"dp_epsilon": 1e-4}, (500, 50, 100), "dp_epsilon: epsilon 0.0001 cannot be reached"),
    ({"dp_epsilon": 8.0, "dp_delta": 0.01}, (500, 50, 100), "dp_delta: 0.01 promises nothing"),
    ({"dp_epsilon": 8.0}, (40, 50, 100), "batch_size: 50 is more than the 40"),
  ):
    with pytest.raises(InputError, match=message):
      private_runs.plan(Settings(**settings), *sizes)


def test_the_tighter_accountant():
  pytest.importorskip("dp_accounting")
  loose = private_runs.plan(Settings(dp_epsilon=3.0), 500, 50, 100)
  tight = private_runs.plan(Settings(dp_epsilon=3.0, dp_accountant="pld"), 500, 50, 100)
  assert tight.epsilon <= 3.0
  assert 0.7 * loose.noise_multiplier < tight.noise_multiplier < loose.noise_multiplier


def test_the_accountant_equals_dp_accounting():
  accounting = pytest.importorskip("dp_accounting")
  from dp_accounting.rdp import RdpAccountant

  for rate, sigma, steps, delta in (
    (0.1, 0.8, 200, 1e-3),
    (0.02, 1.3, 1000, 1e-5),
    (1.0, 5.0, 10, 1e-4),
  ):
    event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(sigma))
    theirs = RdpAccountant(orders=list(privacy.ORDERS))
    theirs.compose(accounting.SelfComposedDpEvent(event, steps))
    ours = privacy.epsilon(rate, sigma, steps, delta)
    np.testing.assert_allclose(ours, theirs.get_epsilon(delta), rtol=1e-9)


# --- an attack: is one canary among the examples? -------------------------------------------------

STEPS, TRIALS, DELTA = 6, 400, 1e-2


def canary_scores(tuner, seed):
  """Scores (2, TRIALS) of runs with and without the canary, the last example of all."""
  clean = jnp.arange(ROWS) < ROWS - 1
  y = BATCH["y"].at[-1].set(100.0)  # far from all others: its gradient is as long as may be
  state = started()
  start = state.trainable

  def task(trainable, batch, key):
    run = functools.partial(tuner.apply, MODEL, trainable, state.frozen, state.extra)
    return loss(run, batch, key)

  def one(key, real):
    batch = {"x": BATCH["x"], "y": y, "real": real}

    def step(trainable, key):
      gradient = tuner.gradient(task, trainable, batch, key)[1]
      return jax.tree.map(lambda p, g: p - 0.02 * g, trainable, gradient), None

    end = jax.lax.scan(step, start, jax.random.split(key, STEPS))[0]
    canary = {"x": batch["x"][-1:], "y": y[-1:]}
    pull = jax.grad(lambda t: task(t, canary, key)[0])(start)
    moved = jax.tree.map(jnp.subtract, start, end)
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), moved, pull)
    return sum(jax.tree.leaves(products))

  keys = jax.random.split(jax.random.key(seed), TRIALS)
  runs = jax.jit(jax.vmap(one, in_axes=(0, None)))
  return np.stack([runs(keys, jnp.ones(ROWS, bool)), runs(keys, clean)])


def attacked(tuner):
  """Lower bound of epsilon; the threshold comes from other runs."""
  (inside, outside), (members, others) = canary_scores(tuner, 0), canary_scores(tuner, 1)
  bounds = []
  for share in (0.5, 0.9, 0.98):
    threshold = np.quantile(outside, share)
    bound = privacy.empirical_epsilon(
      int((inside > threshold).sum()), TRIALS, int((outside > threshold).sum()), TRIALS, DELTA
    )
    bounds.append((bound, threshold))
  threshold = max(bounds)[1]
  found, alarms = int((members > threshold).sum()), int((others > threshold).sum())
  return privacy.empirical_epsilon(found, TRIALS, alarms, TRIALS, DELTA)


def test_canaries_stay_below_the_accountant(monkeypatch):
  """The attack shows something, never more than is promised, and finds a clipped mean out."""
  sigma = 2.0
  promised = privacy.epsilon(1.0, sigma, STEPS, DELTA)
  tuner = private(sigma, expected_batch_size=float(ROWS))
  assert 0.1 < attacked(tuner) <= promised
  monkeypatch.setattr(privacy, "clipped_sum", mean_is_clipped)
  wrong = lambda total, normal, **how: jax.tree.map(
    lambda s, z: s / ROWS + sigma * CLIP * z / ROWS, total, normal
  )
  monkeypatch.setattr(privacy, "noisy_mean", wrong)
  assert attacked(private(sigma, expected_batch_size=float(ROWS))) > promised
