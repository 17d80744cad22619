"""Private, partly corrupted images shared out to clients, and unlabelled public images.

Corruptions are made once, from `split_seed`; who holds which image is drawn anew for every seed. A
client's validation images are never trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmethods.data import corruptions, records, sources, splits
from jaxmethods.data.array_cache import cached
from jaxmethods.errors import InputError
from jaxmethods.experiments.rahfl.config import Config
from jaxmethods.federated import partition
from jaxmethods.testbeds.federated_images.encoder import resized

FORMAT = b"corrupted 1"  # changes when the corruptions do

T = TypeVar("T")  # arrays of jax, of numpy, or their shapes


class Data(NamedTuple):
  """Arrays of an experiment.

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


class Clients(NamedTuple, Generic[T]):
  """Who holds what, as rows of the pool; -1 in `y` where there is none.

  Attributes:
    rows: training images, (K, n) int32.
    y: (K, n) int32.
    validation: (K, m) int32.
    validation_y: (K, m) int32.
  """

  rows: T
  y: T
  validation: T
  validation_y: T


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
  if test_x.shape[1:] != x.shape[1:]:
    raise InputError(
      f"{config.data}: test images of {test_x.shape[1]} pixels, the others of {x.shape[1]}: "
      "set image_size"
    )

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
    f"{records.describe([private])}; {len(y)} to train on, at most {sum(_widths(y, config))} for each "
    f"of {len(client_names(config))} clients, {config.corruption:.0%} of them corrupted by us; "
    f"{len(test_y)} to test on; "
    f"public, labels unread: {len(shown)} of {records.describe([public])}"
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
    corrupt = functools.partial(
      corruptions.corrupt_images, kinds=kinds, severities=config.severities
    )
    return {
      "train": corrupt(train_key, train, config.corruption).images,
      "test": corrupt(test_key, test, 1.0).images,
    }

  settings = repr((kinds, list(config.severities), config.corruption, config.split_seed))
  shapes = np.array([train.shape, test.shape])
  return cached("corrupted", [FORMAT, settings.encode(), shapes, train, test], compute)


def _scale(x: np.ndarray) -> np.ndarray:
  """Mean and standard deviation per channel of images in [0, 1], (2, 3)."""
  mean = x.mean((0, 1, 2)) / 255
  return np.stack([mean, np.maximum(x.std((0, 1, 2)) / 255, 1e-3)]).astype(np.float32)


def draw_clients(
  random: np.random.Generator, labels: np.ndarray, num_classes: int, config: Config
) -> Clients[np.ndarray]:
  """Shares the pool out and keeps a part of every share for validation.

  Args:
    random: generator of the draw.
    labels: of the pool, (N,) int.
    num_classes: C.
    config: of the row.

  Returns:
    Arrays of the shapes of `client_shapes`.

  Raises:
    InputError: naming the client that has too few images.
  """
  names = client_names(config)
  total = len(labels)
  if config.alpha:
    parts = _dirichlet(random, labels, num_classes, len(names), config.alpha)
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
  widths = _widths(labels, config)
  return Clients(*_padded(fit, labels, widths[0]), *_padded(kept, labels, widths[1]))


def client_shapes(labels: np.ndarray, config: Config) -> Clients[jax.ShapeDtypeStruct]:
  """Shapes of what `draw_clients` returns: they do not depend on the draw."""
  shape = lambda width: jax.ShapeDtypeStruct((len(client_names(config)), width), np.int32)
  fit, kept = map(shape, _widths(labels, config))
  return Clients(fit, fit, kept, kept)


def _widths(labels: np.ndarray, config: Config) -> tuple[int, int]:
  """Most training and most validation images that a client can have."""
  total, clients = len(labels), len(client_names(config))
  if config.alpha:  # below its even share, and then a whole class
    most = min(total // clients + int(np.bincount(labels).max()), total)
    return most - int(config.validation_share * most), int(config.validation_share * most)
  sizes = [total] * clients if config.overlap else [-(-total // clients), total // clients]
  sizes = [min(size, config.private_examples) for size in sizes]
  kept = [int(config.validation_share * size) for size in sizes]
  return max(size - k for size, k in zip(sizes, kept, strict=True)), max(kept)


def _dirichlet(
  random: np.random.Generator, labels: np.ndarray, num_classes: int, clients: int, alpha: float
) -> list[np.ndarray]:
  """Drawn again until every client has 10 images, a hundred times at most (code)."""
  for _ in range(100):
    shares = random.dirichlet([alpha] * clients, num_classes)
    order = random.permutation(len(labels))
    by_class = [order[labels[order] == c] for c in range(num_classes)]
    parts = partition.deal_below_even_share(labels, shares, by_class)
    if min(map(len, parts)) >= 10:
      return parts
  raise InputError(f"alpha: no partition with 10 images for every client at {alpha}")


def _padded(
  parts: Sequence[np.ndarray], labels: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the pool and their labels, (K, width) int32; label -1 where there is none."""
  rows = np.stack([np.pad(part, (0, width - len(part))) for part in parts])
  real = np.arange(width) < np.array([[len(part)] for part in parts])
  return rows.astype(np.int32), np.where(real, labels[rows], -1).astype(np.int32)


def client_names(config: Config) -> list[str]:
  """Architecture and number, in the order of the engine: group after group."""
  each = range(config.clients_per_architecture)
  return [f"{name}.{i}" for name in config.architectures for i in each]
