"""ACGKD: distilling a graph network without any graph; and GFKD, its predecessor.

Jia et al., "Adversarial Curriculum Graph-Free Knowledge Distillation for Graph Neural Networks", arXiv
2504.00540 (2025). Graphs are made up (structure and features) so that the teacher is sure of their
class and finds its batch-norm statistics in them; a student then learns the teacher's answers on them.

This is a reconstruction, not a reproduction: of the paper only abstract, introduction and summaries
could be read, and no code was found. What those state is marked (paper) or (summary), our completions
(inferred). GFKD (Deng and Zhang, IJCAI 2021, arXiv 2105.07519) was read and run: (GFKD code).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import jraph
import optax
from jax import Array

Noise = Literal["logistic", "gumbel"]
UNIFORM_MARGIN = 1e-7  # uniform noise is clipped to [margin, 1 - margin]

# --- candidates: which node pairs may be edges -----------------------------------------------------


class Pairs(NamedTuple):
  """Candidate edges of P graphs, padded to M pairs; the only places where a graph may have an edge.

  Attributes:
    source, target: (P, M) int32 nodes; padding pairs join the last node slot to itself.
    num_pairs: (P,) int32 number of real pairs, which come first.
    order: (P, E) int32, in the edge form only: positions of the directed edges, E = M if directed and
      2 M if not (the reversed pairs follow), sorted by receiver and sender. None: the dense form.
  """

  source: Array
  target: Array
  num_pairs: Array
  order: Array | None = None

  @property
  def mask(self) -> Array:
    """(P, M) bool, true for real pairs."""
    return jnp.arange(self.source.shape[1]) < self.num_pairs[:, None]


def pair_count(num_nodes, directed: bool = False):
  """M_i: number of node pairs of graphs with `num_nodes` nodes, without self loops."""
  return num_nodes * (num_nodes - 1) // (1 if directed else 2)


def candidate_count(num_nodes, xi: float, directed: bool = False):
  """m_i = max(1, floor(xi M_i + 0.5)): pairs kept under the spatial complexity xi (inferred).

  Args:
    num_nodes: n_i, an int or an array of them.
    xi: in (0, 1].
    directed: whether (j, k) and (k, j) are two pairs.

  Raises:
    ValueError: if xi is outside (0, 1].
  """
  if not 0 < xi <= 1:
    raise ValueError(f"xi: must be in (0, 1], got {xi}")
  pairs = pair_count(num_nodes, directed)
  if isinstance(num_nodes, int):
    return max(1, math.floor(xi * pairs + 0.5))
  return jnp.maximum(1, jnp.floor(xi * pairs + 0.5).astype(jnp.int32))


def draw_candidates(
  key: Array,
  num_nodes: Array,
  max_nodes: int,
  *,
  xi: float = 1.0,
  directed: bool = False,
  edge_form: bool = False,
) -> Pairs:
  """Draws the candidates of every graph without replacement.

  Args:
    key: typed key.
    num_nodes: (P,) int32, each in 2..max_nodes.
    max_nodes: N.
    xi: share of the pairs that are kept; 1 keeps all.
    directed: whether (j, k) and (k, j) are two pairs.
    edge_form: whether the order of the edge form is worked out too.

  Returns:
    The pairs of each graph in row-major order, exactly `candidate_count` of them.
  """
  chex.assert_rank(num_nodes, 1)
  counts = candidate_count(num_nodes, xi, directed)
  width = candidate_count(max_nodes, xi, directed)

  def draw(args):
    key, nodes, count = args
    # Row-major pairs of the largest graph; those of a smaller one are some of them.
    if directed:
      row = jnp.repeat(jnp.arange(max_nodes), max_nodes - 1)
      column = jnp.tile(jnp.arange(max_nodes - 1), max_nodes)
      column = column + (column >= row)
    else:
      row, column = jnp.triu_indices(max_nodes, 1)
    inside = jnp.maximum(row, column) < nodes
    rank = jnp.where(inside, jax.random.uniform(key, row.shape), 2.0)
    kept = jnp.argsort(rank)[:width]
    kept = jnp.sort(jnp.where(jnp.arange(width) < count, kept, row.size))
    pick = lambda ends: ends.at[kept].get(mode="fill", fill_value=max_nodes - 1)
    source, target = pick(row.astype(jnp.int32)), pick(column.astype(jnp.int32))
    return source, target, receiver_order(source, target, directed) if edge_form else None

  keys = jax.random.split(key, num_nodes.shape[0])
  # One graph after the other: the pairs of all at once would take xi times more memory than is kept.
  source, target, order = jax.lax.map(draw, (keys, num_nodes, counts))
  return Pairs(source, target, counts, order)


def receiver_order(source: Array, target: Array, directed: bool) -> Array:
  """Order of the directed edges of one graph by (receiver, sender); (M,) twice -> (E,)."""
  senders, receivers = _both_ways(source, target, directed)
  return jnp.lexsort((senders, receivers)).astype(jnp.int32)


def _both_ways(source: Array, target: Array, directed: bool) -> tuple[Array, Array]:
  if directed:
    return source, target
  join = lambda a, b: jnp.concatenate([a, b], axis=-1)
  return join(source, target), join(target, source)


# --- structure: Binary Concrete --------------------------------------------------------------------


def concrete(
  log_odds: Array, uniform: Array, temperature: float | Array, noise: Noise = "logistic"
) -> Array:
  """Relaxed edges s = sigmoid((log alpha + G) / lambda), between 0 and 1 and differentiable.

  Args:
    log_odds: log alpha, any shape.
    uniform: U in (0, 1), the same shape; clipped by `UNIFORM_MARGIN`.
    temperature: lambda > 0.
    noise: "logistic", G = ln U - ln(1 - U), the Binary Concrete distribution (paper): P(s > 0.5) =
      sigmoid(log alpha). "gumbel", G = -ln(-ln U) (summary): P(s > 0.5) = 1 - exp(-alpha).

  Returns:
    s, the same shape.

  Raises:
    ValueError: if lambda <= 0 or the noise is unknown.
  """
  chex.assert_equal_shape((log_odds, uniform))
  if isinstance(temperature, float | int) and temperature <= 0:
    raise ValueError(f"temperature: must be positive, got {temperature}")
  u = jnp.clip(uniform, UNIFORM_MARGIN, 1 - UNIFORM_MARGIN)
  if noise == "logistic":
    g = jnp.log(u) - jnp.log1p(-u)
  elif noise == "gumbel":
    g = -jnp.log(-jnp.log(u))
  else:
    raise ValueError(f"noise: must be logistic or gumbel, got {noise!r}")
  return jax.nn.sigmoid((log_odds + g) / temperature)


def straight_through(soft: Array, hard: Array) -> Array:
  """The value of `hard` with the gradient of `soft`: the teacher sees graphs as they will be kept."""
  return soft + jax.lax.stop_gradient(hard - soft)


def harden(log_odds: Array) -> Array:
  """Final edges 1[sigmoid(theta) >= 0.5], as 0 and 1 (GFKD code)."""
  return (log_odds >= 0).astype(log_odds.dtype)


def one_hot_features(logits: Array) -> Array:
  """Final features: arg max over the last axis, one-hot (GFKD code)."""
  return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)


def assemble(
  pairs: Pairs, weights: Array, features: Array, num_nodes: Array, *, directed: bool = False
) -> jraph.GraphsTuple:
  """A batch of the pseudo-graphs for the layers of `graphs.layers`; differentiable.

  Args:
    pairs: candidates of P graphs.
    weights: (P, M) of the candidates; undirected ones count both ways.
    features: (P, N, F).
    num_nodes: (P,).
    directed: as for the pairs.

  Returns:
    P * N node slots; edges sparse or dense as `pairs` has an order or not; no self loops (the layers
    add them).
  """
  graphs, slots = features.shape[:2]
  chex.assert_equal_shape((pairs.source, pairs.target, weights))
  weights = jnp.where(pairs.mask, weights, 0)
  real = jnp.arange(slots) < num_nodes[:, None]
  if pairs.order is None:
    scatter = lambda source, target, weight: (
      jnp.zeros((slots, slots), weight.dtype).at[source, target].add(weight)
    )
    adjacency = jax.vmap(scatter)(pairs.source, pairs.target, weights)
    edges = adjacency if directed else adjacency + adjacency.swapaxes(1, 2)
    senders = receivers = None
    edges_each = slots * slots
  else:
    both = (
      *_both_ways(pairs.source, pairs.target, directed),
      _both_ways(weights, weights, directed)[0],
    )
    ordered = (jnp.take_along_axis(x, pairs.order, 1) for x in both)
    first = slots * jnp.arange(graphs, dtype=jnp.int32)[:, None]
    senders, receivers, edges = ordered
    senders, receivers, edges = (
      (senders + first).ravel(),
      (receivers + first).ravel(),
      edges.ravel(),
    )
    edges_each = pairs.order.shape[1]
  return jraph.GraphsTuple(
    nodes={
      "features": features.reshape(graphs * slots, -1),
      "graph": jnp.repeat(jnp.arange(graphs), slots),
      "mask": real.ravel(),
    },
    edges={"weight": edges},
    senders=senders,
    receivers=receivers,
    n_node=jnp.full(graphs, slots),
    n_edge=jnp.full(graphs, edges_each),
    globals=None,
  )


# --- generation ------------------------------------------------------------------------------------


class Terms(NamedTuple):
  """Parts of the generation objective L_gen = CE + b_bn R + b_oh H (GFKD code).

  Attributes:
    cross_entropy: (P,), of the teacher with the wanted classes.
    batch_norm: (), R, distance of the batch from the teacher's batch-norm statistics.
    entropy: (), H, of the node features.
  """

  cross_entropy: Array
  batch_norm: Array
  entropy: Array

  def total(self, batch_norm_weight: float = 0.01, entropy_weight: float = 1e-6) -> Array:
    """L_gen, the cross-entropy as a mean over graphs."""
    return (
      self.cross_entropy.mean()
      + batch_norm_weight * self.batch_norm
      + entropy_weight * self.entropy
    )


def cross_entropy(logits: Array, labels: Array) -> Array:
  """Of every graph: logits (P, C), labels (P,) -> (P,)."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def feature_entropy(logits: Array, mask: Array) -> Array:
  """H = -sum over nodes and features of X ln X, X = softmax(phi), per real node.

  Args:
    logits: phi, (P, N, F).
    mask: (P, N) bool.
  """
  log_x = jax.nn.log_softmax(logits)  # never log(0), however sure a softmax is
  entropy = -(jnp.exp(log_x) * log_x).sum(-1)
  return jnp.where(mask, entropy, 0).sum() / jnp.maximum(mask.sum(), 1)


def antithetic_gradient(
  log_odds: Array,
  uniform: Array,
  loss: Callable[[Array], tuple[Array, Array]],
  batch_norm_weight: float = 0.01,
) -> Array:
  """GFKD's estimate of the structure gradient from two forward passes, without back-propagation.

  E1 = 1[U > sigmoid(-theta)] and E2 = 1[U < sigmoid(theta)] are both Bernoulli(sigmoid(theta));
  gradient_i = (CE_i(E1) - CE_i(E2) + b_bn (R(E1) - R(E2))) (U_i - 0.5).

  Args:
    log_odds: theta, (P, ...).
    uniform: U in (0, 1), the same shape.
    loss: edges of 0 and 1 -> (cross-entropy (P,), R ()).
    batch_norm_weight: b_bn.

  Returns:
    The shape of theta.
  """
  chex.assert_equal_shape((log_odds, uniform))
  first = (uniform > jax.nn.sigmoid(-log_odds)).astype(log_odds.dtype)
  second = (uniform < jax.nn.sigmoid(log_odds)).astype(log_odds.dtype)
  (ce_1, bn_1), (ce_2, bn_2) = loss(first), loss(second)
  difference = ce_1 - ce_2 + batch_norm_weight * (bn_1 - bn_2)
  return difference.reshape(-1, *(1,) * (log_odds.ndim - 1)) * (uniform - 0.5)


# --- curriculum ------------------------------------------------------------------------------------


def edge_complexity(weights: Array, mask: Array) -> Array:
  """c_i = sum of the edges of each graph (inferred): (P, M) twice -> (P,)."""
  return jnp.where(mask, weights, 0).sum(-1)


def easy_to_hard(complexity: Array) -> Array:
  """Graphs in ascending order of complexity, ties by index: (P,) -> (P,) int."""
  return jnp.argsort(complexity, stable=True)


def curriculum_size(
  epoch: Array | int, num_graphs: int, first_share: float = 0.25, grow_epochs: float = 150
) -> Array:
  """Number of graphs that the student sees in an epoch: max(1, ceil(f(t) P)) (inferred).

  Args:
    epoch: t, from 0.
    num_graphs: P.
    first_share: p0 in f(t) = min(1, p0 + (1 - p0) t / t_grow); 1 is plain training.
    grow_epochs: t_grow.
  """
  share = jnp.minimum(1.0, first_share + (1 - first_share) * epoch / grow_epochs)
  # Rounding noise must not add a graph: 0.3 + 0.7 * 5 / 7 is 0.8 and a bit.
  return jnp.maximum(1, jnp.ceil(share * num_graphs - 1e-4)).astype(jnp.int32)


# --- distillation ----------------------------------------------------------------------------------


def distillation_loss(
  student_logits: Array,
  teacher_logits: Array,
  temperature: float | Array,
  mask: Array | None = None,
) -> Array:
  """L_kd = tau^2 mean_b KL(softmax(z_T / tau) || softmax(z_S / tau)); no gradient for the teacher.

  Args:
    student_logits: z_S, (B, C).
    teacher_logits: z_T, (B, C).
    temperature: tau.
    mask: (B,) bool, graphs that count; default all.
  """
  chex.assert_equal_shape((student_logits, teacher_logits))
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  log_student = jax.nn.log_softmax(student_logits / temperature)
  log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
  divergence = (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(-1)
  mask = jnp.ones(divergence.shape, bool) if mask is None else mask
  mean = jnp.where(mask, divergence, 0).sum() / jnp.maximum(mask.sum(), 1)
  return temperature**2 * mean


def adversarial_temperature(rho: Array, low: float = 1.0, high: float = 8.0) -> Array:
  """Tau = tau_min + (tau_max - tau_min) sigmoid(rho) (inferred from CTKD): stays inside the bounds."""
  return low + (high - low) * jax.nn.sigmoid(rho)


def inverse_temperature(tau: float, low: float = 1.0, high: float = 8.0) -> float:
  """The rho at which the temperature is `tau`."""
  share = (tau - low) / (high - low)
  return math.log(share / (1 - share))


def reversal(epoch: Array | int, total: float = 10) -> Array:
  """r(t) = (1 - cos(pi t / t_total)) / 2, then 1: weight of the ascent on the temperature."""
  return 0.5 * (1 - jnp.cos(jnp.pi * jnp.minimum(epoch / total, 1.0)))


def ascend(rho: Array, gradient: Array, learning_rate: float, weight: float | Array) -> Array:
  """The temperature against the student: rho <- rho + lr r(t) dL_kd / drho."""
  return rho + learning_rate * weight * gradient
