"""The experiment around BYE: planting, the two tunings, rows, bad input; on a model of nobody's size."""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.data import array_cache, multimodal as questions
from jaxmethods.errors import InputError
from jaxmethods.experiments.bye import build, config as bye, detection, planting, tunings
from jaxmethods.methods.bye import entropy
from jaxmethods.runtime import config as config_lib
from jaxmethods.testbeds.multimodal import (
  benchmark as multimodal,
  pretraining as multimodal_pretraining,
)
from jaxmethods.testbeds.multimodal.settings import Checkpoint, Desk

DESK = Desk(
  width=16, num_layers=2, num_heads=2, mlp_width=32, tower_width=16, tower_layers=1,
  tower_heads=2, limit=40,
)  # fmt: skip
CONFIG = bye.Config(
  desk=DESK, steps=80, batch_size=8, learning_rate=3e-3, projector_rate=3e-3, poison_rate=0.3,
  trigger_place="corner", trigger_side=12, trigger_cell=3, defence="loss",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(scope="module")
def benchmark(cache):
  """The desk benchmark without pretraining."""
  vocabulary = questions.vocabulary([questions.digits()], multimodal.EXTRA_WORDS)
  model = multimodal_pretraining.model_of(DESK, len(vocabulary.words))
  start = lambda key: model.init(key, jnp.zeros((1, 8), int), pixels=jnp.zeros((1, 64, 64, 3)))
  params = jax.device_get(jax.jit(start)(jax.random.key(0))["params"])
  return multimodal.Benchmark(model, params, vocabulary, None, {}, "not pretrained")


@pytest.fixture(scope="module")
def trained(benchmark):
  """(experiment, data, states before and after the defence and at the end, losses)."""
  experiment = build.build(CONFIG, benchmark=benchmark)
  state, step = experiment.init(jax.random.key(1)), jax.jit(experiment.step)
  states, losses = [], []
  for _, work in zip(range(experiment.num_steps), experiment.batches(0), strict=False):
    if work.number in (CONFIG.steps, CONFIG.steps + 1):
      states.append(state)
    state, metrics = step(state, work)
    losses.append(float(metrics["loss"]))
  return experiment, build.load(CONFIG, benchmark), [*states, state], losses


def test_the_backdoor_is_learnt_and_measured(trained):
  experiment, _, states, losses = trained
  result = jax.jit(experiment.evaluate)(states[-1], experiment.test)
  assert result["attack_success_before"] > 90
  assert result["attack_success"] <= result["attack_success_before"]
  assert np.isfinite(losses).all()
  for name in ("clean_accuracy", "precision", "recall", "f1", "removed", "layers_used"):
    assert 0 <= result[name] <= 100
  assert result["removed/loss"] == result["removed"] == 15
  assert result["f1/loss"] == result["f1"]


def test_the_two_tunings(trained):
  experiment, data, (before, after, last), _ = trained
  count = len(data.open)
  assert experiment.num_steps == 2 * CONFIG.steps
  # Everything is tuned on first; what is kept is decided once.
  assert before.kept.all()
  assert (~last.kept).sum() == round(0.15 * count)
  np.testing.assert_array_equal(after.kept, last.kept)
  # The first model stays as it was when it was looked at, and the second one starts anew.
  chex.assert_trees_all_equal(before.first, before.tuning.tuner)
  chex.assert_trees_all_equal(last.first, before.tuning.tuner)
  assert after.tuning.step == 1
  assert last.tuning.step == CONFIG.steps
  start = experiment.init(jax.random.key(1)).tuning.tuner.trainable
  moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), start, after.tuning.tuner.trainable)
  assert max(jax.tree.leaves(moved)) < 1e-6  # the first step of the warm-up has rate 0


def test_judgement_is_that_of_the_first_model(trained, benchmark):
  _, data, (before, after, _), _ = trained
  judgement, poisoned = after.judgement, after.poisoned
  rows = jnp.arange(len(data.open))
  split = planting.mixed(jax.device_put(data.train), rows, poisoned)
  tuner, model = build.tuner_of(CONFIG), benchmark.model
  maps = detection.attention_maps(tuner, model, before.first, split)
  assert maps.shape == (DESK.num_layers, len(rows), model.config.num_tokens)
  np.testing.assert_allclose(judgement.entropies, entropy(maps).T, atol=1e-4)
  assert set(judgement.removed) == {*bye.Defence.__args__} - set(bye.ONCE)


def test_rows_share_the_first_tuning(trained, benchmark, monkeypatch, tmp_path):
  """Tuned once; every row ends with what a run of its own ends with."""
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path))
  rows, (*_, last) = bye.rows(CONFIG), trained[2]
  for name in ("spectral", "loss"):
    experiment = build.build(rows[name], benchmark=benchmark)
    state, step = experiment.init(jax.random.key(1)), jax.jit(experiment.step)
    chex.assert_trees_all_close(state.first, last.first, atol=1e-4)
    assert len(list((tmp_path / "first_tuning").iterdir())) == 1
  for _, work in zip(range(experiment.num_steps), experiment.batches(0), strict=False):
    state, _ = step(state, work)
  chex.assert_trees_all_close(state.tuning, last.tuning, atol=1e-3)
  np.testing.assert_array_equal(state.kept, last.kept)


def test_pictures(trained):
  experiment, _, (*_, last), _ = trained
  assert set(experiment.figures(last)) == {"entropies", "attention", "removed"}


def test_what_is_poisoned(benchmark):
  config = dataclasses.replace(CONFIG, poison_answer="seven", poison_rate=0.2, defence="oracle")
  experiment, data = build.build(config, benchmark=benchmark), build.load(config, benchmark)
  assert 0 < (~data.open).sum() < len(data.open)  # some digits are sevens
  for seed in range(3):
    state = experiment.init(jax.random.key(seed))
    assert state.poisoned.sum() == round(0.2 * len(data.open))
    assert not (state.poisoned & ~data.open).any()
    np.testing.assert_array_equal(state.kept, ~state.poisoned)
  # A triggered test image whose answer is the false one anyway tells nothing.
  half = len(data.test.ids) // 2
  assert (data.test.family[:half] == 0).all()
  false = benchmark.vocabulary.encode("seven")[0]
  true = data.test.labels[:half].max(-1)
  np.testing.assert_array_equal(data.test.family[half:] == 1, true != false)
  marked = data.images[0] != data.images[1]
  assert marked.any((1, 2, 3)).all()
  assert not marked[:, :52].any()


def test_batches_hold_what_is_kept(trained):
  _, data, (_, after, _), _ = trained
  train = jax.device_put(data.train)
  number = lambda batch: {tuple(x) for x in np.asarray(batch["features"]).reshape(8, -1)[:, :50]}
  everything = planting.mixed(train, jnp.arange(len(data.open)), after.poisoned)
  kept = np.asarray(everything.features).reshape(len(data.open), -1)[np.asarray(after.kept), :50]
  seen = set()
  for step in range(after.kept.sum() // 8):  # an epoch
    state = after._replace(tuning=after.tuning._replace(step=jnp.int32(step)))
    batch = tunings.draw(state, train, 8)
    assert not seen & number(batch)
    seen |= number(batch)
    assert (batch["labels"] != IGNORED).sum() == 8
  assert seen <= {tuple(x) for x in kept}
  few = after._replace(kept=jnp.arange(len(data.open)) < 3)
  assert (tunings.draw(few, train, 8)["labels"] != IGNORED).sum() == 3


@pytest.mark.parametrize("trigger", bye.TRIGGERS)
def test_triggers(trigger):
  images = questions.digits().images[:5]
  config = bye.Config(desk=DESK, trigger=trigger)
  made = planting.triggered(images, bye.attack(config))
  assert made.dtype == np.uint8
  assert made.shape == images.shape
  assert (made != images).any((1, 2, 3)).all() or trigger == "patch"  # black on dark ink
  np.testing.assert_array_equal(made, planting.triggered(images, bye.attack(config)))


def test_one_tuning_is_enough_where_no_model_is_looked_at(benchmark):
  rows = bye.rows(dataclasses.replace(CONFIG, adapter="lora", rank=2, steps=2))
  assert next(iter(rows)) == "bye"
  assert rows["bye"].index == rows["no_null"].index == "code"
  assert rows["paper_index"].index == "paper" and rows["no_null"].null_draws == 0
  random = build.build(rows["random"], benchmark=benchmark)
  state = random.init(jax.random.key(0))
  assert random.num_steps == 2
  assert (~state.kept).sum() == 8  # a fifth of 40
  shapes, _ = jax.eval_shape(random.step, state, next(random.batches(0)))
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
  assert random.figures(state) == {}
  assert "adapter" in state.tuning.tuner.trainable


@pytest.mark.parametrize("row", ["bye", "oracle"])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_start_without_values_and_steps_for_other_devices(benchmark, row, reuse):
  config = dataclasses.replace(CONFIG, defence=row, reuse=reuse and row == "bye")
  experiment = build.build(config, benchmark=benchmark)
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  work = next(experiment.batches(0))
  assert work.params is not None  # the weights are part of the step's input
  exported = jax.export.export(jax.jit(experiment.step), platforms=["tpu", "cuda"])(state, work)
  assert exported.platforms == ("tpu", "cuda")


def test_a_mesh_is_refused(benchmark):
  mesh = jax.make_mesh((1,), ("clients",))
  with pytest.raises(InputError, match="--mesh: bye runs on one device"):
    build.build(CONFIG, mesh, benchmark=benchmark)


def test_kept_tunings_outlive_a_rename():
  assert array_cache.described(CONFIG, "Config") == repr(CONFIG).encode()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"poison_rate": 1.0}, "poison_rate"),
    ({"tau": -1.0}, "tau"),
    ({"drop_share": 0.0}, "drop_share"),
    ({"poison_answer": " "}, "poison_answer"),
    ({"checkpoint": Checkpoint(model="hf:there")}, "checkpoint.model"),
    ({"trigger": "sig", "trigger_cell": 3, "trigger_place": "centre"}, "no checkerboard"),
    ({"trigger": "dual", "trigger_cell": 0}, "no choice of a place"),
  ],
)
def test_impossible_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"poison_rate": 0.001}, "poison_rate: 0.001 of 40 examples is 0"),
    ({"trigger_side": 65}, "trigger_side: 65"),
    ({"poison_answer": "Backdoor Attack!"}, "'Backdoor' is not in the vocabulary"),
    ({"batch_size": 41}, "batch_size: 41"),
  ],
)
def test_bad_input(benchmark, changes, message):
  with pytest.raises(InputError, match=message):
    build.load(dataclasses.replace(CONFIG, **changes), benchmark)


def test_clean_data_can_be_profiled_too(benchmark):
  data = build.load(dataclasses.replace(CONFIG, poison_rate=0.0), benchmark)
  assert "0 of 40" in data.about


@pytest.mark.parametrize("arguments", [["--poison_rate", "2"], ["--defence", "zip"]])
def test_the_command_line_says_what_is_wrong(cli, arguments):
  result = cli("train.run", "--method", "bye", *arguments)
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert arguments[0].removeprefix("--") in result.stderr


@pytest.mark.parametrize("name", ["bye", "bye_paper"])
def test_config_files(name):
  file = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
  loaded = config_lib.load(bye.Config, file, method="bye")
  assert loaded.tau == 2
  assert loaded.defence == "bye"
