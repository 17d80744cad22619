"""CPU time of a step of GIFT beside that of plain fine-tuning: `python -m benchmarks.gift_step`."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax

from jaxmethods.experiments.gift import build
from jaxmethods.experiments.gift.config import Config, rows
from jaxmethods.runtime import compiler

OUT = Path(__file__).parent / "results" / "gift_step.json"
STEPS = 12


def cpu_milliseconds(config: Config) -> float:
  """Median CPU time of a step inside of a task, after the first, which compiles."""
  experiment = build.build(config)
  step, batches = compiler.jit(experiment.step), experiment.batches(1)
  state, times = experiment.init(jax.random.key(0)), []
  for _ in range(STEPS):
    batch, start = next(batches), time.process_time()
    state, metrics = step(state, batch)
    jax.block_until_ready((state.params, metrics))
    times.append(1e3 * (time.process_time() - start))
  return statistics.median(times[1:])


def main() -> None:
  """Measures both rows and writes the ratio."""
  chosen = rows(dataclasses.replace(Config(), synthetic="renderer"))
  found = {name: round(cpu_milliseconds(chosen[name]), 1) for name in ("finetune", "gift")}
  ratio = round(found["gift"] / found["finetune"], 2)
  record = {"cpu_median_ms": found, "ratio": ratio, "batch": chosen["gift"].batch_size}
  OUT.write_text(json.dumps(record, indent=1) + "\n")
  print(record)


if __name__ == "__main__":
  main()
