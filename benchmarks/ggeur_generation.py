"""GGEUR's generation for 4 clients, 10 classes, 2,000 embeddings each, d = 512, on one thread.

The published sampler was measured at 0.14 s per anchor of 50 samples on one thread of a machine of this
kind (GGEUR spec), 40 anchors for the same 2,000 samples.

  python -m benchmarks.ggeur_generation
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CLIENTS, CLASSES, TARGET, WIDTH, OWN = 4, 10, 2000, 512, 40
PUBLISHED = CLIENTS * CLASSES * (TARGET / 50) * 0.14


def measure() -> None:
  """Prints seconds: the moments of a client, the shape, the generation."""
  import jax
  import jax.numpy as jnp

  from jaxmethods.methods import ggeur
  from jaxmethods.runtime import compiler

  x = jax.random.normal(jax.random.key(0), (CLIENTS, CLASSES * OWN, WIDTH))
  y = jnp.tile(jnp.arange(CLASSES), OWN)
  mask = jnp.ones(y.shape, bool)
  client = compiler.jit(lambda x: ggeur.class_moments(x, y, CLASSES))
  server = compiler.jit(lambda m: ggeur.geometric_shape(ggeur.aggregate(m).covariance))

  def enlarge(key, x, shape):
    return ggeur.enlarge(key, x, y, mask, shape, target=TARGET, rows=TARGET)

  generate = compiler.jit(enlarge)

  def timed(function, *args) -> tuple[float, object]:
    result = jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(5):
      start = time.process_time()
      result = jax.block_until_ready(function(*args))
      seconds.append(time.process_time() - start)
    return statistics.median(seconds), result

  one_client, _ = timed(client, x[0])
  moments = jax.tree.map(lambda *a: jnp.stack(a), *(client(part) for part in x))
  shape_seconds, shape = timed(server, moments)
  seconds, made = timed(generate, jax.random.key(1), x[0], shape)
  assert made.mask.sum() == CLASSES * TARGET
  print(one_client, shape_seconds, CLIENTS * seconds)


def main() -> None:
  """Measures in a process pinned to one core, prints and records."""
  if "--child" in sys.argv:
    measure()
    return
  import jax

  command = ["taskset", "-c", "0", sys.executable, "-m", "benchmarks.ggeur_generation", "--child"]
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
  done = subprocess.run(
    command, env={**os.environ, **flags}, stdout=subprocess.PIPE, text=True, check=True
  )
  client, shape, generation = map(float, done.stdout.split()[-3:])
  text = (
    f"# GGEUR generation\n{time.strftime('%Y-%m-%d')}, `python -m benchmarks.ggeur_generation`; jax "
    f"{jax.__version__}, Python {platform.python_version()}, one thread, load "
    f"{os.getloadavg()[0]:.1f}; CPU seconds, median of 5.\n\n"
    f"{CLIENTS} clients x {CLASSES} classes, {OWN} own embeddings each, filled up to {TARGET}, "
    f"d = {WIDTH}.\n\n| | ours, s | published code, s |\n| --- | --- | --- |\n"
    f"| moments of one client | {client:.3f} | - |\n"
    f"| pooling and eigen-decomposition, all classes | {shape:.3f} | - |\n"
    f"| generation, all clients | {generation:.2f} | {PUBLISHED:.0f} (0.14 s per anchor) |\n\n"
    f"Generation with the decomposition is {PUBLISHED / (generation + shape):.0f} times faster.\n"
  )
  print(text)
  (RESULTS / "ggeur_generation.md").write_text(text)


if __name__ == "__main__":
  from jaxmethods.runtime import launch

  launch.set_allocator()
  main()
