"""Runs the safety suite over seeds, a task and a seed at a time; writes results/llm_safety_TASK.json.

  python -m benchmarks.llm_safety_suite run --parts DIR --seeds 1 2 3 4 5 [--tasks poison dpo]
  python -m benchmarks.llm_safety_suite join --parts DIR

What is done lies in DIR, and is not done again. Shares are written in per cent.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from jaxmethods.experiments.llm_safety.config import TASKS, Config, columns
from jaxmethods.runtime import seeds

RESULTS = Path(__file__).parent / "results"
# Columns that are no shares.
PLAIN = {
  "epsilon", "seconds", "exposure", "audit_epsilon", "member_nll", "margin", "chosen_change",
  "log10_quality", "target_loss", "z", "z_all", "nll",
}  # fmt: skip


def run(task: str, seed: int, file: Path) -> None:
  """Makes all rows of a task for a seed."""
  from jaxmethods.experiments.llm_safety import build

  config = Config(task=task, seed=seed)
  experiment = build.build(config)
  state, batches = experiment.init(None), experiment.batches(0)
  started, cpu = time.perf_counter(), time.process_time()
  for _ in range(experiment.num_steps):
    state, _ = experiment.step(state, next(batches))
  rows = json.loads(experiment.files(state)["rows.json"])
  cost = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}
  file.write_text(json.dumps({"task": task, "seed": seed, "rows": rows, "cost": cost}, indent=1))
  print(task, seed, {name: round(x, 1) for name, x in cost.items()}, flush=True)


def join(parts: Path) -> None:
  """Puts the seeds of every task together."""
  for task in TASKS:
    done = [json.loads(file.read_text()) for file in sorted(parts.glob(f"{task}-*.json"))]
    if not done:
      continue
    rows = [
      {"name": row, "metrics": _metrics(task, [part["rows"][f"{task}.{row}"] for part in done])}
      for row in TASKS[task].rows
    ]
    cost = {name: [round(part["cost"][name], 1) for part in done] for name in ("wall", "cpu")}
    contents = {
      "unit": "per cent; epsilon, exposure (bits), z, nats and seconds as they are",
      "seeds": [part["seed"] for part in done],
      "cost_seconds": cost,
      "rows": rows,
    }
    (RESULTS / f"llm_safety_{task}.json").write_text(json.dumps(contents, indent=1) + "\n")


def _metrics(task: str, runs: list[dict[str, float | None]]) -> dict[str, dict]:
  """Summarises the columns that apply to all runs."""
  found = {}
  for name in columns(task):
    values = [run[name] for run in runs]
    if all(value is not None and math.isfinite(value) for value in values):
      scale = 1 if name in PLAIN else 100
      found[name] = seeds.summarize([round(scale * value, 4) for value in values])
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("what", choices=("run", "join"))
  parser.add_argument("--parts", type=Path, required=True)
  parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
  parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
  args = parser.parse_args()
  args.parts.mkdir(parents=True, exist_ok=True)
  if args.what == "join":
    return join(args.parts)
  for seed in args.seeds:
    for task in args.tasks:
      file = args.parts / f"{task}-{seed}.json"
      if not file.exists():
        run(task, seed, file)
  return None


if __name__ == "__main__":
  main()
