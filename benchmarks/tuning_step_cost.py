"""What a training step of LoRASculpt, SPIDER and ThanoRA costs beside its plain relative.

  python -m benchmarks.tuning_step_cost

LoRASculpt and ThanoRA beside LoRA, SPIDER beside full tuning of the same layers, and every row of the
suite beside LoRA, on the desk model, at equal batches. Rows take turns within one process, a few steps
each and a few of the plain one right after, and processor time is counted, not the clock: other work on
the machine then slows both alike. Printed are medians over the turns, and what a step holds in memory
by XLA's account (weights, optimiser, the training data, temporaries); SPIDER's further copies of the
trained part are counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from jaxmethods import experiments
from jaxmethods.runtime import command, config as config_lib, launch

RESULTS = Path(__file__).parent / "results"
# Method -> rows, the plain one first (None: all that train); and the ratio that is aimed at.
GROUPS: dict[str, tuple[tuple[str, ...] | None, float | None]] = {
  "lorasculpt": (("lora", "lorasculpt", "no_cmr", "dora"), 1.15),
  "spider": (("full", "spider"), 1.3),
  "thanora": (("lora", "thanora", "hydralora", "loramoe"), 1.1),
  "mllm_tuning": (None, None),
}
STEPS = 3


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--turns", type=int, default=15)
  parser.add_argument("--methods", default=",".join(GROUPS))
  args = parser.parse_args()
  import jax

  launch.keep_compiled_programs()
  target = RESULTS / "tuning_step_cost.json"
  found = json.loads(target.read_text()) if target.exists() else {}
  for name in args.methods.split(","):
    rows, aim = GROUPS[name]
    rows = rows or rows_of_suite()
    programs = {row: Program(name, row) for row in rows}
    plain = programs[rows[0]]
    times: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for _ in range(args.turns):
      for row, run in programs.items():
        own = run()
        times[row].append((own, own if run is plain else plain()))
    medians = {row: 1000 * statistics.median(own for own, _ in of) for row, of in times.items()}
    ratios = {
      row: statistics.median(own / beside for own, beside in of) for row, of in times.items()
    }
    found[name] = {
      "cpu_ms_per_step": medians, "ratio": ratios, "aim": aim, "turns": args.turns,
      "step_bytes": {row: run.num_bytes() for row, run in programs.items()},
      "load": os.getloadavg()[0], "jax": jax.__version__, "machine": platform.processor(),
      "copies": copies(programs) if name == "spider" else None,
    }  # fmt: skip
    print(name, {row: f"{medians[row]:.1f} ms, {ratios[row]:.2f}" for row in rows}, flush=True)
    target.write_text(json.dumps(found, indent=1) + "\n")


def rows_of_suite() -> tuple[str, ...]:
  """LoRA, and all other rows that train; posterior ones share the steps of one of them."""
  from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS

  trained = [row for row, kind in PARADIGMS.items() if kind != "posterior" and row != "base"]
  return tuple(sorted(trained, key=lambda row: row != "lora"))


class Program:
  """One row, compiled and warm; a call runs a few steps and returns processor seconds per step."""

  def __init__(self, name: str, row: str):
    import jax

    from jaxmethods.runtime import compiler

    method = experiments.load(name)
    file = command.CONFIGS / f"{name}.yaml"
    config = config_lib.load(method.Config, file, method=name)
    experiment = method.build(method.rows(config)[row])
    self.state: Any = experiment.init(jax.random.key(1))
    self.step = compiler.jit(experiment.step, donate_argnums=0)
    self.batches = experiment.batches(0)
    self()

  def __call__(self) -> float:
    import jax

    clock = time.process_time()
    for _ in range(STEPS):
      self.state, metrics = self.step(self.state, next(self.batches))
      jax.block_until_ready(metrics)
    return (time.process_time() - clock) / STEPS

  def num_bytes(self) -> int | None:
    from jaxmethods.runtime import compiler

    return compiler.num_bytes(self.step, self.state, next(self.batches))


def copies(programs: dict[str, Any]) -> float:
  """Float32 copies of the trained part that SPIDER keeps besides Adam's two moments."""
  from jaxmethods.testbeds.multimodal.tuning import num_parameters

  state = programs["spider"].state.tuner
  return num_parameters(state.extra) / num_parameters(state.trainable)


if __name__ == "__main__":
  launch.set_allocator()
  main()
