"""Zero-shot accuracy of the small CLIP on every task that packages carry, beside chance.

The CLIP is `testbeds.vision_language.pretraining`, one model; the tests are 1,000 pictures a task (real
tasks have fewer), none of which pretraining has seen. Intervals are of the share of right answers.

  python -m benchmarks.small_clip
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.runtime import compiler
from jaxmethods.testbeds.vision_language import encoder, tasks, words
from jaxmethods.testbeds.vision_language.settings import EMBEDDED_TASKS, SmallClip, TaskSize

OUT = Path(__file__).parent / "results" / "small_clip.json"
TESTS = 1000
CLEARLY = 2.0  # times chance is what we call well above it


def main() -> None:
  """Pretrains the model unless the cache has it, and writes the table."""
  stage = encoder.load("small", SmallClip())
  run = compiler.jit(lambda params, x, ids: encoder.zero_shot(stage, params, x, ids).argmax(-1))
  rows = []
  for name in EMBEDDED_TASKS:
    task = tasks.load_task(name, TaskSize(train=20, test=TESTS))
    ids = words.class_texts(task.classes, task.templates, stage.tokens)
    x, y = task.test
    right = np.asarray(run(stage.params, jnp.asarray(x), jnp.asarray(ids))) == y
    value, half = 100 * right.mean(), 196 * right.std() / np.sqrt(len(y))
    chance = 100 / len(task.classes)
    single = lambda value: {"mean": float(value), "ci95": None, "values": [float(value)]}
    accuracy = {
      "mean": value,
      "ci95": half,
      "low": value - half,
      "high": value + half,
      "values": [value],
    }
    metrics = {
      "zero_shot": accuracy, "chance": single(chance), "times_chance": single(value / chance),
      "classes": single(len(task.classes)), "tests": single(len(y)),
    }  # fmt: skip
    rows.append({"name": name, "metrics": metrics})
    print(f"{name}: {value:.1f} ± {half:.1f}, chance {chance:.1f}", flush=True)
  above = sum(row["metrics"]["times_chance"]["mean"] >= CLEARLY for row in rows)
  parameters = sum(x.size for x in jax.tree.leaves(stage.params))
  contents = {
    "unit": "%", "parameters": int(parameters), "source": stage.source._asdict(),
    f"tasks_above_{CLEARLY:g}_times_chance": above, "rows": rows,
  }  # fmt: skip
  OUT.write_text(json.dumps(contents, indent=1) + "\n")
  print(
    f"{above} of {len(rows)} tasks at {CLEARLY:g} times chance or more; {parameters} parameters"
  )


if __name__ == "__main__":
  main()
