"""The three tasks in one interface: init, loss and sample of a conditional motion diffusion.

hhi two persons (InterGen), or the second as a reaction to the first; hoi a person and a moving object
(OMOMO and CHOIS, reduced); hsi a person in a scene with a goal (AffordMotion, reduced). The network is
an argument: the denoiser, or one without its structure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxmethods.methods.human_interaction import diffusion, losses, representation, scenes
from jaxmethods.methods.human_interaction.losses import INTERGEN, Weights
from jaxmethods.methods.human_interaction.representation import Scaling
from jaxmethods.methods.human_interaction.skeleton import SMPL22, Skeleton
from jaxmethods.models.interaction import Condition, Task
from jaxmethods.trees import Key, Params


class Interaction(NamedTuple):
  """A task: functions of parameters.

  Attributes:
    init: (key, motion (B, T, E, F), condition) -> parameters.
    loss: (parameters, key, clean motion, mask (B, T), condition) -> weighted terms and "total".
    sample: see `make`.
  """

  init: Callable[[Key, Array, Condition], Params]
  loss: Callable[[Params, Key, Array, Array, Condition], dict[str, Array]]
  sample: Callable[..., Array]


class Setting(NamedTuple):
  """What the functions of a task share; see `make`."""

  net: nn.Module
  task: Task
  scaling: Scaling
  skeleton: Skeleton
  num_steps: int
  weights: Weights
  drop: float
  gate: float
  fps: float
  published: bool


def make(
  net: nn.Module,
  task: Task,
  scaling: Scaling,
  skeleton: Skeleton = SMPL22,
  *,
  num_steps: int = 1000,
  weights: Weights = INTERGEN,
  drop: float = 0.1,
  gate: float = 0.7,
  fps: float = 30.0,
  published: bool = False,
) -> Interaction:
  """Makes the functions of a task.

  `sample(params, key, condition, frames, steps=50, scale=1.0, guidance=None, mask=None,
  sampler="ddim", eta=0.0)` draws normalised motions (B, T, E, F).

  Args:
    net: flax module called as `InteractionDenoiser`.
    task: "hhi", "hoi" or "hsi".
    scaling: of the features.
    skeleton: of the bodies.
    num_steps: N, steps of training.
    weights: of the losses.
    drop: probability that a condition is dropped in training.
    gate: losses of geometry count for steps up to this share of N.
    fps: frames per second.
    published: whether the losses keep the slips of the published code, see `losses`.

  Raises:
    ValueError: for another task.
  """
  if task not in ("hhi", "hoi", "hsi"):
    raise ValueError(f"task: must be 'hhi', 'hoi' or 'hsi', got {task!r}")
  own = Setting(net, task, scaling, skeleton, num_steps, weights, drop, gate, fps, published)

  def init(key: Key, motion: Array, condition: Condition) -> Params:
    steps = jnp.zeros(len(motion), jnp.int32)
    return net.init({"params": key, "dropout": key}, motion, steps, condition)["params"]

  return Interaction(
    init,
    lambda params, key, x0, mask, condition: loss(own, params, key, x0, mask, condition),
    lambda params, key, condition, frames, **options: sample(
      own, params, key, condition, frames, **options
    ),
  )


def loss(
  own: Setting,
  params: Params,
  key: Key,
  x0: Float[Array, "B T E F"],
  mask: Bool[Array, "B T"],
  condition: Condition,
) -> dict[str, Array]:
  """One draw of steps, noise and dropped conditions, and the losses of the prediction."""
  keys = jax.random.split(key, 4)
  schedule = diffusion.make_schedule(own.num_steps)
  t = jax.random.randint(keys[0], (len(x0),), 0, own.num_steps)
  x = diffusion.noised(schedule, x0, t, jax.random.normal(keys[1], x0.shape, x0.dtype))
  if condition.label is not None:
    kept = diffusion.kept_conditions(keys[2], len(x0), own.drop)
    condition = condition._replace(label=condition.label * kept[:, None])
  reaction = condition.first is not None
  clean = _applied(own, params, x, t, condition, mask, keys[3])
  gate = losses.open_gate(t, own.num_steps, own.gate)
  terms = losses.interaction_loss(
    clean, x0, mask, gate, own.scaling, own.skeleton, weights=own.weights, fps=own.fps,
    gate_orientation=not own.published, into_padding=own.published, reaction=reaction,
  )  # fmt: skip
  del terms["total"]
  return losses.summed(terms | _entity_terms(own, clean, x0, mask, gate, condition))


def _entity_terms(
  own: Setting, clean: Array, x0: Array, mask: Array, gate: Array, condition: Condition
) -> dict[str, Array]:
  """Contact with the object, collision with the scene, where they are known."""
  read = lambda x: representation.joints_of(
    representation.denormalise(x[:, :, 0], own.scaling), own.skeleton
  )
  if own.task == "hoi" and condition.points is not None:
    contact = losses.object_contact(
      read(clean), read(x0), condition.points, mask, gate, own.skeleton
    )
    return {"object": own.weights.object * contact}
  if own.task == "hsi" and condition.solids is not None:
    signed = jax.vmap(scenes.signed_distance)(read(clean), condition.solids)
    hit = losses.gated(losses.collision(signed, mask), gate)
    return {"scene": own.weights.scene * hit}
  return {}


def sample(
  own: Setting,
  params: Params,
  key: Key,
  condition: Condition,
  frames: int,
  *,
  steps: int = 50,
  scale: float = 1.0,
  guidance: diffusion.Guidance | None = None,
  mask: Bool[Array, "B T"] | None = None,
  sampler: diffusion.Sampler = "ddim",
  eta: float = 0.0,
) -> Float[Array, "B T E F"]:
  """Draws normalised motions.

  Args:
    own: see `make`.
    params: of the network.
    key: of all noise.
    condition: of B motions.
    frames: T.
    steps: that are visited of the N, evenly spread ("ddimSTEPS" where the stride is whole).
    scale: s of classifier-free guidance, which drops the label.
    guidance: see `guidance.py`.
    mask: real frames.
    sampler: "ddim" or "ddpm".
    eta: of "ddim".

  Returns:
    Motions; in a reaction person 0 is the given one.

  Raises:
    ValueError: with a scale but no label.
  """
  leaves = jax.tree.leaves(condition)
  if not leaves:
    raise ValueError("condition: is empty; a label of zeros says how many motions to draw")
  batch, bodies = len(leaves[0]), 2 if own.task == "hhi" else 1
  whole = own.num_steps % steps == 0
  visited = (diffusion.ddim_steps if whole else diffusion.even_steps)(own.num_steps, steps)

  def network(x: Array, t: Array, given: tuple[Condition, Array | None]) -> Array:
    return _applied(own, params, x, t, *given)

  dropped = condition
  if condition.label is not None:
    dropped = condition._replace(label=jnp.zeros_like(condition.label))
  elif scale != 1:
    raise ValueError(f"scale: {scale} needs a label to drop")
  made = diffusion.sample(
    diffusion.classifier_free(network, (condition, mask), (dropped, mask), scale),
    diffusion.make_schedule(own.num_steps, visited),
    key,
    (batch, frames, bodies, len(own.scaling.mean)),
    sampler=sampler,
    eta=eta,
    guidance=guidance,
  )
  return made if condition.first is None else diffusion.with_first(made, condition.first)


def _applied(
  own: Setting,
  params: Params,
  x: Array,
  t: Array,
  condition: Condition,
  mask: Array | None,
  dropout: Key | None = None,
) -> Array:
  """The network's prediction, in training with a key of its dropout."""
  rngs = {} if dropout is None else {"dropout": dropout}
  train = dropout is not None
  return jnp.asarray(own.net.apply({"params": params}, x, t, condition, mask, train, rngs=rngs))
