"""Tuners of the suite that are no method of their own: every paradigm behind one interface.

All train the projector themselves, besides what they are named after; embeddings, final norm and head
stay as they are unless a tuner says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmethods import trees
from jaxmethods.adapters import adalora as triplets, low_rank, prompts, selective as masks
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.trees import PyTree, Tree, below, flatten, unflatten
from jaxmethods.tuning import posterior, selective, tuner
from jaxmethods.tuning.calibration import input_moments
from jaxmethods.tuning.tuner import (
  LINEARS,
  PROJECTOR,
  Loss,
  Tuner,
  TunerState,
  adapted,
  own_rates,
  selected,
  split_params,
)

# All that is tuned of a model without its embeddings, final norm and head.
LAYERS = r"^(projector|language/layers(_\d+)?)/"
ATTENTION = rf"{PROJECTOR}|{tuner.ATTENTION_LINEARS}"
GATE_UP = r"^projector/|^language/.*\b(gate|up)/kernel$"
VECTORS = r"^projector/|^language/layers.*(bias|scale)$"


def frozen() -> Tuner:
  """Makes the pretrained model as it is: nothing is trained."""

  def init(key, params, probe):
    del key, probe
    return TunerState({}, dict(params), {})

  return selected(LAYERS)._replace(init=init)


def last_layers(count: int, of: int) -> str:
  """Returns the targets projector and last `count` of `of` unrolled layers."""
  numbers = "|".join(str(i) for i in range(max(of - count, 0), of))
  return rf"{PROJECTOR}|^language/layers_({numbers})/"


# --- selective, iterative -------------------------------------------------------------------------


def l2_sp(weight: float, targets: str = LAYERS) -> Tuner:
  """Makes L2-SP: a penalty on the distance to the pretrained weights."""

  def penalty(trainable, frozen, extra):
    del frozen
    return selective.l2_sp(trainable, extra["anchor"], weight)

  return _anchored(selected(targets, penalty=penalty))


def ewc(weight: float, model: nn.Module, loss: Loss, targets: str = LAYERS) -> Tuner:
  """Makes EWC; its probe is a batch of the tasks that must not be forgotten."""

  def penalty(trainable, frozen, extra):
    del frozen
    return selective.ewc(trainable, extra["anchor"], extra["fisher"], weight)

  base = _anchored(selected(targets, penalty=penalty))

  def init(key, params, probe):
    state = base.init(key, params, probe)
    fisher = _per_sample(selective.squared_gradients, base, model, loss, state, probe)
    return state._replace(extra=state.extra | {"fisher": fisher})

  return base._replace(init=init)


def masked(
  share: float, score: masks.Score, targets: str = LINEARS, also: str | None = PROJECTOR
) -> Tuner:
  """Tunes the `share` of every tensor with the highest scores; the mask is fixed."""
  return adapted(masks.tuned(share, score), targets, also)


def gradient_masked(
  share: float,
  model: nn.Module,
  loss: Loss,
  targets: str = LINEARS,
  also: str | None = PROJECTOR,
) -> Tuner:
  """Tunes the `share` with the highest mean |gradient| over the examples of the probe."""
  base = adapted(masks.tuned(), targets, also)

  def init(key, params, probe):
    plain = selected(targets)
    state = plain.init(key, params, probe)
    scores = _per_sample(selective.absolute_gradients, plain, model, loss, state, probe)
    return masked(share, masks.by_gradient(scores), targets, also).init(key, params, probe)

  return base._replace(init=init)


def _anchored(base: Tuner) -> Tuner:
  """Keeps the pretrained values of the trained part in `extra["anchor"]`."""

  def init(key, params, probe):
    state = base.init(key, params, probe)
    return state._replace(extra=dict(state.extra) | {"anchor": state.trainable})

  return base._replace(init=init)


def _per_sample(
  statistic: Callable[..., Any],
  base: Tuner,
  model: nn.Module,
  loss: Loss,
  state: TunerState,
  probe: PyTree,
) -> Tree:
  """Computes a statistic of the gradients of single examples for the part that `base` trains."""

  def of_one(trainable, sample):
    batch = jax.tree.map(lambda x: x[None], sample)
    run = functools.partial(base.apply, model, trainable, state.frozen, state.extra)
    total, count = loss(run, batch, None)
    return total / jnp.maximum(count, 1)

  # A scan over the samples, which compiles its body and takes the frozen weights as arguments.
  return statistic(of_one, state.trainable, dict(probe))


# --- selective, posterior -------------------------------------------------------------------------


def posterior_edit(edit: posterior.Edit, targets: str = LAYERS) -> Tuner:
  """Makes full tuning whose result is edited tensor by tensor.

  `edit` gets a key that is drawn once, at the start.
  """
  base = _anchored(selected(targets))

  def init(key, params, probe):
    state = base.init(key, params, probe)
    return state._replace(extra=state.extra | {"key": jax.random.key_data(key)})

  def finalize(trainable, frozen, extra):
    key = jax.random.wrap_key_data(extra["key"])
    return trees.merge(posterior.edited(edit, extra["anchor"], trainable, key), frozen)

  return base._replace(init=init, finalize=finalize)


def dare(rate: float, targets: str = LAYERS) -> Tuner:
  """Makes DARE of the whole update."""

  def edit(before, after, key):
    return posterior.dare(before, after, jax.random.bernoulli(key, rate, before.shape), rate)

  return posterior_edit(edit, targets)


def half(share: float = 0.5, targets: str = LAYERS) -> Tuner:
  """Keeps the update of a random share of the entries."""

  def edit(before, after, key):
    return posterior.masked(before, after, jax.random.bernoulli(key, share, before.shape))

  return posterior_edit(edit, targets)


def grafting(share: float, targets: str = LAYERS) -> Tuner:
  """Keeps the update of the entries that changed most."""
  return posterior_edit(
    lambda before, after, key: posterior.grafting(before, after, share), targets
  )


def ties(share: float, scale: float, targets: str = LAYERS) -> Tuner:
  """Makes TIES of a single update: grafting with another scale."""

  def edit(before, after, key):
    del key
    return posterior.ties(before, (after - before)[None], share, scale)

  return posterior_edit(edit, targets)


def interpolated(weight: float, targets: str = LAYERS) -> Tuner:
  """Makes WiSE: a point between pretrained and tuned weights."""
  return posterior_edit(
    lambda before, after, key: posterior.interpolate(before, after, weight), targets
  )


def tailor(
  model: DeskMLLM, sparsity: float, sign: Literal["plus", "minus"] = "plus", targets: str = LAYERS
) -> Tuner:
  """Makes Model Tailor on all linear layers that were tuned; calibrated on the probe.

  Parameters other than their kernels keep their tuned values.
  """
  base = _anchored(selected(targets))

  def init(key, params, probe):
    state = base.init(key, params, probe)
    kept = {name: probe[name] for name in ("features", "ids")}
    return state._replace(extra=state.extra | {"probe": kept})

  def finalize(trainable, frozen, extra):
    params, probe = trees.merge(trainable, frozen), extra["probe"]
    moments = input_moments(model, params, probe, rf"({targets}).*kernel$")
    flat, before = flatten(params), flatten(extra["anchor"])
    for layer, moment in moments.items():
      path = below(layer, "kernel")
      hessian = posterior.hessian(moment, len(probe["ids"]))
      new = posterior.tailor(before[path].T, flat[path].T, hessian, sparsity, sign=sign)
      flat[path] = new.T
    return unflatten(flat)

  return base._replace(init=init, finalize=finalize)


# --- additive -------------------------------------------------------------------------------------


def prompt(length: int) -> Tuner:
  """Makes prompt tuning: learned vectors between the image and the question."""

  def start(key, model_params):
    return prompts.init_prompt(key, model_params, length)

  return _input(start, lambda tree: {"prompt": tree["prompt"]})


def prefix(model: DeskMLLM, length: int) -> Tuner:
  """Makes prefix tuning: learned keys and values that every layer sees."""

  def start(key, model_params):
    del model_params
    return prompts.init_prefix(key, model.config.language, length)

  return _input(start, lambda tree: {"prefix": tree})


def _input(start: Callable[..., Any], inputs: Callable[[Any], dict[str, Any]]) -> Tuner:
  """Trains vectors that the model takes as inputs; trainable: {"input", "params"}."""

  def init(key, params, probe):
    del probe
    own, rest = split_params(params, PROJECTOR)
    return TunerState({"input": start(key, params), "params": own}, rest, {})

  def apply(model, trainable, frozen, extra, *args, **kwargs):
    del extra
    params = trees.merge(trainable["params"], frozen)
    return model.apply({"params": params}, *args, **inputs(trainable["input"]), **kwargs)

  def rates(trainable):
    vectors = jax.tree.map(lambda _: "prompt", trainable["input"])
    return {"input": vectors, "params": own_rates(trainable["params"])}

  return Tuner(init, apply, None, rates)


# --- reparameterised ------------------------------------------------------------------------------


def lora_plus(
  rank: int,
  alpha: float,
  dropout: float,
  targets: str = LINEARS,
  also: str | None = PROJECTOR,
) -> Tuner:
  """Makes LoRA+: B has a learning rate of its own, "adapter_b" (arXiv 2402.12354)."""
  base = adapted(low_rank.lora(rank, alpha, dropout), targets, also)

  def rates(trainable):
    labels = base.rates(trainable)
    fast = {
      path: "adapter_b" if path.endswith("/b") else label
      for path, label in flatten(labels["adapter"]).items()
    }
    return labels | {"adapter": unflatten(fast)}

  return base._replace(rates=rates)


def adalora(
  rank: int,
  dropout: float,
  weight: float,
  steps: int,
  targets: str = LINEARS,
  also: str | None = PROJECTOR,
) -> Tuner:
  """Makes AdaLoRA: starts with half as many triplets again, and prunes them down to `rank` a layer.

  Pruning begins after a tenth of the steps and is done after seven tenths (inferred).

  Args:
    rank: triplets per layer that are left, on average.
    dropout: of the branch.
    weight: gamma, of the orthogonality.
    steps: of the run.
    targets: regular expression on kernel paths.
    also: regular expression on the parameters that are trained themselves.
  """
  initial = rank + rank // 2
  base = adapted(low_rank.adalora(initial, dropout), targets, also)

  def init(key, params, probe):
    state = base.init(key, params, probe)
    return state._replace(extra={"scores": triplets.zero_scores(state.trainable["adapter"])})

  def penalty(trainable, frozen, extra):
    del frozen, extra
    return weight * triplets.orthogonality(trainable["adapter"])

  def post_step(step, gradients, before, trainable, frozen, extra):
    del frozen
    scores = triplets.update_scores(extra["scores"], before["adapter"], gradients.raw["adapter"])
    tree = trainable["adapter"]
    layers = len(triplets.triplet_scores(scores))
    left = triplets.budget(
      step, initial * layers, rank * layers, steps // 10, max(7 * steps // 10, steps // 10 + 1)
    )
    return trainable | {"adapter": triplets.prune(tree, scores, left)}, {"scores": scores}

  return base._replace(init=init, penalty=penalty, post_step=post_step)
