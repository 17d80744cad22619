"""The guides' code runs, their commands exist, and the docs build without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import pages
from jaxmethods.experiments import METHODS

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
name = lambda page: page.stem


def blocks(page: Path, language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_every_guide_is_in_the_index():
  listed = re.findall(r"^guides/(\w+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
  assert sorted(listed) == [page.stem for page in GUIDES]


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_python_of_a_guide_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found: dict = {}
  for code in blocks(page, "python"):
    exec(compile(code, page.name, "exec"), found)
  if page.stem == "own_federated_method":
    assert abs(found["median"] - 1).max() < 0.2 < abs(found["mean"] - 1).max()
  if page.stem == "tuning_a_language_model":
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_commands_of_a_guide_exist(page):
  text = "\n".join(blocks(page, "console"))
  for module in re.findall(r"python -m ([\w.]+)", text):
    assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
  assert set(re.findall(r"--method (\w+)", text)) <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_page_of_a_method(method):
  """Its equations name functions with a docstring each."""
  text = pages.method_page(method, METHODS[method])
  rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text.split("## Evidence")[0], re.MULTILINE)
  assert [row for row, said in rows if not said.strip()] == []


@pytest.mark.slow
def test_docs_build_without_a_warning(tmp_path):
  pytest.importorskip("sphinx")
  done = subprocess.run(
    [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", tmp_path],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  assert (tmp_path / "index.html").is_file()
