"""The room of human interaction: clips, entities, rows, and what they score."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data import motion_sources
from jaxmethods.errors import InputError
from jaxmethods.experiments.human_interaction import (
  bodies,
  build as build_lib,
  clips as clips_lib,
  drawing,
  entities,
  training,
)
from jaxmethods.experiments.human_interaction.config import Config, rows, untrained
from jaxmethods.methods.human_interaction import representation, scenes, tasks
from jaxmethods.methods.human_interaction.skeleton import SBU15, SMPL22
from jaxmethods.models.interaction import Condition

SMALL = Config(
  steps=30, frames=6, width=16, layers=1, heads=2, hidden=16, diffusion_steps=8, sampling_steps=2,
  evaluator_steps=30, evaluator_width=16, embedding=4, samples=2, replications=3, batch_size=16,
  dropout=0.0, augment=False, average=0.5,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nothing_from_before(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(scope="module")
def trained():
  """The short experiment, its state after training and its losses."""
  experiment = build_lib.build(SMALL)
  state = experiment.init(jax.random.key(0))
  batch, step, losses = next(experiment.batches(0)), jax.jit(experiment.step), []
  for _ in range(experiment.num_steps):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  return experiment, state, losses


# --- clips ----------------------------------------------------------------------------------------


def test_clips_start_in_the_frame_of_the_first_person():
  clips = clips_lib.load(dataclasses.replace(SMALL, augment=True), "hhi")
  assert clips.skeleton is SBU15 and len(clips.test.label) == 64
  assert len(clips.train.label) == 4 * 256  # mirrored, swapped, both
  for part in (clips.train, clips.test):
    first = np.asarray(part.joints[:, 0, 0])
    assert np.abs(first[:, SBU15.root][:, [0, 2]]).max() < 1e-4
    ahead = np.asarray(representation.facing(jnp.asarray(first), SBU15))
    np.testing.assert_allclose(ahead, np.tile([0, 0, 1], (len(ahead), 1)), atol=1e-4)
  assert float(jnp.abs(clips.train.features.mean((0, 1, 2))).max()) < 1e-3
  read = representation.joints_of(
    representation.denormalise(clips.test.features, clips.scaling), SBU15
  )
  np.testing.assert_allclose(read, clips.test.joints, atol=1e-4)


def test_resampling_is_that_of_the_method():
  clip = np.random.default_rng(0).normal(size=(11, 2, 3)).astype(np.float32)
  for frames in (2, 7, 30):
    ours = clips_lib.resampled(clip, frames)
    np.testing.assert_allclose(ours, representation.resampled(jnp.asarray(clip), frames), atol=1e-5)


def packed(path, persons=1, labels=2, joints=22, frames=30):
  random = np.random.default_rng(1)
  parents = {"parents": np.r_[-1, np.arange(joints - 1)]} if joints != 22 else {}
  np.savez(
    path, positions=random.normal(size=(10, frames, persons, joints, 3)), fps=30.0,
    label=np.arange(10) % labels, **parents,
  )  # fmt: skip
  return f"motion:{path}"


def test_windows_and_bodies_of_one_person_tasks(tmp_path):
  settings = dataclasses.replace(
    SMALL,
    data=packed(tmp_path / "a.npz", persons=2),
    clips="windows",
    stride=10,
    folds=2,
    task="hsi",
  )
  clips = clips_lib.load(settings, "hsi")
  assert len(clips.test.label) == 5 * 3 * 2  # clips, windows of 7 frames, bodies
  assert clips.fps == 30 and clips.skeleton is SMPL22


@pytest.mark.parametrize(
  ("changes", "packing", "message"),
  [
    ({}, {}, "hhi needs clips of two persons.*the partner is missing"),
    ({"task": "hoi"}, {"labels": 1}, "has one label, '0'; the evaluator needs two"),
    ({"task": "hoi"}, {"joints": 7}, "no joint is the left and right of hips"),
    ({"task": "hoi", "clips": "windows", "frames": 40}, {}, "no clip of .* has 41 frames"),
  ],
)
def test_clips_that_do_not_fit(tmp_path, changes, packing, message):
  settings = dataclasses.replace(
    SMALL, data=packed(tmp_path / "a.npz", **packing), folds=2, **changes
  )
  with pytest.raises(InputError, match=message):
    clips_lib.load(settings, settings.task)


def test_skeletons_are_told_by_names():
  names = ["Hips", "Spine", "LeftUpLeg", "LeftFoot", "RightUpLeg", "RightFoot", "LeftArm", "LeftHand",
           "RightArm", "RightHand"]  # fmt: skip
  found = bodies.skeleton_of(names, [-1, 0, 0, 2, 0, 4, 1, 6, 1, 8])
  assert (found.hips, found.feet, found.shoulders, found.hands) == ((2, 4), (3, 5), (6, 8), (7, 9))
  assert {0, 1, 2, 4} <= found.trunk and not {3, 5, 7, 9} & found.trunk
  short = [
    "root",
    "lhip",
    "rhip",
    "l_foot",
    "r_foot",
    "shoulder.L",
    "shoulder.R",
    "hand.L",
    "hand.R",
  ]
  with pytest.raises(InputError, match="hips"):
    bodies.skeleton_of(short, [-1, 0, 0, 1, 2, 0, 0, 5, 6])


# --- entities -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
  """Bodies one by one, (n, T, 1, J, 3)."""
  data = motion_sources.load("embedded:duets")
  clips = np.stack([clips_lib.resampled(clip[:, :1], 24) for clip in data.clips[:16]])
  return jnp.asarray(clips)


def test_objects_are_carried_by_a_hand(alone):
  made = entities.objects(0, alone, SBU15, 64)
  hands = alone[:, :, 0, jnp.array(SBU15.hands)]
  apart = jnp.linalg.norm(hands[:, :, :, None] - made.points[:, :, None], axis=-1).min(-1)
  held = np.asarray(apart < 0.06)
  moved = np.asarray(jnp.abs(jnp.diff(made.entity[..., :3], axis=1)).sum(-1) > 1e-6)
  for clip in range(len(held)):
    hand = held[clip].sum(0).argmax()
    assert held[clip, :-1, hand][moved[clip]].all()  # what moves is held
    assert held[clip, :, hand].sum() >= 6 and not moved[clip][:2].any() and not moved[clip][-1]


def test_scenes_are_beside_the_motion(alone):
  made = entities.surroundings(0, alone, SBU15, 126)
  far = jax.vmap(lambda p, s: scenes.signed_distance(p, s))(
    alone.reshape(len(alone), -1, 3), made.solids
  )
  assert float(far.min()) > 0.1 and 2 <= float(made.solids.real.sum(1).mean()) <= 6
  on = jax.vmap(scenes.signed_distance)(made.scene, made.solids)
  # On the surface of a solid, which may be inside another one.
  assert float(jnp.where(made.scene_mask, on, 0).max()) < 1e-4
  np.testing.assert_array_equal(made.goal, alone[:, -1, 0, SBU15.root])


# --- rows that learn nothing ----------------------------------------------------------------------


def artist(algorithm, reaction=False):
  return drawing.Artist(algorithm, None, True, 2, 2, 2, 1.0, reaction)


def test_rows_of_training_clips():
  random = np.random.default_rng(0)
  features = jnp.asarray(random.normal(size=(400, 2, 2, 3)), jnp.float32)
  library = clips_lib.Part(features, features, jnp.arange(400) % 2)
  label = jnp.array([1] * 300)
  request = drawing.Request(label, Condition(), jnp.zeros((300, 2, 2, 3)))
  made = {
    name: drawing.draw(artist(name), {}, library, jax.random.key(0), request)
    for name in ("mean", "training_clip", "gaussian", "real")
  }
  own = features[1::2]
  np.testing.assert_allclose(made["mean"][0], own.mean(0), atol=1e-5)
  distance = jnp.abs(made["training_clip"][:, None] - own).reshape(300, 200, -1).max(-1)
  assert float(distance.min(1).max()) == 0 and len(np.unique(distance.argmin(1))) > 50
  spread = lambda x: np.cov(np.asarray(x).reshape(len(x), -1).T)
  assert np.abs(spread(made["gaussian"]) - spread(own)).max() < 0.35
  assert not np.asarray(made["real"]).any()


def test_a_reaction_takes_the_nearest_given_person():
  features = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2, 2, 3)), jnp.float32)
  library = clips_lib.Part(features, features, jnp.zeros(20, int))
  wanted = features[3:6] + 0.01
  request = drawing.Request(jnp.zeros(3, int), Condition(), wanted)
  made = drawing.draw(artist("training_clip", True), {}, library, jax.random.key(0), request)
  np.testing.assert_array_equal(made[:, :, 1], features[3:6, :, 1])
  np.testing.assert_array_equal(made[:, :, 0], wanted[:, :, 0])


def test_rows_and_what_is_untrained():
  table = rows(Config())
  assert {"human_interaction", "reaction", "unconditioned", "real", "gaussian", "mean"} <= set(
    table
  )
  assert [name for name, row in table.items() if untrained(row)] == [
    "training_clip", "mean", "gaussian", "real",
  ]  # fmt: skip
  assert "reaction" not in rows(Config(task="hsi"))


# --- training -------------------------------------------------------------------------------------


def test_it_learns_and_scores(trained):
  experiment, state, losses = trained
  assert np.mean(losses[-5:]) < 0.8 * losses[0]
  found = jax.device_get(jax.jit(experiment.evaluate)(state, experiment.test))
  assert next(iter(found)) == "accuracy" and all(np.isfinite(x) for x in found.values())
  assert found["nearest_train_cm"] > 0 and found["interval/fid"] >= 0
  assert "generated data" in experiment.about and "64 to test" in experiment.about


def test_the_average_follows_the_parameters(trained):
  _, state, _ = trained
  apart = jax.tree.map(lambda a, p: float(jnp.abs(a - p).max()), state.average, state.params)
  assert 0 < max(jax.tree.leaves(apart)) < 0.1


def test_samples_for_others(trained):
  _, state, _ = trained
  sampler = build_lib.sampler(SMALL)
  made, real = sampler.generate(state, 3, "push", 4), sampler.real("push", 4)
  assert made.positions.shape == real.positions.shape == (4, 6, 2, 15, 3)
  assert made.labels == ["push"] * 4 and made.parents == SBU15.parents and made.fps == real.fps
  again = sampler.generate(state, 3, "push", 4)
  assert np.array_equal(made.positions, again.positions)
  with pytest.raises(
    InputError, match="label: 'pusch' was never trained, expected one of approach"
  ):
    sampler.generate(state, 3, "pusch", 1)


def test_pictures(trained):
  experiment, state, _ = trained
  (figure,) = experiment.figures(state).values()
  assert len(figure.axes) == 8 * 7


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"reaction": True},
    {"task": "hoi"},
    {"task": "hsi"},
    {"network": "concat"},
    {"condition": "shuffled"},
    {"interaction": False},
    {"algorithm": "real"},
  ],
)
def test_every_task_learns(changes):
  experiment = build_lib.build(dataclasses.replace(SMALL, **changes))
  state = experiment.init(jax.random.key(0))
  batch, step = next(experiment.batches(0)), jax.jit(experiment.step)
  losses = []
  for _ in range(experiment.num_steps):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-5:]) <= losses[0]
  found = jax.device_get(jax.jit(experiment.evaluate)(state, experiment.test))
  assert all(np.isfinite(x) for x in found.values())
  if changes.get("algorithm") == "real":
    assert found["contact_share"] > 5
  assert experiment.figures(state)


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "changes",
  [
    {"reaction": True, "task": "hoi"},
    {"network": "single", "task": "hsi"},
    {"width": 18},
    {"sampling_steps": 9},
    {"frames": 2},
    {"scale": 0.0},
    {"drop": 1.0},
    {"folds": 1},
  ],
)
def test_settings_that_make_no_sense(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    dataclasses.replace(SMALL, **changes)


def intergen(batch, frames):
  """InterGen's network (width 1024, 8 layers, texts of width 768) and its input, as shapes."""
  net = build_lib.network_of(Config(width=1024, layers=8, heads=8, hidden=2048))
  motion = jax.ShapeDtypeStruct((batch, frames, 2, representation.INTERHUMAN), jnp.float32)
  label = Condition(label=jax.ShapeDtypeStruct((batch, 768), jnp.float32))
  start = lambda key, x, label: net.init(key, x, jnp.zeros(len(x), int), label)["params"]
  return net, motion, label, jax.eval_shape(start, jax.random.key(0), motion, label)


def test_the_size_of_intergen():
  _, _, _, form = intergen(1, 300)
  width, hidden, features = 1024, 2048, representation.INTERHUMAN
  dense = lambda a, b: a * b + b
  block = 4 * dense(width, 2 * width) + 8 * dense(width, width)
  block += dense(width, hidden) + dense(hidden, width)
  others = dense(features, width) + dense(width, features) + 2 * dense(width, width)
  expected = 8 * block + others + dense(768, width)
  assert sum(x.size for x in jax.tree.leaves(form)) == expected == 171_352_326


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_step_of_intergen_lowers(platform):
  net, motion, label, form = intergen(32, 300)
  features = jnp.ones(representation.INTERHUMAN)
  model = tasks.make(net, "hhi", representation.Scaling(0 * features, features))

  def step(params, key, x, label):
    mask = jnp.ones(x.shape[:2], bool)
    return jax.grad(lambda p: model.loss(p, key, x, mask, label)["total"])(params)

  exported = jax.export.export(jax.jit(step), platforms=(platform,))(
    form, jax.eval_shape(lambda: jax.random.key(0)), motion, label
  )
  assert len(exported.out_avals) == len(jax.tree.leaves(form))


# --- what is left for others ----------------------------------------------------------------------


def test_generated_motions_are_files(trained, tmp_path):
  state = trained[1]
  label = build_lib.sampler(SMALL).labels[1]
  config = dataclasses.replace(SMALL, generate=3, label=label, seed=3)
  experiment = build_lib.build(config)
  found = experiment.files(state)
  persons = [f"generated_{i}_person{k}.bvh" for i in (1, 2, 3) for k in (1, 2)]
  assert set(found) == {"player.html", "generated.npz", "generated.gif", *persons}
  assert found["player.html"].count(f'"label":"{label}"') == 3
  (tmp_path / "generated.npz").write_bytes(found["generated.npz"])
  clips = np.load(tmp_path / "generated.npz")
  assert clips["label_names"].tolist() == [label] and clips["positions"].shape[1:] == (2, 15, 3)
  # The user's own reader takes them.
  again = motion_sources.load(f"motion:{tmp_path / 'generated.npz'}")
  np.testing.assert_allclose(np.concatenate(again.clips), clips["positions"], atol=1e-6)
  assert experiment.files(state)["generated_1_person1.bvh"] == found[persons[0]]
  other = dataclasses.replace(config, seed=4)
  assert build_lib.build(other).files(state)["generated_1_person1.bvh"] != found[persons[0]]


def test_a_label_that_was_never_trained():
  with pytest.raises(InputError, match="label: 'dance' was never trained, expected one of "):
    build_lib.build(dataclasses.replace(SMALL, label="dance"))


def test_labels_come_in_turn():
  sampler = build_lib.sampler(SMALL)
  assert len(set(sampler.real(None, 4).labels)) == 4


def test_contact_guidance_is_a_setting_of_the_object_task():
  config = dataclasses.replace(SMALL, task="hoi", contact_guidance=1000.0, steps=1)
  assert rows(dataclasses.replace(config, contact_guidance=0.0))["contact_guidance"] == config
  sampler = build_lib.sampler(config)
  stage = sampler.stage
  noisy = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape)
  params = training.init(stage.artist, stage.rates, stage.train, jax.random.key(0)).average
  drawn = [
    drawing.draw(artist, jax.tree.map(noisy, params), stage.test.library, jax.random.key(2),
                 sampler.request(None, 4))
    for artist in (stage.artist, stage.artist._replace(guide=None))
  ]  # fmt: skip
  # Only positions are guided, and the last prediction is the network's.
  assert np.abs(drawn[0] - drawn[1]).max() > 1e-4
  with pytest.raises(ValueError, match="contact_guidance: is for task=hoi only, got hhi"):
    dataclasses.replace(SMALL, contact_guidance=1.0)
