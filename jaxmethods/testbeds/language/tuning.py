"""Tuning of a causal LM on texts: rows, batches, evaluation by loss and by exact answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmethods.data import answers
from jaxmethods.data.array_cache import cached
from jaxmethods.data.model_sources import LoadedLM
from jaxmethods.data.model_tokenizers import Tokenizer
from jaxmethods.data.text_examples import Example
from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety.private_tuning import REAL
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.models.generate import Generated, generate, left_pad
from jaxmethods.models.sharding import batch_sharding
from jaxmethods.runtime import compiler, host
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.language import tokens
from jaxmethods.testbeds.language.privacy import Guarantee, poisson_rows
from jaxmethods.testbeds.language.tokens import Speech, Table
from jaxmethods.testbeds.language.tuners import Way
from jaxmethods.testbeds.language.writer import end_tokens, identity
from jaxmethods.trees import Json, Params, PyTree
from jaxmethods.tuning.tuner import Run, Tuner, TuningState, text_loss

Arrays = dict[str, np.ndarray]
Test: TypeAlias = Mapping[str, PyTree]  # what an evaluation reads: "chunks", "prompts"
FORMAT = b"text scores 1"


class Module(Protocol):
  """A model as `generate` calls it: plain, or `Tuned`."""

  def apply(self, variables: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree: ...


class Exam(NamedTuple):
  """Texts that are tested on.

  Attributes:
    chunks: arrays of `tokens.Table` with "real", (chunks, rows, ...).
    prompts: {"ids", "mask"} (chunks, rows, P) of what has an answer; {} where nothing has.
    right: answers to them.
    questions: the prompts as texts.
  """

  chunks: Arrays
  prompts: Arrays
  right: list[str]
  questions: list[str]


class Material(NamedTuple):
  """Model and texts of a run.

  Attributes:
    loaded: the model.
    speech: its tokenizer.
    train: rows that are trained on.
    exam: what is tested on.
    about: the line for reports.
  """

  loaded: LoadedLM
  speech: Speech
  train: Table
  exam: Exam
  about: str


class Tuned(NamedTuple):
  """A tuned model with the interface of a module: its variables are (trainable, frozen, extra)."""

  tuner: Tuner
  model: CausalLM

  def apply(self, variables: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
    """Runs the model as it is tuned."""
    return self.tuner.apply(self.model, *variables, *args, **kwargs)


class Scoring(NamedTuple):
  """The parts of an evaluation that do not change.

  Attributes:
    way: way of tuning.
    model: architecture.
    judge: (tokens (n, N), lengths (n,), numbers (n,)) -> bool (n,), on the host; None: no answers.
    max_new_tokens: N.
    ends: tokens that end a text.
    size: number of pretrained parameters.
    before: scores of the pretrained model.
    guarantee: of a private run.
  """

  way: Way
  model: CausalLM
  judge: Callable[..., np.ndarray] | None
  max_new_tokens: int
  ends: tuple[int, ...]
  size: int
  before: Mapping[str, float]
  guarantee: Guarantee | None


def check_context(name: str, config: Json, limit: int) -> int:
  """Returns the most tokens of a row: `limit`, which the model's context must hold; 0: all of it.

  Raises:
    InputError: more than the context.
  """
  context = int(config.get("max_position_embeddings", limit or 2048))
  if limit > context:
    raise InputError(f"max_length: {limit} is more than the context of {name}, {context} tokens")
  return limit or context


def speech_of(name: str, loaded: LoadedLM, tokenizer: Tokenizer, template: str) -> Speech:
  """Prepares the tokenizer of a model."""
  ends = end_tokens(loaded.files, tokenizer)
  return tokens.speech(name, tokenizer, ends, loaded.model.config.vocab_size, template)


def exam_of(speech: Speech, examples: Sequence[Example], limit: int, chunk: int) -> Exam:
  """Arranges the texts that are tested on, `chunk` at once."""
  rows = [tokens.row(speech, example) for example in examples]
  table = tokens.table(rows, examples, limit, packing=False).arrays
  asked = [example for example in examples if example.turns]
  prompts: Arrays = {}
  if asked:
    ids, mask = left_pad([tokens.prompt(speech, example) for example in asked])
    prompts = _chunked({"ids": ids, "mask": mask}, chunk)
  return Exam(
    _chunked(table, chunk),
    prompts,
    [example.answer for example in asked],
    ["\n".join(turn.content for turn in example.turns[:-1]) for example in asked],
  )


def _chunked(arrays: Mapping[str, np.ndarray], chunk: int) -> Arrays:
  """Cuts arrays (n, ...) into (chunks, rows, ...); the last is filled with rows that are not "real"."""
  count = len(next(iter(arrays.values())))
  rows = min(chunk, count)
  rest = -count % rows
  cut = lambda x: np.concatenate([x, np.repeat(x[-1:], rest, 0)]).reshape(-1, rows, *x.shape[1:])
  return {name: cut(np.asarray(x)) for name, x in arrays.items()} | {
    REAL: (np.arange(count + rest) < count).reshape(-1, rows)
  }


# --- batches --------------------------------------------------------------------------------------


def batches(
  table: Table,
  size: int,
  seed: int,
  guarantee: Guarantee | None,
  mesh: Mesh | None,
  first: int,
) -> Iterator[PyTree]:
  """Yields the batches from step `first` on: every epoch in an order of its own, or Poisson samples."""
  count = len(table.arrays["ids"])
  place = (
    (lambda batch: jax.device_put(batch, batch_sharding(mesh))) if mesh else lambda batch: batch
  )
  take = lambda rows: {name: x[rows] for name, x in table.arrays.items()}
  if guarantee:
    for rows, real in poisson_rows(guarantee, count, seed, first):
      yield place(take(rows) | {REAL: real})
  each = count // size
  while True:
    order = np.random.default_rng((seed, first // each)).permutation(count)
    start = first % each * size
    yield place(take(order[start : start + size]))
    first += 1


def probe_of(table: Table, size: int) -> dict[str, jax.Array]:
  """Takes the first examples for what needs statistics of them."""
  return {name: jnp.asarray(x[:size]) for name, x in table.arrays.items()}


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(scoring: Scoring, state: TuningState, test: Test) -> dict[str, jax.Array]:
  """Measures loss and exact answers, beside those of the pretrained model."""
  run, module, variables = tuned(scoring.way.tuner, scoring.model, state)
  found = scores(scoring, run, module, variables, test)
  before = {f"before_{name}": jnp.float32(value) for name, value in scoring.before.items()}
  state_size = sum(leaf.size for leaf in jax.tree.leaves(state.tuner.trainable))
  more = {
    "params_percent": jnp.float32(100 * state_size / scoring.size),
    "mergeable": jnp.float32(scoring.way.tuner.finalize is not None),
  }
  if scoring.guarantee:
    more |= {
      "epsilon": jnp.float32(scoring.guarantee.epsilon),
      "delta": jnp.float32(scoring.guarantee.delta),
    }
  return {**found, **before, **more}


def tuned(tuner: Tuner, model: CausalLM, state: TuningState) -> tuple[Run, Module, PyTree]:
  """Returns the tuned model as a function, and as a module with its variables."""
  if tuner.finalize is None:
    run = functools.partial(tuner.apply, model, *state.tuner)
    return run, Tuned(tuner, model), tuple(state.tuner)
  variables = {"params": tuner.finalize(*state.tuner)}
  return functools.partial(model.apply, variables), model, variables  # type: ignore[return-value]


def scores(
  scoring: Scoring, run: Run, module: Module, variables: PyTree, test: Test
) -> dict[str, jax.Array]:
  """Measures a model: "accuracy" where there are answers, and "test_loss"."""
  found = {}
  if scoring.judge and test["prompts"]:
    correct = jax.lax.map(functools.partial(_judged, scoring, module, variables), test["prompts"])
    real = test["prompts"][REAL]
    found["accuracy"] = jnp.sum(correct & real) / jnp.sum(real)

  def one(chunk):
    labels = jnp.where(chunk[REAL][:, None], chunk["labels"], IGNORED)
    return text_loss(run, dict(chunk) | {"labels": labels}, None)

  total, count = jax.tree.map(jnp.sum, jax.lax.map(one, test["chunks"]))
  return found | {"test_loss": total / count}


def _judged(scoring: Scoring, module: Module, variables: PyTree, prompts: PyTree) -> jax.Array:
  """Writes answers to a chunk of prompts, and has them judged on the host."""
  assert scoring.judge is not None
  written = write(module, variables, prompts, scoring.max_new_tokens, scoring.ends)
  shape = jax.ShapeDtypeStruct((len(prompts["ids"]),), bool)
  return host.call(scoring.judge, shape, written.tokens, written.lengths, prompts["number"])


def write(
  module: Module, variables: PyTree, prompts: PyTree, length: int, ends: tuple[int, ...]
) -> Generated:
  """Continues prompts, greedily."""
  return generate(
    module,  # type: ignore[arg-type]  # all it needs is `apply`
    variables,
    prompts["ids"],
    prompts["mask"],
    max_new_tokens=length,
    eos=ends,
  )


def test_of(exam: Exam) -> Test:
  """Returns the arrays of an exam, prompts numbered."""
  prompts = dict(exam.prompts)
  if prompts:
    shape = prompts["ids"].shape[:2]
    prompts["number"] = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
  return jax.device_put({"chunks": exam.chunks, "prompts": prompts})


def judge_of(speech: Speech, right: Sequence[str]) -> Callable:
  """Makes the judge of texts; an answer is found and compared as `data.answers` says."""

  def judge(written, lengths, numbers):
    rows = zip(np.asarray(written), np.asarray(lengths), np.asarray(numbers), strict=True)
    return np.array(
      [
        n < len(right) and is_right(text_of(speech, row, length), right[n])
        for row, length, n in rows
      ]
    )

  return judge


def is_right(text: str, right: str) -> bool:
  """Whether a text comes to the answer that another one comes to."""
  wanted = answers.final_answer(right) if answers.marker(right) else right.strip()
  given = answers.final_answer(text) if answers.marker(right) else text.strip()
  return given is not None and wanted is not None and answers.same(given, wanted)


def text_of(speech: Speech, written: np.ndarray, length: int) -> str:
  """Decodes a text without its end."""
  kept = [int(token) for token in written[:length] if int(token) not in speech.ends]
  return speech.tokenizer.decode(kept, skip_special_tokens=True)


def pretrained_scores(
  scoring: Scoring, loaded: LoadedLM, params: Params, test: Test, exam: Exam
) -> dict[str, float]:
  """Measures the model before it is tuned, by the cache."""
  program = compiler.jit(functools.partial(_plain_scores, scoring))
  compute = lambda: {name: np.asarray(value) for name, value in program(params, test).items()}
  settings = np.array([scoring.max_new_tokens, *scoring.ends])
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(test)]
  right = "\0".join(exam.right).encode()
  depends: list[bytes | np.ndarray] = [FORMAT, *identity(loaded), settings, right, *leaves]
  return {name: float(x) for name, x in cached("text_scores", depends, compute).items()}


def _plain_scores(scoring: Scoring, params: Params, test: Test) -> dict[str, jax.Array]:
  variables = {"params": params}
  run = functools.partial(scoring.model.apply, variables)
  return scores(scoring, run, scoring.model, variables, test)  # type: ignore[arg-type]
