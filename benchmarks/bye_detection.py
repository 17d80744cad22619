"""What BYE and its rivals find in a poisoned desk model: the first tuning only, at many attacks.

Every run tunes on the poisoned data, judges once and stops before the second tuning: half the cost of
`train.run --method bye`, with the same seeds and the same numbers. One JSON line a run is added to the
file; runs that are in it already are skipped, so the same command continues.

  python -m benchmarks.bye_detection runs.jsonl --seeds 5 --poison_rate 0,0.01,0.05,0.1
  python -m benchmarks.bye_detection runs.jsonl --seeds 3 --trigger blend,sig,wanet,ftrojan
  python -m benchmarks.bye_detection runs.jsonl --seeds 3 --desk.num_layers 6
  python -m benchmarks.bye_detection runs.jsonl --table
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, get_args

from jaxmethods.experiments.bye.config import ONCE, Defence
from jaxmethods.runtime import launch

DETECTORS = [name for name in get_args(Defence) if name not in ONCE]


def configured(changes: dict[str, str]) -> Any:
  """The embedded default with `changes`; what a trigger does not have (a place, cells) is left out."""
  from jaxmethods import experiments
  from jaxmethods.runtime import command, config as config_lib

  changes = dict(changes)
  if changes["trigger"] != "patch":
    changes["trigger_place"] = "centre"
    if changes["trigger"] != "random":
      changes["trigger_cell"] = "0"
  file = command.CONFIGS / "bye.yaml"
  overrides = list(changes.items())
  return config_lib.load(experiments.load("bye").Config, file, overrides=overrides, method="bye")


def detect(config: Any) -> dict[str, float]:
  """Tunes on everything and lets all detectors judge."""
  import jax

  from jaxmethods.experiments.bye.build import build
  from jaxmethods.runtime import compiler

  experiment = build(config)
  state = experiment.init(jax.random.key(config.seed))
  step = compiler.jit(experiment.step, donate_argnums=0)
  for number, work in zip(range(config.steps + 1), experiment.batches(0), strict=False):
    state, metrics = step(state, work)
    if number % 50 == 0:
      print(f"  {number}/{config.steps} loss {float(metrics['loss']):.3f}", flush=True)
  found = compiler.jit(experiment.evaluate)(state, experiment.test)
  return {name: float(value) for name, value in found.items()}


def table(runs: list[dict]) -> str:
  """Means over the seeds of every attack."""
  groups: dict[str, list[dict]] = {}
  for run in runs:
    key = {name: value for name, value in run["changes"].items() if name != "seed"}
    groups.setdefault(" ".join(map(str, key.values())), []).append(run["found"])
  first = [name for name in runs[0]["changes"] if name != "seed"]
  layers = [name for name in runs[0]["found"] if name.startswith("separation/")]
  head = [
    " ".join(first), "seeds", "clean accuracy", "ASR", "separation, best of the layers",
    "runs with a layer", *(f"{name}: F1 (removed)" for name in DETECTORS),
  ]  # fmt: skip
  lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
  for key, found in groups.items():

    def mean(name: str, found: list[dict] = found) -> str:
      return f"{statistics.mean(run[name] for run in found):.1f}"

    best = [max(run[layer] for layer in layers) for run in found]
    cells = [
      key, str(len(found)), mean("clean_accuracy_before"), mean("attack_success_before"),
      ", ".join(f"{value:.2f}" for value in best),
      str(sum(run["layers_used"] > 0 for run in found)),
      *(f"{mean(f'f1/{name}')} ({mean(f'removed/{name}')})" for name in DETECTORS),
    ]  # fmt: skip
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main() -> None:
  """Runs what is missing, then prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("file", type=Path)
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--table", action="store_true")
  lists = {
    "target": "counting", "steps": "1800", "trigger": "patch", "poison_rate": "0.1",
    "trigger_side": "12", "trigger_cell": "3", "adapter": "full", "desk.num_layers": "3",
  }  # fmt: skip
  for name, default in lists.items():
    parser.add_argument(f"--{name}", default=default, help="several with commas")
  args = parser.parse_args()
  read = lambda: [json.loads(line) for line in args.file.read_text().splitlines()]
  runs = read() if args.file.exists() else []
  if not args.table:
    launch.keep_compiled_programs()
    values = [vars(args)[name].split(",") for name in lists]
    for *chosen, seed in itertools.product(*values, range(1, args.seeds + 1)):
      changes = dict(zip(lists, chosen, strict=True)) | {"seed": str(seed)}
      if any(run["changes"] == changes for run in runs):
        continue
      print(changes, flush=True)
      run = {"changes": changes, "found": detect(configured(changes))}
      with args.file.open("a") as file:
        file.write(json.dumps(run) + "\n")
      runs = read()
  print(table(runs))


if __name__ == "__main__":
  launch.set_allocator()
  main()
