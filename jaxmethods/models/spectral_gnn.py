"""The spectral graph network of FedSSP: learned spectra become filters on the edges of a graph.

Structure and defaults after the published code (FedSSP spec, 'Feature extractor'); layers are plain
linen, initialised as PyTorch does.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import jraph
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmethods.graphs.packing import SpectralBatch
from jaxmethods.models.graph_layers import MaskedBatchNorm, segment_sum
from jaxmethods.models.init import torch_linear
from jaxmethods.stats import shapes
from jaxmethods.stats.activations import gelu
from jaxmethods.stats.dropout import dropout


def linear(width: int, name: str, x: jax.Array) -> jax.Array:
  """Applies a `Dense` submodule of the calling module, initialised as PyTorch does."""
  return nn.Dense(width, name=name, **torch_linear(x.shape[-1]))(x)


class Dropout(nn.Module):
  """Dropout from the "dropout" stream; the identity when `rate` is 0 or `train` is off."""

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    return dropout(x, self.rate, self.make_rng("dropout")) if train and self.rate else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def row_attention(
  query: Float[Array, "R M L d"],
  key: Float[Array, "R M L d"],
  value: Float[Array, "R M L d"],
  graph: Int[Array, "R L"],
  seed: jax.Array | None,
  rate: float,
) -> Float[Array, "R M L d"]:
  """Attends within the graphs of packed rows, with dropout on the weights.

  Args:
    query: (R, M, L, d), already scaled.
    key: (R, M, L, d).
    value: (R, M, L, d).
    graph: (R, L) int, graph of each slot; a slot attends to the slots of its own graph.
    seed: key of the dropout mask, None for none.
    rate: of the dropout.

  Returns:
    (R, M, L, d).

  Raises:
    ValueError: for other shapes.
  """
  shapes.check(
    query=(query, "R M L d"), key=(key, "R M L d"), value=(value, "R M L d"), graph=(graph, "R L")
  )
  return _row_attention(query, key, value, graph, seed, rate)[0]


def _row_attention(query, key, value, graph, seed, rate):
  scores = jnp.einsum("rhqd,rhkd->rhqk", query, key)
  same = (graph[:, :, None] == graph[:, None, :])[:, None]
  weights = jax.nn.softmax(jnp.where(same, scores, -1e30))
  mixed = jnp.einsum("rhqk,rhkd->rhqd", _drop_weights(weights, seed, rate), value)
  return mixed, (query, key, value, weights, mixed, seed)


def _row_attention_backward(rate, residuals, d_mixed):
  # Written out for one line: the softmax needs sum_k dP P per query, which is the dot product of
  # the output with its cotangent, also under dropout. Autodiff would reduce over (R, M, L, L).
  query, key, value, weights, mixed, seed = residuals
  dropped = _drop_weights(weights, seed, rate)
  d_value = jnp.einsum("rhqk,rhqd->rhkd", dropped, d_mixed)
  d_weights = _drop_weights(jnp.einsum("rhqd,rhkd->rhqk", d_mixed, value), seed, rate)
  d_scores = weights * (d_weights - (mixed * d_mixed).sum(-1, keepdims=True))
  d_query = jnp.einsum("rhqk,rhkd->rhqd", d_scores, key)
  d_key = jnp.einsum("rhqk,rhqd->rhkd", d_scores, query)
  return d_query, d_key, d_value, None, None


def _drop_weights(weights, seed, rate):
  return weights if seed is None else dropout(weights, rate, seed)


row_attention.defvjp(_row_attention, _row_attention_backward)


class EigenvalueBlock(nn.Module):
  """Pre-norm transformer block over the eigenvalues of each graph."""

  heads: int
  dropout: float

  @nn.compact
  def __call__(
    self, z: jax.Array, graph: jax.Array, rows: tuple[tuple[int, int], ...], train: bool
  ) -> jax.Array:
    """Maps (N, H) to (N, H); `rows` gives (R, L) of each row group, in slot order."""
    width = z.shape[-1]
    t = nn.LayerNorm(epsilon=1e-5, name="norm_1")(z)
    query, key, value = (linear(width, name, t) for name in ("query", "key", "value"))
    query = query * (width // self.heads) ** -0.5
    drop = Dropout(self.dropout)
    mixed, start = [], 0
    for count, length in rows:
      here = slice(start, start + count * length)
      split = lambda x, here=here, n=count, l=length: (
        x[here].reshape(n, l, self.heads, -1).swapaxes(1, 2)
      )
      seed = self.make_rng("dropout") if train and self.dropout else None
      group = row_attention(
        split(query), split(key), split(value), graph[here].reshape(count, length), seed,
        self.dropout,
      )  # fmt: skip
      mixed.append(group.swapaxes(1, 2).reshape(-1, width))
      start += count * length
    z = z + drop(linear(width, "out", jnp.concatenate(mixed)), train)
    t = nn.LayerNorm(epsilon=1e-5, name="norm_2")(z)
    t = gelu(linear(width, "ffn_1", t))
    return z + drop(linear(width, "ffn_2", t), train)


class FilterEncoder(nn.Module):
  """Encodes the filter value of every edge: (edges, M) -> (edges, H)."""

  width: int

  @nn.compact
  def __call__(self, filters: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
    x = filters
    for i in (1, 2):
      x = linear(self.width, f"linear_{i}", x)
      # Each row stands for both directions of an edge, and the published code counts them both.
      x = MaskedBatchNorm(name=f"norm_{i}")(x, mask, train=train, count=2 * mask.sum())
      x = gelu(x)
    return x


def _weighted_neighbours(
  message: Float[Array, "N H"], filters: Float[Array, "E H"], graphs: jraph.GraphsTuple
) -> Float[Array, "N H"]:
  """Sums message_j * filter_ji over the neighbours j."""
  return segment_sum(message[graphs.senders] * filters, graphs.receivers, message.shape[0])


class SpectralConv(nn.Module):
  """Messages weighted per channel by the edge softmax of the filters, then a two-layer update."""

  dropout: float

  @nn.compact
  def __call__(
    self,
    h: jax.Array,
    batch: SpectralBatch,
    filters: jax.Array,
    scale: jax.Array,
    train: bool,
  ) -> jax.Array:
    """Returns the new (N, H); `filters` (E, H) are unnormalised, `scale` (N, H) makes them sum to 1."""
    width, graphs, drop = h.shape[-1], batch.graphs, Dropout(self.dropout)
    # The message depends on its source alone, so it is computed per node, not per edge.
    message = gelu(linear(width, "message", h))
    # Recomputed in the backward pass: gathering again is cheaper than keeping (E, H) per layer.
    received = jax.checkpoint(_weighted_neighbours)(message, filters, graphs)
    h = h + drop(received * scale, train)
    update = h
    for i in (1, 2):
      update = linear(width, f"linear_{i}", update)
      update = MaskedBatchNorm(name=f"norm_{i}")(update, graphs.nodes["mask"], train=train)
      update = nn.relu(update)
    return h + drop(update, train)


class SpectralGNN(nn.Module):
  """Graph representation from node features and the graph's Laplacian spectrum.

  The eigenvalue encoder and the filter encoder act on the spectrum only, never on node features or
  classes, so clients of any domain can share them.

  Attributes:
    hidden: H, even.
    heads: M, attention heads and learned spectra per graph.
    layers: number of convolutions.
    dropout: rate after features, attention, filters and updates.

  >>> spectra = jm.graphs.laplacian_spectra(triangles.graphs)
  >>> one = [np.array([0, 1])]
  >>> packed = jm.graphs.pack(triangles.graphs, triangles.labels, spectra, one, hidden=8)
  >>> batch = jax.tree.map(lambda leaf: leaf[0], packed)
  >>> jm.models.SpectralGNN(hidden=8, heads=2, layers=1).init_with_output(key, batch)[0].shape[1]
  8
  """

  hidden: int = 128
  heads: int = 4
  layers: int = 3
  dropout: float = 0.1

  @nn.compact
  def __call__(self, batch: SpectralBatch, train: bool = False) -> jax.Array:
    """Computes the representation of every graph, (G, H); rows of padding graphs are zero."""
    graphs = batch.graphs
    nodes, edges = graphs.nodes, graphs.edges
    num_nodes, num_graphs = nodes["features"].shape[0], graphs.n_node.shape[0]
    rows = tuple((p.shape[0], p.shape[2]) for p in batch.products)

    h = nn.relu(linear(self.hidden, "node_encoder", nodes["features"]))
    z = linear(self.hidden, "eigenvalue_encoder", jnp.asarray(batch.encoding))
    z = EigenvalueBlock(self.heads, self.dropout, name="transformer")(
      z, nodes["graph"], rows, train
    )
    spectra = linear(self.heads, "decoder", z)

    filters, start = [], 0
    for products, (count, length) in zip(batch.products, rows, strict=True):
      here = spectra[start : start + count * length].reshape(count, length, self.heads)
      filters.append(jnp.einsum("rul,rlm->rum", products, here).reshape(-1, self.heads))
      start += count * length
    f = FilterEncoder(self.hidden, name="filter_encoder")(
      jnp.concatenate(filters)[batch.product_of], jnp.asarray(batch.edge_mask), train
    )
    f = Dropout(self.dropout)(f[batch.twin], train)

    # Softmax over the neighbours of each target, per channel. The shift cancels; one per channel
    # serves all targets, since what batch norm and GELU give spans less than exp's range (|f| is
    # at most the square root of the number of edges; exp keeps 88 + 87 in float32, and what lies
    # deeper than 140 below the top counts as that deep).
    edge_mask = edges["mask"][:, None]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(edge_mask, f, 0.0), axis=0))
    f = jnp.maximum(f - jnp.maximum(top - 60.0, 0.0), -80.0)
    f = jnp.where(edge_mask, jnp.exp(f), 0.0)
    total = segment_sum(f, graphs.receivers, num_nodes)
    total = jnp.where(total > 0, total, 1.0)  # nodes without neighbours receive nothing

    # Not 1 / total: its gradient holds 1 / total^2, which leaves float32 for totals beyond e^44.
    scale = jnp.exp(-jnp.log(total))

    self.sow("intermediates", "edge_softmax", f * scale[graphs.receivers])

    for i in range(self.layers):
      h = SpectralConv(self.dropout, name=f"conv_{i}")(h, batch, f, scale, train)
    h = jnp.where(nodes["mask"][:, None], h, 0.0)
    count = jnp.where(graphs.globals["mask"], graphs.n_node, 1)
    return segment_sum(h, nodes["graph"], num_graphs) / jnp.maximum(count, 1)[:, None]
