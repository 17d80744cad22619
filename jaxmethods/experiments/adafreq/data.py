"""Photographs dealt out to training and test, and to queries and gallery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmethods.data import coats, reid, splits
from jaxmethods.data.reid import ReidData
from jaxmethods.errors import InputError
from jaxmethods.experiments.adafreq.config import Config

_VALIDATION = "val"  # neither trained on nor searched
_TESTED = frozenset({"test", "query", "gallery"})


class Search(NamedTuple):
  """Photographs, and which of them are searched for and in.

  Attributes:
    images: (n, side, side, 3) uint8.
    identity: (n,), -1 where it is not known.
    group: (n,), -1 where it is not known.
    query: (q,) places of the queries.
    gallery: (g,) places of the gallery.
    itself: (q,) place of each query in the gallery, -1 where it is not there.
    most: photographs of the largest identity of the gallery.
    files: (n,) names.
    names: of the individuals.
  """

  images: np.ndarray
  identity: np.ndarray
  group: np.ndarray
  query: np.ndarray
  gallery: np.ndarray
  itself: np.ndarray
  most: int
  files: np.ndarray
  names: Sequence[str]


class Data(NamedTuple):
  """Arrays of an experiment.

  Attributes:
    images: of training, (n, side, side, 3) uint8.
    members: photographs of each of K individuals, (K, m), padded.
    counts: how many, (K,).
    test: what the metrics are of.
    asked: the folders of the user, if there are any.
    about: first line of the report.
  """

  images: np.ndarray
  members: np.ndarray
  counts: np.ndarray
  test: Search
  asked: Search | None
  about: str


def load(config: Config) -> Data:
  """Reads the sources and deals them out.

  Raises:
    InputError: data that are missing or cannot be dealt out.
  """
  sources = [_source(config, name.strip()) for name in config.data.split(",")]
  parts = [_dealt(config, source) for source in sources]
  train, labels, tests = [], [], []
  known = 0
  for source, (training, search) in zip(sources, parts, strict=True):
    train.append(source.images[training])
    numbers, own = np.unique(source.identity[training], return_inverse=True)
    labels.append(known + own)
    known += len(numbers)
    tests.append(search)
  other = _source(config, config.test_data) if config.test_data else None
  test = everything(other) if other else _joined(tests)
  members, counts = _members(np.concatenate(labels), known)
  if known < config.identities:
    raise InputError(
      f"identities: {config.identities} in each batch, but {config.data} has {known} to train on"
    )
  used = [*sources, *([other] if other else [])]
  _check_answerable(config, test)
  images = np.concatenate(train)
  text = _about(used, images, counts, test)
  return Data(images, members, counts, test, asked(config), text)


def _check_answerable(config: Config, test: Search) -> None:
  """Raises where no query has another photograph of its individual to find."""
  own = test.identity[test.query]
  counts = np.bincount(test.identity[test.gallery], minlength=own.max() + 1)
  if not (counts[own] - (test.itself >= 0) > 0).any():
    name = config.test_data or config.data
    raise InputError(f"{name}: no query has a photograph of the same individual in the gallery")


def _about(used: Sequence[ReidData], images: np.ndarray, counts: np.ndarray, test: Search) -> str:
  kind = lambda source: "your" if source.own else "real" if source.real else "generated"
  kinds = ", ".join(dict.fromkeys(kind(data.source) for data in used))
  # By its digest a resumed run knows its data again.
  signed = lambda source: f", sha256 {source.digest[:12]}" if source.digest else ""
  named = ", ".join(
    f"{data.source.name} ({len(data.images)} photographs{signed(data.source)})" for data in used
  )
  origin = ", ".join(dict.fromkeys(data.source.origin for data in used))
  licence = ", ".join(dict.fromkeys(data.source.licence for data in used))
  text = (
    f"{named}; {kinds} data; from {origin}; licence: {licence}; {len(images)} photographs of "
    f"{len(counts)} individuals to train on ({(counts == 1).sum()} with one), {len(test.query)} queries "
    f"in {len(test.gallery)}"
  )
  if absent := _absent(test):
    text += f"; {absent}"
  return "; ".join([text, *(data.notes for data in used if data.notes)])


def asked(config: Config) -> Search | None:
  """Reads the folders of `query` and `gallery`."""
  if not config.query:
    return None
  # Everything in these folders takes part, whatever a table says of training and test.
  query, gallery = (
    reid.load(name, side=config.image_size) for name in (config.query, config.gallery)
  )
  names = sorted({*query.names, *gallery.names})
  number = lambda data: np.array(
    [names.index(data.names[i]) if i >= 0 else -1 for i in data.identity]
  )
  groups, of_query = sorted(set(query.groups) | set(gallery.groups)), len(query.images)
  grouped = lambda data: np.array(
    [groups.index(data.groups[i]) if i >= 0 else -1 for i in data.group], int
  )
  search = Search(
    np.concatenate([query.images, gallery.images]),
    np.concatenate([number(query), number(gallery)]),
    np.concatenate([grouped(query), grouped(gallery)]),
    np.arange(of_query),
    of_query + np.arange(len(gallery.images)),
    _itself(query, gallery),
    _most(number(gallery)),
    np.concatenate([query.files, gallery.files]),
    names,
  )
  if (search.itself >= 0).any() and len(gallery.images) == 1:
    raise InputError(f"gallery: {config.gallery} has nothing but the query itself")
  for line in filter(None, (query.notes, gallery.notes, _copies(search), _absent(search))):
    print(line, flush=True)
  return search


def _itself(query: ReidData, gallery: ReidData) -> np.ndarray:
  """Place of each query's own file in the gallery, however the folders are spelled; -1: not there."""
  places = {path: i for i, path in enumerate(reid.paths(gallery))}
  return np.array([places.get(path, -1) for path in reid.paths(query)], np.int64)


def _copies(search: Search) -> str:
  """Counts the queries that the gallery holds under another name: they find themselves."""
  there = {search.images[i].tobytes(): i for i in search.gallery}
  own = np.where(search.itself >= 0, search.gallery[search.itself], -1)
  copied = [
    query for query, file in zip(search.query, own, strict=True)
    if file < 0 and search.images[query].tobytes() in there
  ]  # fmt: skip
  if not copied:
    return ""
  some = ", ".join(search.files[i] for i in copied[:5]) + (", ..." if len(copied) > 5 else "")
  return f"{len(copied)} queries have a copy in the gallery, which they will find: {some}"


def _absent(search: Search) -> str:
  """Names the individuals of queries that the gallery does not have."""
  there = set(search.identity[search.gallery].tolist())
  missing = sorted(set(search.identity[search.query].tolist()) - there - {-1})
  if not missing:
    return ""
  some = ", ".join(search.names[i] for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
  return f"{len(missing)} individuals of the queries are not in the gallery: {some}"


def everything(data: ReidData) -> Search:
  """Every photograph searches all the others."""
  return _search(data, np.arange(len(data.images)), np.arange(len(data.images)))


def _source(config: Config, name: str) -> ReidData:
  if name == coats.NAME:
    return coats.load(config.image_size, coats.Herd(individuals=config.individuals))
  if not name.startswith("reid:"):
    raise InputError(f"data: {name!r} is no source of individuals: {coats.NAME} or reid:PATH")
  return reid.load(name, side=config.image_size, split=config.split)


def _dealt(config: Config, data: ReidData) -> tuple[np.ndarray, Search]:
  """Places of the training photographs, and the search."""
  known = data.identity >= 0
  if config.protocol == "closed":
    test = _split_or_drawn(config, data, known, per_identity=True)
    train = np.flatnonzero(known & (data.split != _VALIDATION) & ~test)
    return train, _search(data, np.flatnonzero(known & test), train)
  test = _split_or_drawn(config, data, known, per_identity=False)
  train = np.flatnonzero(known & (data.split != _VALIDATION) & ~test)
  shared = np.intersect1d(data.identity[train], data.identity[known & test])
  if len(shared):
    raise InputError(
      f"{data.source.name}: {len(shared)} individuals are in both parts of {config.split!r}, such as "
      f"{data.names[shared[0]]}; use protocol=closed, or another column"
    )
  query, gallery = (np.flatnonzero(known & (data.split == part)) for part in ("query", "gallery"))
  if not len(query):
    query = gallery = np.flatnonzero(known & test)
  return train, _search(data, query, gallery)


def _split_or_drawn(
  config: Config, data: ReidData, known: np.ndarray, *, per_identity: bool
) -> np.ndarray:
  """Marks the test photographs, (n,) bool."""
  named = set(data.split.tolist()) - {""}
  if named:
    if "train" not in named or not named & _TESTED or named - _TESTED - {"train", _VALIDATION}:
      raise InputError(f"{data.source.name}: expected splits train and test, got {sorted(named)}")
    if (empty := int((data.split == "").sum())) > 0:
      raise InputError(f"{data.source.name}: {empty} photographs have no split")
    return np.isin(data.split, sorted(_TESTED))
  test = np.zeros(len(data.identity), bool)
  rng = np.random.default_rng(config.split_seed)
  if per_identity:
    # One photograph at least stays in the database.
    for who in np.unique(data.identity[known]):
      own = rng.permutation(np.flatnonzero(data.identity == who))
      test[own[: int(config.test_share * len(own))]] = True
    return test
  species = _species(data)
  _, chosen = splits.stratified_split(
    species, (1 - config.test_share, config.test_share), seed=config.split_seed
  )
  return np.isin(data.identity, chosen)


def _species(data: ReidData) -> np.ndarray:
  """The species of each individual, where names say it: letters before a number; else one for all."""
  stems = [name.rstrip("0123456789") for name in data.names]
  if data.source.real:
    stems = [""] * len(stems)
  return np.unique(stems, return_inverse=True)[1]


def _search(data: ReidData, query: np.ndarray, gallery: np.ndarray) -> Search:
  if not len(query) or not len(gallery):
    empty = "gallery" if len(query) else "queries"
    raise InputError(f"{data.source.name}: no photograph is left for the {empty}")
  used = np.union1d(query, gallery)
  at = np.full(len(data.images), -1)
  at[used] = np.arange(len(used))
  place = np.full(len(data.images), -1)
  place[gallery] = np.arange(len(gallery))
  identity = data.identity[used]
  return Search(
    data.images[used],
    identity,
    data.group[used],
    at[query],
    at[gallery],
    place[query],
    _most(data.identity[gallery]),
    data.files[used],
    data.names,
  )


def _joined(searches: Sequence[Search]) -> Search:
  """One search among the photographs of several sources."""
  if len(searches) == 1:
    return searches[0]
  images = np.cumsum([0, *(len(s.images) for s in searches)])
  names = np.cumsum([0, *(len(s.names) for s in searches)])
  groups = np.cumsum([0, *(s.group.max() + 1 for s in searches)])
  before = np.cumsum([0, *(len(s.gallery) for s in searches)])
  shifted = lambda x, by: np.where(x >= 0, x + by, -1)
  each = list(enumerate(searches))
  return Search(
    np.concatenate([s.images for s in searches]),
    np.concatenate([shifted(s.identity, names[i]) for i, s in each]),
    np.concatenate([shifted(s.group, groups[i]) for i, s in each]),
    np.concatenate([s.query + images[i] for i, s in each]),
    np.concatenate([s.gallery + images[i] for i, s in each]),
    np.concatenate([shifted(s.itself, before[i]) for i, s in each]),
    max(s.most for s in searches),
    np.concatenate([s.files for s in searches]),
    [name for s in searches for name in s.names],
  )


def _most(identity: np.ndarray) -> int:
  counts = np.unique(identity[identity >= 0], return_counts=True)[1]
  return int(counts.max()) if len(counts) else 1


def _members(labels: np.ndarray, known: int) -> tuple[np.ndarray, np.ndarray]:
  counts = np.bincount(labels, minlength=known)
  members = np.zeros((known, counts.max()), np.int32)
  for label in range(known):
    own = np.flatnonzero(labels == label)
    members[label, : len(own)] = own
  return members, counts.astype(np.int32)
