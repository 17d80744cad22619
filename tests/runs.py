"""Runs of the command line seen from outside: metrics, last checkpoint, ports."""

import json
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmethods.runtime.checkpoints import Checkpoints


def metrics(workdir: Path) -> list[dict]:
  """The lines of metrics.jsonl without their timings."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    del line["seconds"]
  return lines


def wait_for_lines(process, workdir: Path, count: int) -> None:
  """Returns when a running process has logged `count` steps."""
  file, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
  while not (file.exists() and file.read_text().count("\n") >= count):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.005)


def assert_close(got: list[dict], want: list[dict], rel: float | None = None) -> None:
  """The same metrics to 1e-4, or to `rel` of each where that is more."""
  assert len(got) == len(want) > 0
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name] == pytest.approx(b[name], abs=1e-4, rel=rel), name


def last_state(experiment, workdir: Path):
  """(step, state) of the newest checkpoint."""
  like = experiment.init(jax.random.key(0))
  with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
    restored = checkpoints.restore(like)
  assert restored is not None
  return restored


def assert_same_run(experiment, workdir: Path, undisturbed: Path) -> None:
  """The same metrics, no step twice and none missing, and bit-identical last states."""
  assert metrics(workdir) == metrics(undisturbed)
  (step, state), (expected_step, expected) = (
    last_state(experiment, folder) for folder in (workdir, undisturbed)
  )
  assert step == expected_step
  for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
      got, want = jax.random.key_data(got), jax.random.key_data(want)
    np.testing.assert_array_equal(got, want)


def free_ports(count: int) -> list[int]:
  """Ports of this machine that nobody listens on, all different."""
  sockets = [socket.socket() for _ in range(count)]
  for one in sockets:
    one.bind(("localhost", 0))
  ports = [one.getsockname()[1] for one in sockets]
  for one in sockets:
    one.close()
  return ports


def trained(experiment, seed: int):
  """Does all steps of an experiment; returns (jitted step, last state, last metrics)."""
  state, batches = experiment.init(jax.random.key(seed)), experiment.batches(0)
  step = jax.jit(experiment.step)
  for _ in range(experiment.num_steps):
    state, metrics = step(state, next(batches))
  return step, state, metrics
