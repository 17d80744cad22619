"""ACGKD, its parts and its rivals: test accuracy of students on one data set, and accuracy against xi.

The protocol is that of `eval.compare --method acgkd`, cheaper for many rows: rows that differ in the
student only (curriculum, temperature, classifier, architecture) share the pseudo-graphs of a seed. Every
student is trained with each of `--rates`. For each row and kind of student the rate with the best
validation counts: the accuracy on the training graphs of the teacher, the only real graphs that settings
may be chosen on. Accuracies are those of the last epoch. Pseudo-graphs and finished students are kept in
the workdir, so the same command continues where it was stopped.

  JAXMETHODS_DATA=DIR python -m benchmarks.acgkd_tables [--seeds 5] [--students gcn,gin] \
    [--rates 0.01,0.001] [--rows acgkd,gfkd,...] [--xi 0.1,0.3] [--gfkd_lr 1] \
    [--data tu:PROTEINS --teacher trained] [--KEY VALUE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data.files import data_dir
from jaxmethods.experiments.acgkd.build import build
from jaxmethods.experiments.acgkd.config import Config, rows
from jaxmethods.experiments.acgkd.generator import Pseudo
from jaxmethods.runtime import compiler, config as config_lib, launch, seeds
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.runtime.workdir import write_json

RESULTS = Path(__file__).parent / "results"
# Read by the distillation only: rows that agree in everything else have the same pseudo-graphs.
STUDENT = (
  "steps", "student_kind", "student_layers", "student_width", "dropout", "batch_size",
  "learning_rate", "curriculum", "curriculum_start", "curriculum_grow", "classifier", "temperature",
  "tau", "tau_min", "tau_max", "tau_lr", "tau_epochs", "feature_weight",
)  # fmt: skip
COLUMNS = ("pseudo_accuracy", "pseudo_gap", "pseudo_edges")


def graphs_of(row: Config) -> Config:
  """Returns the settings of a row that its pseudo-graphs depend on."""
  plain = Config()
  return dataclasses.replace(row, **{name: getattr(plain, name) for name in STUDENT})


def pseudo_graphs(row: Config, seed: int, path: Path, experiment: Experiment) -> Pseudo | None:
  """Makes or reads the pseudo-graphs of a seed; None for rows whose graphs are given."""
  state = experiment.init(jax.random.key(seed))
  if state.pseudo is None:
    return None
  structure = jax.tree.structure(state.pseudo)
  if not path.exists():
    step, batches = compiler.jit(experiment.step, donate_argnums=0), experiment.batches(0)
    for _ in range(experiment.num_steps - row.steps):
      state, _ = step(state, next(batches))
    part = path.with_suffix(".part")
    with part.open("wb") as file:
      np.savez(file, *jax.device_get(jax.tree.leaves(state.pseudo)))
    part.replace(path)
  with np.load(path) as kept:
    return jax.tree.unflatten(structure, [kept[f"arr_{i}"] for i in range(len(kept))])


def run(
  name: str, row: Config, kinds: list[str], rates: list[float], count: int, workdir: Path
) -> None:
  """Trains the students of one row that are not finished."""
  file = lambda kind, rate, seed: workdir / "students" / f"{name}~{kind}~{rate:g}~{seed}.json"
  maker = None
  for kind in kinds:
    student_row = dataclasses.replace(row, student_kind=kind)
    step = None
    for seed in range(1, count + 1):
      missing = [rate for rate in rates if not file(kind, rate, seed).exists()]
      if not missing:
        continue
      maker = maker or build(graphs_of(row))
      path = workdir / "graphs" / f"{graph_id(row)}.{seed}.npz"
      pseudo = pseudo_graphs(graphs_of(row), seed, path, maker)
      if step is None:
        if pseudo is not None:  # the generation is done: a program of distillation only
          student_row = dataclasses.replace(student_row, algorithm="random")
        experiment = build(student_row)
        step = compiler.jit(experiment.step, donate_argnums=0)
        evaluate = compiler.jit(experiment.evaluate)
      for rate in missing:
        begin, used = time.perf_counter(), time.process_time()
        state = experiment.init(jax.random.key(seed))._replace(pseudo=jax.device_put(pseudo))
        for _, batch in zip(range(experiment.num_steps), experiment.batches(0), strict=False):
          state, _ = step(state, batch._replace(learning_rate=jnp.float32(rate)))
        metrics = {key: float(x) for key, x in evaluate(state, experiment.test).items()}
        metrics |= {
          "seconds": time.perf_counter() - begin,
          "cpu_seconds": time.process_time() - used,
        }
        write_json(file(kind, rate, seed), metrics)
        shown = {k: metrics[k] for k in ("test_accuracy", "validation_accuracy") if k in metrics}
        figures = ", ".join(f"{k.removesuffix('_accuracy')} {x:.3f}" for k, x in shown.items())
        print(f"{name} {kind} {rate:g} seed {seed}: {figures}", flush=True)
    write(workdir)


def graph_id(row: Config) -> str:
  """Names the settings of pseudo-graphs readably."""
  plain = Config()
  changed = {
    key: value
    for key, value in dataclasses.asdict(graphs_of(row)).items()
    if value != getattr(plain, key) and key not in ("data", "teacher")
  }
  return re.sub(r"[^\w.=-]+", "_", ",".join(f"{k}={v}" for k, v in changed.items()) or "default")


Runs = dict[int, dict[str, float]]  # {seed: metrics}


def collect(workdir: Path) -> dict[tuple[str, str], dict[float, Runs]]:
  """Reads the finished students: {(row, kind): {rate: runs}}."""
  found: dict[tuple[str, str], dict[float, Runs]] = {}
  for file in sorted((workdir / "students").glob("*.json")):
    name, kind, rate, seed = file.stem.split("~")
    runs = found.setdefault((name, kind), {}).setdefault(float(rate), {})
    runs[int(seed)] = json.loads(file.read_text())
  return found


def best_rate(tried: dict[float, Runs], published: float) -> float:
  """Returns the rate with the best mean validation; the published one where there is none."""
  complete = max(map(len, tried.values()))
  scores = {
    rate: np.mean([run["validation_accuracy"] for run in runs.values()])
    for rate, runs in tried.items()
    if len(runs) == complete and all("validation_accuracy" in run for run in runs.values())
  }
  if not scores:
    return published if published in tried else max(tried)
  return max(scores, key=lambda rate: (scores[rate], rate))


def write(workdir: Path) -> None:
  """Writes tables and picture of the finished students."""
  about = json.loads((workdir / "about.json").read_text())
  found = collect(workdir)
  rates = {
    key: best_rate(tried, about["settings"]["learning_rate"]) for key, tried in found.items()
  }
  chosen = {key: tried[rates[key]] for key, tried in found.items()}
  lines = [
    f"# ACGKD (a reconstruction) and its rivals on {about['data']}",
    f"{time.strftime('%Y-%m-%d')}, `{about['command']}`; jax {jax.__version__}, Python "
    f"{platform.python_version()}, CPU shared with other work. {about['about']}.",
    "",
    "Test accuracy of the last epoch, mean ± 95 % interval over seeds. Validation: accuracy on the "
    "graphs that the teacher was trained on. Rate: of the student's Adam, the one with the best "
    "validation for each row (`real` trains on those graphs and keeps the published one). Agreement, "
    "gap, edges: of the final pseudo-graphs (teacher's class is the wanted one; distance from its "
    "batch-norm statistics; mean number, of directed edges for gfkd and deepinversion).",
  ]
  kinds = sorted({kind for _, kind in found})
  for kind in kinds:
    lines += [
      "",
      f"## {kind.upper()} student",
      "",
      "| row | test accuracy | each seed | validation | rate | agreement | gap | edges |",
      "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in about["rows"] if (name, kind) in found):
      runs = [one for _, one in sorted(chosen[name, kind].items())]
      cells = [mean(runs, "test_accuracy"), " ".join(f"{r['test_accuracy']:.3f}" for r in runs)]
      cells += [mean(runs, "validation_accuracy"), f"{rates[name, kind]:g}"]
      cells += [mean(runs, column) for column in COLUMNS]
      lines.append(f"| {' | '.join([name, *cells])} |")
  lines += rate_table(found, about["rows"], kinds)
  (RESULTS / f"{about['name']}.md").write_text("\n".join(lines) + "\n")
  flat = {
    f"{name}.{kind}": {f"{rate:g}": runs for rate, runs in tried.items()}
    for (name, kind), tried in found.items()
  }
  write_json(RESULTS / f"{about['name']}.json", {"settings": about["settings"], "runs": flat})
  picture(chosen, about, RESULTS / f"{about['name']}_xi.png")


def rate_table(found: dict, rows: list[str], kinds: list[str]) -> list[str]:
  """Lists every rate that was tried."""
  rates = sorted({rate for tried in found.values() for rate in tried}, reverse=True)
  lines = ["", "## Rates of the student", "", "Mean test accuracy (validation) of each."]
  lines += ["", f"| row, student | {' | '.join(f'{rate:g}' for rate in rates)} |"]
  lines.append("| --- " * (1 + len(rates)) + "|")
  for name, kind in ((name, kind) for kind in kinds for name in rows if (name, kind) in found):
    cells = []
    for rate in rates:
      runs = list(found[name, kind].get(rate, {}).values())
      means = [
        f"{np.mean([run[key] for run in runs]):.3f}" if runs and key in runs[0] else "-"
        for key in ("test_accuracy", "validation_accuracy")
      ]
      cells.append(f"{means[0]} ({means[1]})")
    lines.append(f"| {name}, {kind.upper()} | {' | '.join(cells)} |")
  return lines


def mean(runs: list[dict[str, float]], column: str) -> str:
  """Writes mean and interval of a metric, "-" where a row has none."""
  values = [run[column] for run in runs if column in run]
  if not values:
    return "-"
  summary = seeds.summarize(values)
  spread = "" if summary["ci95"] is None else f" ± {summary['ci95']:.2g}"
  return f"{summary['mean']:.3g}{spread}"


def picture(found: dict, about: dict[str, Any], path: Path) -> None:
  """Draws test and validation accuracy against xi, where several values have been run."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  kinds = sorted({kind for _, kind in found})
  series = {
    kind: sorted(
      (xi, found[name, kind]) for name, xi in about["xi"].items() if (name, kind) in found
    )
    for kind in kinds
  }
  if max(map(len, series.values())) < 3:
    return
  figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.2), layout="constrained")
  for axis, kind in zip(np.atleast_1d(axes), kinds, strict=True):
    for metric, style in (("test_accuracy", "-o"), ("validation_accuracy", "--s")):
      values = [[run[metric] for run in runs.values()] for _, runs in series[kind]]
      middle, low, high = ([f(v) for v in values] for f in (np.mean, np.min, np.max))
      (line,) = axis.plot([xi for xi, _ in series[kind]], middle, style, label=metric.split("_")[0])
      axis.fill_between(
        [xi for xi, _ in series[kind]], low, high, color=line.get_color(), alpha=0.15, lw=0
      )
    axis.set(title=f"{kind.upper()} student", xlabel="spatial complexity xi", ylim=(0, 1))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  np.atleast_1d(axes)[0].set_ylabel("accuracy: mean, least, greatest")
  np.atleast_1d(axes)[0].legend(frameon=False, fontsize=9)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def main() -> int:
  """Trains the missing students and writes the tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", type=Path, default=Path("configs/acgkd_paper.yaml"))
  parser.add_argument("--rows", help="default: all of eval.compare")
  parser.add_argument("--xi", default="", help="more values, each a row of its own")
  parser.add_argument("--gfkd_lr", default="", help="more rates of GFKD's structure, each a row")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--students", default="gcn,gin")
  parser.add_argument("--rates", default="0.01,0.003,0.001,0.0003", help="of the student's Adam")
  parser.add_argument("--workdir", type=Path, default=Path("runs/acgkd_tables"))
  parser.add_argument("--name", default="acgkd_tables", help="of the results files")
  args, rest = parser.parse_known_args()
  overrides = [
    (key.removeprefix("--"), value) for key, value in zip(rest[::2], rest[1::2], strict=True)
  ]
  config = config_lib.load(Config, args.config, overrides=overrides, method="acgkd")
  table = rows(config)
  table |= {
    f"xi={xi}": dataclasses.replace(config, xi=float(xi)) for xi in args.xi.split(",") if xi
  }
  table |= {
    f"gfkd_lr={lr}": dataclasses.replace(table["gfkd"], structure_lr=float(lr))
    for lr in args.gfkd_lr.split(",")
    if lr
  }
  chosen = args.rows.split(",") if args.rows else list(table)
  for folder in ("graphs", "students"):
    (args.workdir / folder).mkdir(parents=True, exist_ok=True)
  xi = {
    name: row.xi
    for name, row in table.items()
    if name in ("acgkd", "all_pairs") or name.startswith("xi=")
  }
  about = {
    "name": args.name,
    "data": config.data,
    "command": " ".join(["python -m benchmarks.acgkd_tables", *sys.argv[1:]]).replace(
      str(args.workdir), "DIR"
    ),
    "about": build(config).about.replace(str(data_dir()), "$JAXMETHODS_DATA"),
    "settings": dataclasses.asdict(config),
    "rows": list(table),
    "xi": xi,
  }
  kept = args.workdir / "about.json"
  if kept.exists() and json.loads(kept.read_text())["settings"] != about["settings"]:
    parser.error(f"{args.workdir} holds runs with other settings")
  write_json(kept, about)
  rates = [float(rate) for rate in args.rates.split(",")]
  for name in chosen:
    run(name, table[name], args.students.split(","), rates, args.seeds, args.workdir)
  write(args.workdir)
  print((RESULTS / f"{args.name}.md").read_text())
  return 0


if __name__ == "__main__":
  os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # one core is its share
  launch.set_allocator()
  launch.keep_compiled_programs()
  sys.exit(main())
