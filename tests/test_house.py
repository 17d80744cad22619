"""Rules of the house that no other tool holds, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxmethods"
PURE = ("federated", "adapters", "models", "graphs", "stats", "methods", "tuning")
JITS = {"jit", "pmap"}
LONGEST, LONGEST_BUILD, DEEPEST = 80, 60, 1
MOST_ANY = 150

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*rooms: str) -> list[Path]:
  return [file for room in rooms for file in sorted((PACKAGE / room).rglob("*.py"))]


def place(file: Path, node: ast.AST) -> str:
  return f"{file.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"


def functions(node: ast.AST, depth: int = 0) -> Iterator[tuple[Function, int]]:
  """All functions below a node, with the number of functions around each."""
  for child in ast.iter_child_nodes(node):
    inside = isinstance(child, Function)
    if inside:
      yield child, depth
    yield from functions(child, depth + inside)


def jits(tree: ast.AST) -> Iterator[ast.AST]:
  """Mentions of jax.jit, compiler.jit and the like, called or handed on."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and node.attr in JITS:
      if isinstance(node.value, ast.Name) and node.value.id in ("jax", "compiler", "nn"):
        yield node
    elif isinstance(node, ast.ImportFrom) and JITS & {alias.name for alias in node.names}:
      yield node


def parsed(file: Path) -> ast.Module:
  return ast.parse(file.read_text(encoding="utf-8"))


def test_equations_never_jit():
  # Flower calls the parts of an algorithm from its own processes: it is a caller.
  found = [
    place(file, node)
    for file in files(*PURE)
    if file.name != "flower.py"
    for node in jits(parsed(file))
  ]
  assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("room", ["experiments", "testbeds"])
def test_functions_are_short_and_not_nested_deeply(room):
  found = []
  for file in files(room):
    for node, depth in functions(parsed(file)):
      lines = node.end_lineno - node.lineno + 1
      build = file.name == "build.py" and node.name == "build" and depth == 0
      if lines > (LONGEST_BUILD if build else LONGEST):
        found.append(f"{place(file, node)} {node.name}: {lines} lines")
      if depth > DEEPEST:
        found.append(f"{place(file, node)} {node.name}: nested {depth} deep")
  assert not found, "\n".join(["", *found])


def test_any_is_rare():
  counts = {
    str(file.relative_to(PACKAGE)): sum(
      (isinstance(node, ast.Name) and node.id == "Any")
      or (isinstance(node, ast.alias) and node.name == "Any")
      for node in ast.walk(parsed(file))
    )
    for file in files("")
  }
  total = sum(counts.values())
  most = sorted(counts.items(), key=lambda item: -item[1])[:8]
  assert total < MOST_ANY, f"{total} times, most in {most}"


def test_the_rules_see_a_fault():
  tree = ast.parse("def a():\n  def b():\n    def c(): return jax.jit(f)\n")
  assert [(node.name, depth) for node, depth in functions(tree)] == [("a", 0), ("b", 1), ("c", 2)]
  assert len(list(jits(tree))) == 1
