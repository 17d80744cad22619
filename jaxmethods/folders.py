"""Where things are kept between runs. Needs no home folder where the variables name every place."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


def cache() -> Path:
  """`$JAXMETHODS_CACHE`, else `~/.cache/jaxmethods`: what is computed once per machine."""
  return _named("JAXMETHODS_CACHE")


def data() -> Path:
  """`$JAXMETHODS_DATA`, else `~/.cache/jaxmethods`: the local data folder."""
  return _named("JAXMETHODS_DATA")


def programs() -> Path:
  """`$JAX_COMPILATION_CACHE_DIR`, else `xla` in `cache()`: compiled programs."""
  named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  return Path(named) if named else cache() / "xla"


def expanded(name: str) -> Path:
  """Returns a path with `~` as the home folder; as it is where there is none."""
  try:
    return Path(name).expanduser()
  except RuntimeError:
    return Path(name)


def _named(variable: str) -> Path:
  if named := os.environ.get(variable):
    return expanded(named)
  home = expanded("~")
  return home / ".cache" / "jaxmethods" if home != Path("~") else _nowhere(variable)


@functools.cache
def _nowhere(variable: str) -> Path:
  """Makes a folder for this process alone, and says so: there is no home folder."""
  folder = Path(tempfile.mkdtemp(prefix="jaxmethods-"))
  print(f"there is no home folder, and {variable} names none: {folder} serves this run", flush=True)
  return folder
