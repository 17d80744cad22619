"""Tests run on CPU, compile quickly, and keep compiled programs: most of their time is compilation."""

import contextlib
import ctypes
import gc
import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from jaxmethods.runtime import command
from tests import tiny_graphs

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("JAXMETHODS_TEST_CACHE", Path.home() / ".cache/jaxmethods/xla-tests"))

pytest.register_assert_rewrite("tests.runs")

# A first call may compile, and the machine may be busy: time says nothing about an example.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

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
def process(spawn: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.CompletedProcess]:
  """Runs `python -m MODULE ARGUMENTS` to its end."""

  def run(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    started = spawn(module, *arguments, **environment)
    out, err = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)

  return run


# What changes how jax runs, or what can be imported, in the whole process.
OWN_PROCESS = {
  "--debug", "--no_cache", "--mesh", "--coordinator", "--num_processes", "XLA_FLAGS", "PYTHONPATH",
}  # fmt: skip


@pytest.fixture
def cli(
  process: Callable[..., subprocess.CompletedProcess], tmp_path: Path, capfd: pytest.CaptureFixture
) -> Callable[..., subprocess.CompletedProcess]:
  """The same in this process, where nothing asks for another: starting one takes seconds."""

  def run(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    argv = list(map(str, arguments))
    if OWN_PROCESS.intersection((*argv, *environment)):
      return process(module, *argv, **environment)
    main = importlib.import_module(module).main
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(tmp_path):
      for name, value in environment.items():
        patch.setenv(name, value)
      status = command.run(main, argv)
    return subprocess.CompletedProcess([module, *argv], status, *capfd.readouterr())

  return run


# Beyond this much memory a module's programs are let go when it is done; the disk still has them.
KEPT_BYTES = 3 * 2**29


@pytest.fixture(scope="module", autouse=True)
def programs_let_go() -> Iterator[None]:
  """Frees the compiled programs of a module, which jax keeps for as long as the process lives."""
  yield
  if "jax" in sys.modules and resident_bytes() > KEPT_BYTES:
    sys.modules["jax"].clear_caches()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
      ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
  """Memory of this process; 0 where the system does not tell."""
  statm = Path("/proc/self/statm")
  return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


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
