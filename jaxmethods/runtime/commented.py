"""The comments beside the fields of a dataclass, as its source has them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize


def notes(schema: type) -> dict[str, str]:
  """Returns {field: comment}: the one on its lines, else the one right above it.

  Fields of base classes are looked up where they are written; a class without source has none.
  """
  found: dict[str, str] = {}
  for base in reversed(schema.__mro__):
    if dataclasses.is_dataclass(base):
      found |= _own_notes(base)
  return found


def _own_notes(schema: type) -> dict[str, str]:
  try:
    source = inspect.cleandoc("\n" + inspect.getsource(schema))
    (body,) = ast.parse(source).body
  except (OSError, TypeError, SyntaxError, ValueError):
    return {}
  comments = {
    token.start[0]: (token.start[1], token.string.lstrip("# "))
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT and "fmt:" not in token.string
  }
  lines = source.splitlines()
  alone = {line for line, (column, _) in comments.items() if not lines[line - 1][:column].strip()}
  found = {}
  for node in getattr(body, "body", ()):
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      numbers = [
        n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments
      ]
      if not numbers:
        above = node.lineno - 1
        while above in alone:
          numbers.insert(0, above)
          above -= 1
      if numbers:
        found[node.target.id] = " ".join(comments[number][1] for number in numbers)
  return found
