"""Two-branch backbone of FedStar: a structure branch that clients share beside a private GIN.

Reference: Tan et al., "Federated Learning on Non-IID Graphs via Structural Knowledge Sharing",
AAAI 2023; layer order as in the official code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jraph
from flax import linen as nn

from jaxmethods.models.gin import GINBackbone
from jaxmethods.models.graph_layers import GCN, GIN
from jaxmethods.models.init import torch_linear


class StructureBranch(nn.Module):
  """Linear, then s <- tanh(GCN(s)) per layer, on structure features alone.

  Attributes:
    hidden: width H.
    num_layers: L.
  """

  hidden: int = 64
  num_layers: int = 3

  @nn.compact
  def __call__(self, batch: jraph.GraphsTuple) -> list[jax.Array]:
    """Computes the L + 1 states s_0, ..., s_L, each (N, H), from `nodes["structure"]`."""
    structure = batch.nodes["structure"]
    s = nn.Dense(self.hidden, name="embed", **torch_linear(structure.shape[-1]))(structure)
    states = [s]
    for layer in range(self.num_layers):
      conv = GCN(self.hidden, symmetric=True, name=f"conv_{layer}")
      s = jnp.tanh(conv(s, batch.senders, batch.receivers, edge_mask=batch.edges["mask"]))
      states.append(s)
    return states


class FedStarBackbone(GINBackbone):
  """GIN over [features ; structure state] per layer, sum pooling, two linear layers.

  Parameters: `structure/...` is what FedStar shares; `embed`, `conv_0`, ..., `merge`, `readout` and
  `head` stay with the client. With `train=True` the rng stream "dropout" is read.
  Attributes are those of `GINBackbone`; both branches have `num_layers` layers.
  """

  @nn.compact
  def __call__(self, batch: jraph.GraphsTuple, *, train: bool = False) -> jax.Array:
    """Computes logits (G, num_classes) of a batch in the layout of `jaxmethods.graphs`."""
    states = StructureBranch(self.hidden, self.num_layers, name="structure")(batch)
    x = batch.nodes["features"]
    h = nn.Dense(self.hidden, name="embed", **torch_linear(x.shape[-1]))(x)
    for layer in range(self.num_layers):
      conv = GIN(self.hidden, symmetric=True, name=f"conv_{layer}")
      h = jnp.concatenate([h, states[layer]], axis=-1)
      h = conv(h, batch.senders, batch.receivers, edge_mask=batch.edges["mask"])
      h = self._drop(nn.relu(h), train)
    h = jnp.concatenate([h, states[-1]], axis=-1)
    h = nn.Dense(self.hidden, name="merge", **torch_linear(2 * self.hidden))(h)
    return self._classified(h, batch, train)
