"""A language model from elsewhere answers problems in words; every step reads a batch of its answers.

Texts are written while the experiment is built, batch by batch, each kept in the cache: a run that was
stopped does not write twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.data import problems as problem_sources
from jaxmethods.data.model_sources import LoadedLM, load_causal_lm
from jaxmethods.data.problems import Problem
from jaxmethods.data.records import Source, sealed
from jaxmethods.errors import InputError
from jaxmethods.experiments.cot_kinetics import evidence, figures, report
from jaxmethods.experiments.cot_kinetics.config import Config, Passes, Trial, passes, trial
from jaxmethods.experiments.cot_kinetics.evidence import Evidence, Facts
from jaxmethods.experiments.cot_kinetics.texts import Answered, Asking, answer, ranked
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.models.reading import Text
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.language.writer import Writer
from jaxmethods.trees import Params

_LEAST_LAYERS = 2  # a path needs them to turn


class Batch(NamedTuple):
  """The input of a step.

  Attributes:
    params: of the model.
    text: prompts and answers.
    facts: of the answers.
    start: place of the batch among all answers.
  """

  params: Params
  text: Text
  facts: Facts
  start: jax.Array


class Reader(NamedTuple):
  """How answers are read: by which model, in which passes; `seed` is that of MC dropout."""

  model: CausalLM
  passes: Passes
  seed: int


class Results(NamedTuple):
  """How a finished reading is shown: the scores, the texts, the name of the model, the report's line."""

  trial: Trial
  answered: Answered
  model: str
  about: str


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Lets the model answer, and composes the experiment that reads the answers.

  Raises:
    InputError: a mesh; a model or problems that are missing or do not fit.
  """
  checks.no_mesh("cot_kinetics", mesh)
  problems, origin, calibration = _problems(config)
  batch_size = min(config.batch_size, len(problems))
  loaded = _readable(load_causal_lm(config.model), config.model)
  writer = Writer(loaded, batch_size)
  asking = Asking(
    config.instruction, config.examples, config.end_of_thinking, config.max_new_tokens,
    config.samples, config.sample_temperature, config.verbalised,
  )  # fmt: skip
  answered = answer(writer, problems, asking, functools.partial(print, flush=True))
  compared = trial(config)._replace(calibration=calibration)
  reader = Reader(loaded.model, passes(config), config.problem_seed)
  about = _about(answered, origin, calibration, loaded.files.source)
  results = Results(compared, answered, config.model, about)
  batch = functools.partial(make_batch, writer.params, answered, config.max_new_tokens, batch_size)
  count = -(-len(problems) // batch_size)
  return Experiment(
    functools.partial(init, reader, batch, count * batch_size),
    lambda first: map(batch, itertools.count(first)),
    functools.partial(step, reader),
    lambda state, test: evidence.judge(state, compared),
    (),
    functools.partial(draw, results),
    count,
    about,
    functools.partial(write, results),
  )


def _problems(config: Config) -> tuple[list[Problem], Source, int]:
  """Problems, where they are from, and how many of them calibrate: a quarter of a short file."""
  if config.calibration_problems:
    return _two_kinds(config)
  source = _source(config.problems)
  wanted = config.calibration + config.num_problems
  problems, origin = problem_sources.load(source, wanted, config.problem_seed)
  if len(problems) < 2:
    raise InputError(
      f"problems: {len(problems)} leaves none to judge on, for calibration takes one"
    )
  short = len(problems) <= config.calibration
  return problems, origin, max(len(problems) // 4, 1) if short else config.calibration


def _source(name: str) -> str:
  return problem_sources.GENERATED if name == "generated" else name


def _two_kinds(config: Config) -> tuple[list[Problem], Source, int]:
  """Problems for calibration of one source, then those of another that are judged on."""
  names = (config.calibration_problems, config.problems)
  counts = (config.calibration, config.num_problems)
  (first, other), (rest, origin) = (
    problem_sources.load(_source(name), count, config.problem_seed)
    for name, count in zip(names, counts, strict=True)
  )
  if not first or not rest:
    raise InputError("calibration_problems, problems: each needs a problem or more")
  calibration = sealed(other.name, other.digest, f"{len(first)} problems")
  origin = origin._replace(origin=f"{origin.origin}, behind {calibration} of another kind")
  return [*first, *rest], origin, len(first)


def _readable(loaded: LoadedLM, name: str) -> LoadedLM:
  """Refuses a model whose layers make no path, before it writes for hours."""
  if (layers := loaded.model.config.num_layers) < _LEAST_LAYERS:
    raise InputError(
      f"model {name}: has {layers} layer; the scores need at least {_LEAST_LAYERS} for a path to turn"
    )
  return loaded


def _about(answered: Answered, origin: Source, calibration: int, model: Source) -> str:
  """The line about data and model for reports."""
  known = answered.problems[0].answer is not None
  kind = "yours" if origin.own else "real" if origin.real else "generated"
  problems = sealed(origin.name, origin.digest, f"{len(answered.problems)} problems")
  return (
    f"{problems}, {kind}, from {origin.origin}, the first {calibration} for calibration"
    f"{'' if known else ', without known answers: nothing can be judged'}; answered greedily by "
    f"{sealed(model.name, model.digest)} from {model.origin}; CoT-Kinetics is our reconstruction"
  )


def make_batch(params: Params, answered: Answered, columns: int, size: int, number: int) -> Batch:
  """A batch of `size` answers of at most `columns` tokens; repeats that fill the last are not `real`."""
  count, written = len(answered.problems), answered.written
  rows = np.arange(number * size, (number + 1) * size)
  inside = np.minimum(rows, count - 1)
  facts = jax.tree.map(lambda x: x[inside], answered.facts)
  facts = jax.tree.map(jnp.asarray, facts._replace(real=rows < count))
  ids, mask, lengths = (
    jnp.asarray(x[inside]) for x in (written.ids, written.mask, written.lengths)
  )
  text = Text(ids, mask, evidence.segments(facts.reasoning, lengths, columns))
  return Batch(params, text, facts, jnp.int32(rows[0]))


def read(reader: Reader, batch: Batch) -> Evidence:
  """Evidence of a batch of answers."""
  key = jax.random.fold_in(jax.random.key(reader.seed), batch.start)
  variables = {"params": batch.params}
  return evidence.gather(reader.model, variables, batch.text, batch.facts, key, reader.passes)


def init(reader: Reader, batch: Callable[[int], Batch], count: int, key: jax.Array) -> Evidence:
  """Evidence of no answer yet; nothing is drawn by the seed of the run."""
  del key
  shapes = jax.eval_shape(functools.partial(read, reader), batch(0))
  return jax.tree.map(lambda s: jnp.zeros((1, count, *s.shape[1:]), s.dtype), shapes)


def step(reader: Reader, state: Evidence, batch: Batch) -> tuple[Evidence, dict[str, jax.Array]]:
  """Reads a batch and puts its evidence in its place."""
  part = read(reader, batch)
  place = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new[None], batch.start, 1)
  wrong = 1 - batch.facts.correct.mean(where=batch.facts.real)
  return jax.tree.map(place, state, part), {"loss": wrong}


def draw(results: Results, state: Evidence) -> dict[str, Figure]:
  """Pictures; those of rankings where answers are known."""
  found, compared, groups = report.finished(state), results.trial, [results.model]
  pictures = {"energy": figures.energy_picture(found, compared.energy, groups)}
  if results.answered.problems[0].answer is not None:
    auroc = report.table(found, compared, groups)[1]
    pictures["auroc"] = figures.auroc_picture(auroc, compared.names, compared.score, groups)
  return pictures


def write(results: Results, state: Evidence) -> dict[str, str]:
  """Files: the ranked answers, and the table of scores where answers are known."""
  found = report.finished(state)
  files = {"ranked.jsonl": ranked(found, results.answered, results.trial)}
  if results.answered.problems[0].answer is not None:
    table, _ = report.table(found, results.trial, [results.model])
    files["scores.md"] = f"{results.about}\n\n{table}"
  return files
