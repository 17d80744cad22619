"""Clients that exist as a number until a round needs them: memory does not grow with the population."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxmethods.experiments.federated.holdings import Arrays, Pool, stacked

_TEST, _COHORT = 1, 2  # streams of random numbers beside that of the clients


class Population(NamedTuple):
  """A pool, and how a client is drawn from it.

  Attributes:
    arrays: examples for training, (n, ...) each, "y" (n,) among them.
    members: of each class, the examples.
    size: clients.
    examples: of a client on average; it has half to one and a half times as many.
    alpha: of the Dirichlet draw of a client's classes.
    seed: of all draws.
  """

  arrays: Arrays
  members: list[np.ndarray]
  size: int
  examples: int
  alpha: float
  seed: int


def make(
  pool: Pool, size: int, examples: int, alpha: float, test_share: float, seed: int
) -> tuple[Population, Arrays]:
  """Sets a test aside; returns the population and the test.

  Args:
    pool: all examples.
    size: clients.
    examples: of a client on average.
    alpha: of the Dirichlet draw of a client's classes.
    test_share: of the pool, where the source has no test of its own.
    seed: of all draws.
  """
  labels = pool.arrays["y"]
  order = np.random.default_rng([seed, _TEST]).permutation(len(labels))
  count = 0 if pool.published else max(round(test_share * len(order)), 1)
  test = pool.published or {name: x[np.sort(order[:count])] for name, x in pool.arrays.items()}
  train = {name: x[np.sort(order[count:])] for name, x in pool.arrays.items()}
  return Population(
    train, _by_class(train["y"], pool.num_classes), size, examples, alpha, seed
  ), test


def client(population: Population, number: int) -> Arrays:
  """Draws a client by its number, with replacement: the same at every call."""
  random = np.random.default_rng([population.seed, 0, number])
  least, most = sizes(population)
  count = int(random.integers(least, most + 1))
  rows = _draw(random, population.members, population.alpha, count)
  return {name: x[rows] for name, x in population.arrays.items()}


def examined(population: Population, test: Arrays, number: int) -> Arrays:
  """Draws a test for a client, from other examples than all clients' and by the shares of its classes.

  Args:
    population: of the client.
    test: examples that no client has.
    number: of the client.
  """
  own = np.bincount(client(population, number)["y"], minlength=len(population.members))
  share = (own / own.sum())[test["y"]] / np.bincount(test["y"])[test["y"]]
  random = np.random.default_rng([population.seed, _TEST, number])
  if not share.any():  # no class of the client is tested on
    return {name: x[:0] for name, x in test.items()}
  rows = random.choice(len(share), population.examples, p=share / share.sum())
  return {name: x[rows] for name, x in test.items()}


def sizes(population: Population) -> tuple[int, int]:
  """Returns the fewest and the most examples that a client may have."""
  half = population.examples // 2
  return max(half, 1), population.examples + half


def cohort(population: Population, size: int, seed: int, step: int) -> np.ndarray:
  """Draws the clients of a round, (size,) int, without replacement and without a list of them all."""
  random = np.random.default_rng([seed, _COHORT, step])
  return random.choice(population.size, size, replace=False, shuffle=False)


def batches(
  population: Population, size: int, multiple: int, seed: int, first: int
) -> Iterator[tuple[Arrays, np.ndarray, np.ndarray]]:
  """Yields (padded clients, weights, numbers) of the rounds from `first` on.

  Args:
    population: of the clients.
    size: clients of a round.
    multiple: of which the padded length is one.
    seed: of the rounds.
    first: round to begin with.
  """
  longest = sizes(population)[1]
  blank = {
    name: np.zeros((longest, *x.shape[1:]), x.dtype) for name, x in population.arrays.items()
  }
  while True:
    numbers = cohort(population, size, seed, first)
    drawn = [client(population, int(number)) for number in numbers]
    # A row of the greatest length there is keeps the shape the same in all rounds.
    rows = {name: x[:-1] for name, x in stacked([*drawn, blank], multiple).items()}
    yield rows, rows["mask"].sum(1).astype(np.float32), numbers.astype(np.int32)
    first += 1


def _draw(
  random: np.random.Generator, members: list[np.ndarray], alpha: float, count: int
) -> np.ndarray:
  """Draws examples: shares of the classes by Dirichlet, then with replacement inside a class."""
  present = [own for own in members if len(own)]
  share = random.dirichlet([alpha] * len(present))
  counts = random.multinomial(count, share)
  return np.concatenate([random.choice(own, n) for own, n in zip(present, counts, strict=True)])


def _by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
  return [np.flatnonzero(labels == c) for c in range(num_classes)]
