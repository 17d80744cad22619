"""The networks of graph-free distillation (GFKD, ACGKD): teachers, students, and the published weights.

GCN-L-d and GIN-L-d have L - 1 convolutions of width d, each followed by batch normalisation, ReLU and,
from the second on, a residual; node rows are summed per graph and classified by one linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn

from jaxmethods.models.graph_layers import GAT, GCN, GIN, MaskedBatchNorm, masked_moments, pool
from jaxmethods.models.init import torch_linear
from jaxmethods.trees import Params, PyTree, Tree

Kind = Literal["gcn", "gin"]


class GraphEncoder(nn.Module):
  """Everything below the classifier.

  Reads batches in the layout of `jaxmethods.graphs`, with optional edge weights in `edges["weight"]`,
  sparse or dense (see `models.graph_layers`). Parameters `conv_0`, `norm_0`, ..., and `projection`.

  Attributes:
    kind: of the convolutions.
    layers: L, number of layers with the classifier.
    width: d.
    projection: width of a graph attention layer on top (ACGKD); 0 for none.
    batch_norm: whether there is any batch normalisation.
    symmetric: promises undirected edges of equal weight both ways, as in `neighbour_sum`.
  """

  kind: Kind = "gcn"
  layers: int = 3
  width: int = 32
  projection: int = 0
  batch_norm: bool = True
  symmetric: bool = False

  @nn.compact
  def __call__(self, batch: jraph.GraphsTuple, *, train: bool = False) -> jax.Array:
    """Sums of node rows, (G, width or projection)."""
    h, mask = batch.nodes["features"], batch.nodes["mask"]
    edges = batch.senders, batch.receivers, batch.edges.get("weight"), batch.edges.get("mask")
    for layer in range(self.layers - 1):
      name = f"conv_{layer}"
      if self.kind == "gcn":
        z = GCN(self.width, symmetric=self.symmetric, name=name)(h, *edges)
      else:
        # The published adjacency has self loops, so a node counts itself twice.
        conv = GIN(
          self.width, epsilon=1.0, batch_norm=self.batch_norm, symmetric=self.symmetric, name=name
        )
        z = conv(h, *edges, mask, train=train)
      if self.batch_norm:
        z = MaskedBatchNorm(name=f"norm_{layer}")(z, mask, train=train)
      h = nn.relu(z) + h if layer else nn.relu(z)
    if self.projection:
      h = GAT(self.projection, name="projection")(h, *edges)
    h = jnp.where(mask[:, None], h, 0)
    return pool(h, batch.nodes["graph"], batch.n_node.shape[0], is_sorted=True)


class Head(NamedTuple):
  """The linear classifier: kernel (d, C), bias (C,)."""

  kernel: jax.Array
  bias: jax.Array

  def __call__(self, pooled: jax.Array) -> jax.Array:
    """(G, d) -> logits (G, C)."""
    return pooled @ self.kernel + self.bias


def init_head(key: jax.Array, width: int, num_classes: int) -> Head:
  """A classifier as PyTorch starts it."""
  init, keys = torch_linear(width), jax.random.split(key)
  return Head(
    init["kernel_init"](keys[0], (width, num_classes)), init["bias_init"](keys[1], (num_classes,))
  )


class Classifier(NamedTuple):
  """A trained network: weights of a `GraphEncoder`, its running statistics, its classifier."""

  params: Params
  batch_stats: Params
  head: Head

  @property
  def variables(self) -> Tree:
    """What `GraphEncoder.apply` takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def batch_norm_gap(
  encoder: GraphEncoder, variables: Params, batch: jraph.GraphsTuple
) -> tuple[jax.Array, jax.Array]:
  """Representations in evaluation mode, and how far the batch is from what each batch norm has seen.

  The gap is sum_l ||v_l - var_l||_2 + ||mu_l - mean_l||_2 over the batch norms l, with running mu_l
  and v_l, and mean and biased variance over the real nodes of the input of l (DeepInversion's term).

  Args:
    encoder: the network; one without batch norms has gap 0.
    variables: its parameters and running statistics.
    batch: (N nodes, G graphs).

  Returns:
    (G, d) and ().
  """
  gaps = [jnp.zeros((), batch.nodes["features"].dtype)]

  def watch(call, args, kwargs, context):
    if isinstance(context.module, MaskedBatchNorm) and context.method_name == "__call__":
      mean, variance, _ = masked_moments(args[0], batch.nodes["mask"])
      seen: PyTree = {
        name: context.module.get_variable("batch_stats", name) for name in ("mean", "var")
      }
      gaps.append(_norm(seen["var"] - variance) + _norm(seen["mean"] - mean))
    return call(*args, **kwargs)

  with nn.intercept_methods(watch):
    pooled: PyTree = encoder.apply(variables, batch)
  return pooled, sum(gaps[1:], gaps[0])


def _norm(x: jax.Array) -> jax.Array:
  """Euclidean norm with gradient 0 at 0."""
  square = jnp.square(x).sum()
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


# --- published weights ----------------------------------------------------------------------------

# Module of the published code -> ours. Weights of its graph convolutions are (in, out), those of its
# linear layers (out, in).
_MODULES = (
  (r"gcnlayers\.(\d+)", r"conv_\1"),
  (r"norms\.(\d+)", r"norm_\1"),
  (r"ginlayers\.(\d+)\.apply_func\.mlp\.linears\.(\d)", r"conv_\1/linear_\2"),
  (r"ginlayers\.(\d+)\.apply_func\.mlp\.norm_list\.0", r"conv_\1/norm"),
  (r"ginlayers\.(\d+)\.apply_func\.norm", r"norm_\1"),
  (r"linears_prediction", "head"),
)
_NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def from_published(weights: Mapping[str, np.ndarray]) -> tuple[GraphEncoder, Classifier]:
  """Reads a network under the names of the published GFKD code.

  Args:
    weights: e.g. "gcnlayers.0.weight" -> array; kind, depth, width and whether there is batch
      normalisation are taken from it.

  Returns:
    The module and its weights, in the dtype they have.

  Raises:
    ValueError: for a name that is not part of such a network, or without classifier.
  """
  params: Tree = {}
  stats: Tree = {}
  for name, value in weights.items():
    module, _, leaf = name.rpartition(".")
    if leaf in ("eps", "num_batches_tracked"):  # eps is fixed at 0 in the published network
      continue
    for pattern, replacement in _MODULES:
      if re.fullmatch(pattern, module):
        path = re.sub(pattern, replacement, module).split("/")
        break
    else:
      raise ValueError(f"{name}: not a weight of a GFKD network")
    tree = params
    if path[-1].startswith("norm"):
      leaf = _NORM_LEAVES[leaf]
      tree = stats if leaf in ("mean", "var") else params
    elif leaf == "weight":
      leaf, value = "kernel", value if module.startswith("gcnlayers") else np.transpose(value)
    for part in path:
      tree = tree.setdefault(part, {})
    tree[leaf] = jnp.asarray(value)
  if set(params.get("head", {})) != {"kernel", "bias"}:
    raise ValueError("linears_prediction: the classifier is missing")
  head = Head(**params.pop("head"))
  convolutions = sum(name.startswith("conv_") for name in params)
  encoder = GraphEncoder(
    kind="gin" if any(name.startswith("ginlayers") for name in weights) else "gcn",
    layers=convolutions + 1,
    width=head.kernel.shape[0],
    batch_norm=bool(stats),
  )
  return encoder, Classifier(params, stats, head)
