"""A small model learns arithmetic in written-out steps, and answers problems it has never seen.

Steps train; an evaluation writes answers at every temperature, reads them again and judges all scores,
in one compiled program.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.adapters.training import token_cross_entropy
from jaxmethods.data import arithmetic
from jaxmethods.data.array_cache import cached_tree, described
from jaxmethods.experiments.cot_kinetics import evidence, exam, figures, report
from jaxmethods.experiments.cot_kinetics.config import Config, Trial, passes, trial
from jaxmethods.experiments.cot_kinetics.evidence import Evidence
from jaxmethods.experiments.cot_kinetics.exam import Candidate, Exam
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.runtime import checks, compiler, loop
from jaxmethods.runtime.experiment import Experiment, in_common
from jaxmethods.trees import Params, PyTree

FORMAT = "answers 3"  # changes when training, or what evidence is made of, changes
_WARM_UP = 0.05
# Choices that are made after the answers have been read.
_AFTERWARDS = ("score", "form", "gamma", "pool", "segment", "states", "bootstrap", "reuse")

Batch = dict[str, np.ndarray]
Examine = Callable[[Params, jax.Array, Exam], Evidence]  # (params, key, exam)

Shown = TypeVar("Shown")  # a state that pictures and files are made of


class State(NamedTuple):
  """All that a checkpoint needs; `optimizer` counts the steps."""

  params: Params
  optimizer: optax.OptState
  key: jax.Array


class Course(NamedTuple):
  """The training of the small model.

  Attributes:
    model: the model.
    optimizer: for all of it.
    batch_size, operations, seed: of the problems that are trained on.
  """

  model: CausalLM
  optimizer: optax.GradientTransformation
  batch_size: int
  operations: int
  seed: int


class Titles(NamedTuple):
  """Names of the temperatures, and the line about the data for reports."""

  groups: tuple[str, ...]
  about: str


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment: training, or the answers of a trained model from the cache (`reuse`).

  Raises:
    InputError: a mesh, or fewer different problems than are wanted.
  """
  checks.no_mesh("cot_kinetics", mesh)
  model = make_model(config.width, config.layers, config.heads)
  optimizer = make_optimizer(config.learning_rate, config.steps)
  course = Course(model, optimizer, config.batch_size, config.operations, config.problem_seed)
  size, compared = arithmetic.sizes(config.operations)[1], trial(config)
  candidate = Candidate(
    model, size, config.temperatures, config.samples, config.sample_temperature, passes(config)
  )
  count = config.calibration + config.num_problems
  problems = exam.make_exam(
    count, config.operations, config.problem_seed, calibration=config.calibration,
    kinds=(config.calibration_operations, config.exam_operations),
  )  # fmt: skip
  titles = Titles(tuple(f"temperature {t:g}" for t in config.temperatures), about(config))
  examine = compiler.jit(functools.partial(exam.gather, candidate))
  if not config.reuse:
    found = functools.partial(_examined, examine, problems)
    return Experiment(
      functools.partial(init, course), functools.partial(batches, course),
      functools.partial(step, course), functools.partial(evaluate, candidate, compared), problems,
      functools.partial(draw, found, compared, titles), config.steps, titles.about,
      functools.partial(tabulate, found, compared, titles),
    )  # fmt: skip
  settings = in_common(config, _AFTERWARDS)
  shapes = exam.shapes(candidate, count, config.operations)
  trained = functools.partial(kept, course, examine, problems, settings, shapes)
  chosen = jnp.int32(compared.names.index(config.score))
  return Experiment(
    trained, lambda step: itertools.repeat(()), stay,
    lambda found, chosen: evidence.judge(found, compared, chosen), chosen,
    functools.partial(draw, _itself, compared, titles), 1, titles.about,
    functools.partial(tabulate, _itself, compared, titles),
  )  # fmt: skip


def about(config: Config) -> str:
  """The line about data and model for reports."""
  every = f"1 to {config.operations}"
  exam, other = config.exam_operations or every, config.calibration_operations or every
  return (
    f"{config.num_problems} generated arithmetic problems of {exam} steps, none of them trained on, and "
    f"{config.calibration} of {other} for calibration; answered at temperatures "
    f"{', '.join(f'{t:g}' for t in config.temperatures)} by a model of {config.layers} layers trained "
    "here on others; CoT-Kinetics is our reconstruction"
  )


# --- training -------------------------------------------------------------------------------------


def make_model(width: int, layers: int, heads: int) -> CausalLM:
  """The small model, of the Llama shape."""
  return CausalLM(
    CausalLMConfig(
      vocab_size=len(arithmetic.CHARACTERS),
      width=width,
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=heads,
      head_dim=width // heads,
      mlp_width=8 * width // 3,
      tied=True,
    )
  )


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay over the whole run."""
  warm_up = max(1, round(_WARM_UP * steps))
  rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, max(steps, warm_up + 1))
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))


def init(course: Course, key: jax.Array) -> State:
  """The state before the first step."""
  params_key, key = jax.random.split(key)
  params = course.model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
  return State(params, course.optimizer.init(params), key)


def batches(course: Course, first: int) -> Iterator[Batch]:
  """Problems of step `first`, the next one, ..."""
  for number in itertools.count(first):
    rng = np.random.default_rng((course.seed, 1 + number))
    drawn = arithmetic.generate(course.batch_size, course.operations, rng)
    yield {"prompts": drawn.prompts, "solutions": drawn.solutions}


def step(course: Course, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
  """One step of training."""
  loss, gradient = jax.value_and_grad(training_loss, argnums=1)(course.model, state.params, batch)
  updates, optimizer = course.optimizer.update(gradient, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  return state._replace(params=params, optimizer=optimizer), {"loss": loss}


def training_loss(model: CausalLM, params: Params, batch: Batch) -> jax.Array:
  """Mean cross-entropy of the tokens of the solutions; prompts are read, not learned."""
  prompts, solutions = jnp.asarray(batch["prompts"]), jnp.asarray(batch["solutions"])
  ids = jnp.concatenate([prompts, solutions], 1)
  labels = jnp.where(solutions > 0, solutions, IGNORED)
  labels = jnp.pad(labels, ((0, 0), (prompts.shape[1], 0)), constant_values=IGNORED)
  out: PyTree = model.apply({"params": params}, ids[:, :-1], mask=ids[:, :-1] > 0)
  total, count = token_cross_entropy(out.logits, labels[:, 1:])
  return total / count


# --- the trained model ----------------------------------------------------------------------------


def evaluate(
  candidate: Candidate, compared: Trial, state: State, problems: Exam
) -> dict[str, jax.Array]:
  """Writes and reads answers, and judges all scores."""
  found = exam.gather(candidate, state.params, state.key, problems)
  return evidence.judge(found, compared)


def kept(
  course: Course,
  examine: Examine,
  problems: Exam,
  settings: Config,
  shapes: Evidence,
  key: jax.Array,
) -> Evidence:
  """Evidence of the model that all steps make of this key, from the cache where it is."""
  if isinstance(key, jax.core.Tracer):  # only the shapes are asked for
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def compute() -> Evidence:
    one_step = compiler.jit(functools.partial(step, course), donate_argnums=0)
    start, drawn = init(course, key), batches(course, 0)
    state = loop.advance(one_step, start, drawn, settings.steps, "training")
    return examine(state.params, state.key, problems)

  drawn_from = np.asarray(jax.random.key_data(key))
  depends: list[bytes | np.ndarray] = [FORMAT.encode(), described(settings, "Config"), drawn_from]
  return cached_tree("reasoners", depends, jax.tree.structure(shapes), compute)


def stay(found: Evidence, batch: tuple[()]) -> tuple[Evidence, dict[str, jax.Array]]:
  """The step of a run that has nothing to train."""
  del batch
  return found, {"loss": 1 - found.facts.correct.mean()}


def _examined(examine: Examine, problems: Exam, state: State) -> Evidence:
  return examine(state.params, state.key, problems)


def _itself(found: Evidence) -> Evidence:
  return found


def draw(
  found: Callable[[Shown], Evidence], compared: Trial, titles: Titles, state: Shown
) -> dict[str, Figure]:
  """Pictures of a state, by the evidence `found` of it."""
  seen = report.finished(found(state))
  auroc = report.table(seen, compared, titles.groups)[1]
  return {
    "energy": figures.energy_picture(seen, compared.energy, titles.groups),
    "auroc": figures.auroc_picture(auroc, compared.names, compared.score, titles.groups),
  }


def tabulate(
  found: Callable[[Shown], Evidence], compared: Trial, titles: Titles, state: Shown
) -> dict[str, str]:
  """Files of a state, by the evidence `found` of it."""
  table, _ = report.table(report.finished(found(state)), compared, titles.groups)
  return {"scores.md": f"{titles.about}\n\n{table}"}
