"""The safety suite beside opacus, jax-privacy, nanoGCG, transformers and NumPy, one thread.

  python -m benchmarks.llm_safety_speed accountant  # epsilons of others -> tests/golden
  python -m benchmarks.llm_safety_speed speed       # -> results/llm_safety_speed.*

The peers need environments of their own, which `benchmarks.peers` makes; --opacus, --jax_privacy and
--nanogcg take others' Python. All sides run in turn, in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks import llm_safety_peers, peers

ROOT = Path(__file__).parents[1]
RESULTS, GOLDEN = (
  Path(__file__).parent / "results",
  ROOT / "tests/golden/llm_safety_accountants.json",
)
SCRIPT = Path(__file__).with_name("llm_safety_peers.py")
PEERS = ("opacus", "jax_privacy", "nanogcg")
ONE_CORE = {
  "OMP_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  "TOKENIZERS_PARALLELISM": "false",
}
# rate, noise multiplier, steps, delta
GRID = list(
  product((0.001, 0.01, 0.1, 0.5, 1.0), (0.6, 1.0, 2.0, 5.0), (10, 1000), (1e-3, 1e-5, 1e-6))
)
TOY = {"V": 160, "T": 16, "D": 64, "L": 2, "H": 4, "FF": 256}  # the LM of the suite
SMALL = {"V": 1024, "T": 64, "D": 128, "L": 4, "H": 4, "FF": 512}
DPSGD = {
  "toy": {"shape": TOY, "batch": 64, "sigma": 1.0, "clip": 1.0},
  "small": {"shape": SMALL, "batch": 32, "sigma": 1.0, "clip": 1.0},
}
SUFFIX = 20
GCG = {
  "toy": {"shape": TOY, "candidates": 512, "top": 64},
  "small": {
    "shape": {"V": 4096, "D": 128, "L": 4, "H": 4, "FF": 344},
    "candidates": 256,
    "top": 256,
  },
}
WATERMARK = {
  "toy": {"vocabulary": 160, "gamma": 0.25, "tokens": 20_000},
  "SmolLM2's vocabulary": {"vocabulary": 49_152, "gamma": 0.25, "tokens": 2000},
}


# --- ours, in a process of its own ----------------------------------------------------------------


def dpsgd(given: dict) -> dict:
  """A step of DP-SGD: the small LM, `private_gradient`, Adam."""
  import jax
  import jax.numpy as jnp
  import optax

  from benchmarks import small_lm
  from jaxmethods.methods.llm_safety import privacy

  shape, batch = given["shape"], given["batch"]
  params, ids = small_lm.drawn(shape), jnp.asarray(small_lm.texts(shape, batch))
  loss = lambda params, row: small_lm.mean_nll(params, row, shape["H"])
  optimiser, real = optax.adam(1e-3), jnp.ones(batch, bool)

  @partial(jax.jit, donate_argnums=(0, 1))
  def update(params, state, key):
    found = privacy.private_gradient(
      loss, params, ids, real, key, clip_norm=given["clip"], noise_multiplier=given["sigma"],
      expected_batch_size=batch, microbatch=given.get("microbatch"),
    )  # fmt: skip
    change, state = optimiser.update(found.gradient, state)
    return optax.apply_updates(params, change), state, found.loss

  state, key = jax.jit(optimiser.init)(params), jax.random.key(0)

  def step() -> float:
    nonlocal params, state, key
    key, own = jax.random.split(key)
    params, state, value = update(params, state, own)
    return float(value)

  return {"version": f"jax {jax.__version__}"} | llm_safety_peers.timed(step, given["calls"])


def gcg(given: dict) -> dict:
  """Steps of GCG on a checkpoint: the prefix is read once, the head sees the target only."""
  import jax
  import jax.numpy as jnp

  from jaxmethods.data.model_sources import load_causal_lm
  from jaxmethods.methods.llm_safety import attacks

  loaded = load_causal_lm(f"hf:{given['folder']}")
  model, variables = loaded.model, {"params": jax.device_put(loaded.params)}
  prefix, target = jnp.array([[3, *given["prefix"]]]), jnp.array(given["target"])
  after = jnp.array([4, *given["target"]])
  length = SUFFIX + len(after)
  vocabulary, suffix = model.config.vocab_size, jnp.array(given["suffix"])
  apply = partial(model.apply, variables)

  @jax.jit
  def search(key):
    cache = apply(prefix, cache_size=prefix.shape[1] + length, logits="none").cache
    embedded = lambda ids: apply(ids, method="embed_tokens")
    table = embedded(jnp.arange(vocabulary))

    def loss(embeddings):
      rows = len(embeddings)
      hidden = apply(embeddings=embeddings, cache=cache.repeated(rows), logits="none").hidden
      last = apply(hidden[:, -len(target) - 1 :], method="logits")
      return attacks.target_loss(last, target)

    def relaxed(onehot):
      return loss(jnp.concatenate([onehot @ table, table[after]])[None])[0]

    def losses(suffixes):
      tail = jnp.broadcast_to(table[after], (len(suffixes), *table[after].shape))
      return loss(jnp.concatenate([table[suffixes], tail], 1))

    step = lambda state, key: attacks.gcg_step(
      state, key, relaxed, losses, jnp.zeros(0, int), vocabulary=vocabulary,
      candidates=given["candidates"], top=given["top"],
    )  # fmt: skip
    walk = lambda state, key: ((state := step(state, key)), state.best_loss)
    start = attacks.start(suffix, losses)
    end, best = jax.lax.scan(walk, start, jax.random.split(key, given["calls"]))
    return start.best_loss, end, best

  key = jax.random.key(0)
  start, _, best = search(key)
  found = llm_safety_peers.timed(lambda: jax.block_until_ready(search(key)), 3)
  per_step = {k: v if k == "load1" else v / given["calls"] for k, v in found.items()}
  return {
    "version": f"jax {jax.__version__}", "start_loss": float(start), "losses": best.tolist()
  } | per_step  # fmt: skip


def watermark(given: dict) -> dict:
  """Reads a text; a small vocabulary has its table of green tokens, a large one draws rows."""
  import jax
  import jax.numpy as jnp

  from jaxmethods.methods.llm_safety import watermark as kgw

  vocabulary, gamma = given["vocabulary"], given["gamma"]
  tokens, key = jnp.array(given["tokens"]), jax.random.key(15485863)

  @jax.jit
  def read(tokens):
    pairs = kgw.Bigrams(tokens[:-1], tokens[1:], jnp.ones(len(tokens) - 1, bool))
    if vocabulary <= 1024:
      green = kgw.green_table(key, vocabulary, gamma)[pairs.previous, pairs.current]
    else:
      green = kgw.is_green(key, pairs, vocabulary, gamma)
    return kgw.detect(pairs, green, gamma)

  once = lambda: float(read(tokens).z)
  return {"version": f"jax {jax.__version__}", "z": once()} | llm_safety_peers.timed(
    once, given["calls"]
  )


def numpy_watermark(given: dict) -> dict:
  """The same in NumPy: a row of green tokens is drawn when its token is first met."""
  import numpy as np

  vocabulary, gamma = given["vocabulary"], given["gamma"]
  tokens = np.array(given["tokens"])

  def once() -> float:
    pairs = np.unique(np.stack([tokens[:-1], tokens[1:]], 1), axis=0)
    hits, green, row = 0, np.zeros(vocabulary, bool), -1
    for previous, current in pairs:  # sorted: every row is drawn once
      if previous != row:
        order = np.random.default_rng((15485863, previous)).permutation(vocabulary)
        green[:], row = False, previous
        green[order[: int(gamma * vocabulary)]] = True
      hits += green[current]
    return (hits - gamma * len(pairs)) / (len(pairs) * gamma * (1 - gamma)) ** 0.5

  return {"version": f"numpy {np.__version__}", "z": float(once())} | llm_safety_peers.timed(
    once, given["calls"]
  )


OURS: dict[str, Callable[[dict], dict]] = {
  "dpsgd": dpsgd,
  "gcg": gcg,
  "watermark": watermark,
  "numpy_watermark": numpy_watermark,
}


# --- taking turns ---------------------------------------------------------------------------------


def run(command: list[str], given: dict) -> dict:
  """One fresh process with one thread; the JSON of its last line."""
  from jaxmethods.runtime import launch

  environment = os.environ | ONE_CORE | {"GLIBC_TUNABLES": launch.tunables()}
  done = subprocess.run(
    [*command, json.dumps(given)], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.strip().splitlines()[-1])


class Turns(NamedTuple):
  """How the processes of a sitting are taken.

  Attributes:
    repeats: processes a side.
    folder: what is done lies there, and is not done again.
    single: stop after one process.
    workloads: those that are timed; (): all.
  """

  repeats: int
  folder: Path
  single: bool
  workloads: tuple[str, ...]

  def chosen(self, table: dict[str, dict]) -> dict[str, dict]:
    """Returns the workloads of a part that are timed."""
    return {name: work for name, work in table.items() if name in (self.workloads or table)}


def in_turn(name: str, sides: dict[str, tuple[list[str], dict]], turns: Turns) -> dict[str, dict]:
  """Runs every side in turn; of each the quietest process by CPU time."""
  runs: dict[str, list[dict]] = {side: [] for side in sides}
  for i, (side, (command, given)) in product(range(turns.repeats), sides.items()):
    kept = turns.folder / f"{name} {side} {i}.json"
    if not kept.exists():
      begin = time.monotonic()
      kept.write_text(json.dumps(run(command, given)))
      peers.said(f"{name}, {side}, {i + 1}/{turns.repeats}: {time.monotonic() - begin:.0f} s")
      if turns.single:
        sys.exit(0)
    runs[side].append(json.loads(kept.read_text()))
  return {side: min(done, key=lambda r: r["cpu_median_s"]) for side, done in runs.items()}


def ours(work: str) -> list[str]:
  """The command of one of `OURS`."""
  return [sys.executable, "-m", "benchmarks.llm_safety_speed", "child", "--work", work]


def accountant(python: dict[str, str]) -> None:
  """Records the epsilons of both peers at our orders."""
  from jaxmethods.methods.llm_safety import privacy

  given = {"grid": GRID, "orders": list(privacy.ORDERS)}
  found = {
    name: run([python[peer], str(SCRIPT), f"{name}_epsilons"], given)
    for name, peer in (("opacus", "opacus"), ("google", "jax_privacy"))
  }
  command = "python -m benchmarks.llm_safety_speed accountant"
  GOLDEN.write_text(json.dumps({"command": command, **given, **found}) + "\n")
  print(f"wrote {GOLDEN.relative_to(ROOT)}: {len(GRID)} settings")


def speed(python: dict[str, str], parts: list[str], turns: Turns) -> None:
  """Times the parts and writes the results; parts that are left out keep theirs."""
  file = RESULTS / "llm_safety_speed.json"
  found = json.loads(file.read_text()) if file.exists() else {}
  for part in parts:
    timed = PARTS[part](python, turns)
    found[part] = {"date": time.strftime("%Y-%m-%d"), "repeats": turns.repeats} | timed
    file.write_text(json.dumps(found, indent=1) + "\n")
  (RESULTS / "llm_safety_speed.md").write_text(page(found))


def time_dpsgd(python: dict[str, str], turns: Turns) -> dict:
  """Examples a second."""
  table = {}
  for name, work in turns.chosen(DPSGD).items():
    given = work | {"threads": 1, "calls": 20}
    peer = lambda peer, name, more={}, given=given: (
      [python[peer], str(SCRIPT), name],
      given | more,
    )
    sides = {
      "jaxmethods": (ours("dpsgd"), given),
      "jax-privacy": peer("jax_privacy", "jax_privacy"),
      "opacus, hooks": peer("opacus", "opacus", {"mode": "hooks"}),
      "opacus, ghost": peer("opacus", "opacus", {"mode": "ghost"}),
    }
    table[name] = rated(in_turn(f"dpsgd {name}", sides, turns), work["batch"], work)
  return {"what": "examples", "workloads": table}


def time_gcg(python: dict[str, str], turns: Turns) -> dict:
  """Candidates a second, on one checkpoint on the disk."""
  table = {}
  for name, work in turns.chosen(GCG).items():
    folder = turns.folder / f"lm {name}"
    if not folder.exists():
      make = {"shape": work["shape"], "folder": str(folder)}
      run([python["nanogcg"], str(SCRIPT), "write_lm"], make)
    given = work | {
      "folder": str(folder), "threads": 1, "calls": 10, "prefix": list(range(20, 30)),
      "suffix": list(range(40, 40 + SUFFIX)), "target": [101, 77, 58, 90],
    }  # fmt: skip
    sides = {
      "jaxmethods": (ours("gcg"), given),
      "nanogcg": ([python["nanogcg"], str(SCRIPT), "nanogcg"], given),
    }
    table[name] = rated(in_turn(f"gcg {name}", sides, turns), work["candidates"], work)
  return {"what": "candidates", "workloads": table}


def time_watermark(python: dict[str, str], turns: Turns) -> dict:
  """Tokens a second of detection, rows of green tokens drawn anew."""
  import numpy as np

  table = {}
  for name, work in turns.chosen(WATERMARK).items():
    vocabulary, count = work["vocabulary"], work["tokens"]
    # Zipf's law, as words follow it.
    chance = 1 / np.arange(1, vocabulary + 1)
    draw = np.random.default_rng(0)
    tokens = draw.choice(vocabulary, count, p=chance / chance.sum()).tolist()
    given = work | {"tokens": tokens, "threads": 1, "calls": 5}
    sides = {
      "jaxmethods": (ours("watermark"), given),
      "NumPy": (ours("numpy_watermark"), given),
      "transformers": ([python["opacus"], str(SCRIPT), "transformers_detector"], given),
    }
    table[name] = rated(in_turn(f"watermark {name}", sides, turns), count, work)
  return {"what": "tokens", "workloads": table}


PARTS = {"dpsgd": time_dpsgd, "gcg": time_gcg, "watermark": time_watermark}


def rated(sides: dict[str, dict], count: int, work: dict) -> dict:
  """Adds rates by CPU time, and our rate over every peer's."""
  for found in sides.values():
    found["per_cpu_second"] = count / found["cpu_median_s"]
  mine = sides["jaxmethods"]["per_cpu_second"]
  times = {s: mine / x["per_cpu_second"] for s, x in sides.items() if s != "jaxmethods"}
  return {"work": work, "sides": sides, "times_faster": times}


# --- the page -------------------------------------------------------------------------------------


def page(found: dict) -> str:
  """The results in Markdown, from their JSON alone."""
  lines = [
    "# Safety suite: speed beside others, one thread",
    "",
    "`python -m benchmarks.llm_safety_speed speed`. Rates by CPU time of the quietest process of "
    "each side, which took turns; wall times are in the JSON.",
  ]
  for part, of in found.items():
    loads = [x["load1"] for w in of["workloads"].values() for x in w["sides"].values()]
    lines += [
      "",
      f"## {TITLES[part]}",
      "",
      f"{of['date']}, processes a side: {of['repeats']}, machine load {min(loads)} to {max(loads)}."
      f"{DISTURBED if max(loads) > 1.5 else ''}",
      "",
      f"| workload | side | version | {of['what']} per CPU second | ours is faster by |",
      "| --- | --- | --- | --- | --- |",
    ]
    for name, table in of["workloads"].items():
      for side, x in table["sides"].items():
        times = table["times_faster"].get(side)
        shown = "" if times is None else f"{times:.2f}"
        lines.append(f"| {name} | {side} | {x['version']} | {x['per_cpu_second']:,.0f} | {shown} |")
    lines += ["", *NOTES[part](of)]
    lines += ["", of["note"]] if "note" in of else []
  return "\n".join(lines) + "\n"


def shape_of(shape: dict) -> str:
  """Sizes of a model in words."""
  return (
    f"vocabulary {shape['V']}, width {shape['D']}, {shape['L']} layers, {shape['H']} heads, "
    f"MLP {shape['FF']}"
  )


def dpsgd_notes(of: dict) -> list[str]:
  """What was timed, and the aims."""
  works = {name: table["work"] for name, table in of["workloads"].items()}
  faster = [table["times_faster"] for table in of["workloads"].values()]
  opacus = [min(v for k, v in times.items() if "opacus" in k) for times in faster]
  own = [times["jax-privacy"] for times in faster]
  each = "; ".join(f"{n}: {shape_of(w['shape'])}, {w['batch']} texts of {w['shape']['T']} tokens"
                   for n, w in works.items())  # fmt: skip
  return [
    f"A whole step (per-example gradients, clipping, noise, Adam) of a pre-LN transformer. {each}. "
    "opacus has its hooks and its ghost clipping, which never forms the gradients.",
    "",
    f"Aims: 3 times opacus, at its faster mode: {verdict(opacus, 3)}. Level with jax-privacy (0.95): "
    f"{verdict(own, 0.95)}.",
  ]


def gcg_notes(of: dict) -> list[str]:
  """What was timed, the aim, and that both sides compute the same loss."""
  works = {name: table["work"] for name, table in of["workloads"].items()}
  each = "; ".join(
    f"{n}: {shape_of(w['shape'])}, {w['candidates']} candidates, top {w['top']}"
    for n, w in works.items()
  )
  gaps = [
    abs(t["sides"]["jaxmethods"]["start_loss"] - t["sides"]["nanogcg"]["start_loss"])
    for t in of["workloads"].values()
  ]
  faster = [t["times_faster"]["nanogcg"] for t in of["workloads"].values()]
  return [
    f"Random Llama-shaped checkpoints that transformers wrote. {each}; suffix of {SUFFIX} tokens, "
    "target of 4. Both keep the prefix in a cache; nanoGCG's filter of retokenised candidates is off. "
    f"Losses of the same start differ by at most {max(gaps):.1e}.",
    "",
    f"Aim: twice nanoGCG: {verdict(faster, 2)}.",
  ]


def watermark_notes(of: dict) -> list[str]:
  """What was timed."""
  works = {name: table["work"] for name, table in of["workloads"].items()}
  each = "; ".join(f"{n}: {w['tokens']} tokens of {w['vocabulary']}" for n, w in works.items())
  return [
    f"Detection of a text, every distinct pair once, tokens by Zipf's law. {each}. Rows of green tokens "
    "are drawn within the time of all sides. Each has permutations of its own, so that z differs."
  ]


def verdict(values: list[float], aim: float) -> str:
  """Whether an aim is met, with the values."""
  shown = ", ".join(f"{v:.2f}" for v in values)
  return f"{'met' if min(values) >= aim else 'missed'} ({shown})"


DISTURBED = (
  " **Other work ran on the machine: even CPU times are disturbed, the ratios only orient.**"
)
TITLES = {"dpsgd": "DP-SGD", "gcg": "GCG", "watermark": "Watermark"}
NOTES = {"dpsgd": dpsgd_notes, "gcg": gcg_notes, "watermark": watermark_notes}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("accountant", "speed", "page", "child"))
  parser.add_argument("--part", choices=PARTS, action="append", help="of speed; default: all")
  parser.add_argument("--repeats", type=int, default=2, help="processes a side")
  parser.add_argument("--workload", action="append", help="such as toy; default: all of a part")
  parser.add_argument("--parts", type=Path, help="keeps what is done; the same command continues")
  parser.add_argument("--single", action="store_true", help="stop after one process")
  for name in PEERS:
    parser.add_argument(f"--{name}", help="Python of the peer; default: .peers/, made if need be")
  parser.add_argument("--work", choices=OURS, help=argparse.SUPPRESS)
  args, rest = parser.parse_known_args()
  if args.what == "child":
    print(json.dumps(OURS[args.work](json.loads(rest[0]))))
    return
  if args.what == "page":
    found = json.loads((RESULTS / "llm_safety_speed.json").read_text())
    (RESULTS / "llm_safety_speed.md").write_text(page(found))
    return
  python = {name: getattr(args, name) or str(peers.python(name)) for name in PEERS}
  if args.what == "accountant":
    accountant(python)
  else:
    folder = args.parts or Path(tempfile.mkdtemp(prefix="llm_safety-"))
    folder.mkdir(parents=True, exist_ok=True)
    speed(
      python,
      args.part or list(PARTS),
      Turns(args.repeats, folder, args.single, tuple(args.workload or ())),
    )


if __name__ == "__main__":
  main()
