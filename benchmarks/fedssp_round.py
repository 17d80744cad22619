"""One federated round of FedSSP on real TU graphs: seconds, compilation, memory.

Each measurement is a fresh process: on one pinned thread, on all cores, and on all cores with the
clients dealt to as many devices (`--mesh clients=N`); first with an empty compilation cache, then (all
cores) with the one the first left behind. The published code cannot be shipped here; its figures were
measured on a machine of the same kind (FedSSP spec) and are printed beside ours;
`benchmarks.fedssp_published` measures it on this one.
A virtual machine is not equally fast at all times, so the rate of one lone matrix product, taken
between the rounds, is printed too: 104 GFLOP/s a core where the aims were set.

  JAXMETHODS_DATA=DIR python -m benchmarks.fedssp_round [--data tu:SM] [--rounds 6]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# Seconds per round of the published PyTorch code, training plus validation and test: CPU seconds on
# one thread and wall seconds on two.
PUBLISHED = {
  "tu:SM": {"one thread": "27.2 to 28.3", "all cores": "18.7 to 20.5"},
  "tu:MUTAG,BZR,COX2,PTC_MR": {"one thread": "3.4 to 4.5", "all cores": "2.3 to 3.2"},
}


def product_rate() -> float:
  """GFLOP/s of a lone (4368, 128) x (128, 128) product, the best of fifty."""
  import jax.numpy as jnp

  from jaxmethods.runtime import compiler

  x, w = jnp.ones((4368, 128)), jnp.ones((128, 128))
  product = compiler.jit(jnp.matmul)
  product(x, w).block_until_ready()
  seconds = []
  for _ in range(50):
    start = time.perf_counter()
    product(x, w).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * x.size * w.shape[1] / min(seconds) / 1e9


def measure(data: str, rounds: int, devices: int) -> dict:
  """Times rounds in this process; seconds and MB."""
  began = time.perf_counter()
  import jax

  from jaxmethods.experiments.fedssp.build import build
  from jaxmethods.experiments.fedssp.config import Config
  from jaxmethods.runtime import launch, loop

  mesh = None
  if devices > 1:
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((devices,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
  config = Config(data=data)
  experiment = build(config, mesh)
  state = launch.replicate(experiment.init(jax.random.key(config.seed)), mesh)
  jax.block_until_ready(state)
  result: dict = {"prepare": time.perf_counter() - began}

  batch = next(experiment.batches(0))
  step, evaluate = loop.compile_experiment(experiment, state, mesh)
  wall, cpu, rate = [], [], []
  for _ in range(rounds + 1):
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    state, metrics = step(state, batch)
    metrics = jax.device_get((metrics, evaluate(state, experiment.test)))
    wall.append(time.perf_counter() - wall_start)
    cpu.append(time.process_time() - cpu_start)
    rate.append(product_rate())
  status = Path("/proc/self/status").read_text()
  peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
  return result | {
    "first": wall[0],
    "wall_median": statistics.median(wall[1:]),
    "wall_min": min(wall[1:]),
    "cpu_median": statistics.median(cpu[1:]),
    "cpu_min": min(cpu[1:]),
    "gflops": statistics.median(rate),
    "peak_mb": int(peak.split()[1]) // 1024,
    "load": os.getloadavg()[0],
  }


def fresh(
  data: str, rounds: int, cache: str, *, one_thread: bool = False, devices: int = 1
) -> dict:
  """Runs `measure` in a new process."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": cache,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  command = [
    sys.executable,
    "-m",
    "benchmarks.fedssp_round",
    "--data",
    data,
    "--rounds",
    str(rounds),
    "--devices",
    str(devices),
  ]
  if one_thread:
    environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    command = ["taskset", "-c", "0", *command]
  done = subprocess.run(
    [*command, "--child"], env=environment, stdout=subprocess.PIPE, text=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Measures, prints and records."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", default="tu:SM")
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--devices", type=int, default=1, help=argparse.SUPPRESS)
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    print(json.dumps(measure(args.data, args.rounds, args.devices)))
    return

  import jax

  runs = {}
  with tempfile.TemporaryDirectory() as cache:
    runs["all cores"] = fresh(args.data, args.rounds, cache)
    warm = fresh(args.data, 1, cache)
  with tempfile.TemporaryDirectory() as cache:
    dealt = f"--mesh clients={os.cpu_count()}"
    runs[dealt] = fresh(args.data, args.rounds, cache, devices=os.cpu_count() or 1)
  with tempfile.TemporaryDirectory() as cache:
    runs["one thread"] = fresh(args.data, args.rounds, cache, one_thread=True)

  published = PUBLISHED.get(args.data, {})
  lines = [
    f"# FedSSP round on {args.data}",
    f"{time.strftime('%Y-%m-%d')}, `python -m benchmarks.fedssp_round --data {args.data}`; "
    f"jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores; allocator "
    f"{os.environ.get('JAXMETHODS_ALLOCATOR') or os.environ.get('GLIBC_TUNABLES', 'untouched')}; "
    f"{args.rounds} rounds, training + validation + test of every client.",
    "",
    "| | wall s, median (best) | CPU s, median (best) | lone product, GFLOP/s | peak MB | load "
    "| published code, s |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for name, run in runs.items():
    lines.append(
      f"| {name} | {run['wall_median']:.2f} ({run['wall_min']:.2f}) "
      f"| {run['cpu_median']:.2f} ({run['cpu_min']:.2f}) | {run['gflops']:.0f} "
      f"| {run['peak_mb']} | {run['load']:.2f} "
      f"| {published.get(name, published.get('all cores', '-'))} |"
    )
  cold = runs["all cores"]
  lines += [
    "",
    f"First round with compilation: {cold['first']:.1f} s with an empty cache, {warm['first']:.1f} s "
    f"with a warm one. Reading, spectra, packing and initial parameters before it: "
    f"{cold['prepare']:.1f} s and {warm['prepare']:.1f} s.",
  ]
  text = "\n".join(lines) + "\n"
  print(text)
  name = "fedssp_round_" + args.data.removeprefix("tu:").replace(",", "_")
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"{name}.md").write_text(text)
  (RESULTS / f"{name}.json").write_text(json.dumps({**runs, "warm": warm}, indent=2) + "\n")


if __name__ == "__main__":
  from jaxmethods.runtime import launch

  launch.set_allocator()
  main()
