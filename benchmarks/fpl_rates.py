"""Learning rates of the rows of FPL, chosen alike: on a validation part of training, one seed.

  python benchmarks/fpl_rates.py --config configs/fpl.yaml

Each row trains with every rate of one grid; the rate is an argument of the jitted round. Writes
results/fpl_rates.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
RATES = (0.01, 0.1, 1.0)
TOWER_RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of rows that change the model's own weights


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", type=Path, default=HERE.parent / "configs" / "fpl.yaml")
  parser.add_argument("--rows", default="lpt,vpt,both,probe,fedavg_image_tower,fedavg_towers")
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
  parser.add_argument("--out", type=Path, default=HERE / "results" / "fpl_rates.json")
  args = parser.parse_args()

  import jax

  from jaxmethods.experiments.fpl import build, data, rounds
  from jaxmethods.experiments.fpl.config import Config, rows
  from jaxmethods.runtime import compiler, config as config_lib

  pairs = [tuple(pair.split("=", 1)) for pair in args.set]
  config = config_lib.load(Config, args.config, overrides=pairs, method="fpl")
  config = dataclasses.replace(config, held_out="validation")
  found = data.load(config.data, config.size, config.held_out)
  towers = build.load_towers(config)
  result: dict = {}
  for name in args.rows.split(","):
    row = rows(config)[name]
    parts = build.make_parts(row, found, towers)

    def step(rate, state, work, parts=parts, row=row):
      optimizer = rounds.sgd(rate, row.momentum, row.weight_decay)
      return rounds.step(parts._replace(optimizer=optimizer), state, work)

    step = compiler.jit(step)
    evaluate = compiler.jit(functools.partial(rounds.evaluate, parts))
    first = compiler.jit(functools.partial(rounds.first_state, parts))
    result[name] = {}
    for rate in TOWER_RATES if "tower" in name else RATES:
      state = rounds.init(parts, jax.random.key(config.seed), first)
      for _ in range(config.steps):
        state, metrics = step(rate, state, parts.work)
      accuracy = float(evaluate(state, parts.test)["test_accuracy"])
      result[name][str(rate)] = round(accuracy, 4)
      print(
        f"{name} {rate}: loss {float(metrics['loss']):.3f} validation {accuracy:.4f}", flush=True
      )
  args.out.write_text(json.dumps({"about": found.about, "accuracy": result}, indent=2) + "\n")


if __name__ == "__main__":
  main()
