"""Every method has a notebook with small outputs; each is executed as it stands (its short form)."""

import os
from pathlib import Path

import pytest

from demos import refresh
from jaxmethods.experiments import METHODS

DEMOS = Path(__file__).resolve().parents[1] / "demos"


def read(path):
  nbformat = pytest.importorskip("nbformat")
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  return notebook


def test_every_method_has_a_notebook():
  assert {path.stem for path in DEMOS.glob("*.ipynb")} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_notebook_begins_as_all_do(method):
  notebook = read(DEMOS / f"{method}.ipynb")
  assert refresh.badge(method) in notebook.cells[0].source
  first = next(cell for cell in notebook.cells if cell.cell_type == "code")
  assert first.source == refresh.INSTALL


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fpl", "gift"}))
def test_notebook_keeps_small_outputs(method):
  """All but two, whose small CLIP takes minutes to be trained."""
  path = DEMOS / f"{method}.ipynb"
  outputs = [output for cell in read(path).cells for output in cell.get("outputs", ())]
  assert path.stat().st_size < 500_000
  assert any("image/png" in output.get("data", {}) for output in outputs)
  assert not any(output.output_type == "error" for output in outputs)
  assert not any(cell.get("execution_count") for cell in read(path).cells)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_notebook_runs(method, tmp_path, monkeypatch):
  nbclient = pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  root = DEMOS.parent
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
  # In a folder of its own, so that its runs/ does not become the project's.
  notebook = read(DEMOS / f"{method}.ipynb")
  nbclient.NotebookClient(
    notebook, timeout=1200, resources={"metadata": {"path": tmp_path}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  text = "".join(output.get("text", "") for output in outputs)
  assert "steps done; see" in text, text[-2000:]
