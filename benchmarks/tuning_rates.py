"""Learning rates of the rows of a tuning method, chosen on the validation split with equal effort.

  python -m benchmarks.tuning_rates --method spider --rows spider,full,half --rates 5e-4,1e-3,2e-3

Every row is trained once at every rate, from one seed, and the rate with the best headline metric on
validation wins (H for one target, the mean over tasks for mixtures); the test split is never looked at.
Where the best rate is the lowest or the highest, the next one outwards is tried too, twice at most.
What is done is kept in benchmarks/results/NAME_rates.json and not done again; the best rates are printed
in the form in which a config has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmethods import experiments
from jaxmethods.runtime import command, config as config_lib, launch, loop
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.runtime.workdir import write_json, write_text

RESULTS = Path(__file__).parent / "results"
FURTHER = 2  # rates tried beyond the given ones, where the best is at the edge


def main() -> None:
  """Runs the command line."""
  launch.keep_compiled_programs()
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--method", required=True)
  parser.add_argument("--rows", help="default: all")
  parser.add_argument("--rates", default="5e-4,1e-3,2e-3")
  parser.add_argument("--name", help="of the result files; default: the method's")
  args, rest = parser.parse_known_args()
  overrides = [
    (key.removeprefix("--"), value) for key, value in zip(rest[::2], rest[1::2], strict=True)
  ]
  method = experiments.load(args.method)
  file = command.CONFIGS / f"{args.method}.yaml"
  config = config_lib.load(method.Config, file, overrides=overrides, method=args.method)
  rows = method.rows(dataclasses.replace(config, rates={}, split="validation"))
  chosen = args.rows.split(",") if args.rows else list(rows)
  rates = [float(rate) for rate in args.rates.split(",")]
  target = RESULTS / f"{args.name or args.method}_rates.json"
  done: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
  for name in chosen:
    of_row = done.setdefault(name, {})
    programs = None  # the rate is part of the state: one compilation serves all
    while todo := untried(rates, of_row):
      rate = todo[0]
      row = dataclasses.replace(rows[name], learning_rate=rate)
      experiment = loop.ordered(method.build(row))
      state = experiment.init(jax.random.key(row.seed))
      programs = programs or loop.compile_experiment(experiment, state, None)
      of_row[str(rate)] = measure(experiment, state, *programs)
      write_json(target, done)
      print(name, rate, of_row[str(rate)], flush=True)
  best = {name: max(of, key=lambda rate, of=of: headline(of[rate])) for name, of in done.items()}
  print("rates:", *(f"  {name}: {rate}" for name, rate in best.items()), sep="\n")
  write_text(target.with_suffix(".md"), table(done, best, config))


def untried(rates: Sequence[float], of_row: Mapping[str, Mapping[str, float]]) -> list[float]:
  """What is left to be tried of a row: the given rates, then what lies beyond an extreme best."""
  if left := [rate for rate in rates if str(rate) not in of_row]:
    return left
  if len(of_row) >= len(rates) + FURTHER:
    return []
  return outwards({float(rate): headline(found) for rate, found in of_row.items()})


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


def measure(experiment: Experiment, state: Any, step: Any, evaluate: Any) -> dict[str, float]:
  """Metrics on validation after one run."""
  batches, clock = experiment.batches(0), time.perf_counter()
  for _ in range(experiment.num_steps):
    state, metrics = step(state, next(batches))
  found = {"loss": float(metrics["loss"])}
  found |= {key: float(value) for key, value in evaluate(state, experiment.test).items()}
  seconds = time.perf_counter() - clock
  return {key: round(value, 4) for key, value in found.items()} | {"seconds": round(seconds, 1)}


def headline(metrics: dict[str, float]) -> float:
  """What a rate is chosen by."""
  value = metrics.get("H", metrics.get("Mean", float("nan")))
  return value if value == value else -1.0


def table(done: dict[str, Any], best: dict[str, str], config: Any) -> str:
  """The search as Markdown."""
  names = [name for name in ("H", "Target", "Mean", "Source", "F", "loss")]
  first = next(iter(next(iter(done.values())).values()))
  names = [name for name in names if name in first]
  lines = [
    f"Learning rates on validation, one seed, {config.steps} steps of {config.batch_size}; "
    f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}. Chosen ones in bold.",
    "",
    "| row | rate | " + " | ".join(names) + " |",
    "|---|---|" + "---|" * len(names),
  ]
  for name, of in done.items():
    for rate, metrics in of.items():
      shown = f"**{rate}**" if rate == best[name] else rate
      cells = " | ".join(f"{metrics[key]:.3g}" for key in names)
      lines.append(f"| {name} | {shown} | {cells} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  launch.set_allocator()
  main()
