"""The six questions of FPL in one process: what `eval.compare --study H1` .. `H6` do, but faster.

Cells that two questions share are run once, and data and model are loaded once. Every cell has the
config that the command gives it, and claims are judged by the same code. Finished cells are kept in
--cells; the same command continues. The rates of text and of vision prompts are chosen first, with the
default data on validation pictures, one seed; the rate is an argument of the jitted round.

  python -m benchmarks.fpl_studies --seeds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmethods.experiments.fpl import build, data, rounds
from jaxmethods.experiments.fpl.config import Config, rows, studies
from jaxmethods.experiments.fpl.towers import Towers
from jaxmethods.runtime import compiler, config as config_lib, seeds, studies as studies_lib
from jaxmethods.runtime.workdir import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def run(config: Config, found: data.Data, towers: Towers, count: int) -> dict[str, list[float]]:
  """Metric -> mean over the last evaluations, a value a seed."""
  parts = build.make_parts(config, found, towers)
  step = compiler.jit(functools.partial(rounds.step, parts), donate_argnums=0)
  evaluate = compiler.jit(functools.partial(rounds.evaluate, parts))
  first = jax.jit(functools.partial(rounds.first_state, parts))
  values: dict[str, list[float]] = {}
  for seed in range(count):
    state = rounds.init(parts, jax.random.key(config.seed + seed), first)
    last: deque = deque(maxlen=config.average_last)
    for k in range(config.steps):
      state, _ = step(state, parts.work)
      if k >= config.steps - config.average_last:
        last.append(jax.device_get(evaluate(state, parts.test)))
    for name in last[0]:
      values.setdefault(name, []).append(float(np.mean([one[name] for one in last])))
  return values


def chosen_rates(
  config: Config, found: data.Data, towers: Towers, rates: Sequence[float]
) -> dict[str, Any]:
  """Validation accuracy of LPT and VPT at every rate, and the best rate of each."""
  accuracy: dict[str, dict[str, float]] = {}
  for name in ("lpt", "vpt"):
    row = rows(config)[name]
    parts = build.make_parts(row, found, towers)

    def step(rate, state, work, parts=parts, row=row):
      optimizer = rounds.sgd(rate, row.momentum, row.weight_decay)
      return rounds.step(parts._replace(optimizer=optimizer), state, work)

    program, evaluate = compiler.jit(step), compiler.jit(functools.partial(rounds.evaluate, parts))
    first = jax.jit(functools.partial(rounds.first_state, parts))
    accuracy[name] = {}
    for rate in rates:
      state = rounds.init(parts, jax.random.key(config.seed), first)
      for _ in range(config.steps):
        state, _ = program(rate, state, parts.work)
      accuracy[name][str(rate)] = float(evaluate(state, parts.test)["test_accuracy"])
    print(name, accuracy[name], flush=True)
  best = {name: float(max(of, key=lambda rate, of=of: of[rate])) for name, of in accuracy.items()}
  return {"about": found.about, "rounds": config.steps, "accuracy": accuracy, "chosen": best}


def tuned(config: Config, towers: Towers, rates: Sequence[float]) -> Config:
  """The config with the rates that validation chooses, kept in fpl_rates.json."""
  file = RESULTS / "fpl_rates.json"
  held_out = dataclasses.replace(config, held_out="validation")
  found = data.load(held_out.data, held_out.size, held_out.held_out)
  kept = json.loads(file.read_text()) if file.exists() else {}
  if (kept.get("about"), kept.get("rounds")) != (found.about, config.steps):
    kept = chosen_rates(held_out, found, towers, rates)
    write_json(file, kept)
  best = kept["chosen"]
  return dataclasses.replace(config, learning_rate=best["lpt"], vision_rate=best["vpt"])


def main() -> None:
  """Runs the cells that are missing, judges, and writes a file and a picture a question."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--config", type=Path, default=HERE.parent / "configs" / "fpl.yaml")
  add("--seeds", type=int, default=3)
  add("--studies", default="H1,H2,H3,H4,H5,H6")
  add("--cells", type=Path, default=Path("runs/fpl_cells.json"))
  add("--rates", default="0.01,0.1,1", help="to choose from; empty: those of the config")
  add("--set", nargs="*", default=[], metavar="KEY=VALUE")
  args = parser.parse_args()
  pairs = [tuple(pair.split("=", 1)) for pair in args.set]
  config = config_lib.load(Config, args.config, overrides=pairs, method="fpl")
  towers = build.load_towers(config)
  if args.rates:
    config = tuned(config, towers, [float(rate) for rate in args.rates.split(",")])
  found = data.load(config.data, config.size, config.held_out)
  args.cells.parent.mkdir(parents=True, exist_ok=True)
  done: dict[str, Any] = json.loads(args.cells.read_text()) if args.cells.exists() else {}
  for name in args.studies.split(","):
    study = studies(config)[name]
    results = []
    for row, cell in studies_lib.rows(study).items():
      about = f"{config_lib.plain(cell)} {args.seeds} {found.about} {towers.about}"
      key = hashlib.sha256(about.encode()).hexdigest()
      if key not in done:
        done[key] = run(cell, found, towers, args.seeds)
        write_json(args.cells, done)
        print(f"{name} {row}: {np.round(done[key]['test_accuracy'], 3).tolist()}", flush=True)
      metrics = {metric: seeds.summarize(each) for metric, each in done[key].items()}
      results.append({"name": row, "metrics": metrics})
    judged = [verdict._asdict() for verdict in studies_lib.judge(study, results)]
    contents = {
      "about": found.about,
      "rows": results,
      "question": study.question,
      "verdicts": judged,
    }
    write_json(RESULTS / f"fpl_{name.lower()}.json", contents)
    figure = studies_lib.picture(study, results)
    figure.savefig(RESULTS / f"fpl_{name.lower()}.png", dpi=110)
    for verdict in judged:
      print(name, verdict, flush=True)


if __name__ == "__main__":
  main()
