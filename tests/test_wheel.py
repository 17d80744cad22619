"""Installed as a wheel, away from the clone: every command behaves as it does in the clone."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmethods.experiments import METHODS
from jaxmethods.runtime import command
from tests.test_docs import GUIDES, blocks

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("jaxmethods", "train", "eval", "configs", "pyproject.toml", "setup.py", "README.md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
  """A folder with what the wheel installs; sources are copied, since a build leaves folders."""
  source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
  for name in BUILT_FROM:
    path = ROOT / name
    copy = shutil.copytree if path.is_dir() else shutil.copy
    copy(path, source / name)
  install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
  result = subprocess.run(
    [sys.executable, *install, "--target", str(target), str(source)], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  return target


def answer(folder: Path, place: Path, *arguments: str) -> str:
  """Standard output of train.run with the package in `place`, in `folder`."""
  return python(folder, place, "-m", "train.run", *arguments)


def python(folder: Path, place: Path, *words: str) -> str:
  """Standard output of Python with the package in `place`, in `folder`."""
  result = subprocess.run(
    [sys.executable, *words],
    cwd=folder,
    env={
      **os.environ,
      "PYTHONPATH": str(place),
      "PYTHONSAFEPATH": "1",
      "JAXMETHODS_ALLOCATOR": "0",
    },
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert result.returncode == 0, (words, result.stderr[-2000:])
  return result.stdout


def test_the_wheel_has_every_config(installed):
  for file in (ROOT / "configs").glob("*.yaml"):
    assert (installed / "jaxmethods/configs" / file.name).read_bytes() == file.read_bytes()
  assert (installed / "jaxmethods/py.typed").exists()


def test_the_wheel_answers_as_the_clone(installed, tmp_path):
  assert answer(tmp_path, installed, "--list") == answer(tmp_path, ROOT, "--list")
  for method in METHODS:
    words = ("--method", method, "--short", "--print_config")
    assert answer(tmp_path, installed, *words) == answer(tmp_path, ROOT, *words)
  paper = ("--method", "ggeur", "--config", "configs/ggeur_paper.yaml", "--print_config")
  assert answer(tmp_path, installed, *paper) == answer(ROOT, ROOT, *paper)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_trains(installed, tmp_path):
  assert "steps done" in answer(tmp_path, installed, "--method", "ggeur", "--short")
  assert (tmp_path / "runs/ggeur/default-short/report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_runs_from_the_wheel(page, installed, tmp_path):
  """Its Python as one script, then its commands in their order."""
  if script := "\n".join(blocks(page, "python")):
    python(tmp_path, installed, "-c", script)
  for line in "\n".join(blocks(page, "console")).splitlines():
    if line.startswith("python -m") and "FOLDER" not in line:
      python(tmp_path, installed, *shlex.split(line, comments=True)[1:])


def test_a_missing_default_is_an_error(cli, tmp_path, monkeypatch):
  monkeypatch.setattr(command, "CONFIGS", tmp_path / "nowhere")
  result = cli("train.run", "--method", "ggeur", "--print_config")
  assert result.returncode == 2
  assert "nowhere/ggeur.yaml: is missing" in result.stderr
  (tmp_path / "own.yaml").write_text("steps: 3\n")
  named = cli("train.run", "--method", "ggeur", "--config", "own.yaml", "--print_config")
  assert named.returncode == 0, named.stderr
