"""The long table of the suite: every row at its best rate, at equal budget and at matched target.

First every row is tried at three learning rates, judged by H on the validation part (one seed), and
beyond them where the best is at the edge; then the chosen rate runs on the test part from several seeds.
Rows that edit the weights afterwards share the run they edit. What is finished is kept line by line:
the same command continues, and a second one on the same folder (with other rows first) shares the work.

  python -m benchmarks.mllm_tuning search            # -> runs.jsonl
  python -m benchmarks.mllm_tuning table             # -> runs.jsonl
  python -m benchmarks.mllm_tuning report            # -> results/mllm_tuning_rows.md, .json, .png
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmethods.runtime import launch
from jaxmethods.stats.matched import lost_at

RESULTS = Path(__file__).parent / "results"
# Factors around the middle rate of a kind of row; three tries each.
FACTORS = (1 / 3, 1.0, 3.0)
FURTHER = 2  # rates tried beyond them, where the best is at the edge
MIDDLE = {
  "reference": 1e-3,
  "selective": 1e-3,
  "posterior": 1e-3,
  "additive": 3e-3,
  "reparameterised": 3e-3,
}
SHARED = "full_no_head"  # the run that posterior rows edit
EVALUATIONS = 4  # along a run, for the reading at matched target
LEVELS = (50.0, 75.0)  # target accuracies of that reading
COLUMNS = ("Source", "Target", "E", "F", "O", "Avg", "H")


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("what", choices=("search", "table", "report"))
  parser.add_argument("--rows", help="A,B: which rows (default: all)")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--unsearched", action="store_true", help="middle rate for rows not searched")
  parser.add_argument("--steps", type=int, default=350)
  parser.add_argument("--target", default="digits")
  parser.add_argument("--folder", type=Path, default=Path("runs/mllm_tuning/long"))
  args = parser.parse_args()
  launch.set_allocator()
  args.folder.mkdir(parents=True, exist_ok=True)
  {"search": search, "table": table, "report": report}[args.what](args)


def search(args: argparse.Namespace) -> None:
  """Three rates for every row on the validation part, seed 1; up to two more beyond an extreme best."""
  runner = Runner(args, "validation")
  todo = {name: rates_to_try(name) for name in chosen_rows(args) if name != "base"}
  for _ in range(1 + FURTHER):
    for run in in_order((name, rate, 1) for name, rates in todo.items() for rate in rates):
      runner.run(*run)
    scores = scores_of(args)
    todo = {name: outwards(scores[name]) for name in todo}
  print(json.dumps(best_rates(args), indent=1))


def table(args: argparse.Namespace) -> None:
  """Every row at its chosen rate on the test part."""
  runner, rates = Runner(args, "test"), {"base": 0.0} | best_rates(args)
  if args.unsearched:
    rates = {name: rates_to_try(name)[len(FACTORS) // 2] for name in chosen_rows(args)} | rates
  names = [name for name in chosen_rows(args) if name in rates]
  seeds = range(1, args.seeds + 1)
  for run in in_order((name, rates[name], seed) for name in names for seed in seeds):
    runner.run(*run)


def outwards(scores: Mapping[float, float]) -> list[float]:
  """The rate beyond the best one, if that is the lowest or the highest; else none.

  Args:
    scores: rate -> what it is chosen by, at rates that grow by a constant factor.
  """
  rates = sorted(scores)
  best = max(rates, key=lambda rate: (scores[rate], -rate))
  if best not in (rates[0], rates[-1]) or len(rates) < 2:
    return []
  factor = rates[1] / rates[0]
  return [float(f"{best / factor if best == rates[0] else best * factor:.1e}")]


def in_order(runs: Iterable[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
  """Posterior rows last, and those of one rate and seed together: they share the run they edit."""
  from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS

  edits = lambda run: PARADIGMS[run[0]] == "posterior"
  return sorted(runs, key=lambda run: (True, *run[1:]) if edits(run) else (False,))


def chosen_rows(args: argparse.Namespace) -> list[str]:
  from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS

  return list(PARADIGMS) if args.rows is None else args.rows.split(",")


def rates_to_try(name: str) -> list[float]:
  """The middle rate of the row's paradigm, a third and three times of it."""
  from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS

  return [float(f"{MIDDLE[PARADIGMS[name]] * factor:.1e}") for factor in FACTORS]


def best_rates(args: argparse.Namespace) -> dict[str, float]:
  """By H on the validation part; the smaller rate of equals."""
  choose = lambda of: max(of, key=lambda rate: (of[rate], -rate))
  return {name: choose(of) for name, of in scores_of(args).items()}


def scores_of(args: argparse.Namespace) -> dict[str, dict[float, float]]:
  """H on the validation part of every row and rate that was tried."""
  scores: dict[str, dict[float, float]] = {}
  for line in finished(args):
    if line["split"] == "validation":
      scores.setdefault(line["row"], {})[line["rate"]] = line["metrics"]["H"]
  return scores


def finished(args: argparse.Namespace) -> list[dict[str, Any]]:
  """The runs of this budget and target so far."""
  path = args.folder / "runs.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  return [line for line in lines if (line["steps"], line["target"]) == (args.steps, args.target)]


class Runner:
  """Trains rows on one benchmark; keeps what is done."""

  def __init__(self, args: argparse.Namespace, split: str):
    from jaxmethods.experiments.mllm_tuning import config as mllm_tuning
    from jaxmethods.runtime import config as config_lib
    from jaxmethods.testbeds.multimodal import benchmark as multimodal

    launch.keep_compiled_programs()
    file = Path(__file__).parents[1] / "configs" / "mllm_tuning.yaml"
    config = config_lib.load(mllm_tuning.Config, file)
    self.args, self.split = args, split
    self.config = dataclasses.replace(config, steps=args.steps, target=args.target, split=split)
    self.benchmark = multimodal.load(config.desk, (args.target,))
    self.programs: dict[str, Any] = {}
    self.shared: tuple[Any, Any] | None = None

  def run(self, name: str, rate: float, seed: int) -> None:
    """One run, unless it is done."""
    from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS

    line = {
      "row": name, "rate": rate, "seed": seed, "split": self.split, "steps": self.args.steps,
      "target": self.args.target,
    }  # fmt: skip
    if key_of(line) in map(key_of, finished(self.args)):  # also by another process on this folder
      return
    began = time.perf_counter()
    posterior = PARADIGMS[name] == "posterior"
    state, seconds, trajectory = (
      self.edited(name, rate, seed) if posterior else self.train(name, rate, seed)
    )
    metrics = self.evaluate(name, state)
    line |= {
      "metrics": metrics,
      "trajectory": trajectory,
      "step_ms": 1000 * seconds,
      "wall": time.perf_counter() - began,
      "load": os.getloadavg()[0],
    }
    with (self.args.folder / "runs.jsonl").open("a") as file:
      file.write(json.dumps(line) + "\n")
    print(f"{name} rate {rate:g} seed {seed} {self.split}: " + brief(metrics), flush=True)

  def build(self, name: str) -> tuple[Any, Any]:
    """(experiment, tuner) of a row; its programs do not depend on rate and seed."""
    from jaxmethods.experiments.mllm_tuning import config as mllm_tuning
    from jaxmethods.testbeds.multimodal import suite as tuning_rows

    if self.programs.get("name") != name:
      row = dataclasses.replace(mllm_tuning.rows(self.config)[name], steps=self.config.steps)
      row = dataclasses.replace(row, eval_every=row.steps)
      experiment = tuning_rows.build(row, benchmark=self.benchmark)
      tuner = tuning_rows.tuner_of(row, self.benchmark.model)
      self.programs |= {"name": name, "experiment": experiment, "tuner": tuner}
      self.programs |= {"step": None, "evaluate": None}
    return self.programs["experiment"], self.programs["tuner"]

  def start(self, name: str, rate: float, seed: int) -> Any:
    """The state before the first step, at this rate."""
    import jax

    from jaxmethods.experiments.mllm_tuning import config as mllm_tuning
    from jaxmethods.testbeds.multimodal import tuning
    from jaxmethods.tuning.tuner import adamw

    experiment, tuner = self.build(name)
    state = experiment.init(jax.random.key(seed))
    row = mllm_tuning.rows(dataclasses.replace(self.config, rates={name: rate or 1.0}))[name]
    rates = tuning.rates_of(row)
    optimiser = adamw(rates, tuner.rates, self.config.steps, warmup=self.config.warmup)
    return state._replace(opt_state=optimiser.init(state.tuner.trainable))

  def train(self, name: str, rate: float, seed: int) -> tuple[Any, float, list[dict[str, float]]]:
    """(state, seconds a step, metrics along the way)."""
    import jax

    from jaxmethods.runtime import compiler

    experiment, _ = self.build(name)
    state = self.start(name, rate, seed)
    steps = 0 if name == "base" else self.config.steps
    if self.programs["step"] is None:
      self.programs["step"] = compiler.jit(experiment.step, donate_argnums=0)
    batches, times, trajectory = experiment.batches(0), [], []
    looks = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS - 1)}
    for k in range(1, steps + 1):
      clock = time.perf_counter()
      state, metrics = self.programs["step"](state, next(batches))
      jax.block_until_ready(metrics)
      times.append(time.perf_counter() - clock)
      if not np.isfinite(float(metrics["loss"])):
        break
      if k in looks and self.split == "test":
        seen = self.evaluate(name, state)
        trajectory.append({"step": k, "Target": seen["Target"], "F": seen["F"]})
    return state, float(np.median(times)) if times else 0.0, trajectory

  def edited(self, name: str, rate: float, seed: int) -> tuple[Any, float, list[dict[str, float]]]:
    """The state of a posterior row: the shared run, with what the row itself keeps."""
    if self.shared is None or self.shared[0] != (rate, seed):
      self.shared = ((rate, seed), self.train(SHARED, rate, seed))
    trained, seconds, _ = self.shared[1]
    own = self.start(name, rate, seed)
    return own._replace(tuner=own.tuner._replace(trainable=trained.tuner.trainable)), seconds, []

  def evaluate(self, name: str, state: Any) -> dict[str, float]:
    """All columns. Plain models share one program."""
    from jaxmethods.runtime import compiler
    from jaxmethods.testbeds.multimodal import tuning

    experiment, tuner = self.build(name)
    if tuner.finalize is None:
      if self.programs["evaluate"] is None:
        self.programs["evaluate"] = compiler.jit(experiment.evaluate)
      return {k: float(v) for k, v in self.programs["evaluate"](state, experiment.test).items()}
    if "plain" not in self.programs:
      model, families = self.benchmark.model, self.benchmark.upstream.families
      target = self.config.target

      def plain(params, test):
        run = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)
        return tuning.table(run, families, target, test)

      self.programs["plain"] = compiler.jit(plain)
    params = compiler.jit(tuner.finalize)(*state.tuner)
    columns = self.programs["plain"](params, experiment.test)
    share = tuning.num_trainable(state.tuner) / tuning.num_parameters(self.benchmark.params)
    metrics = {k: float(v) for k, v in columns.items()}
    return metrics | {"params_percent": 100 * float(share), "mergeable": 1.0}


def key_of(line: dict[str, Any]) -> tuple:
  return tuple(line[name] for name in ("row", "rate", "seed", "split", "steps", "target"))


def brief(metrics: dict[str, float]) -> str:
  return " ".join(f"{name} {metrics[name]:.1f}" for name in ("Source", "Target", "F", "H"))


def report(args: argparse.Namespace) -> None:
  """The table, the search behind it, and the picture."""
  from jaxmethods.testbeds.multimodal import figures as tuning_figures
  from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS

  chosen = best_rates(args)
  lines = [
    line
    for line in finished(args)
    if line["split"] == "test" and line["rate"] == chosen.get(line["row"], line["rate"])
  ]
  rows = [name for name in PARADIGMS if any(line["row"] == name for line in lines)]
  of = {name: [line for line in lines if line["row"] == name] for name in rows}
  tasks = [m for m in lines[0]["metrics"] if m not in (*COLUMNS, "params_percent", "mergeable")]
  header = [
    "paradigm", "method", "seeds", "rate", "params %", *tasks, *COLUMNS, "step / LoRA", "MB", "mergeable"
  ]  # fmt: skip
  body = []
  for name in rows:
    runs = of[name]
    cell = lambda metric, runs=runs: spread([run["metrics"][metric] for run in runs])
    body.append(
      [
        PARADIGMS[name],
        name,
        str(len(runs)),
        f"{runs[0]['rate']:g}",
        f"{runs[0]['metrics']['params_percent']:.1f}",
        *map(cell, tasks),
        *map(cell, COLUMNS),
        *cost_of(name),
        "yes" if runs[0]["metrics"]["mergeable"] else "no",
      ]
    )
  text = ["## Equal budget\n", markdown(header, body), "\n## Matched target\n", matched(of)]
  text += ["\n## Search of the rates\n", searched(args)]
  stem = RESULTS / "mllm_tuning"
  head = "# Ways to tune one model\n" + introduction(args, lines)
  # The page of the method, mllm_tuning.md, is written by hand and by benchmarks.tables.
  (RESULTS / "mllm_tuning_rows.md").write_text("\n".join([head, *text]) + "\n")
  stem.with_suffix(".json").write_text(json.dumps(finished(args), indent=0) + "\n")
  tuning_figures.tradeoff(points(of), PARADIGMS).savefig(stem.with_suffix(".png"), dpi=120)
  print(f"wrote {stem}_rows.md, {stem}.json and .png")


def cost_of(name: str) -> tuple[str, str]:
  """A row's step beside LoRA's, and what it holds, in MB; posterior rows train like `SHARED`."""
  from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS

  if name == "base":
    return "-", "-"
  found = json.loads((RESULTS / "tuning_step_cost.json").read_text())["mllm_tuning"]
  trained = SHARED if PARADIGMS[name] == "posterior" else name
  return f"{found['ratio'][trained]:.2f}", f"{found['step_bytes'][trained] / 1e6:.0f}"


def introduction(args: argparse.Namespace, lines: list[dict[str, Any]]) -> str:
  """What was run, and how far it can be trusted."""
  import jax

  unsearched = sorted({line["row"] for line in lines} - set(best_rates(args)) - {"base"})
  text = (
    f"{datetime.date.today()}, jax {jax.__version__}, `python -m benchmarks.mllm_tuning search`, "
    f"`table`, `report`: the desk model (pretrained on easy-VQA), target {args.target}, {args.steps} "
    "steps of 32 images, projector at 1e-3 beside whatever else is trained. Scores are percent of "
    "greedy answers that are exactly right, on the official test questions and the target's test part; "
    "mean ± sample standard deviation over seeds (data order and starts; one pretrained model). Rates "
    "are the best of three by H on the validation parts, seed 1 (of up to five, where the best was at "
    "the edge). Processor time of a step beside LoRA's and what it holds in memory: `python -m "
    "benchmarks.tuning_step_cost --methods mllm_tuning`, rows in turns; those of posterior rows are "
    f"`{SHARED}`'s.\n"
  )
  if unsearched:
    text += f"\n**Not searched** (middle rate of the three): {', '.join(unsearched)}.\n"
  return text


def spread(values: list[float]) -> str:
  """Mean and sample standard deviation."""
  text = f"{np.mean(values):.1f}"
  return f"{text} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else text


def markdown(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def matched(of: dict[str, list[dict[str, Any]]]) -> str:
  """F where a run first reaches a target accuracy, by straight lines between its evaluations."""
  rows = []
  for name, runs in of.items():
    if runs[0]["trajectory"]:
      cells = []
      for level in LEVELS:
        values = [f for run in runs if (f := forgetting_at(run, level)) is not None]
        cells.append(f"{spread(values)} ({len(values)}/{len(runs)})" if values else "not reached")
      rows.append([name, *cells])
  header = ["method", *(f"F at Target {level:.0f} (runs that reach it)" for level in LEVELS)]
  return markdown(header, rows)


def forgetting_at(run: dict[str, Any], level: float) -> float | None:
  """F where a run first reaches a target accuracy; None where it never does."""
  points = [{"Target": 0.0, "F": 0.0}, *run["trajectory"], run["metrics"]]
  target, f = (np.array([point[name] for point in points]) for name in ("Target", "F"))
  lost = float(lost_at(target, f, level))
  return None if np.isnan(lost) else -lost


def searched(args: argparse.Namespace) -> str:
  """H, Target and F on the validation part at every rate that was tried."""
  by_row: dict[str, list[dict[str, Any]]] = {}
  for line in finished(args):
    if line["split"] == "validation":
      by_row.setdefault(line["row"], []).append(line)
  best, rows = best_rates(args), []
  most = len(FACTORS) + FURTHER
  for name, runs in by_row.items():
    cells = []
    for run in sorted(runs, key=lambda run: run["rate"]):
      m = run["metrics"]
      mark = "**" if run["rate"] == best[name] else ""
      cells.append(f"{mark}{run['rate']:g}: {m['H']:.1f}{mark} ({m['Target']:.0f}, {m['F']:.1f})")
    rows.append([name, *cells, *[""] * (most - len(cells))])
  return markdown(["method", *["rate: H (Target, F)"] * most], rows)


def points(of: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[float, float]]:
  """Row -> (E, F), means over seeds."""
  mean = lambda metric, runs: float(np.mean([run["metrics"][metric] for run in runs]))
  return {name: (mean("E", runs), mean("F", runs)) for name, runs in of.items()}


if __name__ == "__main__":
  main()
