"""How a process starts: memory allocator, devices, compilation cache. Must run before jax starts."""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epy

from jaxmethods import folders
from jaxmethods.errors import InputError

with epy.lazy_imports():
  import jax
  from jax.experimental import multihost_utils

if TYPE_CHECKING:
  from jax.sharding import Mesh

_SWITCH = "JAXMETHODS_ALLOCATOR"  # 0: leave the allocator alone. Else set by ourselves: what is on.

# XLA on CPU allocates its temporaries anew at every call; glibc maps and unmaps them, so every step
# touches fresh pages, which the kernel has to fill with zeros first. What helps is to keep the memory
# (no mmap, no trimming, one arena), and huge pages where the kernel offers them. A FedSSP step on
# COX2 with 239 MB of temporaries, one pinned core of a quiet machine, CPU ms, two repeats:
#   huge pages alone 317 to 330, memory kept 269 to 292, both 282 to 294
# and a read-write pass over 128 MB 4.8 to 5.1, 8.7 to 8.9, 9.2 to 10.0 GB/s.
_KEEP = {
  "mmap_max": "0",
  "trim_threshold": "100000000000",
  "top_pad": "268435456",
  "arena_max": "1",
}
_TUNABLES = {"hugetlb": "1", **_KEEP}
_MALLOPT = {"mmap_max": -4, "trim_threshold": -1, "top_pad": -2, "arena_max": -8}  # of malloc.h


def set_allocator() -> None:
  """Executes the program once more with better allocator settings, where they help.

  They are read when a process starts: huge pages cannot be set from inside. Does nothing outside
  Linux and glibc, when an accelerator does the work, when any malloc setting is already there, or
  when JAXMETHODS_ALLOCATOR is set (0 turns this off).
  """
  if not _allocator_is_ours():
    return
  settings = {"GLIBC_TUNABLES": tunables()}
  described = " ".join(f"{name}={value}" for name, value in settings.items())
  environment = {**os.environ, **settings, _SWITCH: described}
  sys.stdout.flush()
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def keep_memory() -> bool:
  """Keeps freed memory for the next call: what of `set_allocator` works inside a running process.

  For notebooks and programs that call the library themselves. To be called before jax does its first
  work, because a thread stays with the arena that it has.

  Returns:
    Whether it was set: not where `set_allocator` does nothing.
  """
  if not _allocator_is_ours():
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all([mallopt(_MALLOPT[name], min(int(_KEEP[name]), 2**31 - 1)) for name in _KEEP])


def _allocator_is_ours() -> bool:
  """Whether glibc serves a CPU process and nobody has said how."""
  if _SWITCH in os.environ or platform.libc_ver()[0] != "glibc" or not _on_cpu():
    return False
  names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
  return not any(name.startswith(names) for name in os.environ)


def tunables(*, huge: bool = True) -> str:
  """What `set_allocator` sets, as $GLIBC_TUNABLES has it; huge pages only where there are any."""
  values = _TUNABLES if huge and _has_huge_pages() else _KEEP
  return ":".join(f"glibc.malloc.{name}={value}" for name, value in values.items())


def start(args: argparse.Namespace) -> Mesh | None:
  """Sets jax up as the flags say, and returns the mesh of `--mesh` (None without)."""
  axes = _parse_mesh(args.mesh)
  processes = _check_processes(args)
  if args.debug:
    allocator = os.environ.get(_SWITCH, "untouched")
    print(f"allocator: {'untouched' if allocator == '0' else allocator}")
    jax.config.update("jax_debug_nans", True)
    jax.config.update("jax_log_compiles", True)
    # One line for each program is enough: the one with its name and seconds.
    for chatty in ("jax._src.interpreters.pxla", "jax._src.compiler"):
      logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.getLogger("jax._src.dispatch").addFilter(lambda r: "XLA" in r.getMessage())
  else:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
  jax.config.update("jax_enable_compilation_cache", not args.no_cache)
  if not args.no_cache:
    keep_compiled_programs()

  size = math.prod(axes.values())
  if size > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    if size % processes:
      raise InputError(f"--mesh: {size} devices cannot be shared by {processes} processes evenly")
    jax.config.update("jax_num_cpu_devices", size // processes)  # no effect on GPU or TPU
  if args.coordinator == "auto":
    jax.distributed.initialize()
  elif args.coordinator:
    jax.distributed.initialize(args.coordinator, processes, args.process_id)
  if jax.process_count() > 1 and not axes:
    raise InputError("--mesh: is needed with several processes, e.g. --mesh clients=8")
  mesh = _make_mesh(axes) if axes else None
  if mesh and jax.process_count() > 1:
    _connect(mesh)
  return mesh


def replicate(tree, mesh: Mesh | None):
  """Returns `tree` with every array on all devices of the mesh, unless it already spans them.

  Without a mesh the arrays stay where they are. Weak types and arrays that appear twice are
  resolved, because a restored tree has neither, and a donated one must not.
  """
  everywhere = jax.sharding.NamedSharding(mesh, jax.P()) if mesh else None
  seen = set()

  def place(x):
    if not isinstance(x, jax.Array) or getattr(x, "weak_type", False):  # keys have no weak_type
      x = jax.numpy.asarray(x, dtype=jax.numpy.result_type(x))
    if everywhere and x.sharding.device_set != everywhere.device_set:
      is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
      # jax 0.10 cannot put a key on devices of other processes, but jit can.
      if is_key:
        x = jax.jit(lambda key: key, out_shardings=everywhere)(x)
      else:
        x = jax.device_put(x, everywhere)
    x = x.copy() if id(x) in seen else x
    seen.add(id(x))
    return x

  return jax.tree.map(place, tree)


def _connect(mesh: Mesh) -> None:
  """Opens the connections of the groups of devices that reduce together, while processes are in step.

  On CPU a group connects at its first collective, and gives up when a process comes 30 s later than
  the others (`xla_cpu_collective_timeout_seconds` does not change that): compiling the first step on
  a busy machine can take longer.
  """
  axes = mesh.axis_names
  groups = {axes, *((axis,) for axis in axes)}

  def reduce():
    return [jax.lax.psum(jax.lax.axis_index(group), group) for group in sorted(groups)]

  multihost_utils.sync_global_devices("start")  # the group that has one device of each process
  everywhere = jax.shard_map(reduce, mesh=mesh, in_specs=(), out_specs=jax.P(), check_vma=False)
  jax.block_until_ready(jax.jit(everywhere)())


def _on_cpu() -> bool:
  """Guesses the backend from what is visible, since asking jax would start it."""
  platforms = os.environ.get("JAX_PLATFORMS", "")
  devices = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/accel", "/dev/vfio/0")
  return platforms == "cpu" or (not platforms and not any(map(os.path.exists, devices)))


def _has_huge_pages() -> bool:
  try:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    version = tuple(map(int, platform.libc_ver()[1].split(".")[:2]))
  except (OSError, ValueError):
    return False
  return "[never]" not in mode and version >= (2, 35)


def keep_compiled_programs() -> None:
  """Keeps compiled programs in `$JAX_COMPILATION_CACHE_DIR`, by default with our other caches."""
  jax.config.update("jax_compilation_cache_dir", str(folders.programs()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _parse_mesh(text: str) -> dict[str, int]:
  axes: dict[str, int] = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
      raise InputError(f"--mesh: expected NAME=SIZE,.. such as clients=8, got {text!r}")
    axes[name] = int(size)
  return axes


def _check_processes(args: argparse.Namespace) -> int:
  """Returns the number of processes that the flags name."""
  if args.coordinator in (None, "auto"):
    return 1
  if args.num_processes is None or args.process_id is None:
    raise InputError("--coordinator: needs --num_processes and --process_id")
  if not 0 <= args.process_id < args.num_processes:
    raise InputError(f"--process_id: expected 0 to {args.num_processes - 1}, got {args.process_id}")
  return args.num_processes


def _make_mesh(axes: Mapping[str, int]) -> Mesh:
  size, devices = math.prod(axes.values()), jax.devices()
  if size > len(devices):
    kind = f"{len(devices)} {devices[0].platform} device(s)"
    raise InputError(f"--mesh: {dict(axes)} needs {size} devices, there are {kind}")
  # Auto: Explicit axes refuse plain indexing, and methods index.
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
    devices=devices[:size],
  )
