"""All one-pass confidences of finished answers beside the plain forward pass that reads the same tokens.

Time of both in turn in one process, and the temporaries that the compiler plans at 512 and 4,096 tokens
with a third of the layers and with all: summaries per layer leave the scan, states do not.

  python -m benchmarks.cot_reading --model wheel:smollm2-135m
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data.model_sources import LoadedLM, load_causal_lm
from jaxmethods.experiments.cot_kinetics import evidence as trust
from jaxmethods.experiments.cot_kinetics.config import Config, passes, trial
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.models.reading import Text
from jaxmethods.runtime import compiler

RESULTS = Path(__file__).parent / "results" / "cot_reading.md"
CONFIG = Config(samples=0, dropout_passes=0)
MIB = 2**20


def answers(batch: int, prompt: int, new: int, vocab: int) -> tuple[Text, trust.Facts]:
  """Random tokens in the shape of answers; three quarters of each is reasoning."""
  ids = jnp.asarray(np.random.default_rng(0).integers(0, vocab, (batch, prompt + new)))
  whole, reasoning = jnp.full(batch, new), jnp.full(batch, 3 * new // 4)
  text = Text(ids, jnp.ones(ids.shape, bool), trust.segments(reasoning, whole, new))
  true, nan = jnp.ones(batch, bool), jnp.full(batch, jnp.nan)
  return text, trust.Facts(true, true, true, reasoning, reasoning, nan, nan, nan)


def programs(model: CausalLM):
  """(plain, scored): functions of (params, text, facts)."""

  def plain(params, text, facts):
    del facts
    new = text.segments.shape[-1]
    apply = model.apply
    hidden = apply({"params": params}, text.ids, mask=text.mask, logits="none").hidden
    return apply({"params": params}, hidden[:, -new - 1 : -1], method="logits")

  def scored(params, text, facts):
    evidence = trust.gather(
      model, {"params": params}, text, facts, jax.random.key(0), passes(CONFIG)
    )
    kinetics = trust.kinetics(evidence, trial(CONFIG).energy)
    return evidence.tokens, evidence.scaled, evidence.coe, kinetics

  return plain, scored


def measure(loaded: LoadedLM, times: int, batch: int, prompt: int, new: int) -> list[str]:
  """Rows of the table of times."""
  params = jax.device_put(loaded.params)
  arguments = params, *answers(batch, prompt, new, loaded.model.config.vocab_size)
  ready = [compiler.jit(program) for program in programs(loaded.model)]
  cpu: list[list[float]] = [[], []]
  for repeat in range(times + 1):
    for side, program in enumerate(ready):
      begin = time.process_time()
      jax.block_until_ready(program(*arguments))
      if repeat:  # the first call compiles
        cpu[side].append(time.process_time() - begin)
  median = [1e3 * statistics.median(side) for side in cpu]
  least = [1e3 * min(side) for side in cpu]
  ratios = statistics.median(b / a for a, b in zip(*cpu, strict=True))
  return [
    "| | plain forward | all scores | ratio |",
    "| --- | --- | --- | --- |",
    f"| CPU ms, median of {times} | {median[0]:.0f} | {median[1]:.0f} | {ratios:.3f} |",
    f"| CPU ms, least | {least[0]:.0f} | {least[1]:.0f} | {least[1] / least[0]:.3f} |",
  ]


def temporaries(loaded: LoadedLM, layers: int, tokens: int) -> float:
  """MiB that the scored pass needs beside weights and inputs, layers scanned, batch of one."""
  shape = dataclasses.replace(loaded.model.config, num_layers=layers)
  model = CausalLM(shape, scan_layers=True)
  params = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], jax.random.key(0)
  )
  shapes = jax.eval_shape(lambda: answers(1, tokens // 2, tokens // 2, shape.vocab_size))
  compiled = compiler.jit(programs(model)[1]).lower(params, *shapes).compile()
  return compiled.memory_analysis().temp_size_in_bytes / MIB


def main() -> None:
  """Measures and writes the result."""
  parser = argparse.ArgumentParser(description="one-pass confidences beside the forward pass")
  parser.add_argument("--model", default="wheel:smollm2-135m")
  parser.add_argument("--times", type=int, default=7)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--new", type=int, default=128)
  args = parser.parse_args()
  loaded = load_causal_lm(args.model)
  layers = loaded.model.config.num_layers
  lines = [
    f"# All one-pass scores beside the forward pass that reads the same tokens, {args.model}",
    "",
    f"`python -m benchmarks.cot_reading --model {args.model}`, {time.strftime('%Y-%m-%d')}, jax "
    f"{jax.__version__}, load {os.getloadavg()[0]:.1f}. {args.batch} answers of {args.new} tokens "
    f"after prompts of {args.prompt}; logits of the {args.new} in both.",
    "",
    *measure(loaded, args.times, args.batch, args.prompt, args.new),
    "",
    "Temporaries of the scored pass, one answer, MiB (planned by the compiler):",
    "",
    f"| tokens | {layers // 3} layers | {layers} layers | all states stacked would be |",
    "| --- | --- | --- | --- |",
  ]
  for tokens in (512, 4096):
    few, all_ = (temporaries(loaded, count, tokens) for count in (layers // 3, layers))
    stacked = (layers + 1) * tokens * loaded.model.config.width * 4 / MIB
    lines.append(f"| {tokens} | {few:.1f} | {all_:.1f} | {stacked:.1f} more |")
  text = "\n".join(lines) + "\n"
  print(text)
  RESULTS.write_text(text)


if __name__ == "__main__":
  main()
