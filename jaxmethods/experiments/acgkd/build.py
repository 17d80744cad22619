"""Graph-free distillation: teacher, pseudo-graphs and student put together.

The first steps of a run optimise all pseudo-graphs together (`gen_chunk` iterations a step), each later
one is an epoch of distillation, in one compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from jaxmethods.data import gfkd
from jaxmethods.data.records import GraphData
from jaxmethods.experiments.acgkd import figures, generator, lessons, student, teachers
from jaxmethods.experiments.acgkd.config import Algorithm, Config
from jaxmethods.experiments.acgkd.generator import GENERATED, MADE_UP, Generator, Pseudo, Sizes
from jaxmethods.experiments.acgkd.lessons import Curriculum
from jaxmethods.experiments.acgkd.student import Learner, Student
from jaxmethods.experiments.acgkd.teachers import Material, Targets
from jaxmethods.models.graph_classifier import Classifier
from jaxmethods.runtime import checks, compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.trees import Key

EVALUATED = 128  # real graphs of a batch


class State(NamedTuple):
  """Everything a checkpoint needs."""

  key: Key
  pseudo: Pseudo | None
  student: Student


class Given(NamedTuple):
  """Graphs that are given with the answers of the teacher, stacked batches.

  They are its training graphs (the upper bound), or those of the published code.
  """

  batches: jraph.GraphsTuple
  targets: Targets


class Work(NamedTuple):
  """Input of a step.

  Attributes:
    number: () int, of the step.
    learning_rate: () of the student's first epoch; no constant, so that one program serves any.
    teacher: weights.
    accuracy: () of the teacher on the test graphs.
    given: graphs of the rows that make none.
  """

  number: Int[Array, ""]
  learning_rate: Float[Array, ""]
  teacher: Classifier
  accuracy: Float[Array, ""]
  given: Given | None


class Test(NamedTuple):
  """Input of the evaluation.

  Attributes:
    batches: test graphs, stacked batches.
    validation: the graphs that the teacher was trained on, for choosing settings; no student of
      pseudo-graphs sees them.
    teacher: weights.
    accuracy: () of the teacher on the test graphs.
  """

  batches: jraph.GraphsTuple
  validation: jraph.GraphsTuple
  teacher: Classifier
  accuracy: Float[Array, ""]


class Plan(NamedTuple):
  """Static parts of a run: no weights, no data.

  Attributes:
    algorithm: the row.
    gen_steps: number of steps that optimise pseudo-graphs; they come first.
    generator, learner, curriculum: static parts of generation, distillation and its order.
  """

  algorithm: Algorithm
  gen_steps: int
  generator: Generator
  learner: Learner
  curriculum: Curriculum


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Args:
    config: of `experiments.acgkd`.
    mesh: not supported; a run fits one device.

  Raises:
    InputError: data or a teacher are missing or do not fit, or there is a mesh.
  """
  checks.no_mesh("acgkd", mesh)
  material = teachers.load(config)
  plan = _plan(config, material)
  ask = compiler.jit(functools.partial(teachers.answers, plan.generator.encoder))
  test = _test(material, ask)
  given = _given(config, material, ask)
  work = Work(
    jnp.int32(0), jnp.float32(config.learning_rate), material.teacher, test.accuracy, given
  )
  # Plain jit: `init` may be traced, and compiler options are for programs that are not part of others.
  start_graphs = jax.jit(functools.partial(generator.start, plan.generator))
  start_student = jax.jit(functools.partial(student.start, plan.learner))
  first = jax.tree.map(lambda x: x[0], test.batches)

  def init(key: Key) -> State:
    keys = jax.random.split(key)
    made_up = plan.algorithm in MADE_UP
    pseudo = start_graphs(keys[0], material.teacher) if made_up else None
    return State(key, pseudo, start_student(keys[1], first))

  return Experiment(
    init=init,
    batches=functools.partial(_batches, work),
    step=functools.partial(_step, plan),
    evaluate=functools.partial(_evaluate, plan),
    test=test,
    figures=functools.partial(_figures, plan.generator, init, _real_edges(material)),
    num_steps=1 if plan.algorithm == "teacher" else plan.gen_steps + config.steps,
    about=f"{material.about}; {_describe(plan.algorithm, plan.generator.sizes)}",
  )


def _plan(config: Config, material: Material) -> Plan:
  """Collects the static parts of a run."""
  # The teacher sees sparse batches of undirected graphs only, unless the pseudo-graphs are directed.
  symmetric = not config.directed
  sizes = generator.choose_sizes(config, material)
  return Plan(
    config.algorithm,
    config.gen_iters // config.gen_chunk if config.algorithm in GENERATED else 0,
    Generator(config, sizes, material.encoder.clone(symmetric=symmetric)),
    student.make_learner(config, config.steps, material.teacher.head, symmetric=symmetric),
    Curriculum(
      config.curriculum,
      config.curriculum_start,
      config.curriculum_grow * config.steps,
      config.batch_size,
    ),
  )


def _test(material: Material, ask: Callable[..., Targets]) -> Test:
  """Puts the real graphs on the device and tests the teacher."""
  batches, validation = (
    jax.device_put(teachers.real_batches(material.data, ids, EVALUATED))
    for ids in (material.test, material.train)
  )
  answers = ask(material.teacher, batches)
  accuracy = teachers.accuracy(answers.logits, batches)
  return Test(batches, validation, material.teacher, accuracy)


def _given(config: Config, material: Material, ask: Callable[..., Targets]) -> Given | None:
  """Returns the graphs of the rows that make none."""
  data: GraphData = material.data
  ids = material.train
  if config.algorithm == "published":
    data = gfkd.load().pseudo
    ids = np.arange(len(data.labels))
  elif config.algorithm != "real":
    return None
  batches = jax.device_put(teachers.real_batches(data, ids, config.batch_size))
  return Given(batches, ask(material.teacher, batches))


def _describe(algorithm: Algorithm, sizes: Sizes) -> str:
  """Says which graphs the student sees."""
  if algorithm == "published":
    return "student sees the pseudo-graphs of the published code"
  if algorithm not in MADE_UP:
    return "the student sees the teacher's training graphs: an upper bound"
  return (
    f"student sees no real graph: {sizes.graphs} pseudo-graphs of {sizes.low} to {sizes.high} nodes; "
    f"taken as known: this range, {sizes.features} features, {sizes.classes} classes; ACGKD is our "
    "reconstruction"
  )


# --- steps ----------------------------------------------------------------------------------------


def _batches(work: Work, step: int) -> Iterator[Work]:
  """Yields the input of every step."""
  while True:
    yield work._replace(number=jnp.int32(step))
    step += 1


def _step(plan: Plan, state: State, work: Work) -> tuple[State, dict[str, Array]]:
  """Optimises pseudo-graphs or trains the student."""
  if plan.algorithm == "teacher":  # nothing to train: its share of wrong answers
    return state, {"loss": 1 - work.accuracy}
  distil, invert = functools.partial(_distil, plan), functools.partial(_invert, plan)
  if plan.gen_steps:
    # The step's number comes with the batch, so under a map over seeds this stays a branch.
    done = jax.lax.cond(work.number < plan.gen_steps, invert, distil, state, work)
  else:
    done = distil(state, work)
  state, loss, seen = done
  tau = student.temperature(plan.learner.settings, state.student.rho)
  metrics = {"loss": loss, "graphs": seen, "temperature": tau}
  if plan.gen_steps:
    assert state.pseudo is not None
    metrics |= {f"generation/{name}": x for name, x in state.pseudo.best.terms.items()}
  return state, metrics


def _invert(plan: Plan, state: State, work: Work) -> tuple[State, Array, Array]:
  """Optimises the pseudo-graphs for a chunk of iterations; returns the loss and no graphs seen."""
  assert state.pseudo is not None
  first = work.number * plan.generator.settings.gen_chunk
  pseudo = generator.generate(plan.generator, work.teacher, state.pseudo, first, state.key)
  return state._replace(pseudo=pseudo), pseudo.best.loss, jnp.int32(0)


def _distil(plan: Plan, state: State, work: Work) -> tuple[State, Array, Array]:
  """Trains the student for an epoch; returns the loss and the number of graphs seen."""
  epoch = work.number - plan.gen_steps
  order_key, drop_key = jax.random.split(jax.random.fold_in(state.key, work.number))
  if state.pseudo is None:
    assert work.given is not None
    course = lessons.of_given_graphs(*work.given, order_key)
  else:
    course = lessons.of_pseudo_graphs(
      plan.generator, plan.curriculum, state.pseudo, epoch, order_key
    )
  learnt, loss = student.learn(
    plan.learner, state.student, work.teacher, course, epoch, work.learning_rate, drop_key
  )
  return state._replace(student=learnt), loss, jnp.int32(course.seen)


# --- evaluation -----------------------------------------------------------------------------------


def _evaluate(plan: Plan, state: State, test: Test) -> dict[str, Array]:
  """Tests the student and describes the pseudo-graphs."""
  if plan.algorithm == "teacher":
    return {"test_accuracy": test.accuracy, "teacher_accuracy": test.accuracy}
  answer = functools.partial(student.logits, plan.learner, state.student, test.teacher)
  accuracy = lambda batches: teachers.accuracy(jax.lax.map(answer, batches), batches)
  metrics = {"test_accuracy": accuracy(test.batches), "teacher_accuracy": test.accuracy}
  if plan.algorithm != "real":
    metrics["validation_accuracy"] = accuracy(test.validation)
  if state.pseudo is not None:
    metrics |= _pseudo_metrics(plan.generator, state.pseudo)
  return metrics


def _pseudo_metrics(made: Generator, pseudo: Pseudo) -> dict[str, Array]:
  """Computes agreement with the wanted classes, batch-norm gap, and sizes."""
  agrees = pseudo.targets.logits.argmax(-1) == pseudo.labels
  edges = jnp.where(pseudo.pairs.mask, generator.final(made, pseudo)[0], 0).sum(-1)
  return {
    "pseudo_accuracy": agrees.mean(),
    "pseudo_gap": pseudo.gap,
    "pseudo_edges": edges.mean(),
    "structure_parameters": pseudo.pairs.num_pairs.sum(),
  }


def _figures(
  made: Generator, init: Callable[[Key], State], real_edges: np.ndarray, state: State
) -> dict[str, Figure]:
  """Draws the pseudo-graphs at start and end, and their edges beside those of real graphs."""
  if state.pseudo is None:
    return {}
  first = init(state.key).pseudo
  assert first is not None
  drawings = {"random start": _drawing(made, first), "kept": _drawing(made, state.pseudo)}
  return {
    "pseudo_graphs": figures.before_and_after(drawings, made.settings.directed),
    "easy_to_hard": figures.complexity(drawings["kept"], real_edges),
  }


def _drawing(made: Generator, pseudo: Pseudo) -> figures.Graphs:
  """Fetches the final graphs from the device."""
  edges, features = generator.final(made, pseudo)
  pairs, probabilities = pseudo.pairs, jax.nn.softmax(pseudo.targets.logits)
  return figures.Graphs(
    *jax.device_get((
      pseudo.num_nodes, pseudo.labels, pairs.source, pairs.target, edges * pairs.mask, features,
      probabilities,
    ))
  )  # fmt: skip


def _real_edges(material: Material) -> np.ndarray:
  """Counts the undirected edges of each real test graph, for comparison in a picture."""
  return np.asarray(material.data.graphs.n_edge)[material.test] / 2
