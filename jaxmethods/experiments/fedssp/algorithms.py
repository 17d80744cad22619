"""Federated algorithms on a backbone: FedSSP with its ablations, and averaging with its variants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmethods import trees
from jaxmethods.experiments.fedssp.backbones import Backbone, Batch, ModelState, target_of
from jaxmethods.federated import algorithms, gcfl
from jaxmethods.federated.algorithm import FederatedAlgorithm
from jaxmethods.methods import fedssp as method
from jaxmethods.trees import Key, Params, PyTree

# Input and output layers have the widths of a client's own data, so they never leave it.
OWN_LAYERS = ("node_encoder", "embed", "head")


class Setup(NamedTuple):
  """An algorithm and how its clients begin.

  Attributes:
    algorithm: the federated algorithm.
    client: (params, model state) -> the client's first state.
    offset: client state -> addend of a representation when predicting, (H,) or 0.
  """

  algorithm: FederatedAlgorithm
  client: Callable[[Params, ModelState], PyTree]
  offset: Callable[[PyTree], jax.Array | float]


class Bounds(NamedTuple):
  """When GCFL cuts a cluster: mean update below `mean`, a single one above `max`, after `rounds`."""

  mean: float
  max: float
  rounds: int


def make_optimizer(
  name: Literal["adamw", "adam"], learning_rate: float, weight_decay: float
) -> optax.GradientTransformation:
  """Makes the clients' optimiser, with PyTorch's two meanings of weight decay.

  Flat: one vector in place of some sixty arrays is a third less program to lower.
  """
  if name == "adamw":
    return optax.flatten(optax.adamw(learning_rate, weight_decay=weight_decay))
  return optax.flatten(
    optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))
  )


def is_extractor(path: str) -> bool:
  """Tells whether a parameter is in neither the input layer nor the head."""
  return not set(OWN_LAYERS) & set(path.split("/"))


def is_convolution(path: str) -> bool:
  """Tells whether a parameter is in a convolution of GIN: shared by the published FedAvg and GCFL."""
  return path.startswith("conv_")


def is_structure(path: str) -> bool:
  """Tells whether a parameter is in FedStar's structure branch."""
  return path.startswith("structure")


# --- FedSSP ---------------------------------------------------------------------------------------

# FedSSP and its ablations: settings of one algorithm.
VARIANTS: dict[str, dict[str, Any]] = {
  "fedssp": {},
  "gsks": {"preference": None, "tau": 0.0},
  "no_preference": {"preference": None},
  "pgpa": {"shared": trees.nothing},
  "share_extractor": {"shared": is_extractor},
}


def fedssp(
  variant: str,
  backbone: Backbone,
  optimizer: optax.GradientTransformation,
  *,
  eval_preference: bool,
  **settings: Any,
) -> Setup:
  """Sets up FedSSP or one of its ablations.

  Args:
    variant: name in `VARIANTS`.
    backbone: network.
    optimizer: of the weights.
    eval_preference: whether a client predicts with its preference.
    **settings: of `methods.fedssp.fedssp`; the variant overrides them.
  """
  settings |= VARIANTS[variant]
  algorithm = method.fedssp(
    functools.partial(_output, backbone), backbone.classify, target_of, optimizer, **settings
  )
  preference = settings["preference"] or method.PREFERENCE_SGD
  # Until the first consensus is known the preference is zero, so adding it is always right.
  return Setup(
    algorithm,
    functools.partial(_first_state, optimizer, preference),
    lambda client: client.preference if eval_preference else 0.0,
  )


def _output(
  backbone: Backbone, params: Params, model_state: ModelState, batch: Batch, key: Key
) -> method.Output:
  """Computes representations in training mode."""
  return method.Output(*backbone.features(params, model_state, batch, key))


def _first_state(
  optimizer: optax.GradientTransformation,
  preference: method.PreferenceOptimizer,
  params: Params,
  model_state: ModelState,
) -> method.Client:
  """Returns a client of FedSSP before its first round."""
  zero = jnp.zeros(params["head"]["kernel"].shape[0])
  return method.Client(params, model_state, zero, preference.init(zero), optimizer.init(params))


# --- averaging ------------------------------------------------------------------------------------


def averaging(
  algorithm: str,
  backbone: Backbone,
  optimizer: optax.GradientTransformation,
  *,
  extractor: bool,
  num_clients: int,
  local_epochs: int,
  proximal: float,
  bounds: Bounds,
) -> Setup:
  """Sets up FedAvg, FedProx, FedPer, GCFL, FedStar or local training.

  Args:
    algorithm: name.
    backbone: network.
    optimizer: of the clients.
    extractor: whether FedAvg, FedProx and GCFL share the whole extractor, as on FedSSP's network,
      or the convolutions alone, as published on GIN.
    num_clients: clients in all.
    local_epochs: passes over a client's batches per round.
    proximal: mu of FedProx.
    bounds: of GCFL.
  """
  shared = {"fedper": is_extractor, "local": trees.nothing, "fedstar": is_structure}.get(
    algorithm, is_extractor if extractor else is_convolution
  )
  loss = functools.partial(_loss, backbone)
  options: dict[str, Any] = dict(shared=shared, local_epochs=local_epochs, keep_optimizer=True)
  if algorithm == "gcfl":
    federated = gcfl.gcfl(
      loss, optimizer, num_clients, mean_bound=bounds.mean, max_bound=bounds.max,
      first_rounds=bounds.rounds, **options,
    )  # fmt: skip
  else:
    mu = proximal if algorithm == "fedprox" else 0.0
    federated = algorithms.fedavg(loss, optimizer, proximal=mu, **options)
  start = functools.partial(algorithms.init_client, shared=shared, optimizer=optimizer)
  return Setup(federated, start, lambda client: 0.0)


def _loss(
  backbone: Backbone, params: Params, model_state: ModelState, batch: Batch, key: Key
) -> tuple[jax.Array, tuple[ModelState, dict[str, jax.Array]]]:
  """Computes the cross-entropy of a batch in training mode."""
  representation, model_state = backbone.features(params, model_state, batch, key)
  labels, mask = target_of(batch)
  value = method.cross_entropy(backbone.classify(params, representation), labels, mask)
  return value, (model_state, {})
