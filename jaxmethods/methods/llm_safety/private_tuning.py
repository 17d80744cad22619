"""DP-LoRA: any way of tuning, with the gradients of DP-SGD.

Li, Tramer, Liang, Hashimoto, "Large language models can be strong differentially private learners",
arXiv 2110.05679, and Yu et al., "Differentially private fine-tuning of language models", arXiv
2110.06500 (both known): clip and noise only what is trained, an adapter beside frozen weights. The
frozen weights get no gradient at all, so the gradients of all examples at once are as small as the
adapter.

All that a tuner computes of the private data is its gradient: hooks and the merged model are made of it.
What a tuner would compute from a probe of the training data is not private, so the probe is withheld.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import privacy
from jaxmethods.trees import Params, Tree
from jaxmethods.tuning.tuner import Batch, TaskLoss, Tuner, TunerState

# Name of the entry of a batch that tells drawn examples from those that fill its shape.
REAL = "real"


def private(
  tuner: Tuner,
  *,
  clip_norm: float,
  noise_multiplier: float,
  expected_batch_size: float,
  microbatch: int | None = None,
) -> Tuner:
  """Makes a way of tuning private: examples are clipped one by one, and noise is added to their sum.

  The step needs no further clipping: call `tuning_step` with an infinite bound. A batch has the entry
  "real" (B,) beside its own, as `privacy.poisson_batch` draws it. An example counts by its own mean over
  what counts in it, whatever its length.

  Args:
    tuner: what is trained and how; its penalty must not depend on private data.
    clip_norm: C, of the gradient of one example over all that is trained.
    noise_multiplier: sigma.
    expected_batch_size: q n, whatever the number of examples that were drawn.
    microbatch: examples whose gradients are in memory at once, a divisor of B; default all.

  Returns:
    The tuner with another gradient, whose `init` ignores the probe.

  Raises:
    InputError: a bound, noise or size that is not positive (noise may be 0: no privacy).
  """
  for name, value in (("clip_norm", clip_norm), ("expected_batch_size", expected_batch_size)):
    if not value > 0:
      raise InputError(f"{name} must be positive, got {value}")
  if not noise_multiplier >= 0:
    raise InputError(f"noise_multiplier must not be negative, got {noise_multiplier}")

  def init(key: jax.Array, params: Params, probe: Batch) -> TunerState:
    del probe
    return tuner.init(key, params, {})

  def gradient(loss: TaskLoss, trainable: Tree, batch: Batch, key: jax.Array):
    noise, dropout = jax.random.split(key)
    examples = {name: x for name, x in batch.items() if name != REAL}
    found = privacy.private_gradient(
      lambda trainable, example: _of_one(loss, trainable, *example),
      trainable,
      (examples, jax.random.split(dropout, len(batch[REAL]))),
      batch[REAL],
      noise,
      clip_norm=clip_norm,
      noise_multiplier=noise_multiplier,
      expected_batch_size=expected_batch_size,
      microbatch=microbatch,
    )
    return found.loss, found.gradient

  return tuner._replace(init=init, gradient=gradient)


def _of_one(loss: TaskLoss, trainable: Tree, example: Batch, key: jax.Array) -> jax.Array:
  """Computes the mean loss of one example, as a batch of one."""
  total, count = loss(trainable, jax.tree.map(lambda x: x[None], dict(example)), key)
  return total / jnp.maximum(count, 1)
