"""Tuning a LLaVA-style checkpoint on questions from disk: a tiny model in the published file formats."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import memory_plan
from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.data import question_files
from jaxmethods.errors import InputError
from jaxmethods.experiments.thanora import checkpoint as mixtures, config as thanora, rows
from jaxmethods.models.mllm import MLLMConfig
from jaxmethods.testbeds.multimodal import checkpoint, suite, tuning
from jaxmethods.testbeds.multimodal.settings import Checkpoint
from jaxmethods.testbeds.multimodal.suite_settings import SuiteConfig
from jaxmethods.trees import flatten, unflatten
from jaxmethods.tuning.tuner import LINEARS, adamw, answer_loss, init_state, tuning_step
from tests import tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_llava.write(tmp_path_factory.mktemp("llava"))


def config(folder, **changes):
  of = Checkpoint(
    model=f"hf:{folder}", train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"),
    upstream={"other": str(folder / "other.jsonl")}, dtype="float32", remat=False, chunk=2,
  )  # fmt: skip
  small = {"steps": 8, "batch_size": 4, "rank": 2, "alpha": 4.0, "probe_size": 2, "dropout": 0.0}
  return SuiteConfig(checkpoint=of, learning_rate=0.05, **(small | changes))


@pytest.fixture(scope="module")
def material(folder):
  return checkpoint.load(config(folder).checkpoint)


def test_texts_and_labels(material):
  """Prompt, image tokens, question; the loss counts the answer and its end."""
  batch = material.batch(material.train[:2])
  (ids,), (labels,) = batch["ids"][0], batch["labels"][0]
  assert batch["features"].shape == (2, 8, 8, 3)
  assert len(ids) % 32 == 0
  words = {i: word for word, i in tiny_llava.VOCABULARY.items()}
  place = np.flatnonzero(labels != IGNORED)
  assert [words[i] for i in labels[place]] == ["green", "cup", "</s>"]
  assert [words[i] for i in ids[place]] == ["ASSISTANT:", "green", "cup"]
  image = np.flatnonzero(ids == tiny_llava.CONFIG["image_token_index"])
  assert len(image) == 4
  assert words[ids[image[0] - 1]] == "USER:"
  assert [words[i] for i in ids[image[-1] + 1 : place[0]]] == ["what", "is", "it"]
  # The image is padded to a square of the mean colour, not cropped.
  edge, centre = batch["features"][0][0, 4], batch["features"][0][4, 4]
  np.testing.assert_allclose(edge, np.array([122, 116, 104]) / 127.5 - 1, atol=0.05)
  np.testing.assert_allclose(centre, np.array([0, 200, 0]) / 127.5 - 1, atol=0.05)


def test_it_learns(folder, material):
  row = config(folder, row="full", steps=30)
  experiment = checkpoint.build(row, lambda model: suite.tuner_of(row, model), material=material)
  state, batches = experiment.init(jax.random.key(0)), experiment.batches(0)
  step, losses = jax.jit(experiment.step), []
  for _ in range(row.steps):
    state, metrics = step(state, next(batches))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0]
  result = jax.jit(experiment.evaluate)(state, experiment.test)
  assert result["Target"] >= 50
  assert {"H", "other", "Source", "Target", "E", "F"} <= set(result)
  again = experiment.batches(3)
  first = experiment.batches(0)
  for _ in range(3):
    next(first)
  np.testing.assert_array_equal(next(again)["features"], next(first)["features"])


def test_rows_trace(folder, material):
  for name in ("lora", "lorasculpt", "dora", "oft", "bitfit", "l2_sp", "random_mask"):
    row = config(folder, row=name, oft_block=2)
    experiment = checkpoint.build(
      row, lambda model, row=row: suite.tuner_of(row, model), material=material
    )
    state = experiment.init(jax.random.key(0))
    after, _ = jax.eval_shape(experiment.step, state, next(experiment.batches(0)))
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "line 2: expected image, question and answer"),
    ('{"image": "0.png", "question": "what"}', "line 2: expected image"),
    (
      '{"image": "0.png", "question": "what", "answer": " "}',
      "line 2: question or answer is empty",
    ),
    ('{"image": "none.png", "question": "a", "answer": "b"}', "line 2: there is no image"),
  ],
)
def test_bad_lines(folder, tmp_path, line, message):
  (tmp_path / "0.png").symlink_to(folder / "0.png")
  good = '{"image": "0.png", "question": "what", "answer": "cup"}'
  (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
  with pytest.raises(InputError, match=message):
    question_files.read_questions(tmp_path / "q.jsonl")


def test_bad_input(folder, tmp_path):
  good = config(folder).checkpoint
  change = lambda **changes: dataclasses.replace(good, **changes)
  (tmp_path / "empty.jsonl").write_text("\n")
  (tmp_path / "broken.png").write_text("no image")
  for changed, message in (
    (change(train=""), "needs train, test and upstream"),
    (change(train=str(tmp_path / "none.jsonl")), "cannot be read as text"),
    (change(train=str(tmp_path / "empty.jsonl")), "has no questions"),
    (change(upstream={"x": good.train}), "x: 8 of its images are in the training data too"),
  ):
    with pytest.raises(InputError, match=message):
      checkpoint.load(changed)
  with pytest.raises(InputError, match="not a readable image"):
    question_files.open_square(tmp_path / "broken.png", (0, 0, 0))
  with pytest.raises(InputError, match="prefix works on the small model only"):
    suite.build(config(folder, row="prefix"))


def mixture(folder, **changes):
  of = dataclasses.replace(config(folder).checkpoint, train="", test="", scan_layers=False)
  small = {
    "tasks": ["cups", "others"], "steps": 30, "batch_size": 4, "rank": 4, "alpha": 8.0,
    "dropout": 0.0, "preview": 3, "learning_rate": 0.03, "projector_rate": 0.03,
    "train": {"cups": str(folder / "train.jsonl"), "others": str(folder / "test.jsonl")},
    "test": {"cups": str(folder / "other.jsonl"), "others": str(folder / "other.jsonl")},
    "checkpoint": dataclasses.replace(of, upstream={}),
  }  # fmt: skip
  return thanora.Config(**(small | changes))


@pytest.fixture(scope="module")
def mixture_material(folder):
  material = mixtures.load(mixture(folder))
  # The output vectors of a random model are too small for any word to become likely.
  flat = flatten(material.params)
  flat["language/head/kernel"] *= 25
  return material._replace(params=unflatten(flat))


def test_a_mixture_is_tuned(folder, mixture_material):
  """Nothing changes at the start; the mixture is learnt; batches follow the step."""
  settings = mixture(folder)
  experiment = mixtures.build(settings, material=mixture_material)
  state, batches = experiment.init(jax.random.key(0)), experiment.batches(0)
  batch = next(batches)
  model, tuner = mixture_material.model, rows.tuner_of(settings)
  before = model.apply(
    {"params": mixture_material.params}, batch["ids"], features=batch["features"]
  )
  after = tuner.apply(model, *state.tuner, batch["ids"], features=batch["features"])
  np.testing.assert_allclose(after.logits, before.logits, atol=1e-5)
  step, losses = jax.jit(experiment.step), []
  for _ in range(settings.steps):
    state, metrics = step(state, batch)
    losses.append(float(metrics["task_loss"]))
    batch = next(batches)
  assert losses[-1] < 0.6 * losses[0]
  result = jax.jit(experiment.evaluate)(state, experiment.test)
  assert set(result) == {"Mean", "cups", "others"}
  assert result["Mean"] == (result["cups"] + result["others"]) / 2
  np.testing.assert_array_equal(next(experiment.batches(settings.steps))["ids"], batch["ids"])
  assert set(experiment.figures(state)) == {"ranks", "entropy"}


def test_the_preview_of_a_checkpoint(folder, mixture_material):
  """It does not depend on how many questions are read at once, and padding does not count."""
  settings = mixture(folder)
  moments = mixtures.moments_of(mixture_material, settings.preview, 2, LINEARS)
  assert moments["language/layers_0/attention/query"].shape == (2, 8, 8)
  # The inputs of the first layer have mean square 1, but for the norm's epsilon.
  first = np.trace(moments["language/layers_0/attention/query"], axis1=1, axis2=2)
  np.testing.assert_allclose(first, 8, rtol=0.05)
  padded = lambda batch: {
    "features": batch["features"],
    "ids": np.pad(batch["ids"], ((0, 0), (0, 0), (0, 5))),
    "labels": np.pad(batch["labels"], ((0, 0), (0, 0), (0, 5)), constant_values=IGNORED),
  }
  other = mixture_material._replace(batch=lambda shown: padded(mixture_material.batch(shown)))
  again = mixtures.moments_of(other, settings.preview, 1, LINEARS)
  for path, moment in moments.items():
    np.testing.assert_allclose(again[path], moment, rtol=1e-4, atol=1e-5)
  mesh = jax.make_mesh((1,), ("data",))
  spread = mixtures.moments_of(mixture_material, settings.preview, 2, LINEARS, mesh=mesh)
  for path, moment in moments.items():
    np.testing.assert_allclose(spread[path], moment, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["proportional", "balanced"])
def test_rows_of_mixtures_trace(folder, mixture_material, sampler):
  for name in ("lora", "corda", "hydralora", "spr_only"):
    row = thanora.rows(mixture(folder, sampler=sampler))[name]
    experiment = mixtures.build(row, material=mixture_material)
    state, batch = experiment.init(jax.random.key(0)), next(experiment.batches(0))
    assert len(batch["ids"]) == 4
    after, _ = jax.eval_shape(experiment.step, state, batch)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)


def test_bad_mixtures(folder):
  good = mixture(folder)
  test = str(folder / "test.jsonl")
  upstream = dataclasses.replace(good.checkpoint, upstream={"cups": test})
  scanned = dataclasses.replace(good.checkpoint, scan_layers=True)
  for changes, message in (
    ({"train": {"cups": test}}, r"train: must name a file for each of \['cups', 'others'\]"),
    ({"test": {"cups": test, "others": test}}, "cups: 2 of its images are in the training data"),
    ({"checkpoint": upstream}, "checkpoint.upstream: 'cups' is a task too"),
    ({"row": "single"}, "row: single trains one model per task"),
    ({"checkpoint": scanned}, "a preview needs layers that are not scanned"),
  ):
    with pytest.raises(InputError, match=message):
      mixtures.build(dataclasses.replace(good, **changes))


def test_published_size_traces():
  """LLaVA-1.5-7B on abstract arrays: one step of LoRA and projector, with the published counts."""
  config = SuiteConfig(checkpoint=Checkpoint(model="hf:llava"), row="lora", rank=32, alpha=64.0)
  shape = MLLMConfig.from_hugging_face(memory_plan.LLAVA_1_5_7B)
  model = checkpoint.Answering(shape, scan_layers=True, dtype=jnp.bfloat16, remat=True)
  batch = {
    "ids": jax.ShapeDtypeStruct((2, 1, 640), jnp.int32),
    "labels": jax.ShapeDtypeStruct((2, 1, 640), jnp.int32),
    "features": jax.ShapeDtypeStruct((2, 336, 336, 3), jnp.float32),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  init = lambda key, ids, features: model.init(key, ids, features=features)["params"]
  params = jax.eval_shape(init, key, batch["ids"], batch["features"])
  tuner = suite.tuner_of(config, model)
  optimiser = adamw(tuning.rates_of(config), tuner.rates, config.steps)
  state = jax.eval_shape(functools.partial(init_state, tuner, optimiser), key, params, {})
  trained = {name: tuning.num_parameters(tree) for name, tree in state.tuner.trainable.items()}
  assert trained == {"adapter": 79_953_920, "params": 20_979_712}
  after, metrics = jax.eval_shape(tuning_step(tuner, model, optimiser, answer_loss), state, batch)
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
  assert metrics["loss"].shape == ()
