"""LoRASculpt and SPIDER as experiments, with their rows, on a tiny benchmark."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.memory_plan import LLAVA_1_5_7B
from jaxmethods.errors import InputError
from jaxmethods.experiments.lorasculpt import build as sculpting, config as lorasculpt
from jaxmethods.experiments.spider import build as selecting, config as spider
from jaxmethods.models.mllm import MLLM, MLLMConfig
from jaxmethods.runtime.checkpoints import Checkpoints
from jaxmethods.testbeds.multimodal import tuning
from jaxmethods.trees import flatten
from tests.tiny_questions import DESK, benchmark, check_traces, trained

LOW = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "keep_ratio": 0.25, "prune_at": 2}


def config(method, **changes):
  small = {
    "desk": DESK, "steps": 4, "batch_size": 8, "learning_rate": 1e-2, "projector_rate": 1e-2,
    "eval_every": 4, "probe_size": 8,
  }  # fmt: skip
  if method is spider:
    small["last_layers"] = 1
  return method.Config(**(small | (LOW if method is lorasculpt else {}) | changes))


@pytest.fixture(scope="module")
def sculpted():
  settings = config(lorasculpt)
  experiment = sculpting.build(settings, benchmark=benchmark())
  return settings, experiment, trained(experiment, settings)


def test_masks_hold_in_what_is_shipped(sculpted):
  settings, experiment, state = sculpted
  masks = flatten(state.tuner.extra["masks"])
  factors = flatten(state.tuner.trainable["adapter"])
  for path, mask in masks.items():
    assert mask.sum() == math.floor(settings.keep_ratio * mask.size)
    np.testing.assert_array_equal(factors[path][~mask], 0)
  assert any(f[masks[path]].any() for path, f in factors.items() if path.endswith("/b"))
  kept, projector = sum(mask.sum() for mask in masks.values()), state.tuner.trainable["params"]
  assert tuning.num_trainable(state.tuner) == kept + tuning.num_parameters(projector)
  start = experiment.init(jax.random.key(0)).tuner
  assert tuning.num_trainable(start) == tuning.num_parameters(start.trainable)
  assert not any(path.startswith(("projector", "vision")) for path in factors)
  assert set(experiment.figures(state)) == {"accuracy", "update_density"}


def test_merged_and_unmerged_agree(sculpted):
  settings, _, state = sculpted
  model, tuner = benchmark().model, sculpting.tuner_of(settings)
  split = benchmark().targets["digits"].test

  @jax.jit
  def both(state):
    unmerged = tuner.apply(model, *state.tuner, split.ids, features=split.features)
    merged = tuning.tuned(tuner, model, state)(split.ids, features=split.features)
    return merged.logits, unmerged.logits

  np.testing.assert_allclose(*both(state), atol=1e-5)


def test_published_last_step_leaks_and_ours_does_not(sculpted):
  settings = dataclasses.replace(sculpted[0], official_final=True)
  state = trained(sculpting.build(settings, benchmark=benchmark()), settings)
  masks = flatten(state.tuner.extra["masks"])
  factors = flatten(state.tuner.trainable["adapter"])
  assert any(f[~masks[path]].any() for path, f in factors.items())
  # Nothing but the last step differs.
  ours = flatten(sculpted[2].tuner.trainable["adapter"])
  for path, mask in masks.items():
    np.testing.assert_allclose(factors[path][mask], ours[path][mask], atol=1e-6)


def test_without_pruning_and_penalty_it_is_lora():
  results = []
  for changes in ({"row": "lora"}, {"keep_ratio": 1.0, "cmr_weight": 0.0}):
    settings = config(lorasculpt, **changes)
    results.append(trained(sculpting.build(settings, benchmark=benchmark()), settings))
  plain, idle = (state.tuner.trainable for state in results)
  jax.tree.map(np.testing.assert_array_equal, plain, idle)


@pytest.mark.parametrize("connector", ["lora_cmr", "frozen"])
def test_connectors(connector):
  experiment = sculpting.build(config(lorasculpt, connector=connector), benchmark=benchmark())
  check_traces(experiment)
  state = experiment.init(jax.random.key(0))
  assert "projector" in state.tuner.frozen["params"]
  adapted = {path.split("/")[0] for path in flatten(state.tuner.trainable["adapter"])}
  assert adapted == ({"language", "projector"} if connector == "lora_cmr" else {"language"})
  assert all(path.startswith("language") for path in flatten(state.tuner.extra["masks"]))


def test_every_row_traces():
  rows = lorasculpt.rows(config(lorasculpt, rates={"dora": 0.5}))
  assert next(iter(rows)) == "lorasculpt"
  assert rows["dora"].learning_rate == 0.5
  for row in rows.values():
    check_traces(sculpting.build(row, benchmark=benchmark()))
  rows = spider.rows(config(spider))
  assert next(iter(rows)) == "spider"
  for row in rows.values():
    check_traces(selecting.build(row, benchmark=benchmark()))


def test_spider_moves_what_is_selected_and_nothing_else():
  settings = config(spider)
  experiment = selecting.build(settings, benchmark=benchmark())
  state = trained(experiment, settings)
  anchor, now = (flatten(x) for x in (state.tuner.extra["anchor"], state.tuner.trainable))
  assert {path.split("/")[1] for path in now if path.startswith("language")} == {"layers_0"}
  changed = np.concatenate([np.ravel(now[path] != anchor[path]) for path in now])
  assert 0.05 < changed.mean() < 0.95
  assert set(experiment.figures(state)) == {"accuracy", "changed_entries", "importances"}
  before = flatten(benchmark().params)  # frozen means frozen
  for path, x in flatten(state.tuner.frozen).items():
    np.testing.assert_array_equal(x, before[path])


@pytest.mark.parametrize("method", [lorasculpt, spider])
def test_a_run_goes_on_with_its_masks_and_importances(method, tmp_path):
  """Interrupted behind the pruning step, restored and finished: bit for bit as without."""
  settings = config(method)
  make = sculpting.build if method is lorasculpt else selecting.build
  experiment = make(settings, benchmark=benchmark())
  step, batches = jax.jit(experiment.step), experiment.batches(0)
  state = experiment.init(jax.random.key(settings.seed))
  with Checkpoints(tmp_path / "whole") as whole, Checkpoints(tmp_path / "without") as without:
    for k in range(settings.steps):
      state, _ = step(state, next(batches))
      if k + 1 == settings.steps - 1:
        whole.save(k + 1, state)
        without.save(k + 1, state._replace(tuner=state.tuner._replace(extra={})))
  fresh = experiment.init(jax.random.key(settings.seed + 1))
  with Checkpoints(tmp_path / "whole", read_only=True) as whole:
    done, again = whole.restore(fresh)
  again, _ = step(again, next(experiment.batches(done)))
  jax.tree.map(np.testing.assert_array_equal, again, state)
  # A checkpoint that has lost them is refused: a run that began to learn anew what to keep is another.
  with (
    Checkpoints(tmp_path / "without", read_only=True) as without,
    pytest.raises(InputError, match="no checkpoint can be read"),
  ):
    without.restore(fresh)


def test_half_of_the_tensors_rest():
  settings = config(spider, row="half", half_rounds=1)
  state = trained(selecting.build(settings, benchmark=benchmark()), settings)
  before = flatten(benchmark().params)
  still = [(x == before[path]).all() for path, x in flatten(state.tuner.trainable).items()]
  assert sum(still) == len(still) // 2


def test_spider_options_are_part_of_the_state():
  held = config(spider, update_every=3, accumulate="pre_clip", recompute_importance=True)
  experiment = selecting.build(held, benchmark=benchmark())
  check_traces(experiment)
  extra = experiment.init(jax.random.key(0)).tuner.extra
  assert extra["mask"] is not None
  assert extra["importance"] is None


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    (lorasculpt, {"keep_ratio": 0.0}, r"keep_ratio: must be in \(0, 1\]"),
    (lorasculpt, {"keep_ratio": 1.5}, r"keep_ratio: must be in \(0, 1\]"),
    (lorasculpt, {"prune_at": 0}, "prune_at"),
    (lorasculpt, {"dropout": 1.0}, "dropout"),
    (spider, {"last_layers": -1}, "last_layers"),
    (spider, {"dare_rate": 1.0}, "dare_rate"),
    (spider, {"ratio": 1.0}, "ratio"),
    (spider, {"update_every": 0}, "update_every"),
  ],
)
def test_impossible_settings(method, changes, message):
  with pytest.raises(ValueError, match=message):
    config(method, **changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"targets": "nowhere/kernel"}, "'nowhere/kernel' matches no parameter path"),
    ({"regularised": "embed"}, "regularised 'embed' matches no kernel"),
    ({"keep_ratio": 0.001}, "keep_ratio 0.001 keeps none of"),
  ],
)
def test_targets_that_do_not_exist(changes, message):
  with pytest.raises(InputError, match=message):
    check_traces(sculpting.build(config(lorasculpt, **changes), benchmark=benchmark()))


def test_pretrained_weights_with_nan_are_refused():
  broken = jax.tree.map(np.array, benchmark().params)
  broken["language"]["norm"]["scale"][0] = np.nan
  damaged = benchmark()._replace(params=broken)
  for method, build in ((lorasculpt, sculpting.build), (spider, selecting.build)):
    with pytest.raises(InputError, match="language/norm/scale has values that are not finite"):
      build(config(method), benchmark=damaged)


def test_layers_that_the_model_does_not_have():
  with pytest.raises(InputError, match="last_layers: 3 of a model of 1"):
    selecting.build(config(spider, last_layers=3), benchmark=benchmark())


def test_fixed_masks_hold_half_of_every_tensor():
  settings = config(spider, row="magnitude_mask")
  experiment = selecting.build(settings, benchmark=benchmark())
  masks = flatten(experiment.init(jax.random.key(0)).tuner.frozen["adapter"])
  assert any(path.startswith("projector") for path in masks)
  assert all(mask.sum() == mask.size // 2 for mask in masks.values())


def llava(layers, scan):
  """Abstract parameters of LLaVA-1.5-7B with so many decoder layers, and a tower of one."""
  text = LLAVA_1_5_7B["text_config"] | {"num_hidden_layers": layers}
  vision = LLAVA_1_5_7B["vision_config"] | {"num_hidden_layers": 1}
  shape = {"text_config": text, "vision_config": vision, "vision_feature_layer": -1}
  published = MLLMConfig.from_hugging_face(LLAVA_1_5_7B | shape)
  model = MLLM(published, scan_layers=scan)
  ids, pixels = jnp.zeros((1, 4), int), jnp.zeros((1, 336, 336, 3))
  return jax.eval_shape(model.init, jax.random.key(0), ids, pixels)["params"]


def test_published_counts():
  projector = 20_979_712
  params = llava(32, scan=True)
  settings = lorasculpt.Config()
  tuner = sculpting.tuner_of(settings)
  state = jax.eval_shape(lambda p: tuner.init(jax.random.key(0), p, {}), params)
  assert tuning.num_parameters(state.trainable["adapter"]) == 79_953_920
  assert tuning.num_parameters(state.trainable["params"]) == projector
  assert tuning.num_parameters(state.extra["masks"]) == 79_953_920

  params = llava(2, scan=False)
  tuner = selecting.tuner_of(spider.Config(), 2)
  state = jax.eval_shape(lambda p: tuner.init(jax.random.key(0), p, {}), params)
  assert tuning.num_parameters(state.trainable) == 2 * 202_383_360 + projector == 425_746_432
  # theta^0, P and S: 5.1 GB in float32.
  assert tuning.num_parameters(state.extra) == 3 * 425_746_432
