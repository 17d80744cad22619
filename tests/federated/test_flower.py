"""The Flower deployment gives the numbers of the simulation; marked `flower`, needs flwr.

python -m venv flower-venv && flower-venv/bin/pip install -e '.[test,flower]'
flower-venv/bin/python -m pytest -m flower tests/federated
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from jaxmethods.errors import InputError
from jaxmethods.federated import corrections, engine
from tests.runs import free_ports

pytest.importorskip("flwr")
pytestmark = pytest.mark.flower

import flower_app  # noqa: E402
from flwr.app import Array, Context, Error, Message, RecordDict  # noqa: E402

from jaxmethods.federated import flower  # noqa: E402

HERE = Path(__file__).parent
PROJECT = """
[project]
name = "deployment"
version = "1.0.0"
description = "two clients"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "jaxmethods"
[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"
"""
SUPERLINK = """
[superlink]
default = "here"
[superlink.here]
address = "{address}"
insecure = true
"""


class Nodes:
  """A grid whose nodes are ClientApps in this process; node 100 + n has the n-th partition-id.

  Attributes:
    away: partition ids that are not online.
    broken: those that answer every order with an error.
    orders: (round, partition id) of all orders.
  """

  def __init__(self, app, partitions):
    self.contexts = {
      100 + n: Context(1, 100 + n, {"partition-id": i}, RecordDict(), {})
      for n, i in enumerate(partitions)
    }
    self.app, self.away, self.broken, self.orders = app, set(), set(), []

  def get_node_ids(self):
    return [n for n, c in self.contexts.items() if c.node_config["partition-id"] not in self.away]

  def send_and_receive(self, messages, timeout=None):
    del timeout
    return [self._reply(message) for message in messages]

  def _reply(self, message):
    context = self.contexts[message.metadata.dst_node_id]
    client = context.node_config["partition-id"]
    if message.metadata.message_type == "train":
      self.orders.append((int(message.metadata.group_id), client))
      if client in self.broken:
        return Message(Error(0, "out of memory"), reply_to=message)
    try:
      return self.app(message, context)
    except InputError as error:
      return Message(Error(0, str(error)), reply_to=message)


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
  """What Flower's own processes set before an app may create messages."""
  identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
  for name in ("_task_id", "_run_id", "_node_id"):
    monkeypatch.setattr(identity, name, 1)
  monkeypatch.setattr(flower, "_POLL_SECONDS", 0.0)


def simulate(sizes, taking_part, key=flower_app.KEY):
  """Server state and metrics of `federated_round`, for every row of `taking_part` (rounds, clients)."""
  data = problems.bucketed(1, sizes=sizes)
  rows = np.asarray(data.ids[0])  # which client sits in which row
  start = corrections.init_client(problems.params())
  clients = (jax.tree.map(lambda x: jnp.broadcast_to(x, (len(sizes), *x.shape)), start),)
  server, history = flower_app.FED.init(problems.params(), key), []

  @jax.jit
  def one(server, clients, key, taking_part):
    return engine.federated_round(
      flower_app.FED, server, clients, data.data, data.weights, key,
      ids=data.ids, taking_part=taking_part,
    )  # fmt: skip

  for r, some in enumerate(taking_part):
    server, clients, metrics = one(
      server, clients, jax.random.fold_in(key, r), jnp.asarray(some[rows])
    )
    history.append((server, metrics["loss"][np.argsort(rows)]))
  return history


def deploy(sizes, rounds, partitions=None, load=flower_app.load, between=None, **options):
  """The same from a server and clients that only exchange messages."""
  client = flower.client_app(flower_app.FED, problems.params(), lambda i: load(i, sizes))
  nodes = Nodes(client, range(len(sizes)) if partitions is None else partitions)
  history = []

  def report(r, server, metrics):
    history.append((server, metrics))
    if between:
      between(r, nodes)

  server = flower.server_app(
    flower_app.FED, problems.params(), num_clients=len(sizes), num_rounds=rounds,
    key=flower_app.KEY, upload=flower_app.upload_form(), report=report, **options,
  )  # fmt: skip
  server(nodes, None)
  return history, nodes


def assert_same(ours, theirs):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


SIZES = (5, 3, 12, 7)


def test_rounds_are_those_of_the_simulation():
  expected = simulate(SIZES, np.ones((3, 4), bool))
  got, nodes = deploy(SIZES, 3, partitions=[2, 0, 3, 1])
  for (server, metrics), (their_server, their_loss) in zip(got, expected, strict=True):
    assert_same((server, metrics["loss"]), (their_server, their_loss))
  assert sorted(nodes.orders) == [(r, i) for r in (1, 2, 3) for i in range(4)]


def test_away_or_broken_clients_do_not_count_in_that_round():
  def between(r, nodes):
    nodes.away, nodes.broken = ({1}, {3}) if r == 0 else (set(), set())

  some = np.array([[True] * 4, [True, False, True, False], [True] * 4])
  expected = simulate(SIZES, some)
  got, nodes = deploy(SIZES, 3, between=between)
  for r, ((server, metrics), (their_server, _)) in enumerate(zip(got, expected, strict=True)):
    assert_same(server, their_server)
    np.testing.assert_array_equal(metrics["counted"], some[r])
    np.testing.assert_array_equal(np.isfinite(metrics["loss"]), some[r])
  assert (2, 1) not in nodes.orders and (3, 1) in nodes.orders


def test_nan_upload_is_left_out_and_not_remembered():
  def load(i, sizes):
    site = flower_app.load(i, sizes)
    poisoned = {**site.data, "x": site.data["x"] * jnp.nan}
    return site._replace(data=poisoned) if i == 1 else site

  got, nodes = deploy(SIZES, 2, load=load)
  some = np.array([[True, False, True, True]] * 2)
  assert_same(got[-1][0], simulate(SIZES, some)[-1][0])
  assert "client" not in nodes.contexts[101].state
  assert "client" in nodes.contexts[100].state


def test_some_are_drawn_for_every_round():
  got, nodes = deploy(SIZES, 6, taking_part=2)
  assert [metrics["counted"].sum() for _, metrics in got] == [2] * 6
  assert {i for _, i in nodes.orders} == set(range(4))


@pytest.mark.parametrize(
  ("partitions", "match"),
  [([0, 1, 2, 2], "partition-id=2: two nodes"), ([0, 1, 2, 4], "partition-id=4: there are 4")],
)
def test_wrong_numbers_are_named(partitions, match):
  with pytest.raises(InputError, match=match):
    deploy(SIZES, 1, partitions, load=lambda i, sizes: flower_app.load(0, sizes))


def test_a_client_without_data_is_named_before_the_first_round():
  def load(i, sizes):
    raise InputError(f"/data/site{i}: no such folder")

  with pytest.raises(InputError, match=r"node 100 cannot take part: /data/site0"):
    deploy(SIZES, 1, load=load)


def test_pack_and_unpack_give_back_every_kind_of_array():
  tree = {
    "w": [jnp.ones((2, 3), jnp.bfloat16) / 3, jnp.arange(4)],
    "flag": jnp.asarray(True),
    "key": jax.random.split(jax.random.key(3), 2),
  }
  back = flower.unpack(flower.pack(tree), tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
    assert a.dtype == b.dtype and bool((a == b).all())


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda record: record.pop("['a']"), r"\['a'\]' is missing"),
    (lambda record: record.update({"x": Array(np.zeros(1))}), "'x' was not expected"),
    (lambda record: record.update({"['a']": Array(np.zeros(2, np.float32))}), r"float32\[2\]"),
    (lambda record: record.update({"['a']": Array(np.zeros(3, np.int32))}), r"int32\[3\]"),
  ],
)
def test_another_form_is_named(change, match):
  tree = {"a": jnp.zeros(3), "b": jnp.zeros(())}
  record = flower.pack(tree)
  change(record)
  with pytest.raises(InputError, match=match):
    flower.unpack(record, tree)


@pytest.fixture
def processes(tmp_path):
  """Starts a command of Flower's beside this Python, and ends what was started."""
  started, home = [], tmp_path / "home"
  home.mkdir()
  result = tmp_path / "result.json"
  env = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    "FLWR_HOME": str(home),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLOWER_RESULT": str(result),
  }

  def start(command, *arguments):
    log = (tmp_path / f"{len(started)}.log").open("w")
    process = subprocess.Popen(
      [command, *map(str, arguments)], cwd=tmp_path, env=env, stdout=log, stderr=log
    )
    started.append(process)
    return process

  yield start, result
  for process in reversed(started):
    process.terminate()
  for process in started:
    process.wait(timeout=60)


@pytest.mark.timeout(900)
def test_server_and_two_clients_on_loopback(tmp_path, processes):
  start, result = processes
  ports = free_ports(3)
  address = f"127.0.0.1:{ports[0]}"
  app = tmp_path / "app"
  app.mkdir()
  (app / "pyproject.toml").write_text(PROJECT)
  shutil.copy(HERE / "flower_app.py", app)
  (tmp_path / "home" / "config.toml").write_text(SUPERLINK.format(address=address))
  no_install = "--disable-runtime-dependency-installation"
  start("flower-superlink", "--insecure", no_install, "--port", ports[0])
  wait_for(lambda: is_listening(ports[0]), 120)
  for i in range(2):
    start(
      "flower-supernode", "--insecure", "--superlink", address, "--port", ports[1 + i],
      "--node-config", f"partition-id={i}",
    )  # fmt: skip
  run = start("flwr", "run", app, "here", "--stream")
  wait_for(lambda: result.exists() or run.poll(), 600)
  assert result.exists(), "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
  everyone = np.ones((flower_app.ROUNDS, len(flower_app.SIZES)), bool)
  expected = jax.tree.leaves(simulate(flower_app.SIZES, everyone)[-1])
  got = json.loads(result.read_text())
  assert len(got) == len(expected)
  for ours, theirs in zip(got, expected, strict=True):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=2e-5, atol=1e-6)


def is_listening(port):
  with socket.socket() as probe:
    return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, seconds):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.5)
