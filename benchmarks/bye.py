"""BYE's two costs, on one thread: profiling 6218 x 32 entropies, and the pass that extracts them.

Profiling is timed beside scikit-learn's mixtures, which the published code fits (two components, k-means
start, at most 100 iterations), on the same numbers: 32 layers, from well separated to one group.
The pass is timed with and without its probe, alternating, on the desk model and on a causal
language model with as many image tokens as LLaVA-1.5.

  python -m benchmarks.bye
"""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
EXAMPLES, LAYERS = 6218, 32
ROUNDS = 9


def cpu_seconds(*calls: Callable[[], object]) -> list[float]:
  """Median CPU seconds of every call, taken in turns so that a disturbance meets all."""
  for call in calls:
    call()
  times: list[list[float]] = [[] for _ in calls]
  for _ in range(ROUNDS):
    for call, taken in zip(calls, times, strict=True):
      start = time.process_time()
      call()
      taken.append(time.process_time() - start)
  return [statistics.median(taken) for taken in times]


def profiling() -> list[float]:
  """Seconds of ours and of scikit-learn's."""
  import jax
  import numpy as np
  from sklearn.mixture import GaussianMixture

  from jaxmethods.methods import bye
  from jaxmethods.runtime import compiler

  random = np.random.default_rng(0)
  poisoned = random.random(EXAMPLES) < 0.1
  entropies = random.normal(4.8, 0.15, (EXAMPLES, LAYERS)) + random.normal(0, 0.1, (EXAMPLES, 1))
  entropies = (entropies + poisoned[:, None] * np.linspace(-1.5, 0.5, LAYERS)).astype(np.float32)

  @compiler.jit
  def ours(entropies):
    profile = bye.profile(entropies)
    return profile, bye.clean(entropies, profile.kept)

  def theirs():
    fit = lambda x: GaussianMixture(2, random_state=0).fit(x[:, None])
    fits = [fit(layer) for layer in entropies.T]
    gap = [abs(np.subtract(*f.means_[:, 0])) for f in fits]
    kept = np.array(gap) > 2 * np.array([np.sqrt(f.covariances_).sum() for f in fits])
    score = entropies[:, kept].mean(1)
    fit(score).predict(score[:, None])

  device = jax.device_put(entropies)
  found = ours(device)[1].removed
  assert (np.asarray(found) == poisoned).mean() > 0.99
  return cpu_seconds(lambda: jax.block_until_ready(ours(device)), theirs)


def extraction(name: str) -> list[float]:
  """Seconds of a forward pass without and with the probe."""
  import jax
  import jax.numpy as jnp

  from jaxmethods.experiments.bye.detection import attention_probe
  from jaxmethods.methods import bye
  from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
  from jaxmethods.runtime import compiler

  if name == "desk":
    from jaxmethods.testbeds.multimodal.pretraining import model_of
    from jaxmethods.testbeds.multimodal.settings import Desk

    model = model_of(Desk(), 60)
    batch, tokens, text = 40, model.config.num_tokens, 6
    inputs = {"ids": jnp.ones((batch, text), int)}
    inputs["features"] = jax.random.normal(jax.random.key(0), (batch, tokens, Desk().tower_width))
  else:
    model = CausalLM(CausalLMConfig(1000, 256, 6, 8, 8, 32, 704))
    batch, tokens, text = 2, 576, 40
    inputs = {"ids": jnp.ones((batch, tokens + text), int)}
  params = compiler.jit(model.init)(jax.random.key(1), **inputs)
  last = jnp.full(batch, inputs["ids"].shape[1] - 1)

  def forward(params, inputs, probe):
    output = model.apply(params, **inputs, logits="last", probe=probe)
    return output.logits, output.attention

  plain = compiler.jit(functools.partial(forward, probe=None))
  probed = compiler.jit(
    lambda params, inputs, last: forward(params, inputs, attention_probe(last, tokens, bye.entropy))
  )
  return cpu_seconds(
    lambda: jax.block_until_ready(plain(params, inputs)),
    lambda: jax.block_until_ready(probed(params, inputs, last)),
  )


PARTS = {
  "profiling": profiling,
  "desk": functools.partial(extraction, "desk"),
  "language": functools.partial(extraction, "language"),
}


def main() -> None:
  """Measures each part in a process pinned to one core, prints and records."""
  if sys.argv[1:]:
    print(*PARTS[sys.argv[1]]())
    return
  import jax

  flags = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
  }
  load, measured = os.getloadavg()[0], {}
  for part in PARTS:
    command = ["taskset", "-c", "0", sys.executable, "-m", "benchmarks.bye", part]
    done = subprocess.run(
      command, env={**os.environ, **flags}, stdout=subprocess.PIPE, text=True, check=True
    )
    measured[part] = [float(x) for x in done.stdout.split()[-2:]]
  ours, theirs = measured["profiling"]
  lines = [
    "# BYE: profiling and extraction",
    f"{time.strftime('%Y-%m-%d')}, `python -m benchmarks.bye`; jax {jax.__version__}, Python "
    f"{platform.python_version()}, one thread, load {load:.1f}; CPU seconds, median of {ROUNDS}.",
    "",
    f"{EXAMPLES} x {LAYERS} entropies, all layers profiled, scored and split:",
    "",
    f"| ours | scikit-learn's mixtures | ratio | published code (specification) |\n"
    f"| --- | --- | --- | --- |\n"
    f"| {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} | 0.58 |",
    "",
    "Forward pass, entropies of the last token's attention over the image:",
    "",
    "| model | plain | with entropies | ratio |\n| --- | --- | --- | --- |",
  ]
  names = {
    "desk": "desk model, 40 images of 64 tokens",
    "language": "6 layers of width 256, 2 x (576 + 40) tokens",
  }
  for part, name in names.items():
    plain, probed = measured[part]
    lines.append(f"| {name} | {plain:.3f} | {probed:.3f} | {probed / plain:.3f} |")
  text = "\n".join(lines) + "\n"
  print(text)
  (RESULTS / "bye_speed.md").write_text(text)


if __name__ == "__main__":
  from jaxmethods.runtime import launch

  launch.set_allocator()
  main()
