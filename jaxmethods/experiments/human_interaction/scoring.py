"""What drawn motions score: distributions by the evaluator, and bodies, feet and contacts one by one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmethods.experiments.human_interaction import judge
from jaxmethods.experiments.human_interaction.clips import Part
from jaxmethods.experiments.human_interaction.config import Task
from jaxmethods.experiments.human_interaction.drawing import Artist, Request, draw
from jaxmethods.experiments.human_interaction.training import State
from jaxmethods.methods.human_interaction import losses, metrics, physics, representation, scenes
from jaxmethods.methods.human_interaction.representation import Scaling
from jaxmethods.methods.human_interaction.skeleton import Skeleton
from jaxmethods.models.interaction import Condition, MotionEvaluator
from jaxmethods.trees import Key, Params

_AT_ONCE = 16  # clips whose bodies are compared together
_PUBLISHED_FPS, _SLIDE = 30.0, 0.01  # CHOIS: m per frame at that rate
_PER_METRE = {"cm": 100.0, "mm": 1000.0}


class Judging(NamedTuple):
  """Static parts of the evaluation.

  Attributes:
    net: the evaluator.
    task: of the run.
    skeleton: of the bodies.
    fps: frames per second.
    samples: motions drawn for each test clip.
    replications: draws of one of these each.
    touch: m.
  """

  net: MotionEvaluator
  task: Task
  skeleton: Skeleton
  fps: float
  samples: int
  replications: int
  touch: float


class Test(NamedTuple):
  """What the evaluation reads.

  Attributes:
    request: test clips, and what is beside each.
    library: training clips.
    scaling: of the features.
    evaluator: its parameters.
  """

  request: Request
  library: Part
  scaling: Scaling
  evaluator: Params


def evaluate(artist: Artist, judging: Judging, state: State, test: Test) -> dict[str, Array]:
  """Scores a row on the test clips; every mean of a distribution has its interval beside it."""
  draw_key, score_key = jax.random.split(jax.random.fold_in(state.key, 1))
  pool = drawn(artist, judging.samples, state, draw_key, test)
  halves = artist.algorithm == "real"
  return scores(judging, halves, artist.reaction, score_key, pool, test)


def drawn(artist: Artist, samples: int, state: State, key: Key, test: Test) -> Array:
  """Draws samples for every test clip, (S, n, T, E, F) normalised."""
  one = lambda key: draw(artist, state.average, test.library, key, test.request)
  return jax.lax.map(one, jax.random.split(key, samples))


def scores(
  judging: Judging, halves: bool, reaction: bool, key: Key, pool: Array, test: Test
) -> dict[str, Array]:
  """Scores motions that were drawn for the test clips.

  Args:
    judging: settings.
    halves: whether they are the test clips themselves, whose FID is that of two halves.
    reaction: whether person 0 was given.
    key: of the replications.
    pool: motions (S, n, T, E, F), normalised.
    test: the test clips.
  """
  whole, clips = pool.shape[:2]
  every = pool.reshape(whole * clips, *pool.shape[2:])
  logits, z = _seen(judging, test, every)
  by_sample = lambda x: x.reshape(whole, clips, -1)
  found = _distributions(judging, halves, key, by_sample(logits), by_sample(z), test)
  joints = joints_of(every, test.scaling, judging.skeleton)
  true = joints_of(test.request.real, test.scaling, judging.skeleton)
  found["nearest_train_cm"] = _nearest(joints, test)
  tiled = lambda x: jnp.tile(x, (whole, *(1,) * (x.ndim - 1)))
  beside = (joints, tiled(true), jax.tree.map(tiled, test.request.entity))
  score = lambda clip: _clip_scores(judging, reaction, *clip)
  each = jax.lax.map(score, beside, batch_size=min(_AT_ONCE, len(joints)))
  return found | jax.tree.map(lambda x: x.mean(0), each)


def joints_of(features: Array, scaling: Scaling, skeleton: Skeleton) -> Array:
  """Positions (..., J, 3), m, of normalised features."""
  return representation.joints_of(representation.denormalise(features, scaling), skeleton)


def _seen(judging: Judging, test: Test, features: Array) -> tuple[Array, Array]:
  """Logits and embeddings of motions."""
  x = judge.readable(features, judging.skeleton.num_joints)
  logits, z = judging.net.apply({"params": test.evaluator}, x)
  return jnp.asarray(logits), jnp.asarray(z)


def _distributions(
  judging: Judging, halves: bool, key: Key, logits: Array, z: Array, test: Test
) -> dict[str, Array]:
  """Accuracy, FID, diversity and multimodality, over replications.

  Args:
    judging: settings.
    halves: see `scores`.
    key: of all draws.
    logits: of samples of clips (S, n, K).
    z: embeddings (S, n, d).
    test: whose clips are the reference.
  """
  samples, clips = z.shape[:2]
  real = _seen(judging, test, test.request.real)[1]
  half = clips // 2

  def once(key: Key) -> dict[str, Array]:
    keys = jax.random.split(key, 4)
    chosen = jax.random.randint(keys[0], (clips,), 0, samples)
    own, said = z[chosen, jnp.arange(clips)], logits[chosen, jnp.arange(clips)]
    first, second = metrics.drawn_pairs(keys[1], clips, half)
    if halves:
      order = jax.random.permutation(keys[3], clips)
      distance = metrics.fid(real[order[:half]], real[order[half:]])
    else:
      distance = metrics.fid(real, own)
    pairs = metrics.drawn_pairs(keys[2], samples, max(samples // 2, 1))
    return {
      "accuracy": 100 * metrics.action_accuracy(said, test.request.label),
      "fid": distance,
      "diversity": metrics.diversity(own, first, second),
      "multimodality": metrics.multimodality(jnp.moveaxis(z, 0, 1), *pairs),
    }

  found = metrics.replicated(once, key, judging.replications)
  half_widths = {f"interval/{name}": x for name, x in found.half_width.items()}
  return {**found.mean, **half_widths}


def _nearest(joints: Array, test: Test) -> Array:
  """Distance to the nearest training clip, root of the mean over joints and frames, cm."""
  flat = lambda x: x.reshape(len(x), -1)
  apart = metrics.nearest_distance(flat(joints), flat(test.library.joints))
  count = joints[0].size // 3
  return _PER_METRE["cm"] * apart.mean() / jnp.sqrt(count)


# --- one clip -------------------------------------------------------------------------------------


def _clip_scores(
  judging: Judging, reaction: bool, joints: Array, true: Array, entity: Condition
) -> dict[str, Array]:
  """Scores of one clip, joints (T, E, J, 3) m beside a true one."""
  bodies = [joints[:, i] for i in range(joints.shape[1])]
  feet = [_feet(judging, body) for body in bodies[1 if reaction else 0 :]]
  found = jax.tree.map(lambda *x: jnp.stack(x).mean(), *feet)
  if judging.task == "hhi":
    found |= _pair_scores(judging, bodies)
    if reaction:
      found |= _reaction_scores(judging, joints, true)
  elif judging.task == "hoi":
    found |= _object_scores(judging, joints[:, 0], true[:, 0], entity)
  else:
    found |= _scene_scores(judging, joints[:, 0], entity)
  return found


def _feet(judging: Judging, body: Array) -> dict[str, Array]:
  skeleton, fps = judging.skeleton, judging.fps
  length = losses.bone_lengths(body, skeleton)
  return {
    "foot_sliding": physics.foot_sliding(body, skeleton),
    "sliding_share": physics.sliding_share(body, bound=_SLIDE * _PUBLISHED_FPS / fps),
    "skating": 100 * physics.skating_ratio(body, skeleton, fps=fps),
    "pfc": physics.pfc(body, skeleton),
    "bone_change_cm": _PER_METRE["cm"] * length.std(0).mean(),
  }


def _pair_scores(judging: Judging, bodies: list[Array]) -> dict[str, Array]:
  one, other = bodies
  inside = physics.capsule_penetration(one, other, judging.skeleton)
  near = physics.joint_distance(one, other) < judging.touch
  return {
    "penetration_cm": _PER_METRE["cm"] * inside.depth,
    "penetration_share": 100 * inside.share,
    "contact_share": 100 * physics.share_of_frames(near),
  }


def _reaction_scores(judging: Judging, joints: Array, true: Array) -> dict[str, Array]:
  """The answer beside the true one."""
  root = judging.skeleton.root
  near = lambda x: physics.joint_distance(x[:, 0], x[:, 1]) < judging.touch
  return {
    "mpjpe_mm": physics.mpjpe(joints[:, 1], true[:, 1], root),
    "root_error_mm": physics.point_error(joints[:, 1, root], true[:, 1, root]),
    "contact_f1": physics.scores(near(joints), near(true)).f1,
    "true_contact": 100 * physics.share_of_frames(near(true)),
  }


def _object_scores(
  judging: Judging, body: Array, true: Array, entity: Condition
) -> dict[str, Array]:
  assert entity.points is not None
  skeleton, touch = judging.skeleton, judging.touch
  apart = physics.hand_distances(body, entity.points, skeleton)
  wanted = physics.touching(physics.hand_distances(true, entity.points, skeleton), touch)
  scores = physics.scores(physics.touching(apart, touch), wanted)
  return {
    "contact_f1": scores.f1,
    "contact_precision": scores.precision,
    "contact_recall": scores.recall,
    "contact_distance_cm": _PER_METRE["cm"] * physics.contact_distance(apart, wanted),
    "mpjpe_mm": physics.mpjpe(body, true, skeleton.root),
    "root_error_mm": physics.point_error(body[:, skeleton.root], true[:, skeleton.root]),
  }


def _scene_scores(judging: Judging, body: Array, entity: Condition) -> dict[str, Array]:
  assert entity.goal is not None
  signed = scenes.signed_distance(body, entity.solids)
  found = physics.body_in_scene(signed)
  root = body[-1, judging.skeleton.root]
  return {
    "non_collision": 100 * found.non_collision,
    "scene_contact": 100 * found.contact,
    "goal_error_cm": _PER_METRE["cm"] * jnp.linalg.norm(root - entity.goal),
  }
