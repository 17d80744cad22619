"""ThanoRA as an experiment, with its rows, on a tiny mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.adapters.adapter import layers_of
from jaxmethods.errors import InputError
from jaxmethods.experiments.thanora import desk, rows
from jaxmethods.experiments.thanora.config import Config, rows as comparison
from jaxmethods.methods import thanora
from jaxmethods.testbeds.multimodal import tuning
from jaxmethods.testbeds.multimodal.questions import Split
from jaxmethods.trees import flatten
from jaxmethods.tuning.tuner import LINEARS
from tests.tiny_questions import DESK, benchmark, check_traces, trained


def config(**changes):
  small = {
    "desk": DESK, "steps": 3, "batch_size": 8, "learning_rate": 1e-2, "projector_rate": 1e-2,
    "eval_every": 3, "rank": 6, "alpha": 12.0, "dropout": 0.0, "preview": 15,
  }  # fmt: skip
  return Config(**(small | changes))


@pytest.fixture(scope="module")
def tuned():
  settings = config()
  experiment = desk.build(settings, benchmark())
  return settings, experiment, trained(experiment, settings)


def logits(settings, state, split):
  """(merged, unmerged, pretrained) logits."""
  model, tuner = benchmark().model, rows.tuner_of(settings)

  @jax.jit
  def every(state):
    unmerged = tuner.apply(model, *state.tuner, split.ids, features=split.features)
    merged = tuning.tuned(tuner, model, state)(split.ids, features=split.features)
    before = model.apply({"params": benchmark().params}, split.ids, features=split.features)
    return merged.logits, unmerged.logits, before.logits

  return every(state)


def test_nothing_changes_at_the_start_and_merging_changes_nothing(tuned):
  settings, experiment, state = tuned
  split = benchmark().targets["digits"].test
  merged, unmerged, before = logits(settings, experiment.init(jax.random.key(5)), split)
  np.testing.assert_allclose(unmerged, before, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(merged, unmerged, rtol=1e-5, atol=1e-5)
  merged, unmerged, _ = logits(settings, state, split)
  np.testing.assert_allclose(merged, unmerged, rtol=1e-5, atol=1e-5)
  assert np.abs(unmerged - before).max() > 1e-2


def test_ranks_follow_the_preview(tuned):
  settings, experiment, state = tuned
  extra = state.tuner.extra
  layers = layers_of(state.tuner.trainable["adapter"])
  assert extra["owner"].shape == (len(layers), settings.rank)
  for owner, entropy in zip(extra["owner"], extra["entropy"], strict=True):
    ranks, shared = thanora.allocate(entropy.tolist(), settings.rank, settings.temperature)
    np.testing.assert_array_equal(owner, thanora.owners(ranks, shared))
  assert set(experiment.figures(state)) == {"ranks", "entropy"}


def test_preview_equals_the_moments_of_the_inputs():
  """Of a layer whose inputs are known without the model: the queries of the first block see norm_1."""
  settings = config(preview=7)
  parts = [benchmark().targets[name] for name in settings.tasks]
  pad = benchmark().vocabulary.pad
  train = desk.mixed([part.train for part in parts], settings.tasks, pad)
  moments = desk.moments_of(benchmark(), train, settings.preview, LINEARS)
  key, value = (moments[f"language/layers_0/attention/{name}"] for name in ("key", "value"))
  np.testing.assert_array_equal(key, value)
  # RMS-normalised inputs: mean square 1 before the scale, which starts at 1; no token is padding.
  np.testing.assert_allclose(jnp.trace(key, axis1=1, axis2=2), DESK.width, rtol=1e-3)
  # Padding does not count: a mixture with a longer text in it has the same first task.
  longer = parts[0].train._replace(
    ids=np.pad(parts[0].train.ids, ((0, 0), (0, 0), (0, 4)), constant_values=pad),
    labels=np.pad(parts[0].train.labels, ((0, 0), (0, 0), (0, 4)), constant_values=-100),
  )
  padded = desk.mixed([longer, parts[1].train], settings.tasks, pad)
  again = desk.moments_of(benchmark(), padded, settings.preview, LINEARS)
  for path in moments:
    np.testing.assert_allclose(again[path], moments[path], rtol=1e-4, atol=1e-5)


def test_rows_trace():
  settings = comparison(config(rates={"corda": 0.25}))
  assert next(iter(settings)) == "thanora"
  assert settings["corda"].learning_rate == 0.25
  for name in ("lora", "corda", "hydralora", "spr_only", "no_cooperative", "dare", "ties"):
    check_traces(desk.build(settings[name], benchmark()))


def test_separate_models_see_only_their_task():
  settings = config(row="single", steps=2)
  experiment = desk.build(settings, benchmark())
  state = trained(experiment, settings)
  assert jax.tree.leaves(state.tuner.trainable)[0].shape[0] == 2
  # Spoiling the questions of the second task leaves the model of the first as it was.
  data = next(experiment.batches(0))
  second = data.family == 1
  spoilt = data._replace(labels=jnp.where(second[..., None], -100, data.labels))
  fresh = experiment.init(jax.random.key(settings.seed))
  step = jax.jit(experiment.step)
  for _ in range(settings.steps):
    fresh, _ = step(fresh, spoilt)
  for path, x in flatten(fresh.tuner.trainable["adapter"]).items():
    np.testing.assert_array_equal(x[0], flatten(state.tuner.trainable["adapter"])[path][0])


def test_averaging_is_the_mean_of_the_merged_models():
  before = {"w": jnp.zeros(4)}
  models = [{"w": jnp.array([2.0, 0, 1, -1])}, {"w": jnp.array([4.0, 1, 0, 1])}]
  put = lambda how, **options: rows.put_together(how, before, models, jax.random.key(0), **options)[
    "w"
  ]
  np.testing.assert_allclose(put("average"), [3, 0.5, 0.5, 0])
  np.testing.assert_allclose(put("dare", drop=0.0), put("average"))
  np.testing.assert_allclose(put("ties", keep=0.5), [3, 1, 1, 0])  # ties of |.|: the earlier entry


@pytest.mark.parametrize("sampler", ["proportional", "balanced"])
def test_tasks_of_very_different_size(sampler):
  uneven = benchmark(counting_images=600)
  settings = config(sampler=sampler, batch_size=11)
  parts = [uneven.targets[name].train for name in settings.tasks]
  train = desk.mixed(parts, settings.tasks, uneven.vocabulary.pad)
  assert train.sizes.tolist() == [20, 200]
  balanced = sampler == "balanced"
  sizes = rows.batch_sizes(settings.tasks, train.sizes, 11, balanced=balanced, apart=balanced)
  assert sizes == ([1, 10] if sampler == "proportional" else [5, 5])
  assert "digits 20, counting 200" in desk.build(settings, uneven).about
  if sampler == "proportional":
    with pytest.raises(InputError, match=r"task digits: 20 examples give it 0 of a batch of 8"):
      rows.batch_sizes(settings.tasks, train.sizes, 8, balanced=False, apart=True)


def test_an_empty_task_is_refused():
  parts = [benchmark().targets[name].train for name in ("digits", "counting")]
  empty = Split(*(x[:0] for x in parts[1]))
  with pytest.raises(InputError, match="task counting: has no questions"):
    desk.mixed([parts[0], empty], ["digits", "counting"], 0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tasks": []}, "tasks"),
    ({"tasks": ["digits", "digits"]}, "tasks"),
    ({"rank": 2}, "rank: 2 is too small for 2 tasks"),
    ({"temperature": 0.0}, "temperature"),
    ({"drop": 1.0}, "drop"),
    ({"keep": 0.0}, "keep"),
    ({"preview": 0}, "preview"),
  ],
)
def test_impossible_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**changes)


def test_a_regex_that_matches_nothing():
  with pytest.raises(InputError, match="'nowhere' matches no parameter path"):
    desk.build(config(targets="nowhere"), benchmark())
