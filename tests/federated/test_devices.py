"""One device, 8 virtual devices and 2 processes of 4 devices give the same numbers."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import problems
import pytest

from jaxmethods.federated import engine
from tests.runs import free_ports

WORKER = Path(__file__).with_name("devices_worker.py")
RESULT = "result: "


def start(*arguments):
  root = WORKER.parents[2]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(WORKER.parent)])}
  return subprocess.Popen(
    [sys.executable, str(WORKER), *map(str, arguments)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def result(*workers):
  out = [worker.communicate(timeout=300) for worker in workers]
  for worker, (_, errors) in zip(workers, out, strict=True):
    assert worker.returncode == 0, errors[-3000:]
  # The collectives library writes to standard output too, and not always before us.
  lines = [line for line in out[0][0].splitlines() if line.startswith(RESULT)]
  assert lines, out[0][0][-3000:]
  return [np.array(x) for x in json.loads(lines[-1].removeprefix(RESULT))]


@functools.cache
def one_device(kind):
  """The same three rounds in this process, without a mesh."""
  buckets = problems.buckets_of(kind)

  def shared(path):
    return "head" not in path

  fed = problems.algorithm(shared=shared)
  server = fed.init(problems.params(), jax.random.key(0))
  clients = problems.states(buckets, shared=shared)

  @jax.jit
  def one(server, clients, seed):
    key = jax.random.key(seed)
    here = engine.sample_participants(key, 6, 5)
    return engine.federated_round(
      fed, server, clients, buckets.data, buckets.weights, key,
      ids=buckets.ids, taking_part=here, client_map="vmap", drop_nonfinite=True,
    )  # fmt: skip

  for r in range(3):
    server, clients, metrics = one(server, clients, r)
  return jax.tree.leaves((server, clients, metrics))


@pytest.mark.parametrize("kind", ["spread", "dealt"])
@pytest.mark.parametrize("devices", [2, 8])
def test_virtual_devices(devices, kind):
  for a, b in zip(one_device(kind), result(start(devices, kind)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_two_processes_of_four_devices():
  (port,) = free_ports(1)
  workers = [start(4, "dealt", 2, process, port) for process in (0, 1)]
  for a, b in zip(one_device("dealt"), result(*workers), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
