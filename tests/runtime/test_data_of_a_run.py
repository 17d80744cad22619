"""A run is bound to the data it began with."""

import numpy as np
import pytest

from eval import compare
from jaxmethods.errors import InputError
from jaxmethods.runtime import workdir
from train import run

ABOUT = "npz:a.npz (6 examples, sha256 {}), digits (1797 examples); data of yours; from a.npz"


def test_digests():
  assert workdir.digests(ABOUT.format("12ab")) == {"npz:a.npz": "12ab"}
  assert workdir.digests("drawn from a seed") == {}


def test_kept_and_checked(tmp_path):
  workdir.check_data(tmp_path, ABOUT.format("12ab"))  # a new run
  workdir.keep_data(tmp_path, ABOUT.format("12ab"))
  workdir.check_data(tmp_path, ABOUT.format("12ab"))
  workdir.check_data(tmp_path, "npz:other.npz (3 examples, sha256 77)")  # another row
  with pytest.raises(InputError, match=r"npz:a\.npz \(was sha256 12ab, now 34cd\)"):
    workdir.check_data(tmp_path, ABOUT.format("34cd"))
  (tmp_path / workdir.DATA).write_text("{")
  with pytest.raises(InputError, match=r"data\.json: cannot be read"):
    workdir.check_data(tmp_path, ABOUT.format("12ab"))


def write(file, shift):
  rng = np.random.default_rng(0)
  y = np.arange(80) % 4
  x = np.eye(4)[y].repeat(2, 1) + 0.3 * rng.normal(size=(80, 8)) + shift
  np.savez(file, x=x.astype(np.float32), y=y)


@pytest.mark.parametrize("command", [run, compare])
def test_a_resumed_run_with_other_data_stops(command, tmp_path):
  file = tmp_path / "a.npz"
  arguments = [
    "--method", "ggeur", "--data", f"npz:{file}", "--skew", "labels", "--clients", "2", "--alpha", "0",
    "--target", "20", "--own_per_anchor", "2", "--own_samples", "20", "--prototype_samples", "20",
    "--batch_size", "8", "--steps", "1", "--workdir", str(tmp_path / "w"),
  ]  # fmt: skip
  if command is compare:
    arguments += ["--seeds", "1", "--rows", "ggeur"]
  write(file, 0)
  assert command.main(arguments) == 0
  write(file, 1)
  if command is compare:
    for row in (tmp_path / "w" / "rows").glob("*.json"):
      row.unlink()  # as if it had not been reached
  with pytest.raises(InputError, match="the data have changed since this run began"):
    command.main(arguments)
