"""The student: its start, an epoch of distillation, its answers.

`Learner` holds the static parts; weights are arguments of every function.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import optax
from jax import Array
from jaxtyping import Float, Int

from jaxmethods.experiments.acgkd import teachers
from jaxmethods.experiments.acgkd.config import StudentSettings
from jaxmethods.experiments.acgkd.lessons import Course, Lesson
from jaxmethods.methods import acgkd
from jaxmethods.models.graph_classifier import Classifier, GraphEncoder, Head, init_head
from jaxmethods.trees import Key, Params, PyTree

ADAM = optax.scale_by_adam()


class Learner(NamedTuple):
  """Static parts of the distillation.

  Attributes:
    settings: of the student.
    epochs: number of epochs, over which the learning rate falls to 0.
    encoder: network of the student.
    num_classes: C.
  """

  settings: StudentSettings
  epochs: int
  encoder: GraphEncoder
  num_classes: int


class Student(NamedTuple):
  """The network that is trained.

  Attributes:
    params: weights "encoder", and "head" if the classifier is its own.
    batch_stats: running statistics.
    moments: of Adam.
    rho: () free parameter of the temperature.
  """

  params: Params
  batch_stats: PyTree
  moments: optax.OptState
  rho: Float[Array, ""]


def make_learner(settings: StudentSettings, epochs: int, head: Head, *, symmetric: bool) -> Learner:
  """Builds the network of the student.

  Args:
    settings: of the student.
    epochs: number of epochs.
    head: classifier of the teacher; a student that uses it is projected to its width.
    symmetric: promises undirected graphs.
  """
  width, num_classes = head.kernel.shape
  encoder = GraphEncoder(
    settings.student_kind,
    settings.student_layers,
    settings.student_width,
    projection=width if settings.classifier == "teacher" else 0,
    symmetric=symmetric,
  )
  return Learner(settings, epochs, encoder, num_classes)


def start(learner: Learner, key: Key, batch: jraph.GraphsTuple) -> Student:
  """Draws a student; the batch gives the shapes."""
  settings = learner.settings
  keys = jax.random.split(key)
  variables = learner.encoder.init(keys[0], batch)
  params = {"encoder": variables["params"]}
  if settings.classifier == "own":
    params["head"] = init_head(keys[1], learner.encoder.width, learner.num_classes)._asdict()
  rho = jnp.zeros(())
  if settings.temperature == "adversarial":
    rho = jnp.float32(acgkd.inverse_temperature(settings.tau, settings.tau_min, settings.tau_max))
  return Student(params, variables["batch_stats"], ADAM.init(params), rho)


def temperature(settings: StudentSettings, rho: Float[Array, ""]) -> Float[Array, ""]:
  """Returns tau."""
  if settings.temperature == "fixed":
    return jnp.float32(settings.tau)
  return acgkd.adversarial_temperature(rho, settings.tau_min, settings.tau_max)


def logits(
  learner: Learner, student: Student, teacher: Classifier, batch: jraph.GraphsTuple
) -> Float[Array, "G C"]:
  """Classifies graphs in evaluation mode."""
  variables = {"params": student.params["encoder"], "batch_stats": student.batch_stats}
  pooled = jnp.asarray(learner.encoder.apply(variables, batch))
  return _head(student.params, teacher)(pooled)


def learn(
  learner: Learner,
  student: Student,
  teacher: Classifier,
  course: Course,
  epoch: Int[Array, ""],
  learning_rate: Float[Array, ""],
  key: Key,
) -> tuple[Student, Float[Array, ""]]:
  """Trains for one epoch.

  Args:
    learner: static parts.
    student: at the start of the epoch.
    teacher: weights.
    course: lessons of the epoch.
    epoch: () int, from 0.
    learning_rate: () of the first epoch.
    key: of the dropout.

  Returns:
    The student after the epoch, and the mean loss of the lessons.
  """
  settings = learner.settings
  rate = learning_rate * (1 - epoch / learner.epochs)
  ascent = acgkd.reversal(epoch, settings.tau_epochs)

  def step(i: Array, carry: tuple[Student, Array]) -> tuple[Student, Array]:
    (params, batch_stats, moments, rho), total = carry
    loss = functools.partial(
      _loss, learner, teacher, batch_stats, course.lesson(i), jax.random.fold_in(key, i)
    )
    (value, batch_stats), (d_params, d_rho) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
      params, rho
    )
    updates, moments = ADAM.update(d_params, moments)
    params = jax.tree.map(lambda w, u: w - rate * u, params, updates)
    rho = acgkd.ascend(rho, d_rho, settings.tau_lr, ascent)
    return Student(params, batch_stats, moments, rho), total + value

  student, total = jax.lax.fori_loop(0, course.num_lessons, step, (student, jnp.zeros(())))
  return student, total / course.num_lessons


def _loss(
  learner: Learner,
  teacher: Classifier,
  batch_stats: PyTree,
  lesson: Lesson,
  key: Key,
  params: Params,
  rho: Float[Array, ""],
) -> tuple[Float[Array, ""], PyTree]:
  """Computes the loss of a lesson, and the new running statistics."""
  settings = learner.settings
  student_logits, pooled, batch_stats = teachers.train_logits(
    learner.encoder, params["encoder"], batch_stats, _head(params, teacher), lesson.batch,
    settings.dropout, key,
  )  # fmt: skip
  tau = temperature(settings, rho)
  value = acgkd.distillation_loss(student_logits, lesson.targets.logits, tau, lesson.mask)
  if settings.feature_weight:
    distance = jnp.square(pooled - lesson.targets.pooled).mean(-1)
    value += settings.feature_weight * distance.mean(where=lesson.mask)
  return value, batch_stats


def _head(params: Params, teacher: Classifier) -> Head:
  """Returns the classifier of the student if it has one, else that of the teacher."""
  return Head(**params["head"]) if "head" in params else jax.lax.stop_gradient(teacher.head)
