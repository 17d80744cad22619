"""Who learns from whom: the server's knowledge of the clients, and the teachers it makes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxmethods.experiments.rahfl.config import Exchange
from jaxmethods.federated.exchange import Teach, Teachers
from jaxmethods.methods import rahfl as method

# By the rule: accuracies; losses of the last two rounds; prototypes and which are known; nothing.
Standing = dict[str, Array] | tuple[Array, Array] | tuple[()]


def first_standing(rule: Exchange, clients: int, num_classes: int, width: int) -> Standing:
  """Knowledge of the server before the first round; `width`: of FedProto's features."""
  match rule:
    case "asym":
      return {"accuracy": jnp.zeros(clients)}
    case "rhfl":
      return {"previous": jnp.zeros(clients), "current": jnp.zeros(clients)}
    case "fedproto":
      return jnp.zeros((num_classes, width)), jnp.zeros(num_classes, bool)
  return ()


def make_teach(rule: Exchange, rhfl_eta: float) -> Teach | None:
  """Returns the rule of a row: from answers and knowledge of the clients to a teacher for each."""
  if rule in ("none", "fedproto"):
    return None
  if rule == "feddf":
    return ensemble

  def teach(standing: Standing, answers: Array, present: Array) -> Teachers:
    weights = teaching_weights(rule, standing, answers, present, rhfl_eta)
    return method.mixed_teachers(answers[:, 0], weights)

  return teach


def teaching_weights(
  rule: Exchange, standing: Standing, answers: Array, present: Array, rhfl_eta: float
) -> Array:
  """Weights of the clients as teachers, (K, K), row k for client k.

  Args:
    rule: of the row.
    standing: of the clients, see `first_standing`.
    answers: log-probabilities, (K, views, B, C).
    present: clients that answered, (K,) bool.
    rhfl_eta: of RHFL's confidence.
  """
  clients = len(present)
  others = present[None, :] & ~jnp.eye(clients, dtype=bool)
  match rule:
    case "asym":
      assert isinstance(standing, dict)
      allowed = method.knowledge_transfer(standing["accuracy"]) & present[None, :]
      return method.transfer_weights(allowed)
    case "rhfl":
      assert isinstance(standing, dict)
      measured = (standing["previous"] > 0).all()
      confidence = method.confidence_weights(
        jnp.where(measured, standing["previous"], 2.0),
        jnp.where(measured, standing["current"], 1.0),
        rhfl_eta,
      )
      return jnp.where(measured, confidence, 1 / (clients - 1)) * others
    case "aughfl":
      return method.augmentation_weights(answers, present) * others
    case "fedmd":
      return method.transfer_weights(jnp.broadcast_to(present, (clients, clients)))
  return method.transfer_weights(others)  # hfl


def ensemble(standing: Standing, answers: Array, present: Array) -> Teachers:
  """FedDF's one teacher for all: the softmax of the mean of the present clients' answers."""
  del standing
  log_p = answers[:, 0]
  mean = jnp.where(present[:, None, None], log_p, 0).sum(0) / jnp.maximum(present.sum(), 1)
  teacher = jnp.broadcast_to(jax.nn.softmax(mean), log_p.shape)
  return Teachers(teacher, jnp.broadcast_to(present.any(), present.shape))
