"""Tuning a LLaVA-style checkpoint on questions from disk: a tiny model in the published file formats."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import memory_plan
from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.data import question_files
from jaxmethods.data.vision_sources import load_model
from jaxmethods.data.weights_files import save_checkpoint
from jaxmethods.errors import InputError
from jaxmethods.experiments import checkpoint_tuning, mllm_tuning, tuning, tuning_rows
from jaxmethods.experiments.tuning_config import Checkpoint
from jaxmethods.methods.mllm_tuning.tuner import adamw, answer_loss, init_state, tuning_step
from jaxmethods.models.mllm import MLLMConfig, table
from jaxmethods.models.weights import export_params
from tests.tiny_questions import quick_jit

WORDS = (checkpoint_tuning.BEFORE + checkpoint_tuning.AFTER + " what is it red green cup").split()
VOCABULARY = {word: i for i, word in enumerate(dict.fromkeys(("<unk>", "<s>", "</s>", *WORDS)))}
CONFIG = {
  "model_type": "llava",
  "image_token_index": len(VOCABULARY),
  "vision_config": {
    "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
  },
  "text_config": {
    "model_type": "llama", "vocab_size": len(VOCABULARY) + 1, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
  },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint with its tokenizer, and three files of questions about 12 images."""
  path = tmp_path_factory.mktemp("llava")
  random = load_model(f"random:{json.dumps(CONFIG)}")
  save_checkpoint(path, export_params(random.params, table(random.model.config)), CONFIG)
  processor = {
    "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 8, "width": 8},
    "size": {"shortest_edge": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
  }  # fmt: skip
  (path / "preprocessor_config.json").write_text(json.dumps(processor))
  words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
  )
  tokenizer.save_pretrained(path)
  for part, start, count in (("train", 0, 8), ("test", 8, 2), ("other", 10, 2)):
    lines = []
    for i in range(start, start + count):
      colour = "red" if i % 2 else "green"
      image = Image.new("RGB", (10, 6), (200, 0, 0) if i % 2 else (0, 200, 0))
      image.save(path / f"{i}.png")
      if part == "test":  # LLaVA's own form
        turns = [{"value": "<image>\nwhat is it"}, {"value": f"{colour} cup"}]
        lines.append({"image": f"{i}.png", "conversations": turns})
      else:
        lines.append({"image": f"{i}.png", "question": "what is it", "answer": f"{colour} cup"})
    (path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return path


def config(folder, **changes):
  checkpoint = Checkpoint(
    model=f"hf:{folder}", train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"),
    upstream={"other": str(folder / "other.jsonl")}, dtype="float32", remat=False, chunk=2,
  )  # fmt: skip
  small = {"steps": 8, "batch_size": 4, "rank": 2, "alpha": 4.0, "probe_size": 2, "dropout": 0.0}
  return mllm_tuning.Config(checkpoint=checkpoint, learning_rate=0.05, **(small | changes))


@pytest.fixture(scope="module")
def material(folder):
  return checkpoint_tuning.load(config(folder).checkpoint)


def test_texts_and_labels(material):
  """Prompt, image tokens, question; the loss counts the answer and its end."""
  batch = material.batch(material.train[:2])
  (ids,), (labels,) = batch["ids"][0], batch["labels"][0]
  assert batch["features"].shape == (2, 8, 8, 3)
  assert len(ids) % 32 == 0
  words = {i: word for word, i in VOCABULARY.items()}
  place = np.flatnonzero(labels != IGNORED)
  assert [words[i] for i in labels[place]] == ["green", "cup", "</s>"]
  assert [words[i] for i in ids[place]] == ["ASSISTANT:", "green", "cup"]
  image = np.flatnonzero(ids == CONFIG["image_token_index"])
  assert len(image) == 4
  assert words[ids[image[0] - 1]] == "USER:"
  assert [words[i] for i in ids[image[-1] + 1 : place[0]]] == ["what", "is", "it"]
  # The image is padded to a square of the mean colour, not cropped.
  edge, centre = batch["features"][0][0, 4], batch["features"][0][4, 4]
  np.testing.assert_allclose(edge, np.array([122, 116, 104]) / 127.5 - 1, atol=0.05)
  np.testing.assert_allclose(centre, np.array([0, 200, 0]) / 127.5 - 1, atol=0.05)


def test_it_learns(folder, material):
  row = config(folder, row="full", steps=30)
  experiment = checkpoint_tuning.build(
    row, lambda model: tuning_rows.tuner_of(row, model), material=material
  )
  state, batches = experiment.init(jax.random.key(0)), experiment.batches(0)
  step, losses = quick_jit(experiment.step), []
  for _ in range(row.steps):
    state, metrics = step(state, next(batches))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0]
  result = quick_jit(experiment.evaluate)(state, experiment.test)
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
    experiment = checkpoint_tuning.build(
      row, lambda model, row=row: tuning_rows.tuner_of(row, model), material=material
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
  for checkpoint, message in (
    (change(train=""), "needs train, test and upstream"),
    (change(train=str(tmp_path / "none.jsonl")), "cannot be read as text"),
    (change(train=str(tmp_path / "empty.jsonl")), "has no questions"),
    (change(upstream={"x": good.train}), "x: 8 of its images are in the training data too"),
  ):
    with pytest.raises(InputError, match=message):
      checkpoint_tuning.load(checkpoint)
  with pytest.raises(InputError, match="cannot be read as an image"):
    question_files.open_square(tmp_path / "broken.png", (0, 0, 0))
  with pytest.raises(InputError, match="prefix works on the desk model only"):
    tuning_rows.build(config(folder, row="prefix"))


def test_published_size_traces():
  """LLaVA-1.5-7B on abstract arrays: one step of LoRA and projector, with the published counts."""
  config = mllm_tuning.Config(
    checkpoint=Checkpoint(model="hf:llava"), row="lora", rank=32, alpha=64.0
  )
  shape = MLLMConfig.from_hugging_face(memory_plan.LLAVA_1_5_7B)
  model = checkpoint_tuning.Answering(shape, scan_layers=True, dtype=jnp.bfloat16, remat=True)
  batch = {
    "ids": jax.ShapeDtypeStruct((2, 1, 640), jnp.int32),
    "labels": jax.ShapeDtypeStruct((2, 1, 640), jnp.int32),
    "features": jax.ShapeDtypeStruct((2, 336, 336, 3), jnp.float32),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  init = lambda key, ids, features: model.init(key, ids, features=features)["params"]
  params = jax.eval_shape(init, key, batch["ids"], batch["features"])
  tuner = tuning_rows.tuner_of(config, model)
  optimiser = adamw(tuning.rates_of(config), tuner.rates, config.steps)
  state = jax.eval_shape(functools.partial(init_state, tuner, optimiser), key, params, {})
  trained = {name: tuning.num_parameters(tree) for name, tree in state.tuner.trainable.items()}
  assert trained == {"adapter": 79_953_920, "params": 20_979_712}
  after, metrics = jax.eval_shape(tuning_step(tuner, model, optimiser, answer_loss), state, batch)
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
  assert metrics["loss"].shape == ()
