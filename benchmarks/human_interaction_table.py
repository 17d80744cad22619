"""Rows of human interaction on the real two-person clips, fold by fold.

  python -m benchmarks.human_interaction_table [--out FILE] [--steps N] [--write]

The same command continues: a line of FILE is a finished row of a fold, and training is kept beside it.
--write makes benchmarks/results/human_interaction_sbu.json of the lines. One process scores all rows of
a fold by one program, which `eval.compare` cannot.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np

from jaxmethods.experiments.human_interaction import build as room, scoring, training
from jaxmethods.experiments.human_interaction.config import Config, rows, untrained
from jaxmethods.runtime import seeds

RESULTS = Path(__file__).parent / "results" / "human_interaction_sbu.json"
FOLDS, KEEP_EVERY = 5, 100
# Passes over all folds, so that a table of few rows is whole first.
PASSES = (
  ("real", "training_clip", "gaussian", "mean", "human_interaction", "unconditioned"),
  ("reaction", "reaction_nearest"),
  ("shuffled_labels", "no_interaction_losses"),
)  # fmt: skip

SCORE = jax.jit(scoring.scores, static_argnums=(0, 1, 2))


def table(steps: int) -> dict[str, Config]:
  """All rows, on SBU; as a reaction also the nearest training clip."""
  found = rows(Config(data="sbu", smooth=1.0, steps=steps, eval_every=steps))
  nearest = dataclasses.replace(found["training_clip"], reaction=True)
  return found | {"reaction_nearest": nearest}


def trained(stage: room.Stage, config: Config, kept: Path) -> training.State:
  """Trains a row, from where it was kept."""
  state = training.init(stage.artist, stage.rates, stage.train, jax.random.key(config.seed))
  if untrained(config):
    return state
  if kept.exists():
    with np.load(kept) as stored:
      leaves = [stored[name] for name in sorted(stored)]
    form = state._replace(key=jax.random.key_data(state.key))
    plain = jax.tree.unflatten(jax.tree.structure(form), leaves)
    state = plain._replace(key=jax.random.wrap_key_data(plain.key))
    state = jax.tree.map(jax.numpy.asarray, state)
  step = jax.jit(functools.partial(training.step, stage.artist, stage.rates))
  while int(state.step) < config.steps:
    state, _ = step(state, stage.train)
    if int(state.step) % KEEP_EVERY == 0:
      plain = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
      named = {f"{i:04d}": np.asarray(x) for i, x in enumerate(plain)}
      np.savez(kept, **named)  # type: ignore[arg-type]  # a name is no option
  kept.unlink(missing_ok=True)
  return state


def scored(config: Config, kept: Path) -> dict[str, float]:
  """Trains and scores a row of a fold."""
  stage = room.stage_of(config)
  state = trained(stage, config, kept)
  draw_key, score_key = jax.random.split(jax.random.fold_in(state.key, 1))
  draw = jax.jit(functools.partial(scoring.drawn, stage.artist, stage.judging.samples))
  pool = draw(state, draw_key, stage.test)
  halves = stage.artist.algorithm == "real"
  found = SCORE(stage.judging, halves, config.reaction, score_key, pool, stage.test)
  return {name: float(x) for name, x in found.items()}


def lines(out: Path) -> list[dict]:
  """Finished rows, each once: two processes may have worked at the same time."""
  found = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
  return list({(line["row"], line["fold"]): line for line in found}.values())


def run(out: Path, steps: int) -> None:
  """Works off what is not done yet."""
  configs = table(steps)
  for chosen in PASSES:
    for fold in range(FOLDS):
      for name in chosen:
        if any(line["row"] == name and line["fold"] == fold for line in lines(out)):
          continue
        config = dataclasses.replace(configs[name], fold=fold, seed=1 + fold)
        found = scored(config, out.with_suffix(f".{name}-{fold}.npz"))
        with out.open("a") as stream:
          stream.write(
            json.dumps({"row": name, "fold": fold, "steps": steps, "metrics": found}) + "\n"
          )
        print(fold, name, {k: round(v, 3) for k, v in found.items() if "/" not in k}, flush=True)


def write(out: Path) -> None:
  """Sums the folds up, in the form of eval.compare's JSON."""
  done = lines(out)
  found = []
  for name in dict.fromkeys(line["row"] for line in done):
    own = sorted((line for line in done if line["row"] == name), key=lambda line: line["fold"])
    metrics = {
      metric: seeds.summarize([line["metrics"][metric] for line in own])
      for metric in own[0]["metrics"]
    }
    found.append({"name": name, "folds": [line["fold"] for line in own], "metrics": metrics})
  steps = sorted({line["steps"] for line in done})
  contents = {"unit": "as in the names of metrics", "data": "sbu", "steps": steps, "rows": found}
  RESULTS.write_text(json.dumps(contents, indent=1) + "\n")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, default=Path("human_interaction_rows.jsonl"))
  parser.add_argument("--steps", type=int, default=Config().steps)
  parser.add_argument("--write", action="store_true")
  args = parser.parse_args()
  if args.write:
    write(args.out)
  else:
    run(args.out, args.steps)


if __name__ == "__main__":
  main()
