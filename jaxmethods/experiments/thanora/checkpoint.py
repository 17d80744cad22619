"""Tuning a real LLaVA-style checkpoint on several tasks at once, from files of questions and images.

The same tuners, preview and columns as on the desk model (`mixture_tuning`), with the batches of
`checkpoint_tuning`. Rows that train one model per task would hold the checkpoint once for each: they
are runs of `--row lora` with a single task here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.data.question_files import Question, check_disjoint, read_questions
from jaxmethods.errors import InputError
from jaxmethods.experiments.thanora import desk as mixture_tuning
from jaxmethods.methods import thanora as method
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.multimodal import checkpoint as checkpoint_tuning
from jaxmethods.testbeds.multimodal import tuning
from jaxmethods.testbeds.multimodal.checkpoint import Answering, Reader
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import TuningState

if TYPE_CHECKING:
  from jaxmethods.experiments.thanora.config import Config


class Material(NamedTuple):
  """What a run needs.

  Attributes:
    model, params: the checkpoint.
    train: training questions of every task, in the order of `config.tasks`.
    tests: those that are tested on: of the tasks, and of what must not be forgotten.
    batch: questions -> {"features", "ids", "labels"}.
  """

  model: Answering
  params: dict[str, Any]
  train: dict[str, list[Question]]
  tests: dict[str, list[Question]]
  batch: Reader


def load(config: Config, mesh: Any = None) -> Material:
  """Reads the files of questions and the checkpoint.

  Raises:
    InputError: missing or malformed files, or an image that is both trained and tested on.
  """
  for key, of in (("train", config.train), ("test", config.test)):
    if set(of) != set(config.tasks):
      raise InputError(f"{key}: must name a file for each of {config.tasks}, names {sorted(of)}")
  if shared := set(config.tasks) & set(config.checkpoint.upstream):
    raise InputError(f"checkpoint.upstream: {min(shared)!r} is a task too")
  read = lambda file: read_questions(Path(file).expanduser())
  train = {name: read(config.train[name]) for name in config.tasks}
  files = {name: config.test[name] for name in config.tasks} | config.checkpoint.upstream
  tests = {name: read(file) for name, file in files.items()}
  for name, questions in tests.items():
    for trained in train.values():
      check_disjoint(trained, questions, name)
  model, params, batch = checkpoint_tuning.open_model(config.checkpoint, mesh)
  return Material(model, params, train, tests, batch)


def build(config: Config, mesh: Any = None, material: Material | None = None) -> Experiment:
  """Composes the experiment; the material is by default what the config names."""
  if config.row in mixture_tuning.SEPARATE:
    raise InputError(
      f"row: {config.row} trains one model per task; on a checkpoint, run --row lora with one task each"
    )
  material = material or load(config, mesh)
  model, names = material.model, config.tasks
  tuning.check_finite(material.params)
  tuner, chunk = mixture_tuning.tuner_of(config), config.checkpoint.chunk
  optimiser = tuners.adamw(tuning.rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  moments: dict[str, Any] = (
    moments_of(config, material, mesh) if mixture_tuning.needs_preview(config) else {}
  )
  counts = np.array([len(questions) for questions in material.train.values()])
  sizes = mixture_tuning.batch_sizes(config, counts)
  everything = [question for questions in material.train.values() for question in questions]
  ends = np.cumsum(counts)

  def init(key: jax.Array) -> TuningState:
    return tuners.init_state(tuner, optimiser, key, material.params, moments)

  def shuffled(task: int, count: int, k: int, size: int) -> np.ndarray:
    """Places of batch `k` among `count` questions, which every epoch shuffles anew."""
    epoch, place = divmod(k, count // size)
    order = np.random.default_rng((config.seed, task, epoch)).permutation(count)
    return order[place * size : (place + 1) * size]

  def batches(k: int) -> Iterator[dict[str, np.ndarray]]:
    while True:
      if config.sampler == "balanced":
        parts = enumerate(zip(ends - counts, counts, sizes, strict=True))
        rows = np.concatenate([a + shuffled(t, n, k, size) for t, (a, n, size) in parts])
      else:
        rows = shuffled(len(names), int(ends[-1]), k, config.batch_size)
      yield material.batch([everything[row] for row in rows])
      k += 1

  def evaluate(state: TuningState, test: Any) -> dict[str, jax.Array]:
    run = tuning.tuned(tuner, model, state)
    after = checkpoint_tuning.accuracies_of(run, test["tests"], chunk)
    mean = lambda of, which: jnp.stack([of[name] for name in which]).mean()
    columns = {"Mean": mean(after, names), **{name: after[name] for name in names}}
    if upstream := list(config.checkpoint.upstream):
      source = mean(after, upstream)
      columns |= {"Source": source, "F": source - mean(test["before"], upstream)}
    return columns

  tests = {
    name: checkpoint_tuning.split_of(material.batch, questions[: config.checkpoint.test_questions])
    for name, questions in material.tests.items()
  }
  before = checkpoint_tuning.pretrained_scores(model, material.params, tests, chunk)
  shares = ", ".join(f"{name} {n}" for name, n in zip(names, counts, strict=True))
  return Experiment(
    init=init,
    batches=batches,
    step=tuners.tuning_step(tuner, model, optimiser, tuners.answer_loss, clip=config.clip),
    evaluate=evaluate,
    test={"tests": tests, "before": before},
    figures=functools.partial(mixture_tuning.figures, config)
    if config.row == "thanora"
    else lambda state: {},
    num_steps=config.steps,
    about=f"{config.checkpoint.model}; {config.sampler} mixture of {shares} training questions",
  )


def moments_of(config: Config, material: Material, mesh: Any = None) -> dict[str, np.ndarray]:
  """As `mixture_tuning.moments_of`; rows of a moment are spread over the mesh while it grows.

  For LLaVA-1.5-7B the moments of one task take 28 GB in all (float32).
  """
  model = material.model

  def read(params, batch):
    ids, labels = batch["ids"], batch["labels"]
    # Padding is behind the last token that is asked for.
    last = jnp.max(jnp.where(labels != IGNORED, jnp.arange(ids.shape[-1]), -1), axis=-1)
    mask = jnp.arange(ids.shape[-1]) <= last[..., None]
    run = lambda: model.apply({"params": params}, ids, features=batch["features"], logits="none")
    return run, [mask.reshape(-1, ids.shape[-1])]

  def begin(width: int) -> method.Moment:
    moment = method.no_inputs(width)
    if mesh is None:
      return moment
    rows = PartitionSpec(mesh.axis_names) if width % mesh.size == 0 else PartitionSpec()
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return method.Moment(place(moment.total, rows), place(moment.inputs, PartitionSpec()))

  def chunks(questions: list[Question]) -> Iterator[dict[str, np.ndarray]]:
    shown = questions[: config.preview]
    for first in range(0, len(shown), config.checkpoint.chunk):
      yield material.batch(shown[first : first + config.checkpoint.chunk])

  tasks = [chunks(questions) for questions in material.train.values()]
  return mixture_tuning.second_moments(config, material.params, tasks, read, begin)
