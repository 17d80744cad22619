"""Tests run on CPU, compile quickly, and keep compiled programs: most of their time is compilation."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_graphs

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("JAXMETHODS_TEST_CACHE", Path.home() / ".cache/jaxmethods/xla-tests"))

pytest.register_assert_rewrite("tests.runs")

# In the environment, so that the command lines that tests start have them too. pytest imports this
# before any test imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def golden_folder() -> Path:
  """$JAXMETHODS_GOLDEN, else tests/golden."""
  return Path(os.environ.get("JAXMETHODS_GOLDEN") or ROOT / "tests" / "golden")


@pytest.fixture
def golden_file(golden_folder: Path) -> Callable[[str], np.lib.npyio.NpzFile]:
  """Opens reference vectors by name."""
  return lambda name: np.load(golden_folder / f"{name}.npz")


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., subprocess.Popen]:
  """Starts `python -m MODULE ARGUMENTS` in an empty directory."""

  def start(module: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, "-m", module, *map(str, arguments)],
      cwd=tmp_path,
      env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture
def cli(spawn: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.CompletedProcess]:
  """Runs `python -m MODULE ARGUMENTS` to its end."""

  def run(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    process = spawn(module, *arguments, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

  return run


@pytest.fixture(scope="session")
def tiny_graphs_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """The environment in which `tests.tiny_graphs` are found, and spectra kept, in folders of ours."""
  data = tiny_graphs.write(tmp_path_factory.mktemp("data"))
  cache = tmp_path_factory.mktemp("cache")
  return {"JAXMETHODS_DATA": str(data), "JAXMETHODS_CACHE": str(cache)}


@pytest.fixture(scope="module")
def tiny_graphs_here(tiny_graphs_environment: dict[str, str]) -> Iterator[None]:
  """That environment in this process, for a module."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in tiny_graphs_environment.items():
      patch.setenv(name, value)
    yield
