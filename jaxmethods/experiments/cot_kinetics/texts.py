"""Texts of a given model: its answers to problems, what is known about them, and the ranked list."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmethods.data import answers
from jaxmethods.data.problems import Problem
from jaxmethods.experiments.cot_kinetics.config import Trial
from jaxmethods.experiments.cot_kinetics.evidence import Evidence, Facts, test_scores
from jaxmethods.stats import confidence
from jaxmethods.testbeds.language.writer import Writer, Written

ASK_CONFIDENCE = (
  "How likely is it that your answer is right? Reply with a number from 0 to 100, nothing else."
)
_CONFIDENCE_TOKENS = 8
_SCORE_DIGITS = 6

Say = Callable[[str], None]


class Asking(NamedTuple):
  """How a model is asked.

  Attributes:
    instruction: behind every question.
    examples: question, reply, question, ...: before it.
    end_of_thinking: mark behind the reasoning.
    max_new_tokens: of an answer.
    samples, sample_temperature: further answers; 0: none.
    verbalised: whether to ask how sure the model is.
  """

  instruction: str
  examples: tuple[str, ...]
  end_of_thinking: str
  max_new_tokens: int
  samples: int
  sample_temperature: float
  verbalised: bool


class Answered(NamedTuple):
  """Problems with the texts and the answers in them, None where there is none, and facts (N,)."""

  problems: Sequence[Problem]
  written: Written
  answers: list[str | None]
  facts: Facts


def answer(writer: Writer, problems: Sequence[Problem], asking: Asking, say: Say) -> Answered:
  """Lets a model answer greedily, draw samples, and say how sure it is.

  Args:
    writer: the model.
    problems: N of them.
    asking: how it is asked.
    say: called with lines about the progress.
  """
  questions = [f"{p.question}\n{asking.instruction}".strip() for p in problems]
  prompts = [writer.prompt(*asking.examples, question) for question in questions]
  size, nothing = asking.max_new_tokens, np.full(len(problems), np.nan, np.float32)
  written = writer.write(prompts, size, report=lambda line: say(f"answers: {line}"))
  found = finals(written)
  correct = [a is not None and p.check(a) for a, p in zip(found, problems, strict=True)]
  spans = [span(writer, written, row, asking.end_of_thinking, size) for row in range(len(problems))]
  verbalised, agreement, entropy = nothing, nothing, nothing
  if asking.verbalised:
    verbalised = _confidences(writer, questions, written.texts, asking.examples, say)
  if asking.samples:
    agreement, entropy = _samples(writer, prompts, asking, say)
  columns = (
    np.ones(len(problems), bool),
    np.array(correct),
    np.array([a is not None for a in found]),
    np.array([reasoning for reasoning, _ in spans], np.int32),
    np.array([at for _, at in spans], np.int32),
    agreement, entropy, verbalised,
    np.array([text.count("=") for text in written.texts], np.int32),
  )  # fmt: skip
  facts = Facts(*columns)  # type: ignore[arg-type]  # numpy until a batch is made
  return Answered(problems, written, found, facts)


def finals(written: Written) -> list[str | None]:
  """The answers in texts."""
  pairs = zip(written.texts, written.finished, strict=True)
  return [answers.final_answer(text, bool(finished)) for text, finished in pairs]


def _confidences(
  writer: Writer, questions: list[str], texts: list[str], examples: tuple[str, ...], say: Say
) -> np.ndarray:
  """How sure the model says it is, (N,) in [0, 1]."""
  turns = [
    writer.prompt(*examples, question, text, ASK_CONFIDENCE)
    for question, text in zip(questions, texts, strict=True)
  ]
  report = lambda line: say(f"confidence: {line}")
  said = writer.write(turns, _CONFIDENCE_TOKENS, report=report).texts
  numbers = [confidence.verbalised(text) for text in said]
  say(f"{numbers.count(None)} of {len(numbers)} confidences could not be read: 0.5 in their place")
  return np.array([0.5 if n is None else n for n in numbers], np.float32)


def _samples(
  writer: Writer, prompts: list[list[int]], asking: Asking, say: Say
) -> tuple[np.ndarray, np.ndarray]:
  """Agreement, and length-normalised entropy, of several draws."""
  written = writer.write(
    prompts, asking.max_new_tokens, temperature=asking.sample_temperature,
    num_samples=asking.samples, report=lambda line: say(f"samples: {line}"),
  )  # fmt: skip
  ids: dict[str, int] = {}
  name = lambda a: -1 if a is None else ids.setdefault(answers.normalised(a), len(ids))
  table = jnp.array([name(a) for a in finals(written)], jnp.int32).reshape(len(prompts), -1)
  share = confidence.self_consistency(table, table >= 0)[1]
  return np.asarray(share), -written.mean_log_prob.reshape(len(prompts), -1).mean(1)


def span(writer: Writer, written: Written, row: int, end: str, size: int) -> tuple[int, int]:
  """Number of reasoning tokens, and the token where the answer begins, of one text.

  Reasoning ends before the end-of-thinking marker, else before the last "Answer:", else with the
  text; fewer than two tokens are taken to be all of it.
  """
  length, text = int(written.lengths[row]), written.texts[row]
  tokens = written.ids[row, -size:][:length]
  ends = np.array(writer.token_ends(tokens))
  token_of = lambda position: min(int(np.searchsorted(ends, position, side="right")), length - 1)
  thought, marker = text.find(end) if end else -1, answers.marker(text)
  position = thought if thought >= 0 or not marker else marker.start
  reasoning = token_of(position) if position >= 0 else length
  given = answers.final_answer(text, finished=True)
  begins = text.rfind(given) if given else -1
  answer_at = token_of(begins) if begins >= 0 else length - 1
  return (reasoning if reasoning >= 2 else length), answer_at


def ranked(evidence: Evidence, answered: Answered, trial: Trial) -> str:
  """JSON lines of the answers that are judged, the most trusted first."""
  values, _ = test_scores(evidence, trial._replace(names=(trial.score,)))
  score = np.asarray(values)[0, 0]
  lines = []
  for rank, place in enumerate(np.argsort(-score, kind="stable"), 1):
    i = int(place) + trial.calibration
    problem = answered.problems[i]
    line = {
      "rank": rank,
      "score": round(float(score[place]), _SCORE_DIGITS),
      "question": problem.question,
      "text": answered.written.texts[i],
      "answer": answered.answers[i],
      "reasoning_tokens": int(evidence.facts.reasoning[0, i]),
    }
    if problem.answer is not None:
      line |= {"right": problem.answer, "correct": bool(evidence.facts.correct[0, i])}
    lines.append(json.dumps(line, ensure_ascii=False))
  return "\n".join(lines) + "\n"
