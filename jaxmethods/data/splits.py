"""Stratified splits, equal to those of the published protocols."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmethods.errors import InputError


def stratified_split(
  labels: np.ndarray, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 123
) -> tuple[np.ndarray, ...]:
  """Splits examples so that every part has the class shares of the whole.

  The parts are cut off one after the other (20 % off, then halved) with scikit-learn's
  `train_test_split(stratify=labels, random_state=seed)` arithmetic, on which FedSSP, GCFL and FedStar
  rely: the indices are the same. Where scikit-learn refuses (a class with one member, or fewer places
  than classes: Cuneiform has 9 signs per class) the same arithmetic goes on; a small class may then
  be missing from a part.

  Args:
    labels: (n,) class ids.
    fractions: share of each part; they sum to 1.
    seed: the same for every cut.

  Returns:
    One (n_part,) int64 index array per fraction, in the (shuffled) order of scikit-learn.

  Raises:
    InputError: if the fractions are no shares of 1, or a part would be empty.
  """
  labels = np.asarray(labels)
  if min(fractions, default=0) <= 0 or abs(sum(fractions) - 1) > 1e-6:
    raise InputError(f"fractions {tuple(fractions)}: expected positive shares that sum to 1")
  parts, rest, share = [], np.arange(len(labels)), 1.0
  for fraction in fractions[:-1]:
    # Rounded, so that 1 - 0.8 is the 0.2 a person would pass to scikit-learn.
    other = round((share - fraction) / share, 12)
    first, second = _cut(labels[rest], other, np.random.RandomState(seed))
    if not len(first) or not len(second):
      raise InputError(f"{len(labels)} examples are too few for parts of {tuple(fractions)}")
    parts.append(rest[first])
    rest, share = rest[second], share - fraction
  return (*parts, rest)


def _cut(
  labels: np.ndarray, fraction: float, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the kept part and of the part of size ceil(fraction * n) cut off."""
  n_off = int(np.ceil(fraction * len(labels)))
  class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
  keep = _share_out(counts, len(labels) - n_off, random)
  off = _share_out(counts - keep, n_off, random)
  kept, cut = [], []
  for c, count in enumerate(counts):
    members = np.flatnonzero(class_of == c)[random.permutation(count)]
    kept.append(members[: keep[c]])
    cut.append(members[keep[c] : keep[c] + off[c]])
  return random.permutation(np.concatenate(kept)), random.permutation(np.concatenate(cut))


def _share_out(counts: np.ndarray, places: int, random: np.random.RandomState) -> np.ndarray:
  """Distributes `places` over classes in proportion, largest remainders first, ties at random."""
  exact = counts / counts.sum() * places
  given = np.floor(exact)
  remainder = exact - given
  left = int(places - given.sum())
  for value in np.unique(remainder)[::-1]:
    if left <= 0:
      break
    tied = np.flatnonzero(remainder == value)
    tied = random.choice(tied, size=min(len(tied), left), replace=False)
    given[tied] += 1
    left -= len(tied)
  return given.astype(int)
