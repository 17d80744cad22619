"""Silence is explained, and a finished run answers without any work."""

from __future__ import annotations

import time

import pytest

from jaxmethods.runtime import waiting

RUN = ("train.run", "--method", "tests.tiny", "--workdir", "w")


def test_the_innermost_wait_is_said_with_its_seconds(capsys, monkeypatch):
  monkeypatch.setattr(waiting, "_FIRST", 0.05)
  monkeypatch.setattr(waiting, "_GROWTH", 1.0)
  with waiting.waiting("preparing"):
    with waiting.waiting("training the encoder"):
      time.sleep(0.3)
    inside = capsys.readouterr().out
    time.sleep(0.3)
  outside = capsys.readouterr().out
  assert set(inside.splitlines()) == {"training the encoder: 0 s"}
  assert set(outside.splitlines()) <= {"preparing: 0 s", "preparing: 1 s"}
  assert outside
  time.sleep(0.2)
  assert capsys.readouterr().out == ""


def test_a_short_wait_and_a_quiet_one_say_nothing(capsys, monkeypatch):
  with waiting.waiting("preparing"):
    pass
  monkeypatch.setattr(waiting, "_FIRST", 0.01)
  with waiting.waiting("preparing", quiet=True):
    time.sleep(0.1)
  assert capsys.readouterr().out == ""


def test_a_finished_run_answers_at_once(cli, tmp_path, monkeypatch):
  assert cli(*RUN, "--steps", 6).returncode == 0
  before = {path: path.read_bytes() for path in (tmp_path / "w").rglob("*") if path.is_file()}
  with monkeypatch.context() as patch:
    patch.setattr("jaxmethods.runtime.loop.train", lambda *a, **k: pytest.fail("trained again"))
    result = cli(*RUN, "--steps", 6)
  assert result.returncode == 0, result.stderr
  assert "6 steps done before; see w/report.html" in result.stdout
  assert {p: p.read_bytes() for p in (tmp_path / "w").rglob("*") if p.is_file()} == before

  (tmp_path / "w/report.html").unlink()  # anything missing is made again
  assert cli(*RUN, "--steps", 6).returncode == 0
  assert (tmp_path / "w/report.html").exists()
  assert "8 steps done; see" in cli(*RUN, "--steps", 8).stdout


def test_a_conflict_names_the_remedy_and_says_nothing_before(cli):
  assert cli(*RUN, "--steps", 6).returncode == 0
  result = cli(*RUN, "--steps", 8, "--seed", 2)
  assert result.returncode == 2
  assert result.stdout == ""
  assert "seed (was 1, now 2)" in result.stderr
  assert "--workdir NEW" in result.stderr
