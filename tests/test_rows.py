"""Every row of every method is trained, pictured and evaluated by the commands, not by compare alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest

from jaxmethods import experiments
from jaxmethods.errors import InputError
from jaxmethods.runtime import command, config as config_lib


@functools.cache
def commands(method: str) -> dict[str, list[str]]:
  """Row -> the words that make `train.run` that row: what differs from the short config."""
  room, file = experiments.load(method), command.CONFIGS / f"{method}.yaml"
  short = config_lib.load(room.Config, file, short=config_lib.has_short(file))
  shown = {}
  for name, row in room.rows(short).items():
    changed = config_lib.differences(config_lib.plain(short), config_lib.plain(row))
    shown[name] = [f"--{key}={value_text(value)}" for key, (_, value) in changed.items()]
  return shown


def fewest_steps(method: str) -> int:
  """The smallest number of steps that the method takes: one, or one a task."""
  room, file = experiments.load(method), command.CONFIGS / f"{method}.yaml"
  short = config_lib.load(room.Config, file, short=config_lib.has_short(file))
  for steps in range(1, short.steps):
    with contextlib.suppress(InputError):
      return dataclasses.replace(short, steps=steps).steps
  return short.steps


def value_text(value: object) -> str:
  """A value as it is typed."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, list):
    return "[" + ", ".join(map(value_text, value)) + "]"
  return "null" if value is None else str(value)


def assert_trained_and_evaluated(cli, method: str, row: str) -> None:
  file = command.CONFIGS / f"{method}.yaml"
  short = ["--short"] if config_lib.has_short(file) else []
  words = ["--method", method, "--workdir", row]
  trained = cli(
    "train.run", *words, *short, f"--steps={fewest_steps(method)}", *commands(method)[row]
  )
  assert trained.returncode == 0, trained.stderr
  evaluated = cli("eval.run", *words)
  assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "row"), [(method, row) for method in experiments.METHODS for row in commands(method)]
)
def test_every_row(cli, method, row):
  assert_trained_and_evaluated(cli, method, row)


def test_a_row_with_nothing_to_train_is_evaluated_by_its_workdir_alone(cli):
  assert_trained_and_evaluated(cli, "epeagent", "masking")


@pytest.mark.parametrize("method", experiments.METHODS)
def test_the_words_of_a_row_make_its_config(method):
  room, file = experiments.load(method), command.CONFIGS / f"{method}.yaml"
  short = config_lib.load(room.Config, file, short=config_lib.has_short(file))
  for name, row in room.rows(short).items():
    pairs = [tuple(word[2:].split("=", 1)) for word in commands(method)[name]]
    made = config_lib.load(room.Config, file, short=config_lib.has_short(file), overrides=pairs)
    assert made == row, name
    assert dataclasses.is_dataclass(made)
