"""Embeddings of several domains, split into training and test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxmethods.data import records, sources, splits
from jaxmethods.errors import InputError
from jaxmethods.experiments.ggeur.config import Config
from jaxmethods.testbeds.federated_images import clients, encoder
from jaxmethods.testbeds.federated_images.clients import Pool

Parts = Mapping[str, tuple[np.ndarray, np.ndarray]]  # domain -> x (n, ...), y (n,)


class Data(NamedTuple):
  """Arrays of an experiment.

  Attributes:
    domains: names.
    num_classes: C.
    train: examples that clients may hold, (1, n, d) with `skew: labels`, else (D, n, d).
    test: real examples of every domain, (D, n, d).
    about: first line of the report.
  """

  domains: list[str]
  num_classes: int
  train: Pool
  test: Pool
  about: str


def load(config: Config) -> Data:
  """Reads the domains, embeds images, splits off the tests, scales.

  Raises:
    InputError: data that are missing or cannot be dealt out, domains that disagree, a class that no
      client could have.
  """
  domains, sets = sources.load_domains(config.data)
  ranks = {x.ndim for x, _ in domains.values()}
  if not ranks <= {2} and not ranks <= {4}:
    raise InputError(f"{config.data}: expected feature vectors or images in every domain")
  num_classes = max(data.num_classes for data in sets)
  about = records.describe(sets)
  train, test = split(domains, 1 - config.test_share, config.split_seed)
  if ranks == {4}:
    aside, train = split(train, config.encoder_share, config.split_seed + 1)
    train, test = embedded(
      aside, train, test, num_classes, side=config.image_size, epochs=config.encoder_epochs,
      name=config.data,
    )  # fmt: skip
    about += f"; embedded by a convnet trained on {config.encoder_share:.0%} of it, set aside"
  missing = set(range(num_classes)) - set(np.concatenate([y for _, y in train.values()]).tolist())
  if missing:
    raise InputError(f"{config.data}: no client can have class {min(missing)}: no training example")
  if config.norm:
    everything = np.concatenate([x for x, _ in train.values()])
    scale = config.norm / np.sqrt((everything**2).sum(1).mean())
    train, test = ({k: (x * scale, y) for k, (x, y) in part.items()} for part in (train, test))
  held = clients.for_skew(clients.pool(train), config.skew)
  clients.check(config, np.asarray(held.y), num_classes)
  return Data(list(domains), num_classes, held, clients.pool(test), about)


def split(parts: Parts, share: float, seed: int) -> tuple[Parts, Parts]:
  """Splits every domain in two, the first with `share` of every class."""
  first, second = {}, {}
  for name, (x, y) in parts.items():
    one, other = splits.stratified_split(y, (share, 1 - share), seed=seed)
    first[name], second[name] = (x[one], y[one]), (x[other], y[other])
  return first, second


def embedded(
  fit: Parts, train: Parts, test: Parts, num_classes: int, *, side: int, epochs: int, name: str
) -> tuple[Parts, Parts]:
  """Embeds training and test images by an encoder trained on `fit`.

  Args:
    fit: domain -> images (n, h, w, c), labels (n,).
    train: likewise.
    test: likewise.
    num_classes: C.
    side: pixels to which images are brought.
    epochs: of the encoder.
    name: of the data, for errors.

  Raises:
    InputError: domains with different numbers of channels.
  """
  channels = {x.shape[-1] for x, _ in fit.values()}
  if len(channels) > 1:
    raise InputError(f"{name}: domains with {sorted(channels)} channels")
  small = lambda parts: [encoder.resized(x, side) for x, _ in parts.values()]
  labels = np.concatenate([y for _, y in fit.values()])
  pieces = small(train) + small(test)
  vectors = encoder.embed(
    np.concatenate(pieces), (np.concatenate(small(fit)), labels), num_classes, epochs
  )
  x = iter(np.split(vectors, np.cumsum([len(piece) for piece in pieces])[:-1]))
  train, test = ({k: (next(x), y) for k, (_, y) in parts.items()} for parts in (train, test))
  return train, test
