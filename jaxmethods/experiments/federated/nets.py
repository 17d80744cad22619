"""Models by name, or a user's own, as the functions that algorithms and tests call."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxmethods.errors import InputError, hint
from jaxmethods.federated.algorithm import Params
from jaxmethods.federated.algorithms import Loss, ModelState
from jaxmethods.models.convnet import ConvNet
from jaxmethods.models.convnets import classifier
from jaxmethods.models.mlp import MLP
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViTClassifier, ViTConfig
from jaxmethods.stats.losses import mean_of_real
from jaxmethods.trees import Key, PyTree

Batch: TypeAlias = Mapping[str, Array]
NAMES = ("mlp", "linear", "convnet", "resnet", "vit")
_RESNET = "resnet10"


class Sizes(NamedTuple):
  """Sizes of the models by name; see the config."""

  widths: tuple[int, ...]
  narrow: int
  vit_width: int
  vit_layers: int
  vit_heads: int
  vit_patch: int


class Outputs(NamedTuple):
  """Logits (B, C), features (B, h) that the layer "head" reads, and the new model state."""

  logits: Array
  features: Array
  model_state: ModelState


class Scores(NamedTuple):
  """Of some examples, (n,) each: how much is right, of how much, and the summed loss."""

  right: Array
  counted: Array
  loss: Array


class Task(NamedTuple):
  """A model and how it is judged.

  Attributes:
    init: key -> (parameters that are trained, model state).
    fixed: what is not trained and all clients have alike: () or frozen weights.
    loss: fixed -> loss of a batch, for the engine.
    scores: (fixed, parameters, model state, batch) -> scores of the examples.
    logits: fixed -> ((parameters, batch) -> (B, C)); None where there are no classes.
    features: fixed -> ((parameters, batch) -> (B, h)); None likewise.
    num_classes: C; 0 of texts.
    width: h; 0 of texts.
    measure: name of the accuracy.
  """

  init: Callable[[Key], tuple[Params, ModelState]]
  fixed: PyTree
  loss: Callable[[PyTree], Loss]
  scores: Callable[[PyTree, Params, ModelState, Batch], Scores]
  logits: Callable[[PyTree], Callable[[Params, Batch], Array]] | None
  features: Callable[[PyTree], Callable[[Params, Batch], Array]] | None
  num_classes: int
  width: int
  measure: str = "test_accuracy"


# (parameters, model state, batch, key of dropout or None when tested) -> outputs
Run: TypeAlias = Callable[[Params, ModelState, Batch, Key | None], Outputs]


def make(name: str, sizes: Sizes, shape: tuple[int, ...], num_classes: int) -> nn.Module:
  """Makes a model.

  Args:
    name: of `NAMES`, or package.module:function: a function of the number of classes that returns a
      flax module, which maps (B, ...) to logits (B, C); its last layer is named "head" where fedper,
      moon or fedproto are wanted, and a keyword `train` is given where it has one.
    sizes: of the models by name.
    shape: of an example.
    num_classes: C.

  Raises:
    InputError: an unknown name, a function that is not there or returns something else, or images that
      are needed and not there.
  """
  if ":" in name:
    return _own(name, num_classes)
  if name not in NAMES:
    raise InputError(
      f"model: {name!r} is not known; {hint(name, NAMES, 'models')}, or package.module:function"
    )
  if name in ("mlp", "linear"):
    return MLP(sizes.widths if name == "mlp" else (), num_classes)
  if len(shape) != 3:
    raise InputError(f"model: {name} needs images (h, w, c), the data have examples of {shape}")
  if name == "convnet":
    if min(shape[:2]) < 2 ** len(sizes.widths):
      raise InputError(f"widths: {len(sizes.widths)} poolings are too many for images of {shape}")
    return ConvNet(sizes.widths, num_classes)
  if name == "resnet":
    return classifier(_RESNET, num_classes, narrow=sizes.narrow, norm="group")
  encoder = EncoderConfig(
    width=sizes.vit_width,
    num_layers=sizes.vit_layers,
    heads=sizes.vit_heads,
    hidden=4 * sizes.vit_width,
  )
  form = ViTConfig(encoder=encoder, image_size=shape[:2], patch=sizes.vit_patch, channels=shape[2])
  return ViTClassifier(form, num_classes)


def array_task(name: str, module: nn.Module, example: np.ndarray, num_classes: int) -> Task:
  """Makes the task of classifying arrays; pixels of 0 to 255 are divided by 255.

  Args:
    name: of the model, for errors.
    module: maps (B, ...) to logits (B, C).
    example: one example.
    num_classes: C.

  Raises:
    InputError: the module fails on the data, or returns another shape.
  """
  train = {"train"} & set(inspect.signature(type(module).__call__).parameters)

  def run(params: Params, model_state: ModelState, batch: Batch, key: Key | None) -> Outputs:
    x = batch["x"] / 255 if batch["x"].dtype == jnp.uint8 else batch["x"]
    training = key is not None
    return caught(
      module, params, model_state, (x,), key, **(dict.fromkeys(train, training) if train else {})
    )

  def init(key: Key) -> tuple[Params, ModelState]:
    x = jnp.zeros((1, *example.shape), jnp.float32)
    return started(module, key, x)

  batch = {"x": jax.ShapeDtypeStruct((2, *example.shape), example.dtype)}
  return class_task(name, init, run, batch, num_classes, rows=2)


def started(module: nn.Module, key: Key, *args: PyTree) -> tuple[Params, ModelState]:
  """Initialises a module; (parameters, other collections)."""
  variables = dict(module.init(key, *args))
  params = variables.pop("params", {})
  return params, variables or ()


def caught(
  module: nn.Module,
  params: Params,
  model_state: ModelState,
  args: tuple[PyTree, ...],
  key: Key | None,
  **keywords: PyTree,
) -> Outputs:
  """Runs a module, and catches what its layer "head" reads; without one, the logits are the features."""
  read: list[Array] = []

  def catch(following, given, more, context):
    if context.module.name == "head" and context.method_name == "__call__":
      read.append(given[0])
    return following(*given, **more)

  state = dict(model_state or {})
  rngs = None if key is None else {"dropout": key}
  changing = list(state) if key is not None else []
  with nn.intercept_methods(catch):
    logits, changed = module.apply(
      {"params": params, **state}, *args, rngs=rngs, mutable=changing, **keywords
    )
  features = read[-1] if read else logits
  after = {**state, **changed} if state else model_state
  return Outputs(logits, features.reshape(len(features), -1), after)


def class_task(
  name: str,
  init: Callable[[Key], tuple[Params, ModelState]],
  run: Run,
  batch: PyTree,
  num_classes: int,
  rows: int,
) -> Task:
  """Makes a task of classification; the batch, abstract, has `rows` examples.

  Raises:
    InputError: the model fails on the batch, or returns another shape.
  """
  state, outputs = _checked(name, init, run, batch, (rows, num_classes))
  # Batch statistics, where there are any, are those of the batch: the running ones are not read.
  blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)

  def loss(params, model_state, batch, key):
    found = run(params, model_state, batch, key)
    errors = optax.softmax_cross_entropy_with_integer_labels(found.logits, batch["y"])
    return mean_of_real(errors, batch["mask"]), (found.model_state, {})

  def scores(fixed, params, model_state, batch):
    del fixed
    logits = run(params, model_state, batch, None).logits
    errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    right = (logits.argmax(-1) == batch["y"]) & batch["mask"]
    return Scores(right, batch["mask"], jnp.where(batch["mask"], errors, 0))

  def guided(params: Params, batch: Batch) -> Outputs:
    return run(params, blank, batch, jax.random.key(0) if jax.tree.leaves(blank) else None)

  return Task(
    init, (), lambda fixed: loss, scores,
    lambda fixed: lambda params, batch: guided(params, batch).logits,
    lambda fixed: lambda params, batch: guided(params, batch).features,
    num_classes, outputs.features.shape[-1],
  )  # fmt: skip


def _checked(
  name: str, init: Callable, run: Run, batch: PyTree, expected: tuple[int, int]
) -> tuple[ModelState, Outputs]:
  """Forms of model state and outputs, nothing computed.

  Raises:
    InputError: the model fails, or its logits have another shape.
  """
  try:
    params, state = jax.eval_shape(init, jax.random.key(0))
    outputs = jax.eval_shape(run, params, state, batch, jax.random.key(0))
    tested = jax.eval_shape(lambda p, s, b: run(p, s, b, None), params, state, batch)
  except InputError:
    raise
  except Exception as error:  # whatever a model of the user does
    said = str(error).strip().split("\n")[0]
    raise InputError(f"model: {name} fails on the data: {type(error).__name__}: {said}") from None
  for logits in (outputs.logits, tested.logits):
    if tuple(logits.shape) != expected or not jnp.issubdtype(logits.dtype, jnp.floating):
      raise InputError(
        f"model: {name} returns {logits.dtype} {tuple(logits.shape)} for {expected[0]} examples, "
        f"expected logits {expected}: one number a class"
      )
  return state, outputs


def _own(name: str, num_classes: int) -> nn.Module:
  """Calls a function of the user.

  Raises:
    InputError: it cannot be imported, fails, or returns no module.
  """
  where, _, function = name.partition(":")
  try:
    found = getattr(importlib.import_module(where), function)
  except Exception as error:  # whatever the module does when it is imported
    said = str(error).strip().split("\n")[0]
    raise InputError(f"model: {name} cannot be imported: {type(error).__name__}: {said}") from None
  if not callable(found):
    raise InputError(f"model: {name} is no function, but {type(found).__name__}")
  try:
    module = found(num_classes)
  except Exception as error:
    said = str(error).strip().split("\n")[0]
    raise InputError(
      f"model: {name}({num_classes}) fails: {type(error).__name__}: {said}"
    ) from None
  if not isinstance(module, nn.Module):
    raise InputError(f"model: {name} must return a flax.linen module, got {type(module).__name__}")
  return module
