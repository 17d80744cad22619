"""Composes the experiment of one row: clips, entities, an evaluator, a model, what they score."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods.errors import InputError
from jaxmethods.experiments.human_interaction import (
  clips as clips_lib,
  entities,
  generated,
  judge,
  scoring,
  training,
)
from jaxmethods.experiments.human_interaction.clips import Clips, Part
from jaxmethods.experiments.human_interaction.config import Config
from jaxmethods.experiments.human_interaction.drawing import Artist, Request, draw
from jaxmethods.experiments.human_interaction.figures import Strip, strips, trade
from jaxmethods.experiments.human_interaction.scoring import Judging, Test, joints_of
from jaxmethods.experiments.human_interaction.training import Rates, State, Train
from jaxmethods.methods.human_interaction import guidance as guidance_lib, tasks
from jaxmethods.methods.human_interaction.diffusion import Guidance
from jaxmethods.methods.human_interaction.losses import INTERGEN, Weights
from jaxmethods.models.interaction import Condition, InteractionDenoiser, MotionTransformer
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment, Values
from jaxmethods.runtime.motion import Clip, Pair

_SHOWN = 4  # labels in a picture


class Stage(NamedTuple):
  """Everything of a row but its state.

  Attributes:
    artist: how it draws.
    judging: how that is judged.
    rates: of the training.
    train: clips to train on.
    test: clips to test on, the evaluator, the library.
    clips: names, frame rate, skeleton and provenance.
  """

  artist: Artist
  judging: Judging
  rates: Rates
  train: Train
  test: Test
  clips: Clips


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: clips that are missing or do not fit; a mesh.
  """
  checks.no_mesh("human_interaction", mesh)
  stage = stage_of(config)
  if config.label:
    Sampler(stage).places(config.label)
  return Experiment(
    init=functools.partial(training.init, stage.artist, stage.rates, stage.train),
    batches=lambda step: itertools.repeat(stage.train),
    step=functools.partial(training.step, stage.artist, stage.rates),
    evaluate=functools.partial(scoring.evaluate, stage.artist, stage.judging),
    test=stage.test,
    figures=functools.partial(_figures, stage),
    num_steps=config.steps,
    about=stage.clips.about + _said(config),
    files=functools.partial(_files, stage, config),
  )


def stage_of(config: Config) -> Stage:
  clips = clips_lib.load(config, config.task)
  net, evaluator = judge.train(config, clips)
  label = clips.train.label
  if config.condition == "shuffled":
    label = jax.random.permutation(jax.random.key(config.data_seed), label)
  train = Train(clips.train._replace(label=label), _entity(config, clips, clips.train))
  request = Request(clips.test.label, _entity(config, clips, clips.test), clips.test.features)
  model = tasks.make(
    network_of(config), config.task, clips.scaling, clips.skeleton,
    num_steps=config.diffusion_steps, weights=_weights(config), drop=config.drop, gate=config.gate,
    fps=clips.fps,
  )  # fmt: skip
  artist = Artist(
    config.algorithm, model, config.condition != "none", len(clips.label_names), config.frames,
    config.sampling_steps, config.scale, config.reaction,
    functools.partial(_guide, config, clips) if config.contact_guidance else None,
  )  # fmt: skip
  judging = Judging(
    net, config.task, clips.skeleton, clips.fps, config.samples, config.replications, config.touch
  )
  rates = Rates(
    config.steps, config.batch_size, config.learning_rate, config.warmup, config.weight_decay,
    config.clip, config.average,
  )  # fmt: skip
  test = Test(request, clips.train, clips.scaling, evaluator)
  return Stage(artist, judging, rates, train, test, clips)


def _guide(config: Config, clips: Clips, entity: Condition) -> Guidance:
  """Contact guidance by the objects beside the motions."""
  assert entity.entity is not None and entity.points is not None  # of task=hoi
  centre, turn = entities.placement(entity.entity)
  thing = guidance_lib.Object(entity.points, centre, turn)
  whole = jnp.ones(centre.shape[:2], bool)
  return guidance_lib.make(
    guidance_lib.object_objective(thing, whole, clips.skeleton), clips.scaling, clips.skeleton,
    config.sampling_steps, alpha=config.contact_guidance,
  )  # fmt: skip


def network_of(config: Config) -> nn.Module:
  """The network of a row: InterGen's denoiser, or one token a frame, or one network a body."""
  size = (config.width, config.layers, config.heads, config.hidden)
  if config.network == "denoiser":
    return InteractionDenoiser(config.task, *size, dropout=config.dropout)
  return MotionTransformer(*size, separate=config.network == "single", dropout=config.dropout)


def _weights(config: Config) -> Weights:
  if config.interaction:
    return INTERGEN
  return INTERGEN._replace(distance=0.0, affinity=0.0, orientation=0.0)


def _entity(config: Config, clips: Clips, part: Part) -> Condition:
  """What is beside every clip."""
  seed = config.entity_seed + (part is clips.test)
  if config.task == "hoi":
    return entities.objects(seed, part.joints, clips.skeleton, config.points)
  if config.task == "hsi":
    return entities.surroundings(seed, part.joints, clips.skeleton, config.scene_points)
  return Condition()


def _said(config: Config) -> str:
  """Says what is synthetic."""
  made = {"hoi": "synthetic objects", "hsi": "synthetic scenes"}
  return f"; {made[config.task]} round the motion" if config.task in made else ""


# --- what a person looks at -----------------------------------------------------------------------


def _figures(stage: Stage, state: State) -> dict[str, Figure]:
  """Draws a real test clip of some labels above a motion drawn for it."""
  label = np.asarray(stage.test.request.label)
  first = [int(np.flatnonzero(label == k)[0]) for k in np.unique(label)[:_SHOWN]]
  request = jax.tree.map(lambda x: x[jnp.array(first)], stage.test.request)
  key = jax.random.fold_in(state.key, 2)
  run = jax.jit(functools.partial(draw, stage.artist))
  made = run(state.average, stage.test.library, key, request)
  read = lambda x: np.asarray(joints_of(x, stage.test.scaling, stage.judging.skeleton))
  pairs = []
  for i, (real, drawn) in enumerate(zip(read(request.real), read(made), strict=True)):
    name = stage.clips.label_names[int(request.label[i])]
    beside = request.entity.points if request.entity.scene is None else request.entity.scene
    points = None if beside is None else np.asarray(beside[i])
    pairs.append((Strip(f"{name}\nreal", real, points), Strip("drawn", drawn, points)))
  heading = f"{stage.clips.fps:.0f} frames per second, test clips of the fold held out"
  return {"strips": strips(pairs, stage.judging.skeleton.parents, heading)}


def _files(stage: Stage, config: Config, state: State) -> dict[str, str | bytes]:
  """The player, and what `generate` asks for."""
  own, label, count = Sampler(stage), config.label or None, config.generate or _SHOWN
  real, made = own.real(label, count), own.generate(state, config.seed, label, count)
  pairs = [
    Pair(
      made.labels[i],
      _clip(made, i, f"sample {i + 1}, seed {config.seed}"),
      _clip(real, i, "test clip"),
    )
    for i in range(count)
  ]
  skeleton, about = stage.judging.skeleton, stage.clips.about + _said(config)
  alone = "first person" if config.task == "hhi" else "person"
  persons = ("given" if config.reaction else alone, "second person")
  found = generated.player(pairs, skeleton, about, persons)
  return found | generated.files(pairs, skeleton) if config.generate else found


def _clip(motions: Motions, place: int, name: str) -> Clip:
  points = None if motions.points is None else motions.points[place]
  return Clip(motions.positions[place], motions.fps, name, points)


def comparison(rows: list[Values]) -> dict[str, Figure]:
  """FID beside accuracy of every row."""
  mean = lambda row, name: row["metrics"][name]["mean"]
  points = {row["name"]: (mean(row, "fid"), mean(row, "accuracy")) for row in rows}
  return {"fid_accuracy": trade(points, ("FID (own evaluator)", "accuracy, %"))}


# --- samples for others ---------------------------------------------------------------------------


class Motions(NamedTuple):
  """Motions as plain arrays.

  Attributes:
    positions: (n, T, persons, J, 3) float32, m, y up, floor at 0.
    fps: frames per second.
    joint_names: of the skeleton.
    parents: of each joint, -1 at the root.
    labels: name of the label of each motion.
    points: object (n, T, V, 3) or scene (n, V, 3) beside each, m; None.
  """

  positions: np.ndarray
  fps: float
  joint_names: tuple[str, ...]
  parents: tuple[int, ...]
  labels: list[str]
  points: np.ndarray | None


class Sampler(NamedTuple):
  """Draws motions of a trained state, and shows real ones.

  Attributes:
    stage: of the run.
  """

  stage: Stage

  @property
  def labels(self) -> tuple[str, ...]:
    return self.stage.clips.label_names

  def real(self, label: str | None, count: int) -> Motions:
    """Test clips of a label (None: of any), repeated if there are fewer than `count`."""
    request = self.request(label, count)
    return self._plain(request, request.real)

  def generate(
    self, state: State, seed: int, label: str | None, count: int, guidance: Guidance | None = None
  ) -> Motions:
    """Draws motions for the same test clips (their label, entity, or person 0) that `real` returns."""
    request = self.request(label, count)
    run = jax.jit(functools.partial(draw, self.stage.artist, guidance=guidance))
    made = run(state.average, self.stage.test.library, jax.random.key(seed), request)
    return self._plain(request, made)

  def places(self, label: str | None) -> np.ndarray:
    """Where the test clips of a label are; None: of all labels, in turn.

    Raises:
      InputError: as `request`.
    """
    own = np.asarray(self.stage.test.request.label)
    if label is None:
      turn = [int((own[:i] == label).sum()) for i, label in enumerate(own)]
      return np.argsort(turn, kind="stable")
    if label not in self.labels:
      trained = ", ".join(self.labels)
      raise InputError(f"label: {label!r} was never trained, expected one of {trained}")
    places = np.flatnonzero(own == self.labels.index(label))
    if not len(places):
      raise InputError(f"label: the fold held out has no clip of {label!r}")
    return places

  def request(self, label: str | None, count: int) -> Request:
    """Test clips of a label.

    Raises:
      InputError: the label was never trained, or the fold held out has no clip of it.
    """
    places = self.places(label)
    chosen = jnp.asarray(np.resize(places, count))
    return jax.tree.map(lambda x: x[chosen], self.stage.test.request)

  def _plain(self, request: Request, motion: jax.Array) -> Motions:
    skeleton = self.stage.judging.skeleton
    beside = request.entity.points if request.entity.scene is None else request.entity.scene
    return Motions(
      np.asarray(joints_of(motion, self.stage.test.scaling, skeleton), np.float32),
      self.stage.clips.fps, skeleton.names, skeleton.parents,
      [self.labels[int(k)] for k in request.label],
      None if beside is None else np.asarray(beside),
    )  # fmt: skip


def sampler(config: Config) -> Sampler:
  """Returns the sampler of a run with this config; the state is that of its checkpoint.

  Raises:
    InputError: as `build`.
  """
  return Sampler(stage_of(config))
