"""FedSSP from the command line: bad input, kills, devices."""

from pathlib import Path

import numpy as np
import pytest

from jaxmethods.experiments.fedssp.build import build
from jaxmethods.experiments.fedssp.config import Config
from tests import tiny_graphs
from tests.runs import (
  assert_close,
  assert_same_run,
  free_ports,
  last_state,
  metrics,
  wait_for_lines,
)

SMALL = {"hidden": 16, "heads": 2, "layers": 1, "batch_size": 8, "clients_per_domain": 2}
TRAIN = (
  "train.run", "--method", "fedssp", "--data", "tu:RINGS", "--steps", 3,
  *(word for key, value in SMALL.items() for word in (f"--{key}", value)),
)  # fmt: skip


# --- bad input ------------------------------------------------------------------------------------


def rewrite(part, change):
  """Changes one text file of the set RINGS."""

  def damage(folder: Path) -> None:
    file = folder / f"tudataset/RINGS/RINGS_{part}.txt"
    file.write_text(change(file.read_text() if file.exists() else ""))

  return damage


def truncated_archive(folder: Path) -> None:
  (folder / "tudataset/MUTAG.zip").write_bytes(b"PK\x03\x04" + bytes(100))


def nan_attributes(folder: Path) -> None:
  place = folder / "tudataset/RINGS"
  nodes = len((place / "RINGS_graph_indicator.txt").read_text().splitlines())
  (place / "RINGS_node_labels.txt").unlink()
  (place / "RINGS_node_attributes.txt").write_text("1.0\n2.0\nnan\n" + "0.5\n" * (nodes - 3))


def without_line(number):
  return lambda text: "".join(
    line for i, line in enumerate(text.splitlines(keepends=True), 1) if i != number
  )


BAD_INPUT = {
  "missing set, offline": (None, ("--data", "tu:NCI1"), ["tu:NCI1", "JAXMETHODS_DATA"]),
  "unknown set": (None, ("--data", "tu:NCI11"), ["NCI11", "did you mean 'NCI1'"]),
  "corrupt archive": (
    truncated_archive, ("--data", "tu:MUTAG"), ["MUTAG.zip", "damaged zip archive"],
  ),
  "a label too few": (
    rewrite("graph_labels", without_line(7)), (), ["RINGS_graph_labels.txt", "29 labels"],
  ),
  "a gap in the labels' file": (
    rewrite("graph_labels", lambda text: "x\n" + text), (), ["RINGS_graph_labels.txt", "row 1"],
  ),
  "a gap in the graph ids": (
    rewrite("graph_indicator", lambda text: text.replace("30\n", "31\n")), (),
    ["RINGS_graph_indicator.txt", "graph 31 after graph 29"],
  ),
  "no edges": (rewrite("A", lambda text: ""), (), ["client RINGS.0", "no training graphs with edges"]),
  "more clients than graphs": (None, ("--clients_per_domain", 31), ["clients_per_domain", "RINGS"]),
  "one class": (
    rewrite("graph_labels", lambda text: "1\n" * 30), (), ["client RINGS.0", "all have class"],
  ),
  "NaN features": (nan_attributes, (), ["RINGS_node_attributes.txt", "row 3", "not a finite number"]),
  "zero rounds": (None, ("--steps", 0), ["steps: must be at least 1"]),
  "odd width": (None, ("--hidden", 17), ["hidden", "17"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(cli, tmp_path, case):
  damage, arguments, words = BAD_INPUT[case]
  data = tiny_graphs.write(tmp_path / "data")
  if damage:
    damage(data)
  before = sorted(path for path in data.rglob("*") if path.is_file())
  result = cli(
    *TRAIN, "--workdir", "w", *arguments,
    JAXMETHODS_DATA=str(data), JAXMETHODS_CACHE=str(tmp_path / "cache"),
    https_proxy="http://localhost:1", http_proxy="http://localhost:1",  # nobody listens there
  )  # fmt: skip
  assert result.returncode == 2, result.stderr
  assert result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  for word in words:
    assert word in line
  assert {path.name for path in tmp_path.iterdir()} <= {"data", "cache"}
  assert sorted(path for path in data.rglob("*") if path.is_file()) == before


def test_labels_need_not_be_consecutive(cli, tmp_path):
  """TU labels are names: 1 and 5 are two classes, not six."""
  data = tiny_graphs.write(tmp_path / "data")
  rewrite("graph_labels", lambda text: text.replace("0", "5"))(data)
  result = cli(
    *TRAIN, "--steps", 1, "--workdir", "w",
    JAXMETHODS_DATA=str(data), JAXMETHODS_CACHE=str(tmp_path / "cache"),
  )  # fmt: skip
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("algorithm", ["gcfl", "fedstar"])
def test_a_rival_by_its_name_alone(cli, tmp_path, tiny_graphs_environment, algorithm):
  result = cli(
    *TRAIN, "--steps", 1, "--algorithm", algorithm, "--workdir", "w", **tiny_graphs_environment
  )
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "w/accuracy.png").exists()
  assert (tmp_path / "w/spectra.png").exists() == (algorithm != "fedstar")
  result = cli("eval.run", "--method", "fedssp", "--workdir", "w", **tiny_graphs_environment)
  assert result.returncode == 0, result.stderr


# --- kill and resume ------------------------------------------------------------------------------


def test_sigkill_at_any_moment_changes_nothing(
  cli, spawn, tmp_path, tiny_graphs_environment, tiny_graphs_here
):
  steps = 30
  command = (*TRAIN, "--steps", steps, "--checkpoint_every", 4)
  result = cli(*command, "--workdir", "undisturbed", **tiny_graphs_environment)
  assert result.returncode == 0, result.stderr

  killed_at = int(np.random.default_rng().integers(9, steps - 8))
  process = spawn(*command, "--workdir", "w", **tiny_graphs_environment)
  wait_for_lines(process, tmp_path / "w", killed_at)
  process.kill()
  process.communicate()
  result = cli(*command, "--workdir", "w", **tiny_graphs_environment)
  assert result.returncode == 0, result.stderr
  assert "continuing from step" in result.stdout, killed_at

  assert [line["step"] for line in metrics(tmp_path / "w")] == list(range(1, steps + 1)), killed_at
  experiment = build(Config(data="tu:RINGS", **SMALL))
  assert_same_run(experiment, tmp_path / "w", tmp_path / "undisturbed")
  assert last_state(experiment, tmp_path / "w")[0] == steps


# --- devices --------------------------------------------------------------------------------------


# On 8 devices.
ON_DEVICES = (*TRAIN, "--clients_per_domain", 3)
MESH = ("--mesh", "clients=8")


@pytest.mark.parametrize(("clients", "devices"), [(3, 8), (1, 2)], ids=["spread", "dealt"])
def test_devices_agree(cli, tmp_path, tiny_graphs_environment, clients, devices):
  """Clients of one data set are spread over the devices, single ones are dealt to them whole."""
  command = (*TRAIN, "--clients_per_domain", clients)
  for workdir, mesh in (("one", ()), ("many", ("--mesh", f"clients={devices}"))):
    result = cli(*command, *mesh, "--workdir", workdir, **tiny_graphs_environment)
    assert result.returncode == 0, result.stderr
  one = metrics(tmp_path / "one")
  assert len(one) == 3
  assert_close(metrics(tmp_path / "many"), one, rel=1e-4)


@pytest.mark.timeout(900)
def test_two_processes_of_four_devices_agree(cli, spawn, tmp_path, tiny_graphs_environment):
  result = cli(*ON_DEVICES, "--workdir", "one", **tiny_graphs_environment)
  assert result.returncode == 0, result.stderr

  (port,) = free_ports(1)
  processes = [
    spawn(
      *ON_DEVICES, *MESH, "--workdir", "two", "--coordinator", f"localhost:{port}",
      "--num_processes", 2, "--process_id", i, **tiny_graphs_environment,
    )
    for i in range(2)
  ]  # fmt: skip
  outputs = [process.communicate(timeout=500) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  one = metrics(tmp_path / "one")
  assert len(one) == 3
  assert_close(metrics(tmp_path / "two"), one, rel=1e-4)
  assert (tmp_path / "two/report.html").exists()
