"""Runs that are killed, stopped or damaged, and started again with the same command."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.runs import assert_same_run, last_state, metrics, wait_for_lines

COMMAND = (
  "train.run", "--method", "tests.tiny", "--workdir", "w", "--steps", 120, "--log_every", 2,
  "--eval_every", 3, "--checkpoint_every", 7, "--pause", 0.02,
)  # fmt: skip
EXPERIMENT = tiny.build(tiny.Config())


@pytest.fixture
def undisturbed(cli, tmp_path) -> Path:
  result = cli(*COMMAND)
  assert result.returncode == 0, result.stderr
  return (tmp_path / "w").rename(tmp_path / "undisturbed")


def test_sigkill_at_any_moment_changes_nothing(cli, spawn, tmp_path, undisturbed):
  randomness = random.Random()
  for lines in (3, 15, 40):
    process = spawn(*COMMAND)
    wait_for_lines(process, tmp_path / "w", lines)
    time.sleep(randomness.uniform(0, 0.15))
    process.kill()
    process.communicate()
  result = cli(*COMMAND)
  assert result.returncode == 0, result.stderr
  assert "continuing from step" in result.stdout
  assert_same_run(EXPERIMENT, tmp_path / "w", undisturbed)

  again = cli(*COMMAND)  # a finished run stays as it is
  assert again.returncode == 0, again.stderr
  assert_same_run(EXPERIMENT, tmp_path / "w", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_first(spawn, tmp_path, number):
  process = spawn(*COMMAND, "--checkpoint_every", "1000")
  wait_for_lines(process, tmp_path / "w", 5)
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert err == ""
  step, _ = last_state(EXPERIMENT, tmp_path / "w")
  assert f"stopped by {number.name}, saved at step {step}" in out
  assert metrics(tmp_path / "w")[-1]["step"] in (step, step - 1)


def test_damaged_newest_checkpoint_is_set_aside(cli, tmp_path, undisturbed):
  assert cli(*COMMAND).returncode == 0
  newest = tmp_path / "w/checkpoints/120"
  for file in newest.rglob("*"):
    if file.is_file():
      os.truncate(file, file.stat().st_size // 2)
  result = cli(*COMMAND)
  assert result.returncode == 0, result.stderr
  assert "checkpoints/120 is damaged, moved to damaged-120; using step 119" in result.stdout
  assert (tmp_path / "w/checkpoints/damaged-120").is_dir()
  assert_same_run(EXPERIMENT, tmp_path / "w", undisturbed)


def test_nan_loss_names_the_step_and_keeps_the_last_checkpoint(cli, tmp_path):
  # Step 13 is not logged (every second is), the checkpoint before it is of step 7.
  arguments = (*COMMAND, "--pause", 0, "--nan_at", 13)
  for _ in range(2):  # starting again does not lose the checkpoint either
    result = cli(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: step 13: loss is nan")
    assert last_state(EXPERIMENT, tmp_path / "w")[0] == 7
    assert [line["step"] for line in metrics(tmp_path / "w")] == [2, 4, 6, 8, 10, 12]

  result = cli(*arguments, "--workdir", "debug", "--debug")
  assert result.returncode == 2
  assert "tests/tiny.py" in result.stderr  # the traceback of the operation
  assert result.stderr.splitlines()[-1].startswith("error: step 13: ")


def test_killed_comparison_continues(cli, spawn, tmp_path):
  command = (
    "eval.compare", "--method", "tests.tiny", "--seeds", 2, "--steps", 60, "--checkpoint_every", 5,
    "--average_last", 20,
  )  # fmt: skip
  result = cli(*command, "--workdir", "undisturbed")
  assert result.returncode == 0, result.stderr
  slow = (*command, "--workdir", "c", "--pause", 0.03)
  for row in ("sgd", "adam"):
    process = spawn(*slow)
    deadline = time.monotonic() + 120
    while not (tmp_path / "c/rows" / row / "50").exists():
      assert time.monotonic() < deadline
      time.sleep(0.01)
    process.kill()
    process.communicate()
  assert (tmp_path / "c/rows/sgd.json").exists()
  assert not (tmp_path / "c/rows/sgd").exists()
  result = cli(*slow)
  assert result.returncode == 0, result.stderr
  got, want = (
    json.loads((tmp_path / name / "compare.json").read_text())["rows"]
    for name in ("c", "undisturbed")
  )
  assert [row["metrics"] for row in got] == [row["metrics"] for row in want]
