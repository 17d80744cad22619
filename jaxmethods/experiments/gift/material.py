"""Everything a run reads, as arrays on the device: tasks, class prompts, synthetic pairs, references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmethods.data import records, scenes
from jaxmethods.data.array_cache import cached, described
from jaxmethods.data.image_text import FILE, read_image_texts
from jaxmethods.errors import InputError
from jaxmethods.experiments.gift import painter
from jaxmethods.experiments.gift.config import Config
from jaxmethods.methods import gift
from jaxmethods.testbeds.vision_language import encoder
from jaxmethods.testbeds.vision_language.encoder import Stage
from jaxmethods.testbeds.vision_language.tasks import Task, load_tasks
from jaxmethods.testbeds.vision_language.words import class_texts, pack
from jaxmethods.trees import Tree


class Data(NamedTuple):
  """Arrays of T stages (tasks, or pieces of one), padded to the largest; K classes a stage at most.

  Attributes:
    pretrained: theta^0.
    train_x, train_y, train_n: images (T, n, h, w, 3) uint8, labels (T, n), and how many are real (T,).
    test_x, test_y, test_n: the same.
    texts: first template of every class, ids (T, K, L).
    known: classes that a stage trains on, (T, K) bool.
    test_texts: all templates, ids (T, K, M, L).
    asked: classes among which stage j is tested after stage i, (T, T, K) bool; none: not tested.
    pairs_x: synthetic images (T, N, h, w, 3) uint8.
    pairs_ids: prompts of the pairs, (T, N).
    pairs_texts: ids of the prompts of all pairs, (T, N, L).
    reference_x, reference_texts: unlabelled images (R, h, w, 3), captions (R, L): of ZSCL.
  """

  pretrained: Tree
  train_x: Array
  train_y: Array
  train_n: Array
  test_x: Array
  test_y: Array
  test_n: Array
  texts: Array
  known: Array
  test_texts: Array
  asked: Array
  pairs_x: Array
  pairs_ids: Array
  pairs_texts: Array
  reference_x: Array
  reference_texts: Array


class Material(NamedTuple):
  """What a run is made of.

  Attributes:
    stage: model and how it reads.
    names: of the tasks, in their order.
    data: arrays.
    about: first line of the report.
    painted: captions and pictures of the first tasks, for people.
  """

  stage: Stage
  names: list[str]
  data: Data
  about: str
  painted: tuple[list[str], np.ndarray]


class Pairs(NamedTuple):
  """Synthetic pairs of one stage: images (N, h, w, 3), prompts, and what was left out."""

  images: np.ndarray
  prompts: list[str]
  left_out: str = ""


def load(config: Config) -> Material:
  """Reads the model and the tasks, and makes the synthetic pairs that the row needs.

  Raises:
    InputError: data or models that are missing, or that cannot be used.
  """
  tasks = ordered(load_tasks(config.tasks, config.size), config)
  if config.held_out == "validation":
    tasks = [task._replace(test=task.validation) for task in tasks]
  stage = encoder.load(config.model, config.clip)
  split = config.incremental == "class"
  stages = pieces_of(tasks[0], config.pieces) if split else tasks
  for task in stages:
    if len(task.train[1]) < config.batch_size:
      found = len(task.train[1])
      raise InputError(f"batch_size: task {task.name} has {found} images, not {config.batch_size}")
  pairs = synthetic_pairs(stage, stages, config)
  arrays = data_of(stage, stages, pairs, config, split)
  shown = pairs[-1]
  sets = ", ".join(
    records.sealed(task.name, task.source.digest, f"{len(task.classes)} classes") for task in stages
  )
  kinds = sorted({"real" if task.source.real else "rendered" for task in stages})
  left_out = "; ".join(pair.left_out for pair in pairs if pair.left_out)
  model = records.sealed(stage.source.name, stage.source.digest)
  about = (
    f"{model}, {stage.source.origin}; {len(stages)} tasks, {' and '.join(kinds)}: {sets}"
    + _pairs_named(config, pairs, arrays)
    + (f"; synthetic pairs left out: {left_out}" if left_out else "")
    + ("" if config.held_out == "test" else "; tested on validation")
  )
  painted = (shown.prompts[:24], shown.images[:24])
  return Material(stage, [task.name for task in stages], arrays, about, painted)


def _pairs_named(config: Config, pairs: Sequence[Pairs], arrays: Data) -> str:
  """Names a folder of pairs for reports."""
  if not config.synthetic.startswith("folder:"):
    return ""
  prompts = [prompt for pair in pairs for prompt in pair.prompts]
  images = [*(pair.images for pair in pairs), np.asarray(arrays.reference_x)]
  captions = np.asarray(arrays.reference_texts)
  seal = records.digest_of([*images, captions], prompts)
  return f"; pairs of {records.sealed(config.synthetic, seal)}"


# A fixed shuffle: what the fractional parts of multiples of the golden ratio sort like.
_GOLDEN = 0.6180339887498949


def ordered(tasks: list[Task], config: Config) -> list[Task]:
  """Puts tasks in their order: alphabetic (I), mixed (II), or as given."""
  if config.order == "given":
    return tasks
  tasks = sorted(tasks, key=lambda task: task.name)
  if config.order == "mixed":
    places = np.argsort([(k + 1) * _GOLDEN % 1 for k in range(len(tasks))])
    tasks = [tasks[k] for k in places]
  return tasks


def pieces_of(task: Task, pieces: int) -> list[Task]:
  """Splits a task by its classes, as evenly as can be; every piece knows all class names.

  Raises:
    InputError: more pieces than classes.
  """
  count = len(task.classes)
  if pieces > count:
    raise InputError(f"pieces: {task.name} has {count} classes, fewer than {pieces} pieces")
  groups = np.array_split(np.arange(count), pieces)
  cut = lambda part, group: tuple(a[np.isin(part[1], group)] for a in part)
  return [
    task._replace(
      name=f"{task.name}-{k + 1}", train=cut(task.train, group), test=cut(task.test, group)
    )
    for k, group in enumerate(groups)
  ]


# --- synthetic pairs --------------------------------------------------------------------------------


def base_prompts() -> list[str]:
  """Prompts that stand for pretraining: what its captions name, as ImageNet's names do for CLIP."""
  prompts = [
    f"a picture of a {colour} {shape}."
    for c, colour in enumerate(scenes.COLOURS)
    for s, shape in enumerate(scenes.SHAPES)
    if not scenes.held_out(np.array(c), np.array(s))
  ]
  prompts += [f"a picture of a {fill} {shape}." for fill in scenes.FILLS for shape in scenes.SHAPES]
  prompts += [f"a picture of a object on {ground}." for ground in scenes.BACKGROUNDS]
  prompts += [f"a picture of a object at the {place}." for place in scenes.PLACES]
  prompts += [f"a picture of {count} objects." for count in scenes.COUNTS[1:]]
  prompts += [f"a picture of the digit {digit}." for digit in scenes.DIGITS]
  return prompts + [f"a picture of the letter {letter}." for letter in scenes.LETTERS]


def synthetic_pairs(stage: Stage, stages: Sequence[Task], config: Config) -> list[Pairs]:
  """The pairs of every stage, from the painter or from a folder; black ones where no row reads them."""
  kind, _, path = config.synthetic.partition(":")
  if kind not in ("painter", "renderer", "folder") or (kind == "folder") != bool(path):
    raise InputError(
      f"synthetic: must be painter, renderer or folder:PATH, got {config.synthetic!r}"
    )
  if not reads_pairs(config):
    blank = np.zeros((1, scenes.SIZE, scenes.SIZE, 3), np.uint8)
    return [Pairs(blank, [painter.EMPTY]) for _ in stages]
  if kind == "folder":
    return [_from_folder(Path(path).expanduser(), k, config) for k in range(len(stages))]
  if config.model != "small":
    raise InputError(
      f"synthetic: the {kind} knows what the small CLIP knows, not {config.model}; give folder:PATH"
    )
  random = np.random.default_rng(config.synthetic_seed)
  earlier: list[list[str]] = []
  prompts: list[list[str]] = []
  for task in stages:
    pool = gift.prompt_pool(base_prompts(), earlier)
    prompts.append(gift.drawn_prompts(pool, config.synthetic_images, random))
    classes = sorted(set(task.train[1].tolist()))
    earlier.append([task.templates[0].format(task.classes[k]) for k in classes])
  every = [text for texts in prompts for text in texts]
  if kind == "renderer":
    painted = scenes.depict(every, random, config.renderer_noise)
  else:
    painted = _painted(stage, every, config)
  parts = np.split(painted, len(stages))
  return [Pairs(images, texts) for images, texts in zip(parts, prompts, strict=True)]


def reads_pairs(config: Config) -> bool:
  """Tells whether a row reads synthetic pairs."""
  return config.learner in ("gift", "ewc")


def _painted(stage: Stage, texts: list[str], config: Config) -> np.ndarray:
  """Pictures of all texts, from the cache if they were painted before."""
  params = painter.trained(stage, config.painter)
  about = [
    painter.FORMAT, described(config.painter, "painter"), described(config.clip, "small clip"),
    "\n".join(texts).encode(), str(config.synthetic_seed).encode(),
  ]  # fmt: skip
  paint = lambda: painter.paint(stage, params, config.painter, texts, config.synthetic_seed)
  return cached("painted", about, lambda: {"x": paint()})["x"]


def _from_folder(folder: Path, stage: int, config: Config) -> Pairs:
  """Pairs of one stage: of its own folder `task_N`, N from 1, if there is one, else of the folder."""
  own = folder / f"task_{stage + 1}"
  source = own if (own / FILE).exists() else folder
  side = scenes.SIZE if config.model == "small" else 224
  read = read_image_texts(source, config.synthetic_images, side)
  return Pairs(read.images, read.texts, read.left_out)


# --- arrays -----------------------------------------------------------------------------------------


def data_of(
  stage: Stage, stages: Sequence[Task], pairs: Sequence[Pairs], config: Config, split: bool
) -> Data:
  """Packs everything into arrays; `split`: the stages are pieces of one task."""
  train, test = ([getattr(task, part) for task in stages] for part in ("train", "test"))
  templates = min(len(task.templates) for task in stages)
  texts = [class_texts(task.classes, task.templates[:templates], stage.tokens) for task in stages]
  most = max(map(len, texts))
  padded = _stack([_filled(t, most) for t in texts], stage.tokens.pad)
  known, asked = _masks(stages, most, split)
  ids, words = zip(*(_numbered(pair.prompts, stage) for pair in pairs), strict=True)
  count = min(map(len, ids))
  reference = _reference(stage, config)
  return Data(
    pretrained=jax.tree.map(jnp.asarray, stage.params),
    train_x=jnp.asarray(_stack([x for x, _ in train])),
    train_y=jnp.asarray(_stack([y for _, y in train])),
    train_n=jnp.asarray(np.array([len(y) for _, y in train], np.int32)),
    test_x=jnp.asarray(_stack([x for x, _ in test])),
    test_y=jnp.asarray(_stack([y for _, y in test], -1)),
    test_n=jnp.asarray(np.array([len(y) for _, y in test], np.int32)),
    texts=jnp.asarray(padded[:, :, 0]),
    known=jnp.asarray(known),
    test_texts=jnp.asarray(padded),
    asked=jnp.asarray(asked),
    pairs_x=jnp.asarray(np.stack([pair.images[:count] for pair in pairs])),
    pairs_ids=jnp.asarray(np.stack([numbers[:count] for numbers in ids])),
    pairs_texts=jnp.asarray(_stack([rows[:count] for rows in words], stage.tokens.pad)),
    reference_x=jnp.asarray(reference[0]),
    reference_texts=jnp.asarray(reference[1]),
  )


def _masks(stages: Sequence[Task], most: int, split: bool) -> tuple[np.ndarray, np.ndarray]:
  """Classes that stages train on (T, K), and among which they are tested (T, T, K)."""
  count = len(stages)
  known = np.zeros((count, most), bool)
  for k, task in enumerate(stages):
    if split:  # all classes seen so far
      known[k, np.unique(np.concatenate([s.train[1] for s in stages[: k + 1]]))] = True
    else:
      known[k, : len(task.classes)] = True
  if not split:
    return known, np.broadcast_to(known[None], (count, count, most))
  before = np.tri(count, dtype=bool)[:, :, None]  # a piece is tested once it was seen
  return known, before & known[:, None]


def _numbered(prompts: Sequence[str], stage: Stage) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of prompts, equal for equal ones, and their ids."""
  numbers = {text: k for k, text in enumerate(sorted(set(prompts)))}
  return np.array([numbers[text] for text in prompts], np.int32), pack(prompts, stage.tokens)


def _reference(stage: Stage, config: Config) -> tuple[np.ndarray, np.ndarray]:
  """Unlabelled pictures and captions of pretraining, which ZSCL distils on."""
  if config.learner != "zscl":
    return np.zeros((1, scenes.SIZE, scenes.SIZE, 3), np.uint8), pack([painter.EMPTY], stage.tokens)
  if config.model != "small":
    source = config.synthetic.removeprefix("folder:")
    read = read_image_texts(Path(source).expanduser(), config.reference_images, 224)
    return read.images, pack(read.texts, stage.tokens)
  pairs = scenes.pretraining_pairs(config.reference_images, config.clip.seed)
  return pairs.images, pack(pairs.captions, stage.tokens)


def _filled(texts: np.ndarray, most: int) -> np.ndarray:
  """Repeats the last class up to `most`; masks leave the repeated ones out."""
  return np.concatenate([texts, np.repeat(texts[-1:], most - len(texts), axis=0)])


def _stack(arrays: Sequence[np.ndarray], value: int = 0) -> np.ndarray:
  """Stacks arrays of different shapes, each axis padded to the longest."""
  shape = np.max([a.shape for a in arrays], axis=0)
  pad = lambda a: np.pad(
    a, [(0, n - m) for n, m in zip(shape, a.shape, strict=True)], constant_values=value
  )
  return np.stack([pad(a) for a in arrays])
