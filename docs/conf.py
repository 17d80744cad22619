"""Sphinx: guides by hand, a page for every method and every public room by what the code says."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxmethods  # noqa: E402
from docs import pages  # noqa: E402

project = "jaxmethods"
author = "the authors of jaxmethods"
release = jaxmethods.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"jaxmethods {release}"
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # a public name and the module it lives in are both documented

pages.write(Path(__file__).parent)


def setup(app):
  """Stars and bars of formulas are no markup; before napoleon reads the sections."""
  app.connect("autodoc-process-docstring", pages.plain_text, priority=400)
