"""Arrays that are computed once per machine and kept on disk under the hash of what they depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxmethods import folders
from jaxmethods.trees import PyTree

if TYPE_CHECKING:
  from _typeshed import DataclassInstance


def described(
  settings: DataclassInstance,
  kind: str,
  exclude: Iterable[str] = (),
  nested: Mapping[str, str] | None = None,
) -> bytes:
  """Returns the field values of a dataclass as a part of a cache key.

  The name of the class is no part of it, so that a class may be renamed or moved.

  Args:
    settings: a dataclass.
    kind: fixed name; stands for the meaning of the fields.
    exclude: fields on which the result does not depend.
    nested: kinds of fields that are dataclasses themselves, at any depth, by the name of the field.
  """
  kinds = nested or {}

  def text(name: str, value: DataclassInstance) -> str:
    return described(value, kinds[name], (), kinds).decode() if name in kinds else repr(value)

  named = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.repr}
  values = ", ".join(
    f"{name}={text(name, value)}" for name, value in named.items() if name not in set(exclude)
  )
  return f"{kind}({values})".encode()


def cached(
  kind: str,
  depends_on: Iterable[bytes | np.ndarray],
  compute: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
  """Returns what `compute` gives, from disk if it was computed before.

  A damaged file is computed anew and replaced; a folder that cannot be written costs the time of
  computing, nothing else.

  Args:
    kind: folder of the cache.
    depends_on: everything the result depends on, in a fixed order; among it a mark of the format.
    compute: () -> named arrays.
  """
  digest = hashlib.sha256()
  for part in depends_on:
    digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
  path = folders.cache() / kind / f"{digest.hexdigest()}.npz"
  try:
    with np.load(path) as stored:
      return dict(stored)
  except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
    pass
  arrays = dict(compute())
  with contextlib.suppress(OSError):
    _write(path, arrays)
  return arrays


def cached_tree(
  kind: str,
  depends_on: Iterable[bytes | np.ndarray],
  structure: PyTree,
  compute: Callable[[], PyTree],
) -> PyTree:
  """`cached` for any tree of arrays; its structure, which the file does not hold, is given."""

  def leaves() -> dict[str, np.ndarray]:
    return {f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(compute()))}

  stored = cached(kind, depends_on, leaves)
  return jax.tree.unflatten(structure, [jax.numpy.asarray(stored[name]) for name in sorted(stored)])


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes aside and renames: readers, and a run killed here, never see half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as aside:
    np.savez(Path(aside, path.name), **arrays)  # type: ignore[arg-type]  # a name is no option
    os.replace(Path(aside, path.name), path)
