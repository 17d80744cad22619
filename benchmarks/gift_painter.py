"""Pictures of GIFT's painter, and how often the CLIP finds in them what was asked for.

A prompt a class of several kinds is painted several times; the small CLIP chooses among the prompts of
the kind. The same is asked about pictures that the renderer draws from the prompts. Intervals are of the
share of right answers.

  python -m benchmarks.gift_painter
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data import scenes
from jaxmethods.experiments.gift import figures, painter
from jaxmethods.experiments.gift.config import Config
from jaxmethods.runtime import compiler, config as config_lib
from jaxmethods.testbeds.vision_language import encoder, words

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TIMES = 6  # pictures a prompt
KINDS = {
  "shapes": [f"a picture of a {shape}." for shape in scenes.SHAPES],
  "colours": [f"a picture of a {colour} object." for colour in scenes.COLOURS],
  "backgrounds": [f"a picture of a object on {ground}." for ground in scenes.BACKGROUNDS],
  "places": [f"a picture of a object at the {place}." for place in scenes.PLACES],
  "counts": [f"a picture of {count} objects." for count in scenes.COUNTS[1:]],
  "digits": [f"a picture of the digit {digit}." for digit in scenes.DIGITS],
  "letters": [f"a picture of the letter {letter}." for letter in scenes.LETTERS],
}
SHOWN = (
  "a picture of a red circle.", "a picture of a green square.", "a picture of a yellow star.",
  "a picture of a blue triangle.", "a picture of a white cross.", "a picture of a pink ring.",
  "a picture of the digit zero.", "a picture of the digit one.", "a picture of the digit three.",
  "a picture of the digit eight.", "a picture of the letter a.", "a picture of the letter k.",
  "a picture of the letter t.", "a picture of the letter x.", "a picture of three objects.",
  "a picture of five objects.", "a picture of a object at the left.", "a picture of a object on olive.",
)  # fmt: skip


def share(right: np.ndarray) -> dict[str, object]:
  """A share of right answers in percent, with its interval."""
  value, half = 100 * float(right.mean()), 196 * float(right.std()) / len(right) ** 0.5
  return {
    "mean": value, "ci95": half, "low": value - half, "high": value + half, "values": [value],
  }  # fmt: skip


def main() -> None:
  """Trains the painter unless the cache has it, paints, and writes the table and the gallery."""
  config = config_lib.load(Config, HERE.parent / "configs" / "gift.yaml", method="gift")
  stage = encoder.load(config.model, config.clip)
  params = painter.trained(stage, config.painter)
  figure = figures.gallery(
    SHOWN, painter.paint(stage, params, config.painter, SHOWN, config.synthetic_seed)
  )
  figure.savefig(RESULTS / "gift_painted.png", dpi=80)
  read = compiler.jit(lambda params, x, ids: encoder.zero_shot(stage, params, x, ids).argmax(-1))
  texts = [prompt for prompts in KINDS.values() for prompt in prompts for _ in range(TIMES)]
  painted = painter.paint(stage, params, config.painter, texts, 1)
  rendered = scenes.depict(texts, np.random.default_rng(1), 0.0)
  rows, start = [], 0
  for kind, prompts in KINDS.items():
    ids = jnp.asarray(words.pack(prompts, stage.tokens))[:, None]
    asked = np.arange(len(prompts)).repeat(TIMES)
    part = slice(start, start := start + len(asked))
    found = {
      name: share(np.asarray(read(stage.params, jnp.asarray(x[part]), ids)) == asked)
      for name, x in (("painter", painted), ("renderer", rendered))
    }
    chance = 100 / len(prompts)
    metrics = {**found, "chance": {"mean": chance, "ci95": None, "values": [chance]}}
    rows.append({"name": kind, "metrics": metrics})
    print(kind, {name: round(value["mean"], 1) for name, value in metrics.items()}, flush=True)
  count = int(sum(x.size for x in jax.tree.leaves(params)))
  contents = {"unit": "%", "parameters": count, "steps": config.painter.steps, "rows": rows}
  (RESULTS / "gift_painter.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
  main()
