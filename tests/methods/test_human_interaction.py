"""Properties of human interaction: limits, invariances, gradients, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods.human_interaction import (
  diffusion,
  guidance,
  losses,
  metrics,
  physics,
  representation,
  rotations,
  tasks,
)
from jaxmethods.methods.human_interaction.representation import Scaling
from jaxmethods.methods.human_interaction.skeleton import SBU15, SMPL22
from jaxmethods.models.interaction import Condition, InteractionDenoiser

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def bodies(frames=6, people=2, batch=2, skeleton=SBU15, seed=0):
  """People that stand 1 m apart and sway: (B, T, E, J, 3), m."""
  joints = skeleton.num_joints
  still = 0.5 + 0.3 * draw(1, 1, 1, joints, 3, seed=9) + jnp.arange(people)[:, None, None]
  return still + 0.1 * draw(batch, frames, people, joints, 3, seed=seed)


# --- rotations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e-7, 1e-5, 1.0])
def test_the_direction_of_almost_nothing_has_no_gradient(size):
  x = jnp.array([size, 0, 0])
  unit, gradient = jax.value_and_grad(lambda x: rotations.unit(x)[1] + rotations.unit(x)[0])(x)
  assert np.abs(gradient).max() <= 1e6
  if size < 1e-6:
    assert not np.any(gradient)
  else:
    close(unit, 1)
    close(gradient, [0, 1 / size, 0], atol=0.1)


def test_opposite_directions_have_no_exploding_gradient():
  ahead = jnp.array([0.6, 0, 0.8])
  turn = lambda v: rotations.between(ahead, v).sum()
  assert np.isfinite(jax.grad(turn)(-ahead)).all()
  other = -ahead[::-1]
  close(rotations.rotate(rotations.between(ahead, other), ahead), other)


def test_matrices_of_six_numbers():
  made = rotations.matrix(draw(4, 6))
  close(made @ jnp.swapaxes(made, -1, -2), np.broadcast_to(np.eye(3), made.shape))
  close(jnp.linalg.det(made), 1)
  close(rotations.matrix(rotations.six(made)), made)


# --- representations ------------------------------------------------------------------------------


def test_a_canonical_pair_faces_ahead_and_keeps_its_distances():
  pair = bodies() + jnp.array([3.0, 0.7, -2])
  made = representation.canonical_pair(pair, SBU15)
  first = made[:, 0, 0]
  close(first[:, SBU15.root, jnp.array([0, 2])], np.zeros((2, 2)))
  close(representation.facing(first, SBU15), np.broadcast_to([0, 0, 1], (2, 3)))
  close(made[..., 1].min((1, 2, 3)), 0)
  between = lambda x: losses.distances(x[:, :, 0], x[:, :, 1])
  close(between(made), between(pair))
  frame = representation.canonical_frame(pair[:, :, 0], SBU15)
  close(representation.from_frame(representation.to_frame(pair[:, :, 1], frame), frame),
        pair[:, :, 1])  # fmt: skip


def test_clips_there_and_back():
  clip = bodies(people=1)[:, :, 0]
  features = representation.encode_positions(clip, SBU15, 15.0)
  assert features.shape[-1] == representation.positions_size(SBU15)
  close(representation.joints_of(features, SBU15), clip[:, :-1], rtol=0, atol=0)
  scaling = representation.fit_scaling(features)
  normal = representation.normalise(features, scaling)
  close(representation.denormalise(normal, scaling), features)
  close(representation.mirrored(representation.mirrored(clip, SBU15), SBU15), clip, rtol=0)
  longer = representation.resampled(clip[0], 11)
  close(longer[::2], clip[0])
  with pytest.raises(ValueError, match="at least 2 frames, got 1"):
    representation.encode_positions(clip[:, :1], SBU15)


def test_a_slower_camera_sees_the_same_feet_rest():
  clip = bodies(frames=9, people=1)[:, :, 0] * jnp.array([1, 0.05, 1])
  twice = jnp.repeat(clip, 2, axis=1)[:, ::2]
  fast = representation.contacts(clip, SBU15, 60.0)
  slow = representation.contacts(twice, SBU15, 30.0)
  assert (slow | ~fast).all()


# --- diffusion ------------------------------------------------------------------------------------


def test_the_schedule_ends_in_noise():
  betas = diffusion.cosine_betas(50)
  assert betas[-1] == 0.999 and (np.diff(np.cumprod(1 - betas)) < 0).all()
  schedule, x = diffusion.make_schedule(50), draw(3, 4)
  place = jnp.array([0, 20, 49])
  found = diffusion.noised(schedule, x, place, jnp.zeros_like(x))
  close(found, jnp.sqrt(schedule.abar[place])[:, None] * x)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_an_oracle_is_sampled(sampler, count):
  target = draw(2, 3, 1, 4)
  schedule = diffusion.make_schedule(20, diffusion.even_steps(20, count))
  found = diffusion.sample(
    lambda x, t: target, schedule, jax.random.key(1), target.shape, sampler=sampler
  )
  close(found, target, atol=1e-4)


def test_the_first_step_adds_no_noise():
  schedule, x, clean = diffusion.make_schedule(8), draw(2, 3), draw(2, 3, seed=1)
  step = lambda size: diffusion.ddpm_step(schedule, clean, x, jnp.array(0), size * x)
  close(step(0.0), step(100.0), rtol=0, atol=0)


def test_guidance_by_a_condition_of_scale_one_is_the_condition():
  network = lambda x, t, condition: x * condition[:, None]
  x, condition = draw(2, 3), jnp.array([2.0, 3])
  run = lambda scale: diffusion.classifier_free(network, condition, 0 * condition, scale)(
    x, jnp.zeros(2, int)
  )
  close(run(1.0), network(x, None, condition), rtol=0, atol=0)
  close(run(2.5), 2.5 * network(x, None, condition))


# --- losses ---------------------------------------------------------------------------------------


def pair_features(pair):
  return representation.encode_positions(jnp.swapaxes(pair, 1, 2), SBU15, 15.0).swapaxes(1, 2)


@functools.cache
def loss_of(reaction=False):
  size = representation.positions_size(SBU15)
  scaling = Scaling(jnp.zeros(size), jnp.ones(size))
  return jax.jit(
    lambda pred, target, mask, gate: losses.interaction_loss(
      pred, target, mask, gate, scaling, SBU15, fps=15.0, reaction=reaction, into_padding=False,
      gate_orientation=True,
    )
  )  # fmt: skip


def test_losses_of_the_truth_are_nothing_but_contact():
  target = pair_features(bodies())
  mask = jnp.ones(target.shape[:2], bool)
  terms = loss_of()(target, target, mask, jnp.ones(2))
  for name, value in terms.items():
    if name not in ("affinity", "foot_a", "foot_b", "total"):
      close(value, 0, atol=1e-9, err_msg=name)
  moved = pair_features(bodies() + jnp.array([0.3, 0, 2]))
  here, there = (
    loss_of()(pair_features(bodies(seed=1) + by), x, mask, jnp.ones(2))
    for by, x in ((0.0, target), (jnp.array([0.3, 0, 2]), moved))
  )
  assert here["total"] > 0
  for name in ("velocity_a", "bone_b", "distance", "orientation", "affinity"):
    close(there[name], here[name], rtol=1e-3, err_msg=name)
  closed = loss_of()(pair_features(bodies(seed=1)), target, mask, jnp.zeros(2))
  close(closed["total"], closed["simple"])
  swapped = loss_of()(
    pair_features(bodies(seed=1))[:, :, ::-1], target[:, :, ::-1], mask, jnp.ones(2)
  )
  for name in ("distance", "affinity", "orientation"):
    close(swapped[name], here[name], err_msg=name)


def test_padding_and_empty_masks():
  pred, target = pair_features(bodies(seed=1)), pair_features(bodies())
  mask = jnp.arange(target.shape[1]) < jnp.array([[3], [5]])
  plain = loss_of()(pred, target, mask, jnp.ones(2))
  dirty = jnp.where(mask[..., None, None], pred, jnp.nan)
  for name, value in loss_of()(dirty, target, mask, jnp.ones(2)).items():
    close(value, plain[name], err_msg=name)
  for value in loss_of()(pred, target, jnp.zeros_like(mask), jnp.ones(2)).values():
    assert value == 0


# --- metrics --------------------------------------------------------------------------------------


def test_distributions_have_their_limits():
  x, y = draw(60, 5), 1.5 * draw(50, 5, seed=1)
  with jax.enable_x64(True):
    x, y = jnp.asarray(x, float), jnp.asarray(y, float)
    close(metrics.fid(x, x), 0, atol=1e-6)
    close(metrics.fid(x, y), metrics.fid(y, x))
    shift = jnp.arange(5.0)
    close(metrics.fid(x, x + shift), (shift**2).sum())
  x = draw(60, 5)
  found = metrics.retrieval(x, x, pool=20)
  close(found.precision, np.ones(3))
  close(found.distance, 0)
  pairs = metrics.drawn_pairs(jax.random.key(0), 60, 30)
  assert metrics.diversity(jnp.ones_like(x), *pairs) == 0
  assert metrics.apd(jnp.ones((3, 4, 5))) == 0
  with pytest.raises(ValueError, match="fid: needs 2 samples"):
    metrics.fid(x[:1], x)


def test_replications_have_an_interval():
  one = lambda key: jax.random.normal(key)
  found = metrics.replicated(one, jax.random.key(0), 20)
  assert 0 < found.half_width < 1
  with pytest.raises(ValueError, match="times"):
    metrics.replicated(one, jax.random.key(0), 0)


def test_physics_has_its_limits():
  clip, other = bodies(8, 2, 1, SMPL22)[0].swapaxes(0, 1)
  touch = jnp.arange(8) < 3

  @jax.jit
  def found(clip, other):
    still = jnp.broadcast_to(clip[:1] * jnp.array([1, 0.01, 1]), clip.shape)
    slides = still + jnp.arange(8.0)[:, None, None] * jnp.array([0.1, 0, 0])
    return {
      "error": physics.mpjpe(clip + jnp.array([1.0, 2, 3]), clip),
      "skating": (physics.skating_ratio(still), physics.skating_ratio(slides)),
      "sliding": (physics.foot_sliding(still), physics.foot_sliding(slides)),
      "outside": physics.penetration(jnp.ones((8, 3))).share,
      "far": physics.capsule_penetration(clip, clip + 50).depth,
      "inside": physics.capsule_penetration(clip, clip).share,
      "same": jnp.stack(physics.scores(touch, touch)),
      "none": jnp.stack(physics.scores(touch & False, touch)),
      "apart": (
        physics.joint_distance(clip, clip).max(),
        physics.joint_distance(clip, other).min(),
      ),
    }

  of = found(clip, other)
  close(of["error"], 0, atol=1e-2)
  for pair in ("skating", "sliding", "apart"):
    assert of[pair][0] == 0 < of[pair][1], pair
  assert of["outside"] == of["far"] == 0 and of["inside"] == 1
  close(of["same"], np.ones(4))
  close(of["none"], [0, 0, 5 / 8, 0])


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips_are_measured_or_refused(frames):
  clip = bodies(frames, 1, 1, SMPL22)[0, :, 0]
  for metric in (physics.floor_height, physics.skating_ratio, physics.pfc, physics.foot_sliding):
    try:
      assert np.isfinite(jax.jit(metric)(clip))
    except ValueError as error:
      assert f"got {frames}" in str(error)


# --- guidance -------------------------------------------------------------------------------------


def held_object(frames=6, batch=2):
  """A ball that moves past two people."""
  centre = jnp.array([1.0, 1, 1]) + 0.1 * jnp.arange(frames)[:, None] * jnp.array([1.0, 0, 0])
  points = centre[:, None] + 0.05 * rotations.unit(draw(7, 3))
  many = lambda x: jnp.broadcast_to(x, (batch, *x.shape))
  turn = jnp.broadcast_to(jnp.eye(3), (frames, 3, 3))
  return guidance.Object(many(points), many(centre), many(turn))


def test_the_terms_of_guidance():
  joints, thing, mask = bodies(people=1)[:, :, 0], held_object(), jnp.ones((2, 6), bool)
  terms = jax.jit(
    lambda joints, contact, mask: {
      "apart": guidance.hand_distances(joints, thing.points, SBU15),
      "contact": guidance.hand_contact(
        guidance.hand_distances(joints, thing.points, SBU15), contact, mask
      ),
      "consistency": guidance.consistency(joints, thing, contact, mask, SBU15),
      "floor": guidance.below_floor(thing.points, mask),
      "feet": guidance.supporting_foot(joints, mask, SBU15),
      "total": guidance.object_objective(thing, mask, SBU15, contact=contact)(joints[:, :, None]),
    }
  )
  touch = guidance.expected_contact(joints, thing, mask, SBU15)
  assert (touch.sum(-1) == 1).all()
  found = terms(joints, touch, mask)
  slack = np.maximum(touch * found["apart"] - 0.02, 0)
  close(found["contact"], slack.mean((1, 2)))
  close(found["floor"], 0)
  close(terms(joints, 0 * touch, mask)["contact"], 0)
  # A hand that goes with the object: every cosine is 1; the other does not touch.
  rides = joints[:, :1] + (thing.centre - thing.centre[:, :1])[:, :, None]
  one, both = jnp.ones_like(touch).at[..., 1].set(0), jnp.ones_like(touch)
  close(terms(rides, one, mask)["consistency"], 1)
  hands = rotations.unit(joints[:, :, jnp.array(SBU15.hands)] - thing.centre[:, :, None])
  cosines = jnp.einsum("bshi,bthi->bhst", hands, hands).mean((-1, -2))
  close(terms(joints, both, mask)["consistency"], 2 - cosines.sum(1))
  close(terms(joints.at[:, :, jnp.array(SBU15.toes), 1].set(0.02), one, mask)["feet"], 0)
  # Padding counts for nothing.
  part = jnp.arange(6) < jnp.array([[6], [4]])
  dirty = joints.at[1, 4:].set(99)
  close(terms(dirty, both, part)["total"], terms(joints, both, part)["total"])


def test_guidance_lowers_its_objective_inside_the_sampler():
  size, thing, mask = representation.positions_size(SBU15), held_object(), jnp.ones((2, 6), bool)
  scaling = Scaling(jnp.full(size, 0.5), jnp.full(size, 0.3))
  objective = guidance.object_objective(thing, mask, SBU15)
  schedule = diffusion.make_schedule(100, diffusion.ddim_steps(100, 20))
  target = 0.3 * draw(2, 6, 1, size)

  @jax.jit
  def run(alpha, limit):
    guide = guidance.make(objective, scaling, SBU15, 20, alpha=alpha, limit=limit, share=0.2)
    network = lambda x, t: 0.5 * (target + x)
    return [
      diffusion.sample(network, schedule, jax.random.key(0), target.shape, guidance=each)
      for each in (None, guide)
    ]

  value = lambda x: objective(
    representation.joints_of(representation.denormalise(x, scaling), SBU15)
  )
  plain, led = run(1e3, 0.05)
  assert (value(led) < 0.98 * value(plain)).all()
  plain, same = run(0.0, 0.05)
  np.testing.assert_array_equal(same, plain)
  # One step moves no joint by more than the limit, and never raises J.
  for alpha in (1e-6, 1e3):
    guide = guidance.make(objective, scaling, SBU15, 20, alpha=alpha)
    after = jax.jit(guide)(plain, jnp.array(1), schedule.variance[1])
    far = rotations.length(representation.joints_of((after - plain) * scaling.std, SBU15)).max(
      (1, 2, 3)
    )
    assert (far > 0).all() and (far < 0.05 + 1e-6).all() and (value(after) < value(plain)).all()
    early = jax.jit(guide)(plain, jnp.array(10), schedule.variance[10])
    np.testing.assert_array_equal(early, plain)


# --- tasks ----------------------------------------------------------------------------------------


def test_a_reaction_keeps_the_first_person():
  size = representation.positions_size(SBU15)
  scaling = Scaling(jnp.zeros(size), jnp.ones(size))
  task = tasks.make(InteractionDenoiser("hhi", 8, 1, 2, 8), "hhi", scaling, SBU15, num_steps=10)
  motion, label = pair_features(bodies()), jnp.eye(2)
  condition = Condition(label=label, first=motion[:, :, 0])
  params = jax.jit(task.init)(jax.random.key(0), motion, condition)
  made = jax.jit(lambda key: task.sample(params, key, condition, 5, steps=2, scale=2.0))(
    jax.random.key(1)
  )
  np.testing.assert_array_equal(made[:, :, 0], motion[:, :, 0])
  with pytest.raises(ValueError, match="task: must be"):
    tasks.make(InteractionDenoiser("hhi", 8, 1, 2, 8), "dance", scaling)
  with pytest.raises(ValueError, match="needs a label"):
    task.sample(params, jax.random.key(0), condition._replace(label=None), 5, steps=2, scale=2.0)
