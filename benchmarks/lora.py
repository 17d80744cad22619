"""LoRA training step of a 10M-parameter Llama beside PEFT and PyTorch, one pinned core.

Workload of `lora_peft.py` in the shared bench folder: vocabulary 4096, width 256, 10 layers, 8 heads,
MLP 688, untied head; rank 8 on all seven projections; 4 x 128 tokens; AdamW; float32. Both sides run in
turn in fresh processes, under every setting of `PAGES`. The peer needs its own environment
(`pip install torch peft`).

  python -m benchmarks.lora --bench ../shared/bench --peer_python $(python -m benchmarks.peers lora)

That is a look of minutes at the setting of the commands, written to runs/benchmarks; `--full` takes all
settings and writes the results of this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import peers
from jaxmethods.runtime import launch

STEPS = int(os.environ.get("BENCH_STEPS", 20))
RESULTS, LOOK = Path(__file__).parent / "results", Path("runs/benchmarks")
# Allocator settings of both sides; our process calls `launch.keep_memory`, which acts in "default" only.
# "kept huge" is what `train.run` and the other entry points set for themselves.
PAGES = {
  "untouched": {"JAXMETHODS_ALLOCATOR": "0"},
  "default": {},
  "kept": {"GLIBC_TUNABLES": launch.tunables(huge=False)},
  "huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
  "kept huge": {"GLIBC_TUNABLES": launch.tunables()},
}
QUICK = ("kept huge",)
FIELDS = ("median_ms", "min_ms", "cpu_median_ms", "cpu_min_ms")
MALLOC = ("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD", "JAXMETHODS_ALLOCATOR")


def measure(bench: Path, scan: bool) -> dict:
  """Our side, timed exactly as the peer script times its own."""
  sys.path.insert(0, str(bench))
  import common

  common.limit_threads()
  launch.keep_memory()
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from jaxmethods.adapters import low_rank
  from jaxmethods.adapters.adapter import num_trainable
  from jaxmethods.adapters.targets import BLOCK
  from jaxmethods.adapters.training import next_token_loss, update_step
  from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig

  config = CausalLMConfig(
    vocab_size=4096,
    width=256,
    num_layers=10,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    mlp_width=688,
  )
  model = CausalLM(config, scan_layers=scan)
  adapter = low_rank.lora(8, 16.0, dropout=0.0)
  optimiser = optax.adamw(1e-4, weight_decay=0.01)  # PyTorch's default decay
  ids = np.random.default_rng(1).integers(0, 4096, (4, 128))
  batch = {"ids": jnp.asarray(ids), "labels": jnp.asarray(ids)}

  @jax.jit
  def start(key):
    params = model.init(key, batch["ids"])["params"]
    tree = adapter.init(key, params, BLOCK)
    return params, tree, optimiser.init(tree)

  params, tree, state = start(jax.random.key(0))
  loss = next_token_loss(adapter, model)

  def mean(tree, params, batch):
    total, count = loss(params, tree, batch, None)
    return total / count

  begin = time.perf_counter()
  update = (
    jax.jit(update_step(adapter, loss, optimiser), donate_argnums=(0, 1))
    .lower(tree, state, params, batch, None)
    .compile()
  )
  compiled = time.perf_counter() - begin
  forward = jax.jit(mean)
  losses = []

  def train():
    nonlocal tree, state
    tree, state, metrics = update(tree, state, params, batch, None)
    losses.append(metrics["loss"].item())

  return {
    "name": "jaxmethods",
    "form": "scanned" if scan else "unrolled",
    "jax": jax.__version__,
    "threads": common.THREADS,
    "params": sum(x.size for x in jax.tree.leaves(params)),
    "lora_params": num_trainable(adapter, tree),
    "compile_s": round(compiled, 2),
    "temp_mib": round(update.memory_analysis().temp_size_in_bytes / 2**20, 1),
    "forward": timed(lambda: forward(tree, params, batch).item()),
    "train_step": timed(train),
    "loss_first": round(losses[0], 4),
    "loss_last": round(losses[-1], 4),
    "load1": round(os.getloadavg()[0], 2),
  }


def timed(work) -> dict:
  """Wall and CPU ms of `STEPS` calls after two that warm up."""
  wall, cpu = [], []
  for _ in range(STEPS + 2):
    begin, used = time.perf_counter(), time.process_time()
    work()
    wall.append(1e3 * (time.perf_counter() - begin))
    cpu.append(1e3 * (time.process_time() - used))
  wall, cpu = wall[2:], cpu[2:]
  numbers = (statistics.median(wall), min(wall), statistics.median(cpu), min(cpu))
  return dict(zip(FIELDS, (round(number, 2) for number in numbers), strict=True))


def run(command: list[str], pages: str, **kwargs) -> dict:
  """One fresh process on one core; the JSON of its last line."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith(MALLOC)}
  environment = clean | {"BENCH_THREADS": "1", "BENCH_STEPS": str(STEPS)} | PAGES[pages]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, **kwargs)
  if done.returncode:
    sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
  """Runs both sides and writes the results."""
  parser = argparse.ArgumentParser(description="LoRA training step beside PEFT")
  parser.add_argument("--bench", type=Path, default=Path("../shared/bench"))
  parser.add_argument("--peer_python", help="python with torch and peft; none: time ours only")
  parser.add_argument("--repeats", type=int, help="processes a figure (default: 1; --full: 3)")
  parser.add_argument("--full", action="store_true", help="all allocator settings: half an hour")
  parser.add_argument("--scan", action="store_true", help="time the scanned form")
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  bench = args.bench.resolve()
  if not (bench / "lora_peft.py").is_file():
    parser.error(f"--bench: no lora_peft.py in {bench}")
  if args.child:
    print(json.dumps(measure(bench, args.scan)))
    return

  ours = [sys.executable, "-m", "benchmarks.lora", "--child", "--bench", str(bench)]
  ours += ["--scan"] if args.scan else []
  sides = {"jaxmethods": (ours, None)}
  if args.peer_python:
    sides["peft"] = ([args.peer_python, "lora_peft.py"], bench)
  repeats = args.repeats or (3 if args.full else 1)
  turns = [
    (pages, side)
    for _ in range(repeats)
    for pages in (PAGES if args.full else QUICK)
    for side in sides
  ]
  runs: dict[str, dict[str, list[dict]]] = {
    pages: {side: [] for side in sides} for pages, _ in turns
  }
  begin = time.monotonic()
  for i, (pages, side) in enumerate(turns, 1):
    peers.said(
      f"{i}/{len(turns)} {side}, allocator {pages}; {time.monotonic() - begin:.0f} s so far"
    )
    command, folder = sides[side]
    runs[pages][side].append(run(command, pages, cwd=folder))
  write(runs, repeats, RESULTS if args.full else LOOK)


def write(runs: dict[str, dict[str, list[dict]]], repeats: int, results: Path) -> None:
  """The table and the record."""
  rows = [
    "| pages | work | side | median ms | best ms | CPU ms (median) | CPU ms (best) |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  ratios: dict[str, dict[str, dict[str, float]]] = {}
  for pages, sides in runs.items():
    for work in ("forward", "train_step"):
      # The quietest repeat of each; the peer's script has no smallest CPU time.
      best = {
        side: {f: min(r[work][f] for r in done) for f in FIELDS if f in done[0][work]}
        for side, done in sides.items()
      }
      for side, numbers in best.items():
        shown = " | ".join(f"{numbers[f]:.1f}" if f in numbers else "" for f in FIELDS)
        rows.append(f"| {pages} | {work} | {side} | {shown} |")
      if "peft" in best:
        ratio = {f: round(best["jaxmethods"][f] / best["peft"][f], 3) for f in best["peft"]}
        ratios.setdefault(pages, {})[work] = ratio
        shown = " | ".join(str(ratio.get(f, "")) for f in FIELDS)
        rows.append(f"| {pages} | {work} | **ratio** | {shown} |")
  every = [r for sides in runs.values() for done in sides.values() for r in done]
  mine = next(iter(runs.values()))["jaxmethods"][0]
  loads = [r["load1"] for r in every]
  disturbed = (
    " **Other work ran on the machine: figures are disturbed, the ratios of one sitting less so.**"
    if max(loads) > 1.5
    else ""
  )
  text = "\n".join(
    [
      "# LoRA training step, one pinned core",
      f"{time.strftime('%Y-%m-%d')}, `python -m benchmarks.lora --repeats {repeats}`, "
      f"jax {mine['jax']}.",
      "",
      f"Llama of {mine['params']:,} parameters, {mine['lora_params']:,} trained, 4 x 128 tokens, "
      f"float32, layers {mine['form']}. Each side: {STEPS} steps in {repeats} fresh processes, taken in "
      f"turn; figures of the quietest one. Machine load {min(loads)} to {max(loads)}.{disturbed}",
      "",
      *rows,
      "",
      f"Temporaries of our step {mine['temp_mib']} MiB, compilation {mine['compile_s']} s.",
      "",
    ]
  )
  print(text)
  results.mkdir(parents=True, exist_ok=True)
  name = "lora" if mine["form"] == "unrolled" else "lora_scanned"
  (results / f"{name}.md").write_text(text)
  (results / f"{name}.json").write_text(
    json.dumps({"ratios": ratios, "runs": runs}, indent=1) + "\n"
  )


if __name__ == "__main__":
  main()
