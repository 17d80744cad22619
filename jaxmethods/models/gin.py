"""Graph classification backbone of the FedStar and GCFL code: three GIN layers and a sum."""

from __future__ import annotations

import jax
import jraph
from flax import linen as nn

from jaxmethods.models.graph_layers import GIN, pool
from jaxmethods.models.init import torch_linear
from jaxmethods.stats.dropout import Generator, dropout


class GINBackbone(nn.Module):
  """Linear, GIN layers with ReLU and dropout, sum pooling, Linear-ReLU-dropout, Linear.

  Parameters: `embed` and `head` (their shapes depend on the client's features and classes),
  `conv_0`, `conv_1`, ... and `readout`. With `train=True` the rng stream "dropout" is read.

  Attributes:
    num_classes: width of the logits.
    hidden: width H.
    num_layers: number of GIN layers.
    dropout: rate.
    generator: of the dropout masks; default by backend.

  >>> (batch,) = jm.graphs.batch_graphs(triangles, [0, 1])
  >>> jm.models.GINBackbone(2, hidden=8).init_with_output(key, batch)[0].shape  # one slot is padding
  (3, 2)
  """

  num_classes: int
  hidden: int = 64
  num_layers: int = 3
  dropout: float = 0.5
  generator: Generator | None = None

  @nn.compact
  def __call__(self, batch: jraph.GraphsTuple, *, train: bool = False) -> jax.Array:
    """Computes logits (G, num_classes) of a batch in the layout of `jaxmethods.graphs`."""
    x = batch.nodes["features"]
    h = nn.Dense(self.hidden, name="embed", **torch_linear(x.shape[-1]))(x)
    for layer in range(self.num_layers):
      conv = GIN(self.hidden, symmetric=True, name=f"conv_{layer}")
      h = conv(h, batch.senders, batch.receivers, edge_mask=batch.edges["mask"])
      h = self._drop(nn.relu(h), train)
    return self._classified(h, batch, train)

  def _classified(self, h: jax.Array, batch: jraph.GraphsTuple, train: bool) -> jax.Array:
    """Sums nodes and classifies: (N, H) -> (G, num_classes)."""
    nodes = batch.nodes
    h = pool(h, nodes["graph"], batch.n_node.shape[0], nodes["mask"])
    h = nn.relu(nn.Dense(self.hidden, name="readout", **torch_linear(self.hidden))(h))
    h = self._drop(h, train)
    return nn.Dense(self.num_classes, name="head", **torch_linear(self.hidden))(h)

  def _drop(self, x: jax.Array, train: bool) -> jax.Array:
    if not train or self.dropout == 0.0:
      return x
    return dropout(x, self.dropout, self.make_rng("dropout"), self.generator)
