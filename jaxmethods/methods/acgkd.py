"""ACGKD: distilling a graph network without any graph; and GFKD, its predecessor.

Jia et al., "Adversarial Curriculum Graph-Free Knowledge Distillation for Graph Neural Networks", arXiv
2504.00540 (2025). Structure and features of pseudo-graphs are optimised until the teacher assigns them
to the wanted classes and their statistics match its batch norms. A student then learns the answers of
the teacher on them.

This is a reconstruction, not a reproduction: of the paper only abstract, introduction and summaries
could be read, and no code was found. Their statements are marked (paper) or (summary), our completions
(inferred). GFKD (Deng and Zhang, IJCAI 2021, arXiv 2105.07519) was read and run: (GFKD code).

Arguments of a wrong shape give a ValueError of one line that names the argument.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jraph
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxmethods.stats import shapes
from jaxmethods.trees import Key

Noise = Literal["logistic", "gumbel"]
Count = TypeVar("Count", int, Array)
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

  source: Int[Array, "P M"]
  target: Int[Array, "P M"]
  num_pairs: Int[Array, " P"]
  order: Int[Array, "P E"] | None = None

  @property
  def mask(self) -> Bool[Array, "P M"]:
    """(P, M) bool, true for real pairs."""
    return jnp.arange(self.source.shape[1]) < self.num_pairs[:, None]


def pair_count(num_nodes: Count, directed: bool = False) -> Count:
  """Counts the node pairs M_i of graphs with `num_nodes` nodes, without self loops.

  Args:
    num_nodes: n_i, an int or an array of any shape.
    directed: whether (j, k) and (k, j) are two pairs.
  """
  return num_nodes * (num_nodes - 1) // (1 if directed else 2)


def candidate_count(num_nodes: Count, xi: float, directed: bool = False) -> Count:
  """Counts the pairs kept under the spatial complexity: max(1, floor(xi M_i + 0.5)) (inferred).

  Args:
    num_nodes: n_i, an int or an array of any shape.
    xi: spatial complexity, in (0, 1].
    directed: whether (j, k) and (k, j) are two pairs.

  Raises:
    ValueError: xi is outside (0, 1].
  """
  if not 0 < xi <= 1:
    raise ValueError(f"xi: must be in (0, 1], got {xi}")
  pairs = pair_count(num_nodes, directed)
  if isinstance(pairs, int):
    return max(1, math.floor(xi * pairs + 0.5))
  return jnp.maximum(1, jnp.floor(xi * pairs + 0.5).astype(jnp.int32))


def draw_candidates(
  key: Key,
  num_nodes: Int[Array, " P"],
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
    max_nodes: number of node slots N, at least 2.
    xi: share of the pairs that are kept, in (0, 1].
    directed: whether (j, k) and (k, j) are two pairs.
    edge_form: whether to compute the order of the edge form too.

  Returns:
    The pairs of each graph in row-major order, exactly `candidate_count` of them.

  Raises:
    ValueError: xi or max_nodes is out of range.
  """
  shapes.check(num_nodes=(num_nodes, "P"))
  if max_nodes < 2:
    raise ValueError(f"max_nodes: must be at least 2, got {max_nodes}")
  counts = candidate_count(num_nodes, xi, directed)
  width = candidate_count(max_nodes, xi, directed)
  draw = functools.partial(
    _draw_one, max_nodes=max_nodes, width=width, directed=directed, edge_form=edge_form
  )
  keys = jax.random.split(key, num_nodes.shape[0])
  # One graph after the other: the pairs of all at once would take 1 / xi times the memory of the
  # candidates.
  source, target, order = jax.lax.map(draw, (keys, num_nodes, counts))
  return Pairs(source, target, counts, order)


def _draw_one(
  graph: tuple[Key, Array, Array], *, max_nodes: int, width: int, directed: bool, edge_form: bool
) -> tuple[Array, Array, Array | None]:
  """Draws the candidates of one graph, given as (key, number of nodes, number of candidates)."""
  key, nodes, count = graph
  # The pairs of a smaller graph are a subset of those of the largest.
  row, column = _row_major_pairs(max_nodes, directed)
  inside = jnp.maximum(row, column) < nodes
  rank = jnp.where(inside, jax.random.uniform(key, row.shape), 2.0)
  kept = jnp.argsort(rank)[:width]
  kept = jnp.sort(jnp.where(jnp.arange(width) < count, kept, row.size))
  source, target = (
    ends.astype(jnp.int32).at[kept].get(mode="fill", fill_value=max_nodes - 1)
    for ends in (row, column)
  )
  return source, target, receiver_order(source, target, directed) if edge_form else None


def _row_major_pairs(max_nodes: int, directed: bool) -> tuple[Array, Array]:
  """Lists all node pairs of a graph row by row."""
  if not directed:
    row, column = jnp.triu_indices(max_nodes, 1)
    return row, column
  row = jnp.repeat(jnp.arange(max_nodes), max_nodes - 1)
  column = jnp.tile(jnp.arange(max_nodes - 1), max_nodes)
  return row, column + (column >= row)


def receiver_order(
  source: Int[Array, " M"], target: Int[Array, " M"], directed: bool
) -> Int[Array, " E"]:
  """Sorts the directed edges of one graph by (receiver, sender).

  Args:
    source: (M,) int nodes.
    target: (M,) int nodes.
    directed: whether each pair is one edge, E = M, or two, E = 2 M.

  Returns:
    (E,) int32 positions.
  """
  shapes.check(source=(source, "M"), target=(target, "M"))
  senders, receivers = _both_ways(source, target, directed)
  return jnp.lexsort((senders, receivers)).astype(jnp.int32)


def _both_ways(source: Array, target: Array, directed: bool) -> tuple[Array, Array]:
  """Appends the reversed pairs unless `directed`."""
  if directed:
    return source, target
  join = functools.partial(jnp.concatenate, axis=-1)
  return join([source, target]), join([target, source])


# --- structure: Binary Concrete --------------------------------------------------------------------


def concrete(
  log_odds: Float[Array, "*shape"],
  uniform: Float[Array, "*shape"],
  temperature: float | Float[Array, ""],
  noise: Noise = "logistic",
) -> Float[Array, "*shape"]:
  """Relaxes edges: s = sigmoid((log alpha + G) / lambda), between 0 and 1 and differentiable.

  Args:
    log_odds: log alpha, any shape.
    uniform: U in (0, 1), the same shape; clipped by `UNIFORM_MARGIN`.
    temperature: lambda > 0, a scalar.
    noise: "logistic", G = ln U - ln(1 - U), the Binary Concrete distribution (paper): P(s > 0.5) =
      sigmoid(log alpha). "gumbel", G = -ln(-ln U) (summary): P(s > 0.5) = 1 - exp(-alpha).

  Returns:
    s, the same shape.

  Raises:
    ValueError: lambda is not positive (where its value is known), or the noise is unknown.
  """
  shapes.check(uniform=(uniform, _axes(log_odds)), temperature=(temperature, ""))
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


def straight_through(
  soft: Float[Array, "*shape"], hard: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Returns the value of `hard` with the gradient of `soft` (inferred).

  The teacher then sees pseudo-graphs as they are kept.
  """
  shapes.check(hard=(hard, _axes(soft)))
  return soft + jax.lax.stop_gradient(hard - soft)


def harden(log_odds: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Rounds edges to 1[sigmoid(theta) >= 0.5], as 0 and 1 (GFKD code)."""
  return (log_odds >= 0).astype(log_odds.dtype)


def one_hot_features(logits: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
  """Rounds features to the arg max of the last axis, one-hot (GFKD code)."""
  return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)


def assemble(
  pairs: Pairs,
  weights: Float[Array, "P M"],
  features: Float[Array, "P N F"],
  num_nodes: Int[Array, " P"],
  *,
  directed: bool = False,
) -> jraph.GraphsTuple:
  """Builds a batch of pseudo-graphs for the layers of `models.graph_layers`; differentiable.

  Args:
    pairs: candidates of P graphs.
    weights: (P, M) of the candidates; undirected ones count both ways.
    features: (P, N, F) of the node slots.
    num_nodes: (P,) int.
    directed: as for the pairs.

  Returns:
    P * N node slots; edges sparse where `pairs` has an order, else dense; no self loops (the layers
    add them).
  """
  shapes.check(
    features=(features, "P N F"),
    num_nodes=(num_nodes, "P"),
    weights=(weights, "P M"),
    source=(pairs.source, "P M"),
    target=(pairs.target, "P M"),
    num_pairs=(pairs.num_pairs, "P"),
  )
  graphs, slots = features.shape[:2]
  weights = jnp.where(pairs.mask, weights, 0)
  real = jnp.arange(slots) < num_nodes[:, None]
  if pairs.order is None:
    senders = receivers = None
    edges = _adjacency(pairs, weights, slots, directed)
    edges_each = slots * slots
  else:
    senders, receivers, edges = _edge_list(pairs, pairs.order, weights, slots, directed)
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


def _adjacency(pairs: Pairs, weights: Array, slots: int, directed: bool) -> Float[Array, "P N N"]:
  """Scatters the candidates of each graph into its adjacency."""
  scatter = lambda source, target, weight: (
    jnp.zeros((slots, slots), weight.dtype).at[source, target].add(weight)
  )
  adjacency = jax.vmap(scatter)(pairs.source, pairs.target, weights)
  return adjacency if directed else adjacency + adjacency.swapaxes(1, 2)


def _edge_list(
  pairs: Pairs, order: Array, weights: Array, slots: int, directed: bool
) -> tuple[Array, Array, Array]:
  """Lists senders, receivers and weights of all graphs, (P * E,) each, in the given order."""
  senders, receivers = _both_ways(pairs.source, pairs.target, directed)
  edges, _ = _both_ways(weights, weights, directed)
  senders, receivers, edges = (
    jnp.take_along_axis(x, order, 1) for x in (senders, receivers, edges)
  )
  first = slots * jnp.arange(len(order), dtype=jnp.int32)[:, None]
  return (senders + first).ravel(), (receivers + first).ravel(), edges.ravel()


# --- generation ------------------------------------------------------------------------------------


class Terms(NamedTuple):
  """Parts of the generation objective L_gen = CE + b_bn R + b_oh H (GFKD code).

  Attributes:
    cross_entropy: (P,), of the teacher with the wanted classes.
    batch_norm: () distance R of the batch from the batch-norm statistics of the teacher.
    entropy: () entropy H of the node features.
  """

  cross_entropy: Float[Array, " P"]
  batch_norm: Float[Array, ""]
  entropy: Float[Array, ""]

  def total(
    self, batch_norm_weight: float = 0.01, entropy_weight: float = 1e-6
  ) -> Float[Array, ""]:
    """Adds up L_gen, the cross-entropy as a mean over graphs.

    Args:
      batch_norm_weight: b_bn.
      entropy_weight: b_oh.
    """
    shapes.check(
      cross_entropy=(self.cross_entropy, "P"),
      batch_norm=(self.batch_norm, ""),
      entropy=(self.entropy, ""),
    )
    return (
      self.cross_entropy.mean()
      + batch_norm_weight * self.batch_norm
      + entropy_weight * self.entropy
    )


def cross_entropy(logits: Float[Array, "P C"], labels: Int[Array, " P"]) -> Float[Array, " P"]:
  """Computes the cross-entropy of every graph.

  Args:
    logits: (P, C) of the teacher.
    labels: (P,) int, the wanted classes.

  Returns:
    (P,), in nats.
  """
  shapes.check(logits=(logits, "P C"), labels=(labels, "P"))
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def feature_entropy(logits: Float[Array, "P N F"], mask: Bool[Array, "P N"]) -> Float[Array, ""]:
  """Computes H = -sum over nodes and features of X ln X, X = softmax(phi), per real node.

  Args:
    logits: phi, (P, N, F).
    mask: (P, N) bool, true for real nodes.

  Returns:
    (), in nats.
  """
  shapes.check(logits=(logits, "P N F"), mask=(mask, "P N"))
  log_x = jax.nn.log_softmax(logits)  # never log(0), however sharp the softmax
  entropy = -(jnp.exp(log_x) * log_x).sum(-1)
  return jnp.where(mask, entropy, 0).sum() / jnp.maximum(mask.sum(), 1)


def antithetic_gradient(
  log_odds: Float[Array, "P ..."],
  uniform: Float[Array, "P ..."],
  loss: Callable[[Array], tuple[Float[Array, " P"], Float[Array, ""]]],
  batch_norm_weight: float = 0.01,
) -> Float[Array, "P ..."]:
  """Estimates the structure gradient of GFKD from two forward passes, without back-propagation.

  E1 = 1[U > sigmoid(-theta)] and E2 = 1[U < sigmoid(theta)] are both Bernoulli(sigmoid(theta));
  gradient_i = (CE_i(E1) - CE_i(E2) + b_bn (R(E1) - R(E2))) (U_i - 0.5) (GFKD code).

  Args:
    log_odds: theta, (P, ...).
    uniform: U in (0, 1), the same shape.
    loss: edges of 0 and 1 -> (cross-entropy (P,), R ()).
    batch_norm_weight: b_bn.

  Returns:
    The shape of theta.
  """
  shapes.check(uniform=(uniform, _axes(log_odds)))
  first = (uniform > jax.nn.sigmoid(-log_odds)).astype(log_odds.dtype)
  second = (uniform < jax.nn.sigmoid(log_odds)).astype(log_odds.dtype)
  (ce_1, bn_1), (ce_2, bn_2) = loss(first), loss(second)
  for cross_entropies, gap in ((ce_1, bn_1), (ce_2, bn_2)):
    shapes.check(cross_entropy=(cross_entropies, str(len(log_odds))), batch_norm=(gap, ""))
  difference = ce_1 - ce_2 + batch_norm_weight * (bn_1 - bn_2)
  return difference.reshape(-1, *(1,) * (log_odds.ndim - 1)) * (uniform - 0.5)


# --- curriculum ------------------------------------------------------------------------------------


def edge_complexity(weights: Float[Array, "P M"], mask: Bool[Array, "P M"]) -> Float[Array, " P"]:
  """Computes c_i, the sum of the edges of each graph (inferred).

  Args:
    weights: (P, M) of the candidates.
    mask: (P, M) bool, true for real candidates.
  """
  shapes.check(weights=(weights, "P M"), mask=(mask, "P M"))
  return jnp.where(mask, weights, 0).sum(-1)


def easy_to_hard(complexity: Float[Array, " P"]) -> Int[Array, " P"]:
  """Sorts graphs by ascending complexity, ties by index."""
  shapes.check(complexity=(complexity, "P"))
  return jnp.argsort(complexity, stable=True)


def curriculum_size(
  epoch: Int[Array, "*shape"] | int,
  num_graphs: int,
  first_share: float = 0.25,
  grow_epochs: float = 150,
) -> Int[Array, "*shape"]:
  """Counts the graphs that the student sees in an epoch: max(1, ceil(f(t) P)) (inferred).

  Args:
    epoch: t, from 0.
    num_graphs: P.
    first_share: p0 in f(t) = min(1, p0 + (1 - p0) t / t_grow), in (0, 1]; 1 is plain training.
    grow_epochs: t_grow > 0.

  Raises:
    ValueError: first_share or grow_epochs is out of range.
  """
  if not 0 < first_share <= 1:
    raise ValueError(f"first_share: must be in (0, 1], got {first_share}")
  if grow_epochs <= 0:
    raise ValueError(f"grow_epochs: must be positive, got {grow_epochs}")
  share = jnp.minimum(1.0, first_share + (1 - first_share) * epoch / grow_epochs)
  # Rounding noise must not add a graph: 0.3 + 0.7 * 5 / 7 is 0.8 and a bit.
  return jnp.maximum(1, jnp.ceil(share * num_graphs - 1e-4)).astype(jnp.int32)


# --- distillation ----------------------------------------------------------------------------------


def distillation_loss(
  student_logits: Float[Array, "B C"],
  teacher_logits: Float[Array, "B C"],
  temperature: float | Float[Array, ""],
  mask: Bool[Array, " B"] | None = None,
) -> Float[Array, ""]:
  """Computes L_kd = tau^2 mean_b KL(softmax(z_T / tau) || softmax(z_S / tau)).

  The teacher gets no gradient.

  Args:
    student_logits: z_S, (B, C).
    teacher_logits: z_T, (B, C).
    temperature: tau > 0, a scalar.
    mask: (B,) bool, graphs that count; default all.
  """
  mask = jnp.ones(student_logits.shape[:1], bool) if mask is None else mask
  shapes.check(
    student_logits=(student_logits, "B C"),
    teacher_logits=(teacher_logits, "B C"),
    temperature=(temperature, ""),
    mask=(mask, "B"),
  )
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  log_student = jax.nn.log_softmax(student_logits / temperature)
  log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
  divergence = (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(-1)
  mean = jnp.where(mask, divergence, 0).sum() / jnp.maximum(mask.sum(), 1)
  return temperature**2 * mean


def adversarial_temperature(
  rho: Float[Array, "*shape"], low: float = 1.0, high: float = 8.0
) -> Float[Array, "*shape"]:
  """Maps rho into the bounds: tau_min + (tau_max - tau_min) sigmoid(rho) (inferred from CTKD)."""
  return low + (high - low) * jax.nn.sigmoid(rho)


def inverse_temperature(tau: float, low: float = 1.0, high: float = 8.0) -> float:
  """Returns the rho at which the temperature is `tau`.

  Raises:
    ValueError: tau is not between the bounds.
  """
  if not low < tau < high:
    raise ValueError(f"tau: must be in ({low}, {high}), got {tau}")
  share = (tau - low) / (high - low)
  return math.log(share / (1 - share))


def reversal(epoch: Int[Array, "*shape"] | int, total: float = 10) -> Float[Array, "*shape"]:
  """Weighs the ascent on the temperature: r(t) = (1 - cos(pi t / t_total)) / 2, then 1."""
  return 0.5 * (1 - jnp.cos(jnp.pi * jnp.minimum(epoch / total, 1.0)))


def ascend(
  rho: Float[Array, "*shape"],
  gradient: Float[Array, "*shape"],
  learning_rate: float,
  weight: float | Float[Array, ""],
) -> Float[Array, "*shape"]:
  """Moves the temperature against the student: rho <- rho + lr r(t) dL_kd / drho.

  Args:
    rho: free parameter of the temperature.
    gradient: dL_kd / drho, the same shape.
    learning_rate: lr.
    weight: r(t), a scalar.
  """
  shapes.check(gradient=(gradient, _axes(rho)), weight=(weight, ""))
  return rho + learning_rate * weight * gradient


def _axes(x: ArrayLike) -> str:
  """Writes the shape of an array as `shapes.check` reads it."""
  return " ".join(map(str, jnp.shape(x)))
