"""GIFT's runs: what rows share and where they differ, bad input, the published size."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmethods import experiments
from jaxmethods.errors import InputError
from jaxmethods.experiments.gift import build, learner, material
from jaxmethods.experiments.gift.config import Config, rows
from jaxmethods.models.clip import CLIP, CLIPConfig, TextConfig
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViTConfig
from jaxmethods.runtime import config as config_lib
from jaxmethods.testbeds.vision_language import encoder, words

CONFIG = Path(__file__).parents[2] / "configs" / "gift.yaml"


def short(**changes) -> Config:
  text = lambda value: value if isinstance(value, str) else json.dumps(value)
  pairs = [(key, text(value)) for key, value in changes.items()]
  return config_lib.load(Config, CONFIG, short=True, overrides=pairs, method="gift")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


def run(config: Config, steps: int | None = None):
  """The state after some steps, and the losses."""
  experiment = build.build(config)
  state, batches, losses = experiment.init(jax.random.key(1)), experiment.batches(0), []
  step = jax.jit(experiment.step)
  for _ in range(steps or experiment.num_steps):
    state, metrics = step(state, next(batches))
    losses.append(float(metrics["loss"]))
  return experiment, state, losses


def test_a_whole_run():
  experiment, state, losses = run(short())
  assert np.isfinite(losses).all()
  accuracy = np.asarray(state.accuracy)
  assert accuracy.shape == (2, 2) and ((accuracy >= 0) & (accuracy <= 1)).all()
  found = experiment.evaluate(state, experiment.test)
  assert next(iter(found)) == "average"
  np.testing.assert_allclose(found["average"], 100 * accuracy.mean(), rtol=1e-5)
  np.testing.assert_allclose(found["transfer"], 100 * accuracy[0, 1], rtol=1e-5)
  assert state.params["logit_scale"] == experiment.init(jax.random.key(1)).params["logit_scale"]
  assert set(experiment.figures(state)) == {"accuracy", "course", "synthetic_pairs"}
  assert experiment.files(state)["accuracy.csv"].startswith("after,colours,digits\n")
  assert "rendered" in experiment.about and "small CLIP" in experiment.about


def test_gift_without_its_losses_is_finetuning():
  plain = short()
  nothing = dataclasses.replace(plain, distillation=0.0, alignment=0.0, consolidation=0.0)
  states = [
    run(config, 2)[1] for config in (nothing, dataclasses.replace(plain, learner="finetune"))
  ]
  jax.tree.map(np.testing.assert_array_equal, *(state.params for state in states))


# Rows that differ in more than a number.
TRACED = (
  "zero_shot", "l2", "ewc", "lwf", "lwf_vr", "icarl", "wise_ft", "zscl", "gift_static", "gift_mse",
  "gift_image_only", "gift_reverse_kl", "gift_merged_teacher", "gift_pretrained_teacher",
)  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_rows_trace(name):
  config = rows(short())[name]
  experiment = build.build(config)
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  batch = next(experiment.batches(0))
  after, metrics = jax.eval_shape(experiment.step, state, batch)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
  assert all(jax.tree.leaves(same))
  assert metrics["loss"].shape == ()


def test_zero_shot_never_changes():
  experiment, state, _ = run(short(learner="zero_shot"))
  np.testing.assert_array_equal(*np.asarray(state.accuracy))
  assert experiment.init(jax.random.key(0)).optimiser is None


def test_class_incremental():
  config = short(tasks=["digits"], incremental="class", pieces=2, learner="icarl")
  experiment = build.build(config)
  state = experiment.init(jax.random.key(0))
  batch = next(experiment.batches(config.steps // 2 - 1))
  assert jax.eval_shape(experiment.step, state, batch)[0].accuracy.shape == (2, 2)
  assert batch.data.known.sum(1).tolist() == [5, 10]
  asked = batch.data.asked.sum(-1)
  assert asked.tolist() == [[5, 0], [10, 10]]
  accuracy = jnp.array([[0.5, jnp.nan], [0.25, 0.75]])
  found = experiment.evaluate(state._replace(accuracy=accuracy), jnp.array([30, 10]))
  assert list(found)[:2] == ["average", "last"]
  np.testing.assert_allclose(found["last"], 37.5)
  np.testing.assert_allclose(found["average"], (50 + 37.5) / 2)


def test_rates_of_rows():
  config = short(rates={"zscl": 0.25})
  found = rows(config)
  assert found["zscl"].learning_rate == 0.25 and found["zscl"].learner == "zscl"
  assert found["gift"].learning_rate == config.learning_rate
  assert found["gift_l2"].learner == "gift" and found["gift_l2"].fisher == "ones"


def test_validation_takes_the_place_of_the_tests():
  size = {"train": 40, "test": 20, "validation": 12}
  data = [
    material.load(short(size=size, learner="finetune", held_out=part)).data
    for part in ("test", "validation")
  ]
  assert [one.test_n.tolist() for one in data] == [[20, 20], [12, 12]]
  np.testing.assert_array_equal(data[0].train_x, data[1].train_x)


def test_orders():
  tasks = material.load_tasks(["letters", "colours", "shapes", "digits"], short().size)
  of = lambda order: [t.name for t in material.ordered(tasks, short(order=order))]
  assert of("given") == ["letters", "colours", "shapes", "digits"]
  assert of("alphabetic") == ["colours", "digits", "letters", "shapes"]
  assert sorted(of("mixed")) == of("alphabetic") != of("mixed")


def test_prompts_of_the_task_under_way_are_not_painted():
  config = short(synthetic_images=60)
  stage = encoder.load(config.model, config.clip)
  tasks = material.ordered(material.load_tasks(["digits", "letters"], config.size), config)
  first, second = material.synthetic_pairs(stage, tasks, config)
  base = set(material.base_prompts())
  assert set(first.prompts) <= base
  assert first.images.shape == (60, 32, 32, 3) and first.images.dtype == np.uint8
  again = material.synthetic_pairs(stage, tasks, config)
  assert again[1].prompts == second.prompts


def test_ragged_last_batch():
  config = short(synthetic_images=10, synthetic_batch=4)
  loaded = material.load(config)
  batch = learner.Batch(jnp.int32(0), jnp.int32(0), loaded.data, jnp.bool_(False))
  draw = lambda k, c: learner.draw_pairs(
    learner.make(c, loaded.stage), batch, jnp.int32(k), jax.random.key(0)
  )
  assert [int(draw(k, config).real.sum()) for k in range(6)] == [4, 4, 2, 4, 4, 2]
  first = np.concatenate([np.asarray(draw(k, config).prompts)[: (4, 4, 2)[k]] for k in range(3)])
  assert sorted(first.tolist()) == sorted(np.asarray(loaded.data.pairs_ids[0]).tolist())
  dropped = dataclasses.replace(config, synthetic_last="drop")
  assert all(draw(k, dropped).real.all() for k in range(5))


def test_pairs_from_a_folder(tmp_path):
  lines = ["image,text"]
  for i in range(12):
    Image.fromarray(np.full((40, 48, 3), 5 + i, np.uint8)).save(tmp_path / f"{i:02d}.jpg")
    lines.append(f"{i:02d}.jpg,a picture of a red star.")
  (tmp_path / "image_text.csv").write_text("\n".join(lines))
  loaded = material.load(short(synthetic=f"folder:{tmp_path}"))
  assert loaded.data.pairs_x.shape == (2, 12, 32, 32, 3)
  np.testing.assert_array_equal(loaded.data.pairs_ids, 0)


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"distillation": 0, "alignment": 0}, "consolidation: needs distillation or alignment"),
    ({"steps": 7}, "must be a multiple of 2 tasks"),
    ({"tasks": ["colours", "colours"]}, "'colours' comes twice"),
    ({"tasks": ["colour", "digits"]}, "unknown task 'colour'; the nearest is colours"),
    ({"batch_size": 64}, "has 40 images, not 64"),
    ({"synthetic": "nowhere"}, "synthetic: must be painter, renderer or folder:PATH"),
    ({"synthetic": "folder:/nowhere"}, "cannot be read"),
    ({"synthetic_images": 0}, "synthetic_images: must be at least 1"),
    ({"incremental": "class"}, "needs one task"),
    ({"tasks": ["places"], "incremental": "class", "pieces": 8}, "fewer than 8 pieces"),
    ({"clip.context": 6}, "needs .* tokens, the model reads 6"),
    ({"held_out": "validation"}, "held_out: validation needs size.validation"),
    ({"rates": {"zslc": 0.1}}, "rates: unknown row 'zslc'; the nearest is zscl"),
    ({"rates": {"zscl": 0}}, "rates: zscl must be positive"),
    ({"painter.width": 17}, "even multiple"),
    ({"size.train": 0}, "must be at least 1"),
  ],
)
def test_bad_input(changes, reason):
  with pytest.raises(InputError, match=reason):
    build.build(short(**changes))


def vit_b16() -> encoder.Stage:
  """CLIP ViT-B/16 by its published config, without weights."""
  tower = lambda width, heads: EncoderConfig(
    width=width, num_layers=12, heads=heads, hidden=4 * width, activation="quick_gelu",
    scan_layers=True,
  )  # fmt: skip
  vision = ViTConfig(encoder=tower(768, 12), image_size=(224, 224), patch=16, clip=True)
  text = TextConfig(encoder=tower(512, 8), vocabulary=49408, context=77, eos=2)
  model = CLIP(CLIPConfig(vision=vision, text=text, projection=512))
  init = lambda key: model.init(key, jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), jnp.int32))
  params = jax.eval_shape(init, jax.random.key(0))["params"]
  tokens = words.Tokens(lambda text: [1], 49406, 49407, 0, 77, 49408)
  pixels = functools.partial(encoder.clip_pixels, side=224)
  return encoder.Stage(model, params, tokens, pixels, experiments.load)


def test_published_size_lowers():
  stage = vit_b16()
  count = sum(x.size for x in jax.tree.leaves(stage.params))
  assert round(count / 1e6, 1) == 149.6
  config = Config(
    steps=11_000, tasks=[f"task{k}" for k in range(11)], batch_size=64, synthetic_batch=64
  )
  of = learner.make(config, stage)
  shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
  u8, i32, flag = jnp.uint8, jnp.int32, jnp.bool_
  data = material.Data(
    pretrained=stage.params,
    train_x=shape(u8, 11, 100, 32, 32, 3), train_y=shape(i32, 11, 100), train_n=shape(i32, 11),
    test_x=shape(u8, 11, 10, 32, 32, 3), test_y=shape(i32, 11, 10), test_n=shape(i32, 11),
    texts=shape(i32, 11, 397, 77), known=shape(flag, 11, 397), test_texts=shape(i32, 11, 397, 1, 77),
    asked=shape(flag, 11, 11, 397), pairs_x=shape(u8, 11, 1000, 224, 224, 3),
    pairs_ids=shape(i32, 11, 1000), pairs_texts=shape(i32, 11, 1000, 77),
    reference_x=shape(u8, 1, 224, 224, 3), reference_texts=shape(i32, 1, 77),
  )  # fmt: skip
  state = jax.eval_shape(functools.partial(learner.start, of), data, jax.random.key(0))
  batch = learner.Batch(shape(i32), shape(i32), data, shape(flag))
  step = jax.jit(functools.partial(learner.step, of))
  for platform in ("tpu", "cuda"):
    exported = jax.export.export(step, platforms=(platform,))(state, batch)
    assert exported.platforms == (platform,)
