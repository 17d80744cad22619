"""Private, partly corrupted images shared out to clients, and unlabelled public images; their pictures.

Corruptions are made once, from `split_seed`; who holds which image is drawn anew for every seed. A
client's validation images are never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jaxmethods.data import corruptions, records, sources, splits
from jaxmethods.data.array_cache import cached
from jaxmethods.errors import InputError
from jaxmethods.federated import partition
from jaxmethods.testbeds.federated_images.encoder import resized

if TYPE_CHECKING:
  from jaxmethods.experiments.rahfl.config import Config

FORMAT = b"corrupted 1"  # changes when the corruptions do


class Data(NamedTuple):
  """What an experiment reads.

  Attributes:
    num_classes: C.
    pool: private training images (N, s, s, 3) uint8, corrupted.
    labels: (N,) int32, on the host.
    test: "clean" and "corrupted" images (n, s, s, 3) uint8, "y" (n,).
    public: images (n0, s, s, 3) uint8.
    scale: per-channel mean and standard deviation of private and of public images, (2, 2, 3).
    about: first line of the report.
  """

  num_classes: int
  pool: Array
  labels: np.ndarray
  test: dict[str, Array]
  public: Array
  scale: np.ndarray
  about: str


class Clients(NamedTuple):
  """Who holds what, as rows of the pool; -1 in `y` where there is none.

  Attributes:
    rows: training images, (K, n) int32.
    y: (K, n) int32.
    validation: (K, m) int32.
    validation_y: (K, m) int32.
  """

  rows: Array
  y: Array
  validation: Array
  validation_y: Array


def load(config: Config) -> Data:
  """Reads private and public images, splits off the test, corrupts.

  Raises:
    InputError: data that are missing, are no square images, or do not fit each other.
  """
  private, public = (sources.load_arrays(name) for name in (config.data, config.public))
  if "test" in private.splits:
    test_x, test_y = private.splits["test"]
    parts = [part for name, part in private.splits.items() if name != "test"]
    if not parts:
      raise InputError(f"{config.data}: has test images only")
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
  else:
    x, y = (np.concatenate(arrays) for arrays in zip(*private.splits.values(), strict=True))
    fit, held_out = splits.stratified_split(
      y, (1 - config.test_share, config.test_share), seed=config.split_seed
    )
    test_x, test_y, x, y = x[held_out], y[held_out], x[fit], y[fit]
  absent = set(range(private.num_classes)) - set(y.tolist())
  if absent:
    raise InputError(f"{config.data}: no client can have class {min(absent)}: no training example")
  x, test_x = (_images(part, config.data, config.image_size) for part in (x, test_x))

  shown = np.concatenate([part for part, _ in public.splits.values()])
  shown = np.random.default_rng(config.split_seed).permutation(shown)[: config.public_examples]
  shown = _images(shown, config.public, config.image_size)
  if shown.shape[1:] != x.shape[1:]:
    raise InputError(
      f"public {config.public}: images of {shown.shape[1]} pixels, {config.data} of {x.shape[1]}: "
      f"set image_size"
    )
  if len(shown) < config.batch_size:
    raise InputError(f"public {config.public}: {len(shown)} images, fewer than one batch_size")

  made = _corrupted(x, test_x, config)
  scale = np.stack([_scale(made["train"]), _scale(shown)])
  about = (
    f"{records.describe([private])}; {config.corruption:.0%} of the training images corrupted by us; "
    f"public, labels unread: {records.describe([public])}"
  )
  test = {"clean": test_x, "corrupted": made["test"], "y": test_y}
  return Data(
    private.num_classes,
    jnp.asarray(made["train"]),
    y,
    {name: jnp.asarray(a) for name, a in test.items()},
    jnp.asarray(shown),
    scale,
    about,
  )


def _images(x: np.ndarray, name: str, size: int) -> np.ndarray:
  """(n, s, s, 3) uint8; grey images get three equal channels."""
  if x.ndim != 4 or x.shape[1] != x.shape[2] or x.shape[3] not in (1, 3):
    raise InputError(f"{name}: expected square images, grey or RGB, got shape {x.shape[1:]}")
  if size and size != x.shape[1]:
    x = np.concatenate([resized(part, size) for part in np.array_split(x, -(-len(x) // 4096))])
  if x.dtype != np.uint8:
    x = np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)
  return np.broadcast_to(x, (*x.shape[:3], 3))


def _corrupted(train: np.ndarray, test: np.ndarray, config: Config) -> dict[str, np.ndarray]:
  """Training images corrupted at the configured share, test images all; kept on disk."""
  kinds = corruptions.KINDS if config.kinds == ["all"] else tuple(config.kinds)

  def compute() -> dict[str, np.ndarray]:
    train_key, test_key = jax.random.split(jax.random.key(config.split_seed))
    options: dict[str, Any] = {"kinds": kinds, "severities": config.severities}
    return {
      "train": corruptions.corrupt_images(train_key, train, config.corruption, **options).images,
      "test": corruptions.corrupt_images(test_key, test, 1.0, **options).images,
    }

  settings = repr((kinds, list(config.severities), config.corruption, config.split_seed))
  shapes = np.array([train.shape, test.shape])
  return cached("corrupted", [FORMAT, settings.encode(), shapes, train, test], compute)


def _scale(x: np.ndarray) -> np.ndarray:
  """Mean and standard deviation per channel of images in [0, 1], (2, 3)."""
  mean = x.mean((0, 1, 2)) / 255
  return np.stack([mean, np.maximum(x.std((0, 1, 2)) / 255, 1e-3)]).astype(np.float32)


def draw_clients(random: np.random.Generator, data: Data, config: Config) -> Clients:
  """Shares the pool out and keeps a part of every share for validation.

  Raises:
    InputError: naming the client that has too few images.
  """
  names = client_names(config)
  total = len(data.labels)
  if config.alpha:
    parts = _dirichlet(random, data, len(names), config.alpha)
  elif config.overlap:
    parts = [random.permutation(total)[: config.private_examples] for _ in names]
  else:
    parts = np.array_split(random.permutation(total), len(names))
    parts = [part[: config.private_examples] for part in parts]
  kept, fit = [], []
  for name, part in zip(names, parts, strict=True):
    part = random.permutation(part)
    size = int(config.validation_share * len(part))
    if not size:
      raise InputError(
        f"client {name}: no validation image of {len(part)} at validation_share "
        f"{config.validation_share}"
      )
    if len(part) - size < config.batch_size:
      raise InputError(
        f"client {name}: {len(part) - size} training images, fewer than one batch_size "
        f"({config.batch_size})"
      )
    kept.append(part[:size])
    fit.append(part[size:])
  return Clients(*_padded(fit, data.labels), *_padded(kept, data.labels))


def _dirichlet(
  random: np.random.Generator, data: Data, clients: int, alpha: float
) -> list[np.ndarray]:
  """Drawn again until every client has 10 images, a hundred times at most (code)."""
  for _ in range(100):
    shares = random.dirichlet([alpha] * clients, data.num_classes)
    order = random.permutation(len(data.labels))
    by_class = [order[data.labels[order] == c] for c in range(data.num_classes)]
    parts = partition.deal_below_even_share(data.labels, shares, by_class)
    if min(map(len, parts)) >= 10:
      return parts
  raise InputError(f"alpha: no partition with 10 images for every client at {alpha}")


def _padded(parts: Sequence[np.ndarray], labels: np.ndarray) -> tuple[Array, Array]:
  longest = max(map(len, parts))
  rows = np.stack([np.pad(part, (0, longest - len(part))) for part in parts])
  real = np.arange(longest) < np.array([[len(part)] for part in parts])
  return jnp.asarray(rows, jnp.int32), jnp.asarray(np.where(real, labels[rows], -1), jnp.int32)


def client_names(config: Config) -> list[str]:
  """Architecture and number, in the order of the engine: group after group."""
  each = range(config.clients_per_architecture)
  return [f"{name}.{i}" for name in config.architectures for i in each]


# --- pictures -----------------------------------------------------------------------------------


def accuracy_bars(names: list[str], scores: dict[str, Any]) -> Figure:
  """Accuracy of every client on clean and on corrupted test images."""
  figure, axes = plt.subplots(figsize=(6, 1.4 + 0.5 * len(names)), layout="constrained")
  place = np.arange(len(names))
  for shift, kind, color in ((-0.2, "clean", "#8fb8de"), (0.2, "corrupted", "#1f6f8b")):
    values = [float(scores[f"{kind}_accuracy/{name}"]) for name in names]
    axes.barh(place + shift, values, height=0.38, color=color, label=kind)
    for row, value in enumerate(values):
      axes.text(value + 0.01, row + shift, f"{value:.3f}", va="center", fontsize=8)
  axes.set_yticks(place, names)
  axes.set(xlim=(0, 1.1), xlabel="test accuracy")
  axes.invert_yaxis()
  axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
  axes.spines[["top", "right"]].set_visible(False)
  return figure


def class_counts(y: np.ndarray, names: list[str], num_classes: int) -> Figure:
  """How many training images of each class every client holds."""
  counts = np.stack([np.bincount(row[row >= 0], minlength=num_classes) for row in y])
  figure, axes = plt.subplots(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
  axes.imshow(counts, aspect="auto", cmap="Blues", vmin=0)
  for (client, label), count in np.ndenumerate(counts):
    color = "white" if count > 0.5 * counts.max() else "black"
    axes.text(label, client, str(count), ha="center", va="center", fontsize=8, color=color)
  axes.set_yticks(range(len(names)), names)
  axes.set(xlabel="class", title="private training images")
  return figure


def sample_images(data: Data, shown: int = 10) -> Figure:
  """The first test images, clean and corrupted, and public ones."""
  rows = {
    "clean": data.test["clean"],
    "corrupted": data.test["corrupted"],
    "public": data.public,
  }
  figure, axes = plt.subplots(3, shown, figsize=(shown, 3.2), layout="constrained")
  for line, (name, images) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(line, np.asarray(images[:shown]), strict=False):
      axis.imshow(image)
    for axis in line:
      axis.set(xticks=[], yticks=[])
      axis.spines[:].set_visible(False)
    line[0].set_ylabel(name)
  return figure
