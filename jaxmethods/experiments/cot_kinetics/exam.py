"""The exam of the small model: problems it has never seen, its answers, and the evidence in them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data import arithmetic
from jaxmethods.experiments.cot_kinetics import evidence
from jaxmethods.experiments.cot_kinetics.config import Passes
from jaxmethods.experiments.cot_kinetics.evidence import Evidence, Facts
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.models.generate import Generated, generate
from jaxmethods.models.reading import Text
from jaxmethods.stats import confidence
from jaxmethods.trees import Params

_CHUNK = 500  # problems that are answered together


class Exam(NamedTuple):
  """Test problems: prompts (n, P), their mask, and right answers (n,), calibration first."""

  prompts: jax.Array
  mask: jax.Array
  answers: jax.Array


class Candidate(NamedTuple):
  """A model, and how it writes and reads answers.

  Attributes:
    model: the small model.
    size: tokens of a solution at most.
    temperatures: at which answers are drawn.
    samples, sample_temperature: further draws, for what they agree on.
    passes: over each answer.
  """

  model: CausalLM
  size: int
  temperatures: tuple[float, ...]
  samples: int
  sample_temperature: float
  passes: Passes


def make_exam(
  count: int, operations: int, seed: int, *, calibration: int = 0, kinds: tuple[int, int] = (0, 0)
) -> Exam:
  """Draws `count` test problems of at most so many operations.

  Args:
    count: problems, calibration included.
    operations: the most.
    seed: of the draw.
    calibration: how many come first to calibrate on.
    kinds: operations of the problems for calibration, and of those behind them; both 0: drawn.
  """
  rng = np.random.default_rng((seed, 0))
  if kinds == (0, 0):
    parts = [arithmetic.generate(count, operations, rng, test=True)]
  else:
    parts = [
      arithmetic.generate(size, operations, rng, test=True, exactly=kind)
      for size, kind in zip((calibration, count - calibration), kinds, strict=True)
    ]
  prompts = jnp.asarray(np.concatenate([part.prompts for part in parts]))
  answers = jnp.asarray(np.concatenate([part.answers for part in parts]))
  return Exam(prompts, prompts > 0, answers)


def inspect(tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
  """Reads the answers out of solutions.

  Args:
    tokens: (B, N).
    lengths: (B,), the end included.

  Returns:
    reasoning (B,): tokens before the end-of-thinking mark; all of them without a mark, or where fewer
    than two come before it. answer_at (B,): first token behind the mark. value (B,): the number there;
    -1 where there is none, or anything else.
  """
  size = tokens.shape[1]
  place = jnp.arange(size)
  inside = place < lengths[:, None]
  marks = (tokens == arithmetic.END_OF_THINKING) & inside
  thought = jnp.where(marks.any(1), marks.argmax(1), lengths)
  answer_at = jnp.minimum(thought + 1, lengths - 1)
  digit = tokens - arithmetic.ZERO
  in_answer = (place > thought[:, None]) & (place < lengths[:, None] - 1)
  last = jnp.take_along_axis(tokens, lengths[:, None] - 1, 1)[:, 0]
  valid = (
    in_answer.any(1)
    & (last == arithmetic.END)
    & ((~in_answer) | ((digit >= 0) & (digit <= 9))).all(1)
    & (in_answer.sum(1) <= 6)
  )
  power = jnp.maximum(lengths[:, None] - 2 - place, 0)
  value = jnp.where(in_answer, digit * 10 ** jnp.minimum(power, 6), 0).sum(1)
  return (
    jnp.where(thought >= 2, thought, lengths).astype(jnp.int32),
    answer_at.astype(jnp.int32),
    jnp.where(valid, value, -1).astype(jnp.int32),
  )


def gather(candidate: Candidate, params: Params, key: jax.Array, exam: Exam) -> Evidence:
  """Answers all problems at every temperature and reads the answers: evidence (G, N, ...)."""
  count = len(exam.answers)
  chunks = -(-count // _CHUNK)
  # Chunks of one size; what is repeated to fill the last one is cut off again.
  rows = jnp.arange(chunks * -(-count // chunks)).reshape(chunks, -1) % count

  def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> Evidence:
    rows, index = chunk
    part = jax.tree.map(lambda x: x[rows], exam)
    return _answer(candidate, params, jax.random.fold_in(key, index), part)

  found = jax.lax.map(of_chunk, (rows, jnp.arange(chunks)))
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :count]
  return jax.tree.map(join, found)


def _answer(candidate: Candidate, params: Params, key: jax.Array, part: Exam) -> Evidence:
  """Evidence (G, n, ...) of the answers to some of the problems."""
  nothing = jnp.full(len(part.answers), jnp.nan)
  sample_key, key = jax.random.split(key)
  sampled = nothing, nothing
  if candidate.samples:
    sampled = _draws(candidate, params, sample_key, part)
  real, groups = jnp.ones(len(part.answers), bool), []
  for g, temperature in enumerate(candidate.temperatures):
    write_key, read_key = jax.random.split(jax.random.fold_in(key, g))
    out = _write(candidate, params, write_key, part, temperature)
    reasoning, answer_at, value = inspect(out.tokens, out.lengths)
    there = jnp.arange(candidate.size) < out.lengths[:, None]
    text = Text(
      jnp.concatenate([part.prompts, out.tokens], 1),
      jnp.concatenate([part.mask, there], 1),
      evidence.segments(reasoning, out.lengths, candidate.size),
    )
    written = (out.tokens == arithmetic.EQUALS) & (jnp.arange(candidate.size) < reasoning[:, None])
    facts = Facts(
      real, value == part.answers, value >= 0, reasoning, answer_at, *sampled, nothing,
      written.sum(1),
    )  # fmt: skip
    groups.append(
      evidence.gather(candidate.model, {"params": params}, text, facts, read_key, candidate.passes)
    )
  return jax.tree.map(lambda *x: jnp.stack(x), *groups)


def _write(
  candidate: Candidate, params: Params, key: jax.Array, part: Exam, temperature: float
) -> Generated:
  """One solution of every problem."""
  return generate(
    candidate.model, {"params": params}, part.prompts, part.mask, max_new_tokens=candidate.size,
    key=key, temperature=temperature, eos=(arithmetic.END,),
  )  # fmt: skip


def _draws(
  candidate: Candidate, params: Params, key: jax.Array, part: Exam
) -> tuple[jax.Array, jax.Array]:
  """Agreement and length-normalised entropy of further samples."""

  def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = _write(candidate, params, key, part, candidate.sample_temperature)
    return inspect(out.tokens, out.lengths)[2], out.log_probs.sum(1) / out.lengths

  values, log_probs = jax.lax.map(one, jax.random.split(key, candidate.samples))
  return confidence.self_consistency(values.T, values.T >= 0)[1], -log_probs.mean(0)


@functools.cache
def shapes(candidate: Candidate, count: int, operations: int) -> Evidence:
  """Shapes of the evidence that `gather` gives; traced once for all rows and seeds."""
  one, several = arithmetic.sizes(operations)[0], (count,)

  def evidence_of(key: jax.Array) -> Evidence:
    params = candidate.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    prompts = jnp.zeros((count, one), jnp.int32)
    return gather(candidate, params, key, Exam(prompts, prompts > 0, jnp.zeros(several, jnp.int32)))

  return jax.eval_shape(evidence_of, jax.random.key(0))
