"""The generated pages of the docs: one for every method, one for every public room."""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path

import jaxmethods as jm
from jaxmethods.experiments import METHODS, Method

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("methods", "api")
_LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


def write(docs: Path) -> None:
  """Writes `methods/` and `api/` below the docs folder."""
  for folder in GENERATED:
    (docs / folder).mkdir(exist_ok=True)
    for old in (docs / folder).glob("*.md"):
      old.unlink()
  for name, method in METHODS.items():
    (docs / "methods" / f"{name}.md").write_text(method_page(name, method))
  for room in jm.__all__:
    if room != "methods":
      (docs / "api" / f"{room}.md").write_text(room_page(room))


def method_page(name: str, method: Method) -> str:
  """Builds a method's page: what it is, which function is which equation, evidence and limits."""
  parts = [
    f"# {method.title}\n\n{method.summary[0].upper()}{method.summary[1:]}. {method.paper}.",
    f"```console\npython -m train.run --method {name}\npython -m eval.compare --method {name}\n```",
  ]
  if name in jm.methods.__all__:
    parts.append(equations(name))
  results = ROOT / "benchmarks" / "results" / f"{name}.md"
  if results.is_file():
    parts.append(f"## Evidence and limits\n\n{evidence(results)}")
  return "\n\n".join(parts) + "\n"


def equations(name: str) -> str:
  """Tables of the public functions of a method: name, and what its docstring says first."""
  module = getattr(jm.methods, name)
  tables = []
  for each in modules_of(module):
    rows = [
      f"| `{function}` | {first_line(value)} |"
      for function, value in vars(each).items()
      if inspect.isfunction(value) and value.__module__ == each.__name__ and function[0] != "_"
    ]
    if rows:
      tables.append(
        f"`{each.__name__}`\n\n| function | equation |\n| --- | --- |\n" + "\n".join(rows)
      )
  return "## Equations\n\n" + "\n\n".join(tables)


def modules_of(module: types.ModuleType) -> list[types.ModuleType]:
  """A method's module, or those of its folder."""
  if not hasattr(module, "__path__"):
    return [module]
  import importlib
  import pkgutil

  names = sorted(info.name for info in pkgutil.iter_modules(module.__path__))
  return [module, *(importlib.import_module(f"{module.__name__}.{name}") for name in names)]


def first_line(value: object) -> str:
  """The first sentence of a docstring, as a cell of a table."""
  text = (inspect.getdoc(value) or "").split("\n\n")[0]
  return " ".join(text.split()).replace("|", r"\|").replace("$", r"\$")


def plain_text(app, kind, name, value, options, lines: list[str]) -> None:
  """Escapes stars and bars outside of code, in place."""
  del app, kind, name, value, options
  for i, line in enumerate(lines):
    if not line.lstrip().startswith((">>>", "...")):
      spans = line.split("`")
      spans[::2] = [re.sub(r"([*|])", r"\\\1", text) for text in spans[::2]]
      lines[i] = "`".join(spans)


def evidence(page: Path) -> str:
  """A results page one heading lower, its links leading to the files of the source."""
  lines = page.read_text().split("\n")[1:]  # the page has a title of its own
  text = "\n".join(f"#{line}" if line.startswith("#") else line for line in lines).strip()
  text = re.sub(r"!\[[^]]*\]\((?!http)[^)]+\)", "", text)
  return _LINK.sub(
    r"](https://github.com/jaxmethods/jaxmethods/blob/main/benchmarks/results/\1)", text
  )


def room_page(room: str) -> str:
  """Builds the page of a public room: what each name is, from its docstring."""
  package = getattr(jm, room)
  parts = [f"# jm.{room}\n\n{first_line(package)}"]
  for name in package.__all__:
    value = getattr(package, name)
    if isinstance(value, types.ModuleType):
      # Its functions may be public names themselves, which is where links lead.
      members = f".. automodule:: {value.__name__}\n   :members:\n   :no-index:"
      parts.append(f"## {name}\n\n```{{eval-rst}}\n{members}\n```")
    else:
      kind = "autoclass" if inspect.isclass(value) else "autofunction"
      place = f"{value.__module__}.{value.__name__}"
      if not value.__module__.startswith(f"{package.__name__}."):  # another room's, shown here too
        place += "\n   :no-index:"
      parts.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: {place}\n```")
  return "\n\n".join(parts) + "\n"
