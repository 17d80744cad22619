"""What init makes of a partition: the exchange of moments, the generation, and its control."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmethods.experiments.ggeur.config import Config
from jaxmethods.methods import ggeur as method
from jaxmethods.methods.ggeur import Moments, Shape
from jaxmethods.runtime import compiler
from jaxmethods.testbeds.federated_images import clients


class Holdings(NamedTuple):
  """Examples of all clients, padded.

  Attributes:
    x: embeddings, (K, n, d).
    y: labels, (K, n) int.
    mask: which are there, (K, n) bool.
  """

  x: Float[Array, "K n d"]
  y: Int[Array, "K n"]
  mask: Bool[Array, "K n"]


Enlarge = Callable[
  [Array, Holdings], Holdings
]  # (key, own holdings) -> those that clients train on


def make_enlarge(config: Config, y: np.ndarray, num_classes: int) -> Enlarge:
  """Returns the step of init that makes the training sets; compiled once for all seeds.

  Args:
    config: of the method.
    y: labels of the pool, (D, n); -1 where there is none.
    num_classes: C.
  """
  rows = max(config.target, largest_class(y))
  match config.enlarge:
    case "none":
      return lambda key, held: held
    case "repeat":
      return lambda key, held: repeated(
        held, num_classes=num_classes, target=config.target, rows=rows,
        keep_shares=config.skew == "labels",
      )  # fmt: skip
  work = functools.partial(generate, num_classes=num_classes, rows=rows, config=config)
  program = compiler.jit(work)
  # Compiler options are for a program of its own, not for a part of another.
  traced = lambda key: isinstance(key, jax.core.Tracer)
  return lambda key, held: work(key, held) if traced(key) else program(key, held)


def exchange(key: Array, held: Holdings, num_classes: int, config: Config) -> tuple[Moments, Shape]:
  """The one exchange of GGEUR: reports of the clients, and the server's answer.

  Returns:
    The reported moments, stacked over clients, and the geometric shape.
  """
  moments = jax.vmap(method.class_moments, in_axes=(0, 0, None, 0))(
    held.x, held.y, num_classes, held.mask
  )
  report = lambda key, m: method.share(
    m, min_count=config.min_count_to_share, noise=config.moment_noise, key=key
  )
  reported = jax.vmap(report)(jax.random.split(key, held.x.shape[0]), moments)
  if config.skew == "labels":
    chosen = method.guided_set(reported.counts, config.guided_threshold)
    reported = method.select(reported, chosen)
  pooled = method.aggregate(reported)
  shape = method.geometric_shape(pooled.covariance, config.top_scaling)
  if config.geometry == "isotropic":
    shape = without_directions(shape)
  elif config.geometry == "none":
    shape = shape._replace(eigenvalues=jnp.zeros_like(shape.eigenvalues))
  return reported, shape


def without_directions(shape: Shape) -> Shape:
  """Spreads the trace evenly over all directions (an ablation)."""
  level = shape.eigenvalues.mean(-1, keepdims=True)
  identity = jnp.broadcast_to(jnp.eye(shape.eigenvalues.shape[-1]), shape.eigenvectors.shape)
  return Shape(jnp.broadcast_to(level, shape.eigenvalues.shape), identity)


def largest_class(y: np.ndarray) -> int:
  """Most examples of a class that a client can have; y: labels of the pool (D, n), -1 for none."""
  return max(int(np.bincount(labels[labels >= 0]).max()) for labels in y)


def generate(
  key: Array, held: Holdings, *, num_classes: int, rows: int, config: Config
) -> Holdings:
  """Enlarges the holdings of all clients after the exchange.

  Args:
    key: of exchange and generation.
    held: (K, n, ...).
    num_classes: C.
    rows: R, at least the target and `largest_class`.
    config: of the method.

  Returns:
    The enlarged holdings, (K, C R, ...).
  """
  exchange_key, own_key = jax.random.split(key)
  reported, shape = exchange(exchange_key, held, num_classes, config)
  num_clients = held.x.shape[0]

  def one(args: tuple[Array, Array, Holdings]) -> method.Enlarged:
    key, index, (x, y, mask) = args
    if config.skew == "labels":
      return method.enlarge(
        key, x, y, mask, shape, target=config.target, rows=rows, scale=config.scale
      )
    others = (jnp.arange(num_clients) != index)[:, None] & (reported.counts > 0)
    if config.enlarge == "own":
      others = jnp.zeros_like(others)
    return method.enlarge_across_domains(
      key, x, y, mask, shape, reported.mean, others, own_samples=config.own_samples,
      own_per_anchor=config.own_per_anchor, prototype_samples=config.prototype_samples,
      target=config.target, rows=rows, scale=config.scale,
    )  # fmt: skip

  keys = jax.random.split(own_key, num_clients)
  made = jax.lax.map(one, (keys, jnp.arange(num_clients), held))
  flat = lambda a: a.reshape(num_clients, -1, *a.shape[3:])
  labels = jnp.broadcast_to(jnp.arange(num_classes)[:, None], made.mask.shape)
  return Holdings(flat(made.x), flat(labels), flat(made.mask))


def repeated(
  held: Holdings, *, num_classes: int, target: int, rows: int, keep_shares: bool
) -> Holdings:
  """Repeats own examples, as many as a client has after generation: as many steps, nothing new.

  Args:
    held: (K, n, ...).
    num_classes: C.
    target: examples of a class after generation.
    rows: R, as of `generate`.
    keep_shares: whether a class that a client lacks stays empty and a large one stays large, as with
      `skew: labels`.

  Returns:
    The holdings, (K, C target, ...); (K, C R, ...) with `keep_shares`.
  """
  own = clients.class_counts(held.y, held.mask, num_classes)
  filled = jnp.full_like(own, target)
  if keep_shares:
    filled = jnp.where(own > 0, jnp.maximum(own, target), 0)
  total = filled.sum(1, keepdims=True)
  place = jnp.arange(num_classes * (rows if keep_shares else target))
  order = jnp.argsort(~held.mask, axis=1, stable=True)
  source = jnp.take_along_axis(order, place % own.sum(1, keepdims=True), 1)
  take = jax.vmap(lambda a, rows: a[rows])
  return Holdings(take(held.x, source), take(held.y, source), place < total)
