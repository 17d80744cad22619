"""Composes the tuning of a real LLaVA-style checkpoint on several tasks, from files of questions.

Tuners, preview and columns are those of the small model (`desk`), batches those of
`testbeds.multimodal.checkpoint`. Rows that train one model per task would hold the checkpoint once for
each: run `--row lora` with a single task in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmethods import folders
from jaxmethods.data.model_sources import ModelFiles
from jaxmethods.data.question_files import Question, check_disjoint, described, read_questions
from jaxmethods.errors import InputError
from jaxmethods.experiments.thanora import rows
from jaxmethods.experiments.thanora.config import Config
from jaxmethods.experiments.thanora.figures import figures
from jaxmethods.experiments.thanora.preview import Reading, second_moments
from jaxmethods.methods import thanora as method
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.multimodal import checkpoint as checkpoint_tuning, tuning
from jaxmethods.testbeds.multimodal.checkpoint import Answering, Reader
from jaxmethods.trees import Params
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Tuner, TuningState


class Material(NamedTuple):
  """Model and questions of a run.

  Attributes:
    train: training questions of every task, in the order of the tasks.
    tests: test questions of the tasks, and of what must not be forgotten.
    model, params: the checkpoint.
    batch: maps questions to {"features", "ids", "labels"}.
    files: the checkpoint came from.
  """

  train: dict[str, list[Question]]
  tests: dict[str, list[Question]]
  model: Answering
  params: Params
  batch: Reader
  files: ModelFiles


class Order(NamedTuple):
  """Order of the training data.

  Attributes:
    questions: all tasks, one after the other.
    counts: questions of every task, (T,).
    sizes: questions of every task in a batch; None: batches of the whole mixture.
    batch_size: questions of a batch.
    seed: seed of the shuffles.
    batch: see `Material`.
  """

  questions: list[Question]
  counts: np.ndarray
  sizes: list[int] | None
  batch_size: int
  seed: int
  batch: Reader


class Kept(NamedTuple):
  """The parts of an evaluation that do not change: tuner, model, names, and questions at once."""

  tuner: Tuner
  model: Answering
  tasks: tuple[str, ...]
  upstream: tuple[str, ...]
  chunk: int


def load(config: Config, mesh: Mesh | None = None) -> Material:
  """Reads the files of questions and the checkpoint.

  Raises:
    InputError: missing or malformed files, or an image that is both trained and tested on.
  """
  for key, of in (("train", config.train), ("test", config.test)):
    if set(of) != set(config.tasks):
      raise InputError(f"{key}: must name a file for each of {config.tasks}, names {sorted(of)}")
  if shared := set(config.tasks) & set(config.checkpoint.upstream):
    raise InputError(f"checkpoint.upstream: {min(shared)!r} is a task too")
  read = lambda file: read_questions(folders.expanded(file))
  train = {name: read(config.train[name]) for name in config.tasks}
  files = {name: config.test[name] for name in config.tasks} | config.checkpoint.upstream
  tests = {name: read(file) for name, file in files.items()}
  for name, questions in tests.items():
    for trained in train.values():
      check_disjoint(trained, questions, name)
  return Material(train, tests, *checkpoint_tuning.open_model(config.checkpoint, mesh))


def build(config: Config, mesh: Mesh | None = None, material: Material | None = None) -> Experiment:
  """Composes the experiment; the material is by default that of the config."""
  if config.row in rows.SEPARATE:
    raise InputError(
      f"row: {config.row} trains one model per task; on a checkpoint, run --row lora with one task each"
    )
  material = material or load(config, mesh)
  model, params, names = material.model, material.params, tuple(config.tasks)
  tuning.check_finite(params)
  tuner, chunk = rows.tuner_of(config), config.checkpoint.chunk
  optimiser = tuners.adamw(tuning.rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  plan = start_of(config, material, mesh)
  counts, balanced = (
    np.array([len(of) for of in material.train.values()]),
    config.sampler == "balanced",
  )
  sizes = rows.batch_sizes(names, counts, config.batch_size, balanced=balanced, apart=balanced)
  everything = [question for questions in material.train.values() for question in questions]
  parts = sizes if balanced else None
  order = Order(everything, counts, parts, config.batch_size, config.seed, material.batch)
  tests = {
    name: checkpoint_tuning.split_of(material.batch, questions[: config.checkpoint.test_questions])
    for name, questions in material.tests.items()
  }
  before = checkpoint_tuning.pretrained_scores(model, params, tests, chunk)
  kept = Kept(tuner, model, names, tuple(config.checkpoint.upstream), chunk)
  draw = functools.partial(figures, names, config.start == "preview")
  return Experiment(
    init=lambda key: tuners.init_state(tuner, optimiser, key, params, plan),
    batches=functools.partial(_batches, order),
    step=tuners.tuning_step(tuner, model, optimiser, tuners.answer_loss, clip=config.clip),
    evaluate=functools.partial(_evaluate, kept),
    test={"tests": tests, "before": before},
    figures=draw if config.row == "thanora" else lambda state: {},
    num_steps=config.steps,
    about=_about(config, material),
    export=checkpoint_tuning.export_of(model, material.files, tuner),
  )


def _about(config: Config, material: Material) -> str:
  """The first line of the report."""
  files = config.test | config.checkpoint.upstream
  trained = [f"{name}: {described(config.train[name], q)}" for name, q in material.train.items()]
  tested = [
    f"{name}: {described(files[name], q, config.checkpoint.test_questions)}"
    for name, q in material.tests.items()
  ]
  return (
    f"{checkpoint_tuning.named(material.files)}; data of yours; "
    f"{config.sampler} mixture of {', '.join(trained)}; "
    f"tested on {', '.join(tested)}"
  )


def _batches(order: Order, k: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields the batches from step `k` on."""
  counts, ends = order.counts, np.cumsum(order.counts)
  while True:
    if order.sizes is None:
      chosen = _shuffled(order.seed, len(counts), int(ends[-1]), k, order.batch_size)
    else:
      parts = enumerate(zip(ends - counts, counts, order.sizes, strict=True))
      chosen = np.concatenate(
        [a + _shuffled(order.seed, t, n, k, size) for t, (a, n, size) in parts]
      )
    yield order.batch([order.questions[row] for row in chosen])
    k += 1


def _shuffled(seed: int, task: int, count: int, k: int, size: int) -> np.ndarray:
  """Draws the places of batch `k` among `count` questions, which every epoch shuffles anew."""
  epoch, place = divmod(k, count // size)
  order = np.random.default_rng((seed, task, epoch)).permutation(count)
  return order[place * size : (place + 1) * size]


def _evaluate(kept: Kept, state: TuningState, test: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Measures the mean accuracy over the tasks, each task, and the change of the upstream ones."""
  run = tuning.tuned(kept.tuner, kept.model, state)
  after = checkpoint_tuning.accuracies_of(run, test["tests"], kept.chunk)
  mean = lambda of, which: jnp.stack([of[name] for name in which]).mean()
  columns = {"Mean": mean(after, kept.tasks), **{name: after[name] for name in kept.tasks}}
  if kept.upstream:
    source = mean(after, kept.upstream)
    columns |= {"Source": source, "F": source - mean(test["before"], kept.upstream)}
  return columns


def start_of(config: Config, material: Material, mesh: Mesh | None = None) -> dict[str, Any]:
  """Plans the start of a row by its preview; empty for rows that start without data."""
  if not rows.needs_preview(config):
    return {}
  moments = moments_of(
    material,
    config.preview,
    config.checkpoint.chunk,
    rows.targets_of(config),
    together=config.row == "corda",
    centred=config.centred,
    mesh=mesh,
  )
  return rows.plan_of(config, material.params, moments)


def moments_of(
  material: Material,
  count: int,
  chunk: int,
  targets: str,
  *,
  together: bool = False,
  centred: bool = False,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Measures second moments of the inputs of every layer on a preview of every task.

  For LLaVA-1.5-7B the moments of one task take 28 GB in all (float32).

  Args:
    material: model and questions.
    count: questions of every task that are read.
    chunk: questions that are read at once.
    targets: regular expression on kernel paths.
    together: whether all tasks have one moment.
    centred: whether means are taken out.
    mesh: devices over which the rows of a moment are spread while it grows.
  """
  tasks = [_chunks(material.batch, of[:count], chunk) for of in material.train.values()]
  return second_moments(
    material.params,
    tasks,
    functools.partial(_read, material.model),
    targets,
    together=together,
    begin=functools.partial(_no_inputs, mesh, centred),
  )


def _read(model: Answering, params: Params, batch: Mapping[str, jax.Array]) -> Reading:
  """Reads a batch; padding is behind the last token that is asked for."""
  ids, labels = batch["ids"], batch["labels"]
  last = jnp.max(jnp.where(labels != IGNORED, jnp.arange(ids.shape[-1]), -1), axis=-1)
  mask = jnp.arange(ids.shape[-1]) <= last[..., None]
  # No gradient, so nothing to compute again; what is seen inside a remat may not leave it.
  plain = model.clone(remat=False)
  run = lambda: plain.apply({"params": params}, ids, features=batch["features"], logits="none")
  return run, [mask.reshape(-1, ids.shape[-1])]


def _no_inputs(mesh: Mesh | None, centred: bool, width: int) -> method.Moment:
  """Begins the moment of a layer, its rows spread over the mesh."""
  moment = method.no_inputs(width, centred=centred)
  if mesh is None:
    return moment
  spec = PartitionSpec(mesh.axis_names) if width % mesh.size == 0 else PartitionSpec()
  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  sums = None if moment.sums is None else place(moment.sums, PartitionSpec())
  return method.Moment(place(moment.total, spec), place(moment.inputs, PartitionSpec()), sums)


def _chunks(
  batch: Reader, questions: Sequence[Question], chunk: int
) -> Iterator[dict[str, np.ndarray]]:
  """Cuts questions into batches."""
  for first in range(0, len(questions), chunk):
    yield batch(questions[first : first + chunk])
