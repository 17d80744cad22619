"""Checkpoints whose files are damaged one by one, and what a reader may touch."""

import os
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.runtime.checkpoints import Checkpoints


class State(NamedTuple):
  weights: dict
  key: jax.Array
  nothing: tuple
  seconds: np.ndarray


def state_at(step: int) -> State:
  weights = {"w": jnp.full((64, 32), step, jnp.float32), "b": jnp.full(3, step, jnp.bfloat16)}
  return State(weights, jax.random.key(step), (), np.array([step], np.float64))


def assert_is(state: State, step: int) -> None:
  expected = state_at(step)
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  assert state.weights["b"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(state.weights["w"], expected.weights["w"])
  assert jax.random.key_data(state.key).tolist() == jax.random.key_data(expected.key).tolist()
  np.testing.assert_array_equal(state.seconds, expected.seconds)


def test_keeps_the_newest(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore(state_at(0)) is None
    for step in (1, 2, 3):
      checkpoints.save(step, state_at(step))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
  with Checkpoints(tmp_path) as checkpoints:
    step, state = checkpoints.restore(state_at(0))
    assert_is(state, 3)
    checkpoints.save(3, state)  # already there: nothing to do
  assert step == 3


def test_donated_buffers_are_not_saved_over(tmp_path):
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((1000, 1000))
  with Checkpoints(tmp_path, keep=9) as checkpoints:
    for step in range(1, 4):
      x = advance(x)
      checkpoints.save(step, {"x": x})
      for _ in range(5):
        x = advance(x)
    _, restored = checkpoints.restore({"x": x})
  np.testing.assert_array_equal(restored["x"], 13)


def test_any_truncated_file_is_survived(tmp_path):
  original = tmp_path / "original"
  with Checkpoints(original, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state_at(step))
  files = [file for file in sorted((original / "2").rglob("*")) if file.is_file()]
  set_aside = 0
  for file in files:
    for size in (0, file.stat().st_size // 2):
      copy = tmp_path / "copy"
      shutil.copytree(original, copy)
      os.truncate(copy / file.relative_to(original), size)
      with Checkpoints(copy, keep=3) as checkpoints:
        step, state = checkpoints.restore(state_at(0))
        assert_is(state, step)
        assert (copy / "damaged-2").exists() == (step == 1)
        set_aside += step == 1
        checkpoints.save(2, state_at(2))
        checkpoints.wait()
        assert_is(checkpoints.restore(state_at(0))[1], 2)
      shutil.rmtree(copy)
  assert set_aside >= 2  # most files of a checkpoint are needed


def test_nothing_readable_is_an_error_and_moves_nothing(tmp_path):
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state_at(step))
    with pytest.raises(InputError, match="no checkpoint can be read"):
      checkpoints.restore({"other": jnp.zeros(3)})
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_reader_leaves_a_running_save_alone(tmp_path):
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state_at(step))
  unfinished = tmp_path / "3.orbax-checkpoint-tmp"
  unfinished.mkdir()
  for file in (tmp_path / "2").rglob("*"):
    if file.is_file():
      os.truncate(file, 0)
  with Checkpoints(tmp_path, read_only=True) as reader:
    step, state = reader.restore(state_at(0))
  assert_is(state, 1)
  assert step == 1
  assert unfinished.exists()
  assert (tmp_path / "2").exists()
  with Checkpoints(tmp_path):
    assert not unfinished.exists()
