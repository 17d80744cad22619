"""One device, eight virtual devices, and two processes of four devices give the same metrics."""

import pytest

from tests.runs import assert_close, free_ports, metrics

COMMAND = ("train.run", "--method", "tests.tiny", "--steps", 25, "--checkpoint_every", 10)


def test_devices_and_processes_agree(cli, spawn, tmp_path):
  result = cli(*COMMAND, "--workdir", "one")
  assert result.returncode == 0, result.stderr
  one = metrics(tmp_path / "one")

  result = cli(*COMMAND, "--workdir", "eight", "--mesh", "clients=8")
  assert result.returncode == 0, result.stderr
  assert_close(metrics(tmp_path / "eight"), one)

  def two_processes(*arguments):
    port = free_ports(1)[0]
    # The second one from the environment, as a cluster would start it.
    first = spawn(
      *COMMAND, *arguments, "--coordinator", f"localhost:{port}", "--num_processes", 2,
      "--process_id", 0,
    )  # fmt: skip
    second = spawn(
      *COMMAND,
      *arguments,
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID="1",
    )
    outputs = [process.communicate(timeout=400) for process in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    return outputs

  # Half of the way first: a restart finds its checkpoint in both processes.
  mesh = ("--workdir", "two", "--mesh", "clients=8")
  two_processes(*mesh, "--steps", 13)
  (out, _), (silent, _) = two_processes(*mesh)
  assert "continuing from step 13" in out
  assert "tests.tiny" not in silent  # one process speaks for all
  assert_close(metrics(tmp_path / "two"), one)
  assert (tmp_path / "two/report.html").exists()


@pytest.mark.slow
def test_a_process_may_be_late(spawn, tmp_path):
  """By more than the 30 s that the collectives on CPU wait for each other at first."""
  arguments = ("--steps", 2, "--mesh", "clients=8", "--late", 40, "--workdir", "late")
  cluster = ("--coordinator", f"localhost:{free_ports(1)[0]}", "--num_processes", 2, "--process_id")
  processes = [spawn(*COMMAND, *arguments, *cluster, i) for i in range(2)]
  outputs = [process.communicate(timeout=400) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert (tmp_path / "late/report.html").exists()


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--mesh", "clients=9", "--num_processes", 2], ["9 devices", "2 processes"]),
    (["--mesh", "clients=0"], ["clients=0"]),
    (["--mesh", "a=2,a=4"], ["a=2,a=4"]),
  ],
)
def test_impossible_mesh(cli, tmp_path, arguments, words):
  processes = ("--coordinator", "localhost:1", "--process_id", 0) if len(arguments) > 2 else ()
  result = cli(*COMMAND, *arguments, *processes)
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  for word in words:
    assert word in result.stderr
  assert not list(tmp_path.iterdir())


def test_mesh_that_the_machine_cannot_give(cli):
  flags = "--xla_force_host_platform_device_count=2"
  result = cli(*COMMAND, "--mesh", "clients=8", XLA_FLAGS=flags)
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert "needs 8 devices, there are 2 cpu" in result.stderr
