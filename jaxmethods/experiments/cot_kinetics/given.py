"""A language model from elsewhere answers problems in words; every step reads a batch of its answers.

The heavy half of `experiments.cot_kinetics` when a `model` is given. Texts are written while the
experiment is built, batch by batch, each kept in the cache: a run that was stopped does not write twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data import problems as problem_sources
from jaxmethods.data.model_sources import load_causal_lm
from jaxmethods.errors import InputError
from jaxmethods.experiments.cot_kinetics import evidence as answer_trust
from jaxmethods.experiments.cot_kinetics import report as trust_report
from jaxmethods.experiments.cot_kinetics.config import available
from jaxmethods.experiments.cot_kinetics.evidence import Evidence, Facts
from jaxmethods.models.reading import Text
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.stats import confidence
from jaxmethods.testbeds.language.writer import Writer, Written

if TYPE_CHECKING:
  from jaxmethods.experiments.cot_kinetics.config import Config

ASK_CONFIDENCE = (
  "How likely is it that your answer is right? Reply with a number from 0 to 100, nothing else."
)
_CONFIDENCE_TOKENS = 8
_SCORE_DIGITS = 6


class Batch(NamedTuple):
  """A step's input.

  Attributes:
    params: of the model.
    text: prompts and answers.
    facts: of the answers.
    start: place of the batch among all answers.
  """

  params: Any
  text: Text
  facts: Facts
  start: jax.Array


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Lets the model answer, and composes the experiment that reads the answers.

  Raises:
    InputError: a model or problems that are missing or do not fit.
  """
  if mesh is not None:
    raise InputError("--mesh: cot_kinetics runs on one device")
  source = problem_sources.GENERATED if config.problems == "generated" else config.problems
  wanted = config.calibration + config.num_problems
  problems, origin = problem_sources.load(source, wanted, config.problem_seed)
  if len(problems) < 2:
    raise InputError(
      f"problems: {len(problems)} leaves none to judge on, for calibration takes one"
    )
  if len(problems) <= config.calibration:  # a short file: a quarter of it calibrates
    config = dataclasses.replace(config, calibration=max(len(problems) // 4, 1))
  config = dataclasses.replace(config, batch_size=min(config.batch_size, len(problems)))
  known = problems[0].answer is not None
  loaded = load_causal_lm(config.model)
  writer = Writer(loaded, config.batch_size)
  say = lambda line: print(line, flush=True)
  written, answers, facts = _answer(writer, problems, config, say)
  names = available(config)
  model, size = loaded.model, config.max_new_tokens
  count = -(-len(problems) // config.batch_size)
  padded = count * config.batch_size

  def batch(i: int) -> Batch:
    rows = np.arange(i * config.batch_size, (i + 1) * config.batch_size)
    inside = np.minimum(rows, len(problems) - 1)
    part = jax.tree.map(lambda x: x[inside], facts)
    part = jax.tree.map(jnp.asarray, part._replace(real=rows < len(problems)))
    ids, mask, lengths = (
      jnp.asarray(x[inside]) for x in (written.ids, written.mask, written.lengths)
    )
    text = Text(ids, mask, answer_trust.segments(part.reasoning, lengths, size))
    return Batch(writer.params, text, part, jnp.int32(rows[0]))

  def gather(batch: Batch) -> Evidence:
    key = jax.random.fold_in(jax.random.key(config.problem_seed), batch.start)
    variables = {"params": batch.params}
    return answer_trust.gather(model, variables, batch.text, batch.facts, key, config)

  def init(key) -> Evidence:
    del key  # nothing here is drawn by the run's seed
    shapes = jax.eval_shape(gather, batch(0))
    return jax.tree.map(lambda s: jnp.zeros((1, padded, *s.shape[1:]), s.dtype), shapes)

  def batches(step: int) -> Iterator[Batch]:
    while True:
      yield batch(step)
      step += 1

  def step(state: Evidence, batch: Batch):
    part = gather(batch)
    place = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new[None], batch.start, 1)
    wrong = 1 - batch.facts.correct.mean(where=batch.facts.real)
    return jax.tree.map(place, state, part), {"loss": wrong}

  def evaluate(state: Evidence, test):
    del test
    return answer_trust.judge(state, names, config)

  def figures(state: Evidence):
    evidence, groups = trust_report.finished(state), [config.model]
    pictures = {"energy": trust_report.energy_picture(evidence, config, groups)}
    if known:
      auroc = trust_report.table(evidence, names, config, groups)[1]
      pictures["auroc"] = trust_report.auroc_picture(auroc, names, config, groups)
    return pictures

  def files(state: Evidence) -> dict[str, str]:
    evidence = trust_report.finished(state)
    ranked = _ranked(evidence, problems, answers, written.texts, config)
    if not known:
      return {"ranked.jsonl": ranked}
    table = trust_report.table(evidence, names, config, [config.model])[0]
    return {"ranked.jsonl": ranked, "scores.md": f"{about}\n\n{table}"}

  about = (
    f"{len(problems)} problems ({origin.name}, {'real' if origin.real else 'generated'}, from "
    f"{origin.origin}), the first {config.calibration} for calibration"
    f"{'' if known else ', without known answers: nothing can be judged'}; answered greedily by "
    f"{config.model} (from {loaded.files.source.origin}); CoT-Kinetics is our reconstruction"
  )
  return Experiment(init, batches, step, evaluate, (), figures, count, about, files)


def _answer(
  writer: Writer, problems, config: Config, say
) -> tuple[Written, list[str | None], Facts]:
  """Greedy answers; what samples agree on; how sure the model says it is."""
  questions = [f"{p.question}\n{config.instruction}".strip() for p in problems]
  prompts = [writer.prompt(*config.examples, question) for question in questions]
  size = config.max_new_tokens
  written = writer.write(prompts, size, report=lambda line: say(f"answers: {line}"))
  final = _finals(written)
  correct = [a is not None and p.check(a) for a, p in zip(final, problems, strict=True)]
  spans = [
    _span(writer, written, row, config.end_of_thinking, size) for row in range(len(problems))
  ]
  nothing = np.full(len(problems), np.nan, np.float32)
  verbalised, agreement, entropy = nothing, nothing, nothing
  if config.verbalised:
    turns = [
      writer.prompt(*config.examples, question, text, ASK_CONFIDENCE)
      for question, text in zip(questions, written.texts, strict=True)
    ]
    said = writer.write(
      turns, _CONFIDENCE_TOKENS, report=lambda line: say(f"confidence: {line}")
    ).texts
    numbers = [confidence.verbalised(text) for text in said]
    say(
      f"{numbers.count(None)} of {len(numbers)} confidences could not be read: 0.5 in their place"
    )
    verbalised = np.array([0.5 if n is None else n for n in numbers], np.float32)
  if config.samples:
    agreement, entropy = _samples(writer, prompts, config, say)
  columns = (
    np.ones(len(problems), bool),
    np.array(correct),
    np.array([a is not None for a in final]),
    np.array([reasoning for reasoning, _ in spans], np.int32),
    np.array([at for _, at in spans], np.int32),
    agreement, entropy, verbalised,
  )  # fmt: skip
  return written, final, Facts(*columns)  # type: ignore[arg-type]  # numpy until a batch is made


def _finals(written: Written) -> list[str | None]:
  pairs = zip(written.texts, written.finished, strict=True)
  return [problem_sources.final_answer(text, bool(finished)) for text, finished in pairs]


def _samples(writer: Writer, prompts, config: Config, say) -> tuple[np.ndarray, np.ndarray]:
  """Agreement, and length-normalised entropy, of several draws."""
  written = writer.write(
    prompts, config.max_new_tokens, temperature=config.sample_temperature,
    num_samples=config.samples, report=lambda line: say(f"samples: {line}"),
  )  # fmt: skip
  ids: dict[str, int] = {}
  name = lambda a: -1 if a is None else ids.setdefault(problem_sources.normalised(a), len(ids))
  table = jnp.array([name(a) for a in _finals(written)], jnp.int32).reshape(len(prompts), -1)
  share = confidence.self_consistency(table, table >= 0)[1]
  return np.asarray(share), -written.mean_log_prob.reshape(len(prompts), -1).mean(1)


def _span(writer: Writer, written: Written, row: int, end: str, size: int) -> tuple[int, int]:
  """Number of reasoning tokens, and the token where the answer begins, of one text.

  Reasoning ends before the end-of-thinking marker, else before the last "Answer:", else with the
  text; what would be fewer than two tokens is taken to be all of it.
  """
  length, text = int(written.lengths[row]), written.texts[row]
  tokens = written.ids[row, -size:][:length]
  ends = np.array(writer.token_ends(tokens))
  token_of = lambda position: min(int(np.searchsorted(ends, position, side="right")), length - 1)
  thought, marker = text.find(end) if end else -1, text.lower().rfind(problem_sources.MARKER)
  position = thought if thought >= 0 else marker
  reasoning = token_of(position) if position >= 0 else length
  given = problem_sources.final_answer(text, finished=True)
  begins = text.rfind(given) if given else -1
  answer_at = token_of(begins) if begins >= 0 else length - 1
  return (reasoning if reasoning >= 2 else length), answer_at


def _ranked(evidence: Evidence, problems, answers, texts: list[str], config: Config) -> str:
  """JSON lines of the answers that are judged, the most trusted first."""
  values, _ = answer_trust.test_scores(evidence, (config.score,), config)
  score = np.asarray(values)[0, 0]
  lines = []
  for rank, place in enumerate(np.argsort(-score, kind="stable"), 1):
    i = int(place) + config.calibration
    line = {
      "rank": rank,
      "score": round(float(score[place]), _SCORE_DIGITS),
      "question": problems[i].question,
      "text": texts[i],
      "answer": answers[i],
      "reasoning_tokens": int(evidence.facts.reasoning[0, i]),
    }
    if problems[i].answer is not None:
      line |= {"right": problems[i].answer, "correct": bool(evidence.facts.correct[0, i])}
    lines.append(json.dumps(line, ensure_ascii=False))
  return "\n".join(lines) + "\n"
