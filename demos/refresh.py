"""Runs the notebooks anew and keeps small outputs: `python -m demos.refresh [NAME ...] [--form]`.

The first cell and the badge are the same in all of them and are written here. Pictures are kept at
screen size, texts are cut; `--form` writes these two and leaves the outputs alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
  from nbformat import NotebookNode

DEMOS = Path(__file__).parent
ROOT = DEMOS.parent
INSTALL = """\
# Installs jaxmethods where it is not there yet, as on Colab. $JAXMETHODS_SOURCE: another source than
# PyPI, the path of a wheel or of a clone, or an address such as git+https://HOST/OWNER/REPOSITORY.
import importlib.util, os, sys
from pathlib import Path

source = os.environ.get("JAXMETHODS_SOURCE", "jaxmethods")
wanted = f"jaxmethods[data] @ {source}" if "://" in source else f"{source}[data]"
if importlib.util.find_spec("jaxmethods") is None:
  %pip install -q "{wanted}"
if Path.cwd().name == "demos":
  os.chdir("..")"""
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
WIDEST = (
  640,
  480,
  320,
)  # pixels of a picture that is kept; the next where a notebook grows too large
LARGEST = 400_000  # bytes of the pictures of a notebook
LONGEST = 40  # lines of a text that is kept
PROGRESS = re.compile(r"^[a-z ]+: \d+ s$|━")


def main() -> None:
  """Runs the command line."""
  import nbformat  # of the extra `demos`

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", help="notebooks (default: all)")
  parser.add_argument("--form", action="store_true", help="write first cell and badge only")
  args = parser.parse_args()
  for name in args.names or sorted(path.stem for path in DEMOS.glob("*.ipynb")):
    path = DEMOS / f"{name}.ipynb"
    notebook = formed(nbformat.read(path, as_version=4), name)
    if not args.form:
      notebook = kept(executed(notebook))
    nbformat.write(notebook, path)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB", flush=True)


def formed(notebook: NotebookNode, name: str) -> NotebookNode:
  """Puts the badge under the title and the installation into the first cell of code."""
  title, first = notebook.cells[0], next(c for c in notebook.cells if c.cell_type == "code")
  heading, _, rest = title.source.partition("\n")
  rest = re.sub(r"^\s*\[!\[Open in Colab\].*\n*", "", rest).strip()
  title.source = f"{heading}\n\n{badge(name)}\n\n{rest}".strip()
  first.source = INSTALL
  return notebook


def badge(name: str) -> str:
  """The line that opens a notebook in Colab."""
  return f"[![Open in Colab]({BADGE})]({colab(name)})"


def colab(name: str) -> str:
  """The address of a notebook in Colab; that of the project is pyproject's `[project.urls]`."""
  urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
  place = urls["Source"].removeprefix("https://").replace(".com/", "/", 1)
  return f"https://colab.research.google.com/{place}/blob/main/demos/{name}.ipynb"


def executed(notebook: NotebookNode) -> NotebookNode:
  """Runs a notebook in an empty folder, with the library of this folder."""
  from nbclient import NotebookClient

  os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  with tempfile.TemporaryDirectory() as folder:
    where = {"metadata": {"path": folder}}
    return NotebookClient(notebook, timeout=1200, resources=where).execute()


def kept(notebook: NotebookNode) -> NotebookNode:
  """Makes outputs small and free of what differs between two runs of the machine."""
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
      cell.execution_count = None
      cell.outputs = [short(output) for output in joined(cell.outputs)]
  pictures = [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", ())
    if "image/png" in output.get("data", {})
  ]
  given = [base64.b64decode(picture.data["image/png"]) for picture in pictures]
  for widest in WIDEST:
    scaled = [base64.b64encode(small(data, widest)).decode() for data in given]
    if sum(map(len, scaled)) < LARGEST:
      break
  for picture, data in zip(pictures, scaled, strict=True):
    picture.data["image/png"], picture.metadata = data, {}
  notebook.metadata["language_info"] = {"name": "python"}
  return notebook


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
  """Joins printed texts, and drops warnings and progress, which go to standard error."""
  result: list[NotebookNode] = []
  for output in outputs:
    if output.output_type == "stream" and output.name == "stderr":
      continue
    before = result[-1] if result else None
    if before and output.output_type == before.output_type == "stream":
      before.text += output.text
    else:
      result.append(output)
  return result


def short(output: NotebookNode) -> NotebookNode:
  """Cuts a long text, and drops lines of waiting."""
  if "execution_count" in output:
    output.execution_count = None
  if output.output_type == "stream":
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.text).replace("\r\n", "\n").split("\n")
    lines = [line.rpartition("\r")[2].rstrip() for line in lines]
    lines = [line for line in lines if not PROGRESS.search(line)]
    if len(lines) > LONGEST:
      lines = [*lines[: LONGEST // 2], "...", *lines[-LONGEST // 2 :]]
    output.text = "\n".join(lines)
  return output


def small(data: bytes, widest: int) -> bytes:
  """Scales a PNG down and takes its 64 main colours."""
  picture = Image.open(io.BytesIO(data)).convert("RGB")
  picture.thumbnail((widest, 2 * widest), Image.Resampling.LANCZOS)
  stream = io.BytesIO()
  picture.quantize(64).save(stream, "PNG", optimize=True)
  return stream.getvalue()


if __name__ == "__main__":
  main()
