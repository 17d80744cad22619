"""Whatever a file, a disk, a folder name or memory does to a run: one line and an exit status."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from jaxmethods import folders
from jaxmethods.errors import InputError, MachineError
from jaxmethods.runtime import command, failures
from jaxmethods.runtime.metric_log import MetricLog
from tests import tiny
from tests.runs import assert_same_run

RUN = ("train.run", "--method", "tests.tiny", "--steps", 12, "--checkpoint_every", 3)


def system(number: int, file: str | None = None) -> OSError:
  return OSError(number, os.strerror(number), file)


def chained(error: BaseException) -> Exception:
  outer = ValueError("something of a library\nin two lines")
  outer.__cause__ = error
  return outer


@pytest.mark.parametrize(
  ("error", "status", "words"),
  [
    (InputError("a: b\n c"), 2, "a: b c"),
    (MachineError("a"), 1, "a"),
    (system(errno.ENOENT, "x.npz"), 2, "x.npz: No such file or directory"),
    (system(errno.EISDIR, "x"), 2, "x: Is a directory"),
    (system(errno.ENAMETOOLONG, "x"), 2, "x: File name too long"),
    (system(errno.ENOSPC, "x"), 1, "x: No space left on device; make space"),
    (system(errno.EDQUOT), 1, "Disk quota exceeded; make space"),
    (system(errno.EROFS, "x"), 1, "x: Read-only file system"),
    (system(errno.EACCES, "x"), 1, "x: Permission denied"),
    (chained(system(errno.EIO, "x")), 1, "x: Input/output error"),
    (
      ValueError("UNKNOWN: Error writing: No space left on device [tensorstore]"),
      1,
      "No space left",
    ),
    (MemoryError(), 1, "not enough memory"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes"), 1, "not enough memory"),
    (ExceptionGroup("some", [system(errno.ENOSPC)]), 1, "No space left"),
    (RuntimeError("Could not determine home directory."), 2, "home folder"),
    (ZeroDivisionError("division by zero"), 1, "a fault of the program: ZeroDivisionError"),
  ],
)
def test_every_exception_is_one_line(capsys, error, status, words):
  def main(argv):
    raise error

  assert command.run(main, []) == status
  said = capsys.readouterr()
  (line,) = said.err.splitlines()
  assert line.startswith("error: ")
  assert words in line


def test_the_traceback_of_a_fault_is_kept(tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  line = failures.explain(ZeroDivisionError("division by zero")).line
  (kept,) = tmp_path.iterdir()
  assert str(kept) in line
  assert "ZeroDivisionError" in kept.read_text()


def test_a_thread_that_dies_is_one_line(capsys):
  def main(argv):
    def die():
      raise system(errno.ENOSPC, "events")

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    return 0

  assert command.run(main, []) == 0
  assert capsys.readouterr().err.startswith("warning: events: No space left on device")


@pytest.mark.parametrize("place", ["write", "sync"])
def test_a_disk_that_fills_up_costs_no_step(cli, tmp_path, monkeypatch, place):
  assert cli(*RUN, "--workdir", "whole").returncode == 0
  calls = iter(range(10**6))
  whole = getattr(MetricLog, place)

  def full(*arguments):
    if next(calls) == (7 if place == "write" else 2):
      raise system(errno.ENOSPC, "metrics.jsonl")
    whole(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(MetricLog, place, full)
    result = cli(*RUN, "--workdir", "w")
  assert result.returncode == 1
  assert result.stderr == (
    "error: metrics.jsonl: No space left on device; make space, the same command continues\n"
  )
  again = cli(*RUN, "--workdir", "w")
  assert again.returncode == 0
  assert "continuing from step" in again.stdout
  assert_same_run(tiny.build(tiny.Config()), tmp_path / "w", tmp_path / "whole")


@pytest.mark.parametrize(
  "name", ["lr[0.1]", "[", "a]b", "every*", "why?", "back\\slash", "two words", "größe-数", "{a,b}",
           "#1", "%20", "~", "$HOME", "-dash", "quote'\"", "a:b", "new\nline"],
)  # fmt: skip
def test_a_run_may_have_any_name(cli, tmp_path, name):
  for folder in ("plain", name):
    assert cli(*RUN, "--steps", 6, f"--workdir=runs/{folder}").returncode == 0
    result = cli("eval.run", "--method", "tests.tiny", f"--workdir=runs/{folder}")
    assert (result.returncode, result.stderr) == (0, "")
    result = cli(*RUN, f"--workdir=runs/{folder}")
    assert (result.returncode, result.stderr) == (0, "")
    assert "continuing from step 6" in result.stdout
  assert_same_run(tiny.build(tiny.Config()), tmp_path / "runs" / name, tmp_path / "runs/plain")
  assert {path.name for path in (tmp_path / "runs").iterdir()} == {"plain", name}


@pytest.mark.parametrize("flag", ["--workdir", "--config"])
@pytest.mark.parametrize(
  "place", ["gs://bucket/run", "s3://bucket/run", "hdfs://a/b", "file:///tmp/x", ""]
)
def test_places_on_other_machines_are_refused_first(cli, tmp_path, flag, place):
  result = cli(*RUN, f"{flag}={place}")
  assert result.returncode == 2
  assert f"argument {flag}: " in result.stderr
  assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long(cli):
  result = cli(*RUN, "--workdir", "x" * 300)
  assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
  assert "File name too long" in result.stderr


def test_words_that_are_no_text(cli):
  result = cli(*RUN, "--data", "\udcff")
  assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
  assert "UTF-8" in result.stderr


def test_no_home_folder_is_needed_where_the_caches_are_named(monkeypatch, tmp_path):
  def nobody(self):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr("pathlib.Path.expanduser", nobody)
  for name in ("JAXMETHODS_CACHE", "JAXMETHODS_DATA", "JAX_COMPILATION_CACHE_DIR"):
    monkeypatch.setenv(name, str(tmp_path / name))
  assert folders.cache() == tmp_path / "JAXMETHODS_CACHE"
  assert folders.data() == tmp_path / "JAXMETHODS_DATA"
  assert folders.programs() == tmp_path / "JAX_COMPILATION_CACHE_DIR"
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  assert folders.programs() == tmp_path / "JAXMETHODS_CACHE/xla"


def test_without_home_and_names_a_run_keeps_its_caches_to_itself(monkeypatch, tmp_path, capsys):
  def nobody(self):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr("pathlib.Path.expanduser", nobody)
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  monkeypatch.delenv("JAXMETHODS_CACHE", raising=False)
  folders._nowhere.cache_clear()
  assert folders.cache().parent == tmp_path
  assert "JAXMETHODS_CACHE names none" in capsys.readouterr().out
  folders._nowhere.cache_clear()
