"""The split is scikit-learn's, and goes on where scikit-learn refuses."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.data.splits import stratified_split
from jaxmethods.errors import InputError


def _sklearn(labels, seed=123):
  from sklearn.model_selection import train_test_split

  index = np.arange(len(labels))
  train, rest = train_test_split(index, test_size=0.2, random_state=seed, stratify=labels)
  valid, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest])
  return train, valid, test


@pytest.mark.parametrize(
  "counts",
  # MUTAG, BZR, NCI1, Letter, IMDB-MULTI, AIDS and the smallest sets OHSU, Peking_1
  [(63, 125), (319, 86), (2053, 2057), (150,) * 15, (500,) * 3, (400, 1600), (35, 44), (49, 36)],
)
def test_indices_are_those_of_scikit_learn(counts):
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
  for ours, theirs in zip(stratified_split(labels), _sklearn(labels), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**31))
def test_any_classes(counts, seed):
  labels = np.repeat(np.arange(len(counts)), counts)
  if len(labels) < 6:  # a fifth of it, rounded up, is a single example
    with pytest.raises(InputError, match="too few"):
      stratified_split(labels, seed=seed)
    return
  parts = stratified_split(labels, seed=seed)
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
  share = np.array(counts) / len(labels)
  for part in parts:  # in proportion, to a rounding per cut
    got = np.bincount(labels[part], minlength=len(counts))
    assert (abs(got - share * len(part)) <= 2).all()
  try:
    expected = _sklearn(labels, seed)
  except ValueError:  # scikit-learn refuses: checked above that we do not
    return
  for ours, theirs in zip(parts, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_many_small_classes():
  labels = np.repeat(
    np.arange(30), 9
  )  # Cuneiform: scikit-learn cannot halve 54 signs of 30 classes
  train, valid, test = stratified_split(labels)
  assert (len(train), len(valid), len(test)) == (216, 27, 27)
  assert len(set(labels[train])) == 30
  assert np.bincount(labels[train]).min() >= 7


def test_two_parts_and_one():
  labels = np.arange(100) % 2
  assert [len(part) for part in stratified_split(labels, (0.7, 0.3))] == [70, 30]
  assert [len(part) for part in stratified_split(labels, (1.0,))] == [100]


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.5, 0.5, 0.0), (), (1.2, -0.2)])
def test_bad_fractions(fractions):
  with pytest.raises(InputError, match="shares"):
    stratified_split(np.arange(10), fractions)
