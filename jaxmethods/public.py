"""Public names, loaded when they are first used.

The stub `__init__.pyi` of a package lists its public names, for type checkers and for this module:
`from jaxmethods.federated.algorithms import fedavg as fedavg` makes `jaxmethods.federated.fedavg`.
A name that no stub lists is private and may change in any version. No public function has the name of
a module beside it: an import of that module would take the function's place.
"""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable
from typing import TypeAlias

_ROOT = os.path.dirname(os.path.dirname(__file__))

Public: TypeAlias = tuple[Callable[[str], object], Callable[[], list[str]], list[str]]


def attach(package: str, file: str) -> Public:
  """Reads the stub beside a package's `__init__.py`.

  Args:
    package: `__name__` of the package.
    file: its `__file__`.

  Returns:
    `__getattr__`, `__dir__` and `__all__` of the package.
  """
  with open(file + "i", encoding="utf-8") as stub:
    origin = _origins(stub.read())

  def load(name: str) -> object:
    if name not in origin:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module, attribute = origin[name]
    if attribute is None:
      return importlib.import_module(f"{module}.{name}")
    return getattr(importlib.import_module(module), attribute)

  return load, lambda: sorted(origin), sorted(origin)


def _origins(stub: str) -> dict[str, tuple[str, str | None]]:
  """Public name -> (module, attribute); no attribute: the name is a submodule."""
  found: dict[str, tuple[str, str | None]] = {}
  for node in ast.parse(stub).body:
    if isinstance(node, ast.ImportFrom) and node.module:
      folder = os.path.join(_ROOT, *node.module.split("."))
      for alias in node.names:
        below = os.path.join(folder, alias.name)
        is_submodule = os.path.isdir(below) or os.path.isfile(f"{below}.py")
        found[alias.asname or alias.name] = (node.module, None if is_submodule else alias.name)
  return found
