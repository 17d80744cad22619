"""A real experiment that takes seconds: multinomial logistic regression on scikit-learn's digits."""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

from etils import epy

from jaxmethods.errors import InputError
from jaxmethods.runtime.experiment import Experiment, RunConfig, Selection

with epy.lazy_imports():
  import jax
  import jax.numpy as jnp
  import matplotlib.pyplot as plt
  import numpy as np
  import optax

  from jaxmethods.data import embedded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  learning_rate: float = 0.5
  name: Literal["sgd", "adam"] = "sgd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  data: str = "digits"
  batch_size: int = 64
  nan_at: int = 0  # step whose features are NaN; 0 for none
  pause: float = 0.0  # seconds before each batch: time for a test to kill the run
  late: float = 0.0  # seconds that the second process needs longer to begin
  held_out: Literal["test", "validation"] = "test"
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)


def build(config: Config, mesh=None) -> Experiment:
  if config.data != "digits":
    raise InputError(f"data: no source {config.data!r}, the nearest is 'digits'")
  if config.late and jax.process_index() == 1:
    time.sleep(config.late)
  x, y = embedded.load_arrays("digits").splits["all"]
  x = x.reshape(-1, 64)
  order = np.random.default_rng(0).permutation(len(x))
  train, test = order[:1500], order[1500:]
  if config.held_out == "validation":
    train, test = train[450:], train[:450]
  optimizer = getattr(optax, config.optimizer.name)(config.optimizer.learning_rate)

  def init(key):
    params = {"w": 0.01 * jax.random.normal(key, (64, 10)), "b": jnp.zeros(10)}
    return {"params": params, "optimizer": optimizer.init(params), "key": key}

  def batches(k):
    while True:
      time.sleep(config.pause)
      rows = np.random.default_rng((config.seed, k)).choice(train, config.batch_size)
      k += 1
      yield spread((x[rows] * (np.nan if k == config.nan_at else 1), y[rows]))

  def spread(batch):
    if mesh is None:
      return batch
    sharding = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
    return jax.tree.map(
      lambda a: jax.make_array_from_callback(a.shape, sharding, lambda part: a[part]), batch
    )

  def cross_entropy(params, x, y):
    logits = x @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def step(state, batch):
    key = jax.random.fold_in(state["key"], 1)
    x, y = batch
    x = x + 0.05 * jax.random.normal(key, x.shape)
    loss, gradients = jax.value_and_grad(cross_entropy)(state["params"], x, y)
    updates, opt = optimizer.update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": opt, "key": key}, {"loss": loss}

  def evaluate(state, test):
    x, y = test
    correct = (x @ state["params"]["w"] + state["params"]["b"]).argmax(-1) == y
    per_class = jnp.stack([jnp.mean(correct, where=y == c) for c in range(10)])
    return {
      "accuracy": correct.mean(),
      "a_loss": cross_entropy(state["params"], x, y),
      "per_class": per_class,
    }

  def figures(state):
    weights = np.asarray(state["params"]["w"]).T.reshape(10, 8, 8)
    figure, axes = plt.subplots(2, 5, figsize=(8, 3.6), layout="constrained")
    for digit, (axis, w) in enumerate(zip(axes.flat, weights, strict=True)):
      axis.imshow(w, cmap="RdBu", vmin=-abs(weights).max(), vmax=abs(weights).max())
      axis.set(title=f"evidence for {digit}", xticks=[], yticks=[])
    return {"weights": figure}

  return Experiment(
    init=init,
    batches=batches,
    step=step,
    evaluate=evaluate,
    test=(x[test], y[test]),
    figures=figures,
    num_steps=config.steps,
    about="1,797 handwritten digits of 8x8 pixels (scikit-learn), real: 1,500 train, 297 test",
    validation_items=450,
  )


def rows(config: Config) -> dict[str, Config]:
  adam = Optimizer(learning_rate=0.01, name="adam")
  return {"sgd": config, "adam": dataclasses.replace(config, optimizer=adam)}


def selection(config: Config) -> Selection:
  held_out = dataclasses.replace(config, held_out="validation")
  return Selection(held_out, "accuracy", trade=("accuracy", "a_loss"))
