"""One update of an adapter: gradients for what is trained, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.adapters.adapter import Adapter, Params, Tree, apply, join, split
from jaxmethods.errors import InputError
from jaxmethods.stats.losses import IGNORED

Batch = Mapping[str, jax.Array]
# (params, adapter tree, batch, key) -> (sum over what counts, how much counts). A sum and not a mean, so
# that parts of a batch add up to the whole whatever their padding.
Loss = Callable[[Params, Tree, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]
Update = Callable[
  [Tree, optax.OptState, Params, Batch, jax.Array | None],
  tuple[Tree, optax.OptState, dict[str, jax.Array]],
]


def update_step(
  adapter: Adapter, loss: Loss, optimiser: optax.GradientTransformation, *, accumulate: int = 1
) -> Update:
  """The pure update (tree, optimiser state, params, batch, key) -> (tree, optimiser state, metrics).

  To be jitted by the caller. With the batch sharded over a mesh and the rest replicated it is the
  data-parallel step. The precision of the computation and the recomputation of layers are the model's
  `dtype` and `remat`; tree, gradients and optimiser state stay float32.

  Args:
    adapter: what the tree belongs to.
    loss: see `Loss`.
    optimiser: of the trained part; its state is `optimiser.init(split(adapter, tree)[0])`.
    accumulate: parts that the batch is worked off in, one after the other; only one part's activations
      are in memory at a time. Must divide the batch.

  Returns:
    The update; metrics are "loss", the mean, and "grad_norm".

  >>> def loss(params, tree, batch, key):
  ...   error = (jm.adapters.apply(lora, net, params, tree, batch["x"]) - 1) ** 2
  ...   return error.sum(), error.size
  >>> update = jax.jit(jm.adapters.update_step(lora, loss, optax.sgd(0.1)))
  >>> tree = lora.init(key, params, "kernel")
  >>> opt_state = optax.sgd(0.1).init(jm.adapters.split(lora, tree)[0])
  >>> tree, opt_state, metrics = update(tree, opt_state, params, {"x": x}, None)
  >>> sorted(metrics)
  ['grad_norm', 'loss']
  """
  if accumulate < 1:
    raise InputError(f"accumulate: must be at least 1, got {accumulate}")

  def step(tree, state, params, batch, key):
    trained, rest = split(adapter, tree)
    of_part = jax.value_and_grad(
      lambda trained, part, key: loss(params, join(trained, rest), part, key), has_aux=True
    )

    loss_mean, gradients = mean_of_parts(of_part, trained, batch, key, accumulate)
    updates, state = optimiser.update(gradients, state, trained)
    metrics = {"loss": loss_mean, "grad_norm": optax.tree.norm(gradients)}
    return join(optax.apply_updates(trained, updates), rest), state, metrics

  return step


def mean_of_parts(
  of_part: Callable[..., tuple[tuple[jax.Array, jax.Array], Tree]],
  trained: Tree,
  batch: Batch,
  key: jax.Array | None,
  count: int,
) -> tuple[jax.Array, Tree]:
  """Computes the mean loss and its gradient over a batch that is worked off in parts.

  Args:
    of_part: (trained, part, key) -> ((sum, how much counts), gradient of the sum).
    trained: what the gradient is of.
    batch: arrays (B, ...).
    key: of dropout; None: none.
    count: parts, a divisor of B.

  Returns:
    (mean, gradient of the mean).
  """

  def add(sums, inputs):
    part, index = inputs
    part_key = None if key is None else jax.random.fold_in(key, index)
    return jax.tree.map(jnp.add, sums, of_part(trained, part, part_key)), None

  if count == 1:
    (total, weight), gradients = of_part(trained, batch, key)
  else:
    every = parts(batch, count)
    first = jax.tree.map(lambda x: x[0], every)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, trained, first, key)
    )
    ((total, weight), gradients), _ = jax.lax.scan(add, zeros, (every, jnp.arange(count)))
  weight = jnp.maximum(weight, 1)
  return total / weight, jax.tree.map(lambda g: g / weight, gradients)


def parts(batch: Batch, count: int) -> dict[str, jax.Array]:
  """Arrays (B, ...) as (count, B / count, ...).

  A part is every count-th row: where rows are spread over devices, none has to move.
  """
  for name, x in batch.items():
    if x.shape[0] % count:
      raise InputError(f"{name}: a batch of {x.shape[0]} cannot be worked off in {count} parts")
  return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), dict(batch))


def next_token_loss(adapter: Adapter, model: nn.Module) -> Loss:
  """Makes the cross-entropy of the next token; the batch has "ids", "labels" and maybe "mask".

  Labels (B, T) stand at the position of their own token, as transformers has it. `IGNORED` ones do not
  count, neither does the first, nor one whose predecessor is padding: nothing foretells it. With a key,
  dropout is on.

  >>> model, ids = jm.models.CausalLM(tiny), jnp.arange(6)[None]
  >>> weights = model.init(key, ids)["params"]
  >>> loss = jm.adapters.next_token_loss(lora, model)
  >>> tree = lora.init(key, weights, "query/kernel")
  >>> total, count = loss(weights, tree, {"ids": ids, "labels": ids}, None)
  >>> int(count)
  5
  """

  def loss(params, tree, batch, key):
    rngs = None if key is None else {"dropout": key}
    mask = batch.get("mask")
    output = apply(adapter, model, params, tree, batch["ids"], mask=mask, rngs=rngs)
    # The labels are moved, not the logits: a slice of those would be a copy of the largest array.
    labels = jnp.roll(batch["labels"], -1, axis=1).at[:, -1].set(IGNORED)
    if mask is not None:
      labels = jnp.where(mask, labels, IGNORED)
    return token_cross_entropy(output.logits, labels)

  return loss


def token_cross_entropy(
  logits: jax.Array, labels: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Sum of the cross-entropies, and number, of the labels that are not `IGNORED`.

  Args:
    logits: (..., V).
    labels: (...) int.
  """
  counts = labels != IGNORED
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), jnp.where(counts, labels, 0)
  )
  return jnp.sum(losses, where=counts), jnp.sum(counts)
