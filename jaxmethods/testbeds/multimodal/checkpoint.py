"""Composes the tuning of a real LLaVA-style checkpoint on questions and images from disk.

Tuners and step are those of the small model. Batches are read while the model trains, in an order that
follows `seed`. An answer is right if greedy decoding says exactly its tokens and its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmethods import folders
from jaxmethods.data.model_sources import ModelFiles, save_tensors, save_tokenizer
from jaxmethods.data.question_files import (
  Question,
  check_disjoint,
  described,
  open_square,
  read_questions,
)
from jaxmethods.data.records import sealed
from jaxmethods.data.vision_sources import image_processor, load_model
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import Output
from jaxmethods.models.mllm import MLLM, table
from jaxmethods.models.weights import export_params
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment, Export
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.multimodal import tuning
from jaxmethods.testbeds.multimodal.questions import Split, accuracies
from jaxmethods.testbeds.multimodal.settings import Checkpoint, TuningConfig
from jaxmethods.trees import Params
from jaxmethods.tuning import metrics
from jaxmethods.tuning.tuner import (
  Run,
  Tuner,
  TuningState,
  adamw,
  answer_loss,
  init_state,
  tuning_step,
)

# The conversation of LLaVA-1.5 ("v1"), as it was trained.
BEFORE = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
  "detailed, and polite answers to the user's questions. USER: "
)
AFTER = " ASSISTANT:"


# Questions -> a batch: {"features", "ids", "labels"}.
Reader = Callable[[Sequence[Question]], dict[str, np.ndarray]]


class Answering(MLLM):
  """An `MLLM` with the interface of the small model: (ids (B, K, T), features=pixels)."""

  def __call__(self, ids: jax.Array, *, features: jax.Array, **keywords: Any) -> Output:  # type: ignore[override]
    """Logits (B, K, T, V); padding is on the right, where the causal mask hides it."""
    batch, count, length = ids.shape
    pixels = jnp.repeat(features, count, axis=0)
    out = super().__call__(ids.reshape(-1, length), pixels, **keywords)
    if out.logits is None:
      return out
    return out._replace(logits=out.logits.reshape(batch, count, length, -1))


class Material(NamedTuple):
  """Model and questions of a run.

  Attributes:
    model, params: the checkpoint.
    train: questions of the target.
    tests: test questions by name, those of the target under "target".
    batch: maps questions to {"features", "ids", "labels"}.
    about: the line for reports.
    files: the checkpoint came from.
  """

  model: Answering
  params: Params
  train: list[Question]
  tests: dict[str, list[Question]]
  batch: Reader
  about: str
  files: ModelFiles


def load(checkpoint: Checkpoint, mesh: Mesh | None = None) -> Material:
  """Reads the checkpoint and the questions.

  Raises:
    InputError: missing or malformed files, or an image that is both trained and tested on.
  """
  if not (checkpoint.train and checkpoint.test and checkpoint.upstream):
    raise InputError("checkpoint: needs train, test and upstream, files of questions")
  train = read_questions(folders.expanded(checkpoint.train))
  files = {**checkpoint.upstream, "target": checkpoint.test}
  tests = {name: read_questions(folders.expanded(file)) for name, file in files.items()}
  for name, questions in tests.items():
    check_disjoint(train, questions, name)
  model, params, batch, opened = open_model(checkpoint, mesh)
  tested = ", ".join(
    f"{name}: {described(files[name], questions, checkpoint.test_questions)}"
    for name, questions in tests.items()
  )
  trained = described(checkpoint.train, train)
  about = f"{named(opened)}; data of yours; trained on {trained}; tested on {tested}"
  return Material(model, params, train, tests, batch, about, opened)


def open_model(
  checkpoint: Checkpoint, mesh: Mesh | None = None
) -> tuple[Answering, Params, Reader, ModelFiles]:
  """Opens a checkpoint: model, parameters, the function from questions to batches, files.

  Raises:
    InputError: missing or malformed files, or no LLaVA-style model.
  """
  loaded = load_model(
    checkpoint.model,
    mesh=mesh,
    scan_layers=checkpoint.scan_layers,
    remat=checkpoint.remat,
    dtype=checkpoint.dtype,
  )
  if not isinstance(loaded.model, MLLM):
    raise InputError(f"{checkpoint.model}: is no LLaVA-style model")
  old = loaded.model
  model = Answering(old.config, old.scan_layers, old.dtype, old.param_dtype, old.remat)
  batch = reader(model, loaded.files.tokenizer(), image_processor(loaded.files), checkpoint)
  return model, loaded.params, batch, loaded.files


def named(files: ModelFiles) -> str:
  """Returns the name of a checkpoint in reports, with the digest by which it is known again."""
  return sealed(files.source.name, files.source.digest)


def export_of(model: Answering, files: ModelFiles, tuner: Tuner) -> Export:
  """Tells how a tuned checkpoint leaves: as one of its own kind, the update merged into its weights."""
  formats = () if tuner.finalize is None else ("merged",)
  return Export(
    formats, functools.partial(_write, model, files, tuner), files.source.name,
    "multimodal checkpoints are written whole, with the update merged" if formats
    else "the update cannot be merged",
  )  # fmt: skip


def _write(
  model: Answering, files: ModelFiles, tuner: Tuner, state: TuningState, form: str, folder: Path
) -> None:
  """Writes a checkpoint; tensors that our model has no use for are kept as they were."""
  del form
  assert tuner.finalize is not None
  tensors = export_params(tuner.finalize(*state.tuner), table(model.config))
  rest = {name: x for name, x in (files.tensors or {}).items() if name not in tensors}
  save_tensors(folder, files, rest | tensors, "LlavaForConditionalGeneration")
  save_tokenizer(folder, files, None)


class Texts(NamedTuple):
  """The conversation around a question, as tokens.

  Attributes:
    tokenizer: of the checkpoint.
    begin: tokens before the image.
    image: placeholders of the image.
    limit: largest number of tokens of a text.
  """

  tokenizer: Any  # a tokenizer of transformers
  begin: list[int]
  image: list[int]
  limit: int


def reader(
  model: Answering,
  tokenizer: Any,
  process: Callable[[list[np.ndarray]], np.ndarray],
  checkpoint: Checkpoint,
) -> Reader:
  """Makes the function from questions to features (B, height, width, 3), ids and labels (B, 1, T).

  T is the multiple of 32 that the longest text needs: few lengths, few programs.
  """
  image = [model.config.image_token] * model.config.tokens_per_image
  texts = Texts(tokenizer, tokenizer(BEFORE).input_ids, image, checkpoint.max_length)
  red, green, blue = checkpoint.padding
  return functools.partial(_batch, texts, process, (red, green, blue))


def _batch(
  texts: Texts,
  process: Callable[[list[np.ndarray]], np.ndarray],
  padding: tuple[int, int, int],
  questions: Sequence[Question],
) -> dict[str, np.ndarray]:
  """Reads the images of questions and arranges their texts."""
  each = [_tokens(texts, question) for question in questions]
  longest = -(-max(len(tokens) for tokens, _ in each) // 32) * 32
  ids = np.zeros((len(each), 1, longest), np.int32)
  labels = np.full(ids.shape, IGNORED, np.int32)
  for row, (tokens, start) in enumerate(each):
    ids[row, 0, : len(tokens) - 1] = tokens[:-1]
    labels[row, 0, start - 1 : len(tokens) - 1] = tokens[start:]
  images = [open_square(question.image, padding) for question in questions]
  return {"features": process(images), "ids": ids, "labels": labels}


def _tokens(texts: Texts, question: Question) -> tuple[list[int], int]:
  """Returns the tokens of question and answer, and the number of those before the answer."""
  encode = lambda text: texts.tokenizer(text, add_special_tokens=False).input_ids
  prompt = [*texts.begin, *texts.image, *encode("\n" + question.question + AFTER)]
  answer = [*encode(question.answer), texts.tokenizer.eos_token_id]
  if len(prompt) + len(answer) > texts.limit:
    raise InputError(
      f"checkpoint.max_length: {question.image.name} and its question and answer are "
      f"{len(prompt) + len(answer)} tokens, more than {texts.limit}"
    )
  return prompt + answer, len(prompt)


class Scores(NamedTuple):
  """The parts of an evaluation that do not change: tuner, model, and questions at once."""

  tuner: Tuner
  model: Answering
  chunk: int


def build(
  config: TuningConfig,
  make_tuner: Callable[[Answering], Tuner],
  mesh: Mesh | None = None,
  material: Material | None = None,
) -> Experiment:
  """Composes the experiment.

  Args:
    config: budget, rates, checkpoint.
    make_tuner: maps a model to the way it is tuned.
    mesh: devices over which the parameters are spread; None: one device.
    material: model and questions; default: those of `config.checkpoint`.
  """
  material = material or load(config.checkpoint, mesh)
  model, train = material.model, material.train
  tuner, chunk = make_tuner(model), config.checkpoint.chunk
  if config.batch_size > len(train):
    raise InputError(f"batch_size: {config.batch_size} is more than the {len(train)} questions")
  optimiser = adamw(tuning.rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  tests = {
    name: split_of(material.batch, questions[: config.checkpoint.test_questions])
    for name, questions in material.tests.items()
  }
  before = pretrained_scores(model, material.params, tests, chunk)

  def init(key: jax.Array) -> TuningState:
    probe = jax.device_put(material.batch(train[: min(config.probe_size, len(train))]))
    return init_state(tuner, optimiser, key, material.params, probe)

  return Experiment(
    init=init,
    batches=functools.partial(_batches, material, config.batch_size, config.seed),
    step=tuning_step(tuner, model, optimiser, answer_loss, clip=config.clip),
    evaluate=functools.partial(_evaluate, Scores(tuner, model, chunk)),
    test={"tests": tests, "before": before},
    figures=lambda state: {},
    num_steps=config.steps,
    about=material.about,
    export=export_of(model, material.files, tuner),
  )


def _batches(material: Material, size: int, seed: int, k: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields the batches from step `k` on."""
  train = material.train
  each = len(train) // size
  while True:
    order = np.random.default_rng((seed, k // each)).permutation(len(train))
    start = k % each * size
    yield material.batch([train[i] for i in order[start : start + size]])
    k += 1


def _evaluate(scores: Scores, state: TuningState, test: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Measures the columns of the survey, H first."""
  run = tuning.tuned(scores.tuner, scores.model, state)
  after = accuracies_of(run, test["tests"], scores.chunk)
  upstream = [name for name in after if name != "target"]
  stack = lambda of: jnp.stack([of[name] for name in upstream])
  summary = metrics.summary(
    stack(test["before"]), stack(after), test["before"]["target"], after["target"]
  )
  return {"H": summary.pop("H"), **{name: after[name] for name in upstream}, **summary}


def split_of(batch: Reader, questions: Sequence[Question]) -> Split:
  """Arranges questions for testing."""
  arrays = batch(questions)
  return Split(**arrays, family=np.zeros(arrays["ids"].shape[:2], np.int32))


def accuracies_of(run: Run, tests: Mapping[str, Split], chunk: int) -> dict[str, jax.Array]:
  """Measures the accuracy on every set by its name, in percent; `chunk` questions at once."""
  return {name: accuracies(run, split, (name,), chunk)[name] for name, split in tests.items()}


def pretrained_scores(
  model: Answering, params: Params, tests: Mapping[str, Split], chunk: int
) -> dict[str, jax.Array]:
  """Measures the accuracies of the model as it is in the checkpoint."""

  @compiler.jit
  def scores(params, tests):
    run = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)
    return accuracies_of(run, tests, chunk)

  return scores(params, tests)
