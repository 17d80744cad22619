"""A small model learns arithmetic in written-out steps, and answers what it has never seen.

The heavy half of `experiments.cot_kinetics` without a `model`. Steps train; an evaluation writes
answers at every temperature, reads them again and judges all scores, in one compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.adapters.training import token_cross_entropy
from jaxmethods.data import arithmetic
from jaxmethods.data.array_cache import cached_tree
from jaxmethods.errors import InputError
from jaxmethods.experiments.cot_kinetics import evidence as answer_trust
from jaxmethods.experiments.cot_kinetics import report as trust_report
from jaxmethods.experiments.cot_kinetics.config import available
from jaxmethods.experiments.cot_kinetics.evidence import Evidence, Facts
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.models.generate import generate
from jaxmethods.models.reading import Text
from jaxmethods.runtime import compiler, loop
from jaxmethods.runtime.experiment import Experiment, in_common
from jaxmethods.stats import confidence

if TYPE_CHECKING:
  from jaxmethods.experiments.cot_kinetics.config import Config

FORMAT = "answers 2"  # changes when training, or what evidence is made of, changes
_CHUNK = 500  # problems that are answered together
_WARM_UP = 0.05
# Choices that are made after the answers have been read.
_AFTERWARDS = ("score", "form", "gamma", "pool", "segment", "states", "bootstrap", "reuse")


class State(NamedTuple):
  """What a checkpoint needs; `optimizer` counts the steps."""

  params: Any
  optimizer: Any
  key: jax.Array


class Exam(NamedTuple):
  """Test problems: prompts (n, P), their mask, and right answers (n,), calibration first."""

  prompts: jax.Array
  mask: jax.Array
  answers: jax.Array


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Composes the experiment: training, or the answers of a trained model from the cache (`reuse`)."""
  if mesh is not None:
    raise InputError("--mesh: cot_kinetics runs on one device")
  model = make_model(config)
  exam = make_exam(config)
  names = available(config)
  groups = [f"temperature {t:g}" for t in config.temperatures]
  question = lambda params, key, exam: gather(model, params, key, exam, config)
  examine = compiler.jit(question)

  def init(key: jax.Array) -> State:
    params_key, key = jax.random.split(key)
    params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
    return State(params, make_optimizer(config).init(params), key)

  def batches(step: int) -> Iterator[dict[str, np.ndarray]]:
    while True:
      rng = np.random.default_rng((config.problem_seed, 1 + step))
      drawn = arithmetic.generate(config.batch_size, config.operations, rng)
      yield {"prompts": drawn.prompts, "solutions": drawn.solutions}
      step += 1

  def step(state: State, batch):
    loss, gradient = jax.value_and_grad(lambda params: training_loss(model, params, batch))(
      state.params
    )
    updates, optimizer = make_optimizer(config).update(gradient, state.optimizer, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), optimizer=optimizer), {
      "loss": loss
    }

  def evaluate(state: State, exam: Exam):
    return answer_trust.judge(question(state.params, state.key, exam), names, config)

  about = (
    f"{config.num_problems} generated arithmetic problems of 1 to {config.operations} steps, none of "
    f"them trained on, and {config.calibration} for calibration; answered at temperatures "
    f"{', '.join(f'{t:g}' for t in config.temperatures)} by a model of {config.layers} layers trained "
    "here on others; CoT-Kinetics is our reconstruction"
  )

  def reported(evidence_of):
    """Pictures and files from a state's evidence."""

    def figures(state):
      evidence = trust_report.finished(evidence_of(state))
      auroc = trust_report.table(evidence, names, config, groups)[1]
      return {
        "energy": trust_report.energy_picture(evidence, config, groups),
        "auroc": trust_report.auroc_picture(auroc, names, config, groups),
      }

    def files(state):
      evidence = trust_report.finished(evidence_of(state))
      return {"scores.md": f"{about}\n\n{trust_report.table(evidence, names, config, groups)[0]}"}

    return figures, files

  if not config.reuse:
    figures, files = reported(lambda state: examine(state.params, state.key, exam))
    return Experiment(init, batches, step, evaluate, exam, figures, config.steps, about, files)

  def trained(key: jax.Array) -> Evidence:
    """Evidence of the model that `config.steps` steps make of this key, cached."""
    one_step = compiler.jit(step, donate_argnums=0)

    def compute() -> Evidence:
      state = loop.advance(one_step, init(key), batches(0), config.steps, "training")
      return examine(state.params, state.key, exam)

    settings = in_common(config, _AFTERWARDS)
    drawn_from = np.asarray(jax.random.key_data(key))
    depends: list[bytes | np.ndarray] = [FORMAT.encode(), repr(settings).encode(), drawn_from]
    return cached_tree("reasoners", depends, _structure(settings), compute)

  def judged(evidence: Evidence, chosen: jax.Array):
    return answer_trust.judge(evidence, names, config, chosen)

  def nothing(evidence: Evidence, batch):
    del batch
    return evidence, {"loss": 1 - evidence.facts.correct.mean()}

  def no_batches(step: int) -> Iterator[tuple]:
    del step
    while True:
      yield ()

  figures, files = reported(lambda evidence: evidence)
  chosen = jnp.int32(names.index(config.score))
  return Experiment(trained, no_batches, nothing, judged, chosen, figures, 1, about, files)


def make_model(config: Config) -> CausalLM:
  """The small model, of the Llama shape."""
  return CausalLM(
    CausalLMConfig(
      vocab_size=len(arithmetic.CHARACTERS),
      width=config.width,
      num_layers=config.layers,
      num_heads=config.heads,
      num_kv_heads=config.heads,
      head_dim=config.width // config.heads,
      mlp_width=8 * config.width // 3,
      tied=True,
    )
  )


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay over the whole run."""
  warm_up = max(1, round(_WARM_UP * config.steps))
  rate = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, warm_up, max(config.steps, warm_up + 1)
  )
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))


def make_exam(config: Config) -> Exam:
  """The test problems."""
  count = config.calibration + config.num_problems
  rng = np.random.default_rng((config.problem_seed, 0))
  drawn = arithmetic.generate(count, config.operations, rng, test=True)
  prompts = jnp.asarray(drawn.prompts)
  return Exam(prompts, prompts > 0, jnp.asarray(drawn.answers))


def training_loss(model: CausalLM, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
  """Mean cross-entropy of the tokens of the solutions; prompts are read, not learned."""
  prompts, solutions = jnp.asarray(batch["prompts"]), jnp.asarray(batch["solutions"])
  ids = jnp.concatenate([prompts, solutions], 1)
  labels = jnp.where(solutions > 0, solutions, IGNORED)
  labels = jnp.pad(labels, ((0, 0), (prompts.shape[1], 0)), constant_values=IGNORED)
  out: Any = model.apply({"params": params}, ids[:, :-1], mask=ids[:, :-1] > 0)
  total, count = token_cross_entropy(out.logits, labels[:, 1:])
  return total / count


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


def gather(model: CausalLM, params: Any, key: jax.Array, exam: Exam, config: Config) -> Evidence:
  """Answers all problems at every temperature and reads the answers: evidence (G, N, ...)."""
  variables = {"params": params}
  size = arithmetic.sizes(config.operations)[1]
  count = len(exam.answers)
  chunks = -(-count // _CHUNK)
  # Chunks of one size; what is repeated to fill the last one is cut off again.
  rows = jnp.arange(chunks * -(-count // chunks)).reshape(chunks, -1) % count

  def write(key: jax.Array, part: Exam, temperature: float):
    return generate(
      model, variables, part.prompts, part.mask, max_new_tokens=size, key=key,
      temperature=temperature, eos=(arithmetic.END,),
    )  # fmt: skip

  def draws(key: jax.Array, part: Exam) -> tuple[jax.Array, jax.Array]:
    """Agreement and length-normalised entropy of further samples."""

    def one(key):
      out = write(key, part, config.sample_temperature)
      return inspect(out.tokens, out.lengths)[2], out.log_probs.sum(1) / out.lengths

    values, log_probs = jax.lax.map(one, jax.random.split(key, config.samples))
    return confidence.self_consistency(values.T, values.T >= 0)[1], -log_probs.mean(0)

  def answer(key: jax.Array, part: Exam) -> Evidence:
    nothing = jnp.full(len(part.answers), jnp.nan)
    sample_key, key = jax.random.split(key)
    sampled = draws(sample_key, part) if config.samples else (nothing, nothing)
    groups = []
    for g, temperature in enumerate(config.temperatures):
      write_key, read_key = jax.random.split(jax.random.fold_in(key, g))
      out = write(write_key, part, temperature)
      reasoning, answer_at, value = inspect(out.tokens, out.lengths)
      there = jnp.arange(size) < out.lengths[:, None]
      text = Text(
        jnp.concatenate([part.prompts, out.tokens], 1),
        jnp.concatenate([part.mask, there], 1),
        answer_trust.segments(reasoning, out.lengths, size),
      )
      real = jnp.ones(len(part.answers), bool)
      facts = Facts(
        real, value == part.answers, value >= 0, reasoning, answer_at, *sampled, nothing
      )
      groups.append(answer_trust.gather(model, variables, text, facts, read_key, config))
    return jax.tree.map(lambda *x: jnp.stack(x), *groups)

  def of_chunk(chunk):
    rows, index = chunk
    return answer(jax.random.fold_in(key, index), jax.tree.map(lambda x: x[rows], exam))

  found = jax.lax.map(of_chunk, (rows, jnp.arange(chunks)))
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :count]
  return jax.tree.map(join, found)


@functools.cache
def _structure(config: Config) -> Any:
  """Of the evidence that `gather` gives; traced once for all rows and seeds."""

  def evidence(key: jax.Array) -> Evidence:
    model = make_model(config)
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return gather(model, params, key, make_exam(config), config)

  return jax.tree.structure(jax.eval_shape(evidence, jax.random.key(0)))
