"""FedSSP and its baselines on the published settings, beside the published accuracies.

Every run (setting, row, seed) is one `eval.compare` process on one core, as many at once as `--lanes`.
Finished runs are kept and a run that was stopped goes on, so the same command collects what there is
and continues with the rest. The table is written after every run.

  JAXMETHODS_DATA=DIR python -m benchmarks.fedssp_settings --settings SM,BIO-SN-CV \
    --rows fedssp,fedavg,local --seeds 3 [--lanes 2] [--workdir runs/fedssp_settings]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from jaxmethods.runtime import seeds as seeds_lib

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("SM", "BIO-SM", "SM-CV", "BIO-SM-SN", "BIO-SN-CV", "SM-SN-CV")
# Test accuracy in per cent, as reprinted in table 1 of the follow-up paper FedIGL (FedSSP spec).
PUBLISHED = {
  "fedavg": (74.12, 67.82, 81.21, 67.31, 70.93, 75.33),
  "fedprox": (69.35, 67.27, 70.02, 63.89, 69.32, 67.15),
  "gcfl": (77.71, 72.05, 72.64, 70.43, 67.91, 71.79),
  "fedstar": (78.63, 72.71, 78.84, 72.60, 69.51, 75.94),
  "fedssp": (79.62, 73.66, 84.29, 72.37, 75.07, 79.12),
}


def command(workdir: Path, setting: str, row: str, seed: int, steps: int | None) -> list[str]:
  """Returns the command of one run."""
  words = [sys.executable, "-m", "eval.compare", "--method", "fedssp"]
  words += ["--config", "configs/fedssp_paper.yaml", "--data", f"tu:{setting}", "--rows", row]
  words += ["--seed", str(seed), "--seeds", "1", "--workdir", str(workdir)]
  return words if steps is None else [*words, "--steps", str(steps)]


def run_all(jobs: list[tuple[str, str, int]], args: argparse.Namespace) -> list[str]:
  """Runs the jobs in order, `args.lanes` at once, each on its core; returns what failed."""
  waiting: queue.SimpleQueue = queue.SimpleQueue()
  for job in jobs:
    waiting.put(job)
  failed = []

  def lane(core: int) -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    while True:
      try:
        setting, row, seed = waiting.get_nowait()
      except queue.Empty:
        return
      workdir = run_directory(args.workdir, setting, row, seed)
      workdir.mkdir(parents=True, exist_ok=True)
      start = time.time()
      with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        words = command(workdir, setting, row, seed, args.steps)
        status = subprocess.run(
          ["taskset", "-c", str(core), *words], env=environment, stdout=log, stderr=log
        ).returncode
      print(
        f"{setting} {row} seed {seed}: status {status}, {time.time() - start:.0f} s", flush=True
      )
      if status:
        failed.append(f"{setting} {row} seed {seed}")
      write(args.workdir, args.name)

  threads = [threading.Thread(target=lane, args=(core,)) for core in range(args.lanes)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return failed


def run_directory(workdir: Path, setting: str, row: str, seed: int) -> Path:
  """Where one run lives."""
  return workdir / f"{setting}.{row}.{seed}"


def collect(workdir: Path) -> dict[str, dict[str, dict[int, dict]]]:
  """Returns {setting: {row: {seed: metrics}}} of the finished runs."""
  found: dict[str, dict[str, dict[int, dict]]] = {}
  for file in sorted(workdir.glob("*/compare.json")):
    setting, row, seed = file.parent.name.rsplit(".", 2)
    result = json.loads(file.read_text())["rows"][0]
    metrics = {name: value["values"][0] for name, value in result["metrics"].items()}
    found.setdefault(setting, {}).setdefault(row, {})[int(seed)] = {
      **metrics,
      "seconds": result["seconds"],
    }
  return found


def table(found: dict[str, dict[str, dict[int, dict]]]) -> str:
  """Returns the Markdown table: mean over seeds, each seed, the published figure."""
  lines = []
  for i, setting in enumerate(SETTINGS):
    if setting not in found:
      continue
    lines += [
      f"## {setting}",
      "",
      "| row | test accuracy % (± 95 % interval) | each seed | published | minutes a seed |",
      "| --- | --- | --- | --- | --- |",
    ]
    for row, seeds in found[setting].items():
      values = [100 * one["test_accuracy"] for one in seeds.values()]
      summary = seeds_lib.summarize(values)
      spread = "" if summary["ci95"] is None else f" ± {summary['ci95']:.1f}"
      minutes = sum(one["seconds"] for one in seeds.values()) / len(seeds) / 60
      published = f"{PUBLISHED[row][i]:.2f}" if row in PUBLISHED else "-"
      each = " ".join(f"{value:.1f}" for value in values)
      lines.append(
        f"| {row} | {summary['mean']:.2f}{spread} | {each} | {published} | {minutes:.1f} |"
      )
    lines.append("")
  return "\n".join(lines)


def write(workdir: Path, name: str) -> None:
  """Writes the results file from what is finished."""
  found = collect(workdir)
  text = (
    "# FedSSP on the published settings\n"
    f"Written {time.strftime('%Y-%m-%d')}, `python -m benchmarks.fedssp_settings`, each run "
    f"`{' '.join(command(Path('DIR'), 'SETTING', 'ROW', 0, None)[1:])}`: 200 rounds, mean test "
    "accuracy over clients, average of the last 20 rounds, one CPU core a run. Runs of earlier days are "
    "kept; minutes are wall time beside whatever else ran.\n\n" + table(found)
  )
  (RESULTS / f"{name}.md").write_text(text)
  (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
  """Runs what is missing, records and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--settings", default=",".join(SETTINGS))
  parser.add_argument("--rows", default="fedssp,fedavg,fedprox,fedper,gcfl,fedstar,local")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, help="rounds, default 200")
  parser.add_argument("--lanes", type=int, default=os.cpu_count())
  parser.add_argument("--workdir", type=Path, default=Path("runs/fedssp_settings"))
  parser.add_argument("--name", default="fedssp_settings", help="of the results file")
  args = parser.parse_args()
  jobs = [
    (setting, row, seed)
    for setting, row, seed in itertools.product(
      args.settings.split(","), args.rows.split(","), range(1, args.seeds + 1)
    )
    if not (run_directory(args.workdir, setting, row, seed) / "compare.json").exists()
  ]
  failed = run_all(jobs, args)
  write(args.workdir, args.name)
  print(table(collect(args.workdir)))
  if failed:
    print("failed: " + "; ".join(failed), file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  from jaxmethods.runtime import launch

  launch.set_allocator()
  sys.exit(main())
