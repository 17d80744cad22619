"""Allocator, compilation cache, and placing a state on a mesh."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.runtime import launch

SETTINGS = ("JAXMETHODS_ALLOCATOR", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "LD_PRELOAD")


@pytest.fixture
def executed(monkeypatch) -> list[dict[str, str]]:
  """Returns the environments that the program was executed again with."""
  environments: list[dict[str, str]] = []
  monkeypatch.setattr(os, "execve", lambda path, arguments, env: environments.append(env))
  monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
  monkeypatch.setattr(launch, "_has_huge_pages", lambda: True)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  for name in [*os.environ]:
    if name in SETTINGS or name.startswith("MALLOC_"):
      monkeypatch.delenv(name)
  return environments


def test_allocator_is_set_once(executed, monkeypatch):
  launch.set_allocator()
  (environment,) = executed
  tunables = environment["GLIBC_TUNABLES"].split(":")
  assert "glibc.malloc.hugetlb=1" in tunables and "glibc.malloc.mmap_max=0" in tunables
  monkeypatch.setenv("JAXMETHODS_ALLOCATOR", environment["JAXMETHODS_ALLOCATOR"])
  launch.set_allocator()
  assert len(executed) == 1


def test_allocator_without_huge_pages(executed, monkeypatch):
  monkeypatch.setattr(launch, "_has_huge_pages", lambda: False)
  launch.set_allocator()
  tunables = executed[0]["GLIBC_TUNABLES"]
  assert "glibc.malloc.mmap_max=0" in tunables and "hugetlb" not in tunables


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("JAXMETHODS_ALLOCATOR", "0"),
    ("GLIBC_TUNABLES", "glibc.malloc.check=1"),
    ("MALLOC_ARENA_MAX", "2"),
    ("LD_PRELOAD", "libtcmalloc.so"),
    ("JAX_PLATFORMS", "cuda"),
  ],
)
def test_allocator_is_left_alone(executed, monkeypatch, name, value):
  monkeypatch.setenv(name, value)
  launch.set_allocator()
  assert executed == []


def test_allocator_needs_glibc(executed, monkeypatch):
  monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
  launch.set_allocator()
  assert executed == []


FAULTS = """
import os, resource, sys
from jaxmethods.runtime import launch
kept = launch.keep_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sort(x * 2).sum())  # 16 MB of temporaries
x, counts = jnp.ones(2**22), []
for _ in range(8):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x).block_until_ready()
  counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), min(counts))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("switch", [None, "0"])
def test_memory_is_kept_from_inside(switch):
  names = (*SETTINGS, "JAX_PLATFORMS")
  environment = {k: v for k, v in os.environ.items() if k not in names and k[:7] != "MALLOC_"}
  environment |= {"JAX_PLATFORMS": "cpu"} | ({} if switch is None else {SETTINGS[0]: switch})
  command = [sys.executable, "-c", FAULTS]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  kept, faults = map(int, done.stdout.split())
  assert kept == (switch is None)
  if kept:
    assert faults < 400  # 16 MB are 4,096 pages, which otherwise are touched anew at every call


def test_compiled_programs_are_kept_unless_told_not_to(process, tmp_path):
  command = ("train.run", "--method", "tests.tiny", "--steps", 2)
  environment = {"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
  cache = tmp_path / ".cache/jaxmethods/xla"
  assert process(*command, "--workdir", "a", "--no_cache", **environment).returncode == 0
  assert not cache.exists()
  result = process(*command, **environment)
  assert result.returncode == 0, result.stderr
  assert list(cache.iterdir())
  assert (tmp_path / "runs/tests.tiny/default/report.html").exists()  # the default workdir


def test_replicate_resolves_what_a_restored_state_cannot_have():
  x = jnp.arange(3.0)
  tree = {"twice": [x, x], "weak": jnp.asarray(1.0) * 2, "number": 3, "key": jax.random.key(1)}
  placed = launch.replicate(tree, None)
  first, second = placed["twice"]
  assert first is not second
  assert not placed["weak"].weak_type
  assert not placed["number"].weak_type
  np.testing.assert_array_equal(second, x)
  # Such a tree can be donated.
  jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf, tree), donate_argnums=0)(placed)
