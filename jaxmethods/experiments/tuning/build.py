"""Composes the tuning of a causal LM: data, model, way of tuning, pictures, files to export."""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.data import text_examples
from jaxmethods.data.model_sources import LoadedLM, load_causal_lm, open_model
from jaxmethods.data.model_tokenizers import Tokenizer
from jaxmethods.data.records import sealed
from jaxmethods.data.text_examples import Example
from jaxmethods.errors import InputError
from jaxmethods.experiments.tuning import figures
from jaxmethods.experiments.tuning.config import Config, by_layer, rate_of
from jaxmethods.experiments.tuning.figures import Shown
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.language import exporting, starter, tokens, tuning
from jaxmethods.testbeds.language.privacy import Guarantee, plan, private_tuner
from jaxmethods.testbeds.language.tuners import Way, way_of
from jaxmethods.testbeds.language.tuning import Material, Scoring
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import TuningState

_GENERATED = (500, 100)  # examples that are trained and tested on where the config does not say
# B of LoRA+ learns this much faster than A (orig).
_LORA_PLUS = 16.0


class Desk(NamedTuple):
  """What pictures and files of a state are made of: the evaluation, and how many texts are shown."""

  scoring: Scoring
  material: Material
  shown: int


def build(config: Config, mesh: Mesh | None = None, material: Material | None = None) -> Experiment:
  """Composes the experiment.

  Args:
    config: its settings.
    mesh: devices with the axes "data", "fsdp", "tensor" or some of them; None: one device.
    material: model and texts; default: those of the config.
  """
  material = material or load(config, mesh)
  model, params, train = material.loaded.model, material.loaded.params, material.train
  count = len(train.arrays["ids"])
  if config.batch_size > count:
    raise InputError(f"batch_size: {config.batch_size} is more than the {count} rows to train on")
  guarantee = plan(config, count, config.batch_size, config.steps) if config.is_private else None
  way = _way(config, material, guarantee)
  rate = rate_of(config)
  rates = dict.fromkeys(("decoder", "adapter", "prompt"), rate) | {"adapter_b": _LORA_PLUS * rate}
  optimiser = tuners.adamw(rates, way.tuner.rates, config.steps, warmup=config.warmup)
  judge = tuning.judge_of(material.speech, material.exam.right) if material.exam.right else None
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  scoring = Scoring(
    way, model, judge, config.max_new_tokens, material.speech.ends, size, {}, guarantee
  )
  test = tuning.test_of(material.exam)
  before = tuning.pretrained_scores(scoring, material.loaded, params, test, material.exam)
  scoring = scoring._replace(before=before)
  desk = Desk(scoring, material, config.shown)
  probe = functools.partial(_probe, config, material)
  return Experiment(
    init=lambda key: tuners.init_state(way.tuner, optimiser, key, params, probe()),
    batches=functools.partial(
      tuning.batches, train, config.batch_size, config.seed, guarantee, mesh
    ),
    step=tuners.tuning_step(
      way.tuner, model, optimiser, tuners.text_loss, clip=jnp.inf if guarantee else config.clip
    ),
    evaluate=functools.partial(tuning.evaluate, scoring),
    test=test,
    figures=functools.partial(_figures, desk),
    files=functools.partial(_files, desk),
    num_steps=config.steps,
    about=material.about + (f"; {guarantee}" if guarantee else ""),
    export=exporting.export_of(way, material.loaded, material.speech.tokenizer),
  )


def load(config: Config, mesh: Mesh | None = None) -> Material:
  """Opens the model and reads the texts.

  Raises:
    InputError: whatever is wrong with either, or that they do not fit.
  """
  train, test, about = _texts(config)
  loaded, tokenizer = _model(config, mesh)
  speech = tuning.speech_of(config.model, loaded, tokenizer, config.template)
  limit = tuning.check_context(config.model, loaded.files.config, config.max_length)
  rows = [tokens.row(speech, example) for example in train]
  if config.packing and not config.max_length:
    longest = max(len(row.ids) for row in rows)
    limit = min(limit, max(256, -(-longest // 16) * 16))
  table = tokens.table(rows, train, limit, packing=config.packing)
  exam = tuning.exam_of(speech, test, limit, config.chunk)
  source = loaded.files.source
  said = (
    f"{sealed(config.model, source.digest, source.origin)}; {about}; "
    f"{'turns in the template of the tokenizer' if speech.template else 'plain lines'}, "
    f"{table.counted} of {table.tokens} tokens count, "
    f"{table.truncated} of {len(train)} answers cut off at {limit} tokens"
  )
  if config.packing:
    said += f", packed into {len(table.arrays['ids'])} rows of {limit}"
  return Material(loaded, speech, table, exam, said)


def _texts(config: Config) -> tuple[list[Example], list[Example], str]:
  """Reads what is trained and what is tested on, and says so."""
  generated = not config.data.startswith(text_examples.FILE)
  defaults = _GENERATED if generated else (0, 0)
  trained, tested = (
    given or default
    for given, default in zip((config.num_train, config.num_test), defaults, strict=True)
  )
  if config.test:
    given = text_examples.load(config.data, trained, config.data_seed)
    others = text_examples.load(config.test, tested, config.data_seed)
    if shared := {e[:2] for e in given.examples} & {e[:2] for e in others.examples}:
      raise InputError(f"test: {len(shared)} of its examples are in the training data too")
    said = f"trained on {given.about}, tested on {others.about}"
    return given.examples, others.examples, said
  every = text_examples.load(config.data, trained + tested if generated else 0, config.data_seed)
  found = list({e[:2]: e for e in every.examples}.values())  # no text is trained and tested on
  if len(found) < 2:
    raise InputError(
      f"data: {config.data} has {len(found)} example: one to train and one to test on"
    )
  cut = tested or max(1, round(config.test_share * len(found)))
  if cut >= len(found):
    raise InputError(f"num_test: {cut} leaves none of the {len(found)} examples to train on")
  train, test = found[:-cut], found[-cut:]
  train = train[:trained] if trained else train
  return train, test, f"{every.about}: trained on {len(train)}, tested on {len(test)} others"


def _model(config: Config, mesh: Mesh | None) -> tuple[LoadedLM, Tokenizer]:
  """Opens the model and a tokenizer."""
  if config.model == starter.NAME:
    loaded = starter.load(config.small_steps, dtype=config.dtype, remat=config.remat)
  else:
    loaded = load_causal_lm(
      config.model, mesh=mesh, dtype=config.dtype, remat=config.remat,
      scan_layers=False if by_layer(config) else None, key=jax.random.key(config.seed),
    )  # fmt: skip
  if not config.tokenizer:
    return loaded, loaded.files.tokenizer()
  if config.tokenizer == starter.NAME:
    return loaded, starter.make_tokenizer()
  return loaded, open_model(config.tokenizer).tokenizer()


def _way(config: Config, material: Material, guarantee: Guarantee | None) -> Way:
  """Makes the way of tuning, in parts or in private."""
  try:
    way = way_of(config.adapter, config.tuner, material.loaded.model, config.steps)
    if config.tuner.targets:
      probe = jax.eval_shape(lambda: jax.random.key(0))
      jax.eval_shape(
        lambda key, params: way.tuner.init(key, params, {}), probe, material.loaded.params
      )
  except InputError as error:
    raise InputError(f"tuner: {error}") from None
  except KeyError:  # a start that needs the probe
    pass
  if guarantee:
    return way._replace(tuner=private_tuner(way.tuner, guarantee))
  return way._replace(tuner=tuners.accumulated(way.tuner, config.accumulate))


def _probe(config: Config, material: Material) -> dict[str, jax.Array]:
  """Takes examples for statistics: of what must not be forgotten, or of the training data."""
  if not config.upstream:
    return tuning.probe_of(material.train, config.probe_size)
  examples = text_examples.load(config.upstream, config.probe_size, 0).examples
  rows = [tokens.row(material.speech, example) for example in examples]
  limit = tuning.check_context(config.model, material.loaded.files.config, config.max_length)
  return tuning.probe_of(tokens.table(rows, examples, limit, packing=False), config.probe_size)


# --- the report -----------------------------------------------------------------------------------


def written(desk: Desk, state: TuningState) -> list[Shown]:
  """Lets a state answer the first prompts of the exam."""
  exam, scoring, speech = desk.material.exam, desk.scoring, desk.material.speech
  if not exam.prompts:
    return []
  _, module, variables = tuning.tuned(scoring.way.tuner, scoring.model, state)
  chunk = {name: x[0] for name, x in exam.prompts.items()}
  program = compiler.jit(
    lambda variables, chunk: tuning.write(
      module, variables, chunk, scoring.max_new_tokens, scoring.ends
    )
  )
  found = program(variables, chunk)
  texts = [
    tuning.text_of(speech, row, length)
    for row, length in zip(np.asarray(found.tokens), np.asarray(found.lengths), strict=True)
  ]
  each = zip(exam.questions, texts, exam.right, strict=False)
  return [Shown(q, text, right, tuning.is_right(text, right)) for q, text, right in each]


def _figures(desk: Desk, state: TuningState) -> dict[str, Figure]:
  shown = written(desk, state)[: desk.shown]
  return {"generations": figures.generations(shown)} if shown else {}


def _files(desk: Desk, state: TuningState) -> dict[str, str]:
  lines = [json.dumps(one._asdict(), ensure_ascii=False) for one in written(desk, state)]
  return {"generations.jsonl": "\n".join(lines) + "\n"} if lines else {}
