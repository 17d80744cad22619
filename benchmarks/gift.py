"""Rows of GIFT: rates chosen on validation pictures, then many seeds on the tests.

  python -m benchmarks.gift --seeds 5
  python -m benchmarks.gift --rows gift_cd,gift_cd_ita --seeds 3

Every row trains once with every rate of one grid, seed 0, and keeps the one with the best Average on
the validation pictures; the seeds on the tests count from 1. The rate is an argument of the jitted step,
so a row compiles once. CPU time is that of the steps that neither begin nor end a task. Finished rows
stay in the file; the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmethods.experiments.gift import build, learner, material
from jaxmethods.experiments.gift.config import Config, rows, untrained
from jaxmethods.methods import gift
from jaxmethods.runtime import compiler, config as config_lib, seeds
from jaxmethods.runtime.workdir import write_json

HERE = Path(__file__).resolve().parent
MAIN = (
  "zero_shot", "finetune", "gift", "zscl", "lwf", "wise_ft", "l2", "ewc", "icarl", "lwf_vr",
  "gift_cd", "gift_cd_ita",
)  # fmt: skip
RATES = (3e-4, 1e-3)
_WARM = 5  # steps that are not timed


class Row(NamedTuple):
  """One row: its config, jitted step (rate, state, batch), first state, tests and validation."""

  config: Config
  step: Callable
  start: Callable
  test: material.Data
  validation: material.Data
  names: list[str]


def make(config: Config) -> Row:
  """Loads the data of a row and composes its step."""
  loaded = material.load(config)
  other = material.load(dataclasses.replace(config, held_out="validation")).data
  parts = {name: getattr(other, name) for name in ("test_x", "test_y", "test_n")}
  of = learner.make(config, loaded.stage)

  def step(rate: jax.Array, state: learner.State, batch: learner.Batch) -> Any:
    schedule = functools.partial(
      gift.rate, base=rate, warmup=round(config.warmup * of.steps), total=of.steps
    )
    optimiser = optax.adamw(schedule, weight_decay=0.0)
    return learner.step(of._replace(optimiser=optimiser), state, batch)

  return Row(
    config,
    compiler.jit(step, donate_argnums=1),
    functools.partial(learner.start, of),
    loaded.data,
    loaded.data._replace(**parts),
    loaded.names,
  )


def run(row: Row, data: material.Data, rate: float, seed: int) -> dict[str, float]:
  """One run of all tasks: what `evaluate` finds, and the median CPU time of a step."""
  state, times = row.start(data, jax.random.key(seed)), []
  each = row.config.steps // row.config.stages
  for k in range(row.config.steps):
    task, place = divmod(k, each)
    batch = learner.Batch(jnp.int32(task), jnp.int32(place), data, jnp.bool_(place == each - 1))
    begin = time.process_time()
    state, _ = jax.block_until_ready(row.step(jnp.float32(rate), state, batch))
    if k >= _WARM and 0 < place < each - 1:
      times.append(time.process_time() - begin)
  found = build.evaluate(row.names, False, state, data.test_n)
  return {name: float(value) for name, value in found.items()} | {
    "step_cpu_ms": 1e3 * statistics.median(times)
  }


def measured(name: str, config: Config, rates: list[float], count: int) -> dict[str, Any]:
  """Rates on validation, then seeds on the tests."""
  row, tried = make(config), {}
  best = rates[0]
  if not untrained(config):
    tried = {str(rate): run(row, row.validation, rate, 0) for rate in rates}
    best = max(rates, key=lambda rate: tried[str(rate)]["average"])
    print(
      f"{name}: validation { ({r: round(v['average'], 1) for r, v in tried.items()}) }", flush=True
    )
  runs = [run(row, row.test, best, 1 + seed) for seed in range(count)]
  metrics = {key: seeds.summarize([one[key] for one in runs]) for key in runs[0]}
  validation = {
    rate: {k: v[k] for k in ("average", "last", "transfer")} for rate, v in tried.items()
  }
  return {"name": name, "rate": best, "validation": validation, "metrics": metrics}


def main() -> None:
  """Measures the rows that the file lacks."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--config", type=Path, default=HERE.parent / "configs" / "gift.yaml")
  add("--rows", default=",".join(MAIN))
  add("--seeds", type=int, default=5)
  add("--rates", default=",".join(map(str, RATES)))
  add("--set", nargs="*", default=[], metavar="KEY=VALUE")
  add("--out", type=Path, default=HERE / "results" / "gift.json")
  args = parser.parse_args()
  pairs = [tuple(pair.split("=", 1)) for pair in args.set]
  config = config_lib.load(Config, args.config, overrides=pairs, method="gift")
  settings = {
    "steps": config.steps, "tasks": config.tasks, "synthetic": config.synthetic,
    "rates": args.rates, "batch_size": config.batch_size, "train": config.size.train,
    "test": config.size.test, "validation": config.size.validation, "seeds": args.seeds,
  }  # fmt: skip
  contents: dict[str, Any] = {"unit": "%", "settings": settings, "rows": []}
  if args.out.exists():
    kept = json.loads(args.out.read_text())
    contents = kept if kept.get("settings") == settings else contents
  for name in args.rows.split(","):
    if name in {row["name"] for row in contents["rows"]}:
      continue
    row = measured(name, rows(config)[name], [float(r) for r in args.rates.split(",")], args.seeds)
    contents["rows"].append(row)
    write_json(args.out, contents)
    shown = {k: round(row["metrics"][k]["mean"], 1) for k in ("average", "last", "transfer")}
    print(f"{name} at {row['rate']}: {shown}", flush=True)


if __name__ == "__main__":
  main()
