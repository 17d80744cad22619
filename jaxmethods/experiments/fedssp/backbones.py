"""Networks that classify graphs, behind one set of functions: `Backbone`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jraph
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.graphs.packing import SpectralBatch
from jaxmethods.models.fedstar import FedStarBackbone
from jaxmethods.models.gin import GINBackbone
from jaxmethods.models.init import draw_variables, torch_linear
from jaxmethods.models.spectral_gnn import SpectralGNN
from jaxmethods.trees import Key, Params, PyTree, Tree

Batch: TypeAlias = SpectralBatch | jraph.GraphsTuple  # a packed batch, or the view that is kept
ModelState: TypeAlias = Params  # batch-norm statistics


class Backbone(NamedTuple):
  """A network that classifies graphs.

  Attributes:
    view: the part of a packed batch that it reads; only that part reaches the device.
    init: (key, shapes of a batch, classes) -> (params, model state).
    features: (params, model state, batch, key or None) -> (representations (G, H), model state); a
      key means training.
    classify: (params, representations) -> logits (G, C).
    decoded: (params, model state, batch) -> new spectra (N, M); None without a decoder.
  """

  view: Callable[[SpectralBatch], Batch]
  init: Callable[[Key, PyTree, int], tuple[Tree, ModelState]]
  features: Callable[[Params, ModelState, PyTree, Key | None], tuple[jax.Array, ModelState]]
  classify: Callable[[Params, jax.Array], jax.Array]
  decoded: Callable[[Params, ModelState, SpectralBatch], jax.Array] | None = None


def make_backbone(
  network: Literal["spectral", "gin", "fedstar"],
  *,
  hidden: int,
  heads: int,
  layers: int,
  dropout: float,
) -> Backbone:
  """Makes the network of a name.

  Args:
    network: "spectral" (FedSSP), "gin" or "fedstar".
    hidden: width H.
    heads: attention heads and learned spectra M of "spectral"; the others have none.
    layers: convolutions.
    dropout: rate.
  """
  if network == "spectral":
    model = SpectralGNN(hidden, heads, layers, dropout)
    return Backbone(
      view=lambda batch: batch,
      init=functools.partial(_init_spectral, model),
      features=functools.partial(_features, model),
      classify=_classify,
      decoded=functools.partial(_decoded, model),
    )
  kind = GINBackbone if network == "gin" else FedStarBackbone
  make = functools.partial(kind, hidden=hidden, num_layers=layers, dropout=dropout)
  return Backbone(
    view=lambda batch: batch.graphs,
    init=functools.partial(_init_gin, make),
    features=functools.partial(_gin_logits, make),
    classify=lambda params, logits: logits,
  )


def graphs_of(batch: Batch) -> jraph.GraphsTuple:
  """Returns the batch in the layout of `jaxmethods.graphs`."""
  return batch.graphs if isinstance(batch, SpectralBatch) else batch


def target_of(batch: Batch) -> tuple[Int[Array, " G"], Bool[Array, " G"]]:
  """Returns the labels of the graphs and which graphs are real."""
  about = graphs_of(batch).globals
  return about["label"], about["mask"]


# --- FedSSP's network with a linear head -----------------------------------------------------------


def _init_spectral(
  model: SpectralGNN, key: Key, batch: PyTree, classes: int
) -> tuple[Tree, ModelState]:
  """Draws the network, then the head."""
  body, kernel_key, bias_key = jax.random.split(key, 3)
  variables = dict(draw_variables(model.init, body, batch))
  linear = torch_linear(model.hidden)
  head = {
    "kernel": linear["kernel_init"](kernel_key, (model.hidden, classes)),
    "bias": linear["bias_init"](bias_key, (classes,)),
  }
  return variables.pop("params") | {"head": head}, variables


def _classify(params: Params, representation: Float[Array, "G H"]) -> Float[Array, "G C"]:
  """Applies the linear head."""
  return representation @ params["head"]["kernel"] + params["head"]["bias"]


def _decoded(
  model: SpectralGNN, params: Params, model_state: ModelState, batch: SpectralBatch
) -> Float[Array, "N M"]:
  """Computes the new spectra."""
  variables = {"params": params, **model_state}
  _, seen = model.apply(
    variables, batch, capture_intermediates=lambda module, _: module.name == "decoder"
  )
  return seen["intermediates"]["decoder"]["__call__"][0]


# --- networks that end in their own head: their features are the logits ----------------------------


def _init_gin(
  make: Callable[[int], nn.Module], key: Key, batch: PyTree, classes: int
) -> tuple[Tree, ModelState]:
  """Draws the network for a number of classes."""
  variables = dict(draw_variables(make(classes).init, key, batch))
  return variables.pop("params"), variables


def _gin_logits(
  make: Callable[[int], nn.Module],
  params: Params,
  model_state: ModelState,
  batch: jraph.GraphsTuple,
  key: Key | None,
) -> tuple[Float[Array, "G C"], ModelState]:
  """Computes the logits; the head tells the number of classes."""
  return _features(make(params["head"]["bias"].shape[-1]), params, model_state, batch, key)


def _features(
  model: nn.Module, params: Params, model_state: ModelState, batch: Batch, key: Key | None
) -> tuple[jax.Array, ModelState]:
  """Applies a network; with a key it trains, and its statistics move."""
  variables = {"params": params, **model_state}
  result: PyTree
  if key is None:
    result = model.apply(variables, batch), model_state
  else:
    result = model.apply(
      variables, batch, train=True, rngs={"dropout": key}, mutable=list(model_state)
    )
  return result
