"""Federated averaging beside fedjax: the same clients, start and schedule, on one pinned core.

  python benchmarks/fedavg.py --bench ../shared/bench --peer_python VENV/bin/python
  (VENV: `python -m benchmarks.peers fedavg` makes one and prints its Python)

The workload is that of `--bench` (common.py, fedavg_fedjax.py): scikit-learn digits over 100 clients
with Dirichlet(0.5) label skew, all taking part, 2 local epochs in batches of 8, SGD 0.1. There are
only 1,437 training images; for other numbers of clients the pool shrinks or grows with them, so that
the work per client stays the same: the first 14.37 * clients images of the training set followed by
copies of it with Gaussian pixel noise of 0.1 (at 1,000 clients nine tenths are such copies).

Every figure is a fresh process; ours and the peer's take turns. Writes results/fedavg.{json,md,png}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
GOALS = {"mlp": 0.25, "cnn": 0.5}


def parse(argv=None) -> argparse.Namespace:
  default_bench = os.environ.get("BENCH_DIR", str(HERE.parents[1] / "shared" / "bench"))
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--bench", type=Path, default=Path(default_bench), help="folder of common.py")
  parser.add_argument("--peer_python", help="Python with fedjax; without it only ours is timed")
  parser.add_argument("--full", action="store_true", help="all numbers of clients, into results/")
  parser.add_argument("--repeats", type=int, help="processes per figure (default: 1; --full: 3)")
  parser.add_argument("--rounds", type=int, help="rounds per process (default: 10; --full: 20)")
  parser.add_argument("--curve", type=int, nargs="*", help="numbers of clients to compare at")
  parser.add_argument("--out", type=Path, help="default: runs/benchmarks; --full: results/")
  parser.add_argument("--worker", choices=["ours", "fedjax"], help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  usual = {"repeats": 1, "rounds": 10, "curve": [100], "out": Path("runs/benchmarks")}
  full = {"repeats": 3, "rounds": 20, "curve": [10, 30, 100, 300, 1000], "out": RESULTS}
  for name, value in (full if args.full else usual).items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  return args


def use_common(bench: Path):
  """Imports the shared workload, with the pool of images scaled to the number of clients."""
  import numpy as np

  sys.path.insert(0, str(bench))
  import common

  common.limit_threads()
  original = common.digits

  def pool():
    (x, y), test = original()
    size = round(len(x) * common.CLIENTS / 100)
    rng = np.random.default_rng(common.SEED + 2)
    copies = -(-size // len(x))
    noise = 0.1 * rng.normal(size=(copies, *x.shape)).astype(np.float32)
    noise[0] = 0
    return ((x + noise).reshape(-1, *x.shape[1:])[:size], np.tile(y, copies)[:size]), test

  if common.CLIENTS != 100:
    common.digits = pool
  return common


def ours(common) -> None:
  """Times our rounds and prints one JSON line."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax
  import jax.numpy as jnp
  import optax

  from jaxmethods.federated import algorithms, batching, engine, padding
  from jaxmethods.models.convnet import ConvNet
  from jaxmethods.models.mlp import MLP

  names = {
    "mlp": ("dense_0/w1/b1", "dense_1/w2/b2", "head/w3/b3"),
    "cnn": ("conv_0/c1/d1", "conv_1/c2/d2", "head/w/b"),
  }
  net = MLP((128, 64), 10) if common.MODEL == "mlp" else ConvNet((16, 32), 10)
  start = common.init_params()
  params = {}
  for layer, kernel, bias in (name.split("/") for name in names[common.MODEL]):
    params[layer] = {"kernel": jnp.asarray(start[kernel]), "bias": jnp.asarray(start[bias])}

  def loss(params, model_state, batch, key):
    del key
    errors = optax.softmax_cross_entropy_with_integer_labels(
      net.apply({"params": params}, batch["x"]), batch["y"]
    )
    return (errors * batch["mask"]).sum() / batch["mask"].sum(), (model_state, {})

  fed = algorithms.fedavg(
    loss,
    optax.sgd(common.LR),
    batches=batching.shuffled(common.BATCH),
    local_epochs=common.EPOCHS,
  )
  clients, (test_x, test_y) = common.clients()
  data, weights, ids = padding.bucket_clients(
    [{"x": x, "y": y} for x, y in clients], multiple=common.BATCH
  )
  states = tuple(algorithms.ClientState({}, (), ()) for _ in data)
  sampled = int(os.environ.get("BENCH_SAMPLED", 0))

  @jax.jit
  def one_round(server, states, data, weights, ids, key):
    cohort_key, key = jax.random.split(key)
    sizes = [len(w) for w in weights]
    cohort = engine.sample_cohort(cohort_key, sizes, sampled) if sampled else None
    return engine.federated_round(fed, server, states, data, weights, key, ids=ids, cohort=cohort)

  server = fed.init(params, jax.random.key(0))
  clock = common.Clock("jaxmethods", version=f"jax {jax.__version__}", sampled=sampled)
  for r in range(common.ROUNDS):
    with clock:
      server, states, _ = one_round(server, states, data, weights, ids, jax.random.key(r))
      jax.block_until_ready(server)
  hits = net.apply({"params": server.params}, test_x).argmax(-1) == test_y
  sizes = [len(x) for x, _ in clients]
  clock.report(
    test_accuracy=round(float(hits.mean()), 4),
    examples=sum(sizes),
    steps=sum(common.EPOCHS * -(-n // common.BATCH) for n in sizes),
    peer_steps=sum(-(-common.EPOCHS * n // common.BATCH) for n in sizes),
  )


def measure(args, who: str, model: str, clients: int, rounds: int, sampled: int = 0) -> dict:
  """Runs one process and returns its JSON line."""
  env = {
    **os.environ,
    "BENCH_MODEL": model,
    "BENCH_CLIENTS": str(clients),
    "BENCH_ROUNDS": str(rounds),
    "BENCH_SAMPLED": str(sampled),
    "BENCH_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(HERE.parent),
  }
  env.pop("JAX_COMPILATION_CACHE_DIR", None)  # the first round is to show the cost of compiling
  python = sys.executable if who == "ours" else args.peer_python
  command = [python, __file__, "--worker", who, "--bench", str(args.bench.resolve())]
  print(f"{who}: {model}, {clients} clients ...", file=sys.stderr, flush=True)
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{who} failed on {model}, {clients} clients:\n{done.stderr[-2000:]}")
  row = json.loads(done.stdout.splitlines()[-1])
  print(
    f"{who:7} {model} {clients:5} clients: {row['median_s']:.4f} s/round, "
    f"CPU {row['cpu_median_s']:.4f}, first {row['first_s']:.1f}, "
    f"accuracy {row['test_accuracy']:.3f}, load {row['load1']}",
    flush=True,
  )
  return row


def compare(args, model: str, clients: int, rounds: int, repeats: int) -> dict:
  """Takes turns between ours and the peer and puts the figures side by side."""
  runs: dict[str, list[dict]] = {"ours": [], "fedjax": []}
  for _ in range(repeats):
    for who, rows in runs.items():
      if who == "ours" or args.peer_python:
        rows.append(measure(args, who, model, clients, rounds))
  row = {"model": model, "clients": clients, "rounds": rounds, "runs": runs}
  for field in ("cpu_median_s", "median_s", "min_s", "first_s", "test_accuracy"):
    for who, rows in runs.items():
      if rows:
        row[f"{who}_{field}"] = statistics.median(r[field] for r in rows)
  if runs["fedjax"]:
    pairs = list(zip(runs["ours"], runs["fedjax"], strict=True))
    for name, field in (("ratio", "cpu_median_s"), ("wall_ratio", "median_s")):
      ratios = [a[field] / b[field] for a, b in pairs]
      row[name] = statistics.median(ratios)
      row[name + "_range"] = [min(ratios), max(ratios)]
  return row


def write(args, report: dict) -> None:
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "fedavg.json").write_text(json.dumps(report, indent=1) + "\n")
  (args.out / "fedavg.md").write_text(markdown(report))
  draw(report, args.out / "fedavg.png")


def markdown(report: dict) -> str:
  lines = [
    "# Federated averaging beside fedjax",
    "",
    f"{report['date']}, `{report['command']}`  ",
    f"{report['machine']}; {report['versions']}  ",
    "One pinned core, fresh processes in turn, no compilation cache, allocator untouched. CPU "
    "seconds of the median round (the machine may be shared), median over the processes; range of "
    "the ratio in brackets. Workload: see `benchmarks/fedavg.py`.",
    "",
    "| workload | ours, CPU s | fedjax, CPU s | ratio | goal | wall ratio | ours, wall s (best) | "
    "first round, ours / fedjax | accuracy, ours / fedjax |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in report["main"] + [row for row in report["curve"] if row not in report["main"]]:
    goal = GOALS[row["model"]] if row in report["main"] else "-"
    ours_s = f"{row['ours_cpu_median_s']:.4f}"
    name = f"{row['model']}, {row['clients']} clients, {row['rounds']} rounds"
    wall = f"{row['ours_median_s']:.4f} ({row['ours_min_s']:.4f})"
    if "ratio" not in row:
      first, accuracy = f"{row['ours_first_s']:.1f} s", f"{row['ours_test_accuracy']:.3f}"
      lines.append(f"| {name} | {ours_s} | - | - | {goal} | - | {wall} | {first} | {accuracy} |")
      continue
    low, high = row["ratio_range"]
    lines.append(
      f"| {name} | {ours_s} | {row['fedjax_cpu_median_s']:.4f} | **{row['ratio']:.2f}** "
      f"({low:.2f} to {high:.2f}) | {goal} | {row['wall_ratio']:.2f} | {wall} | "
      f"{row['ours_first_s']:.1f} / {row['fedjax_first_s']:.1f} s | "
      f"{row['ours_test_accuracy']:.3f} / {row['fedjax_test_accuracy']:.3f} |"
    )
  cohort, steps = report["cohort"], report["main"][0]["runs"]["ours"][0]
  lines += [
    "",
    f"50 of 1,000 clients sampled per round (mlp, ours): {cohort['cpu_median_s']:.4f} CPU s.",
    "",
    "Same examples per round, not quite the same steps: we batch every epoch by itself and keep its "
    f"remainder ({steps['steps']} steps in a round of 100 clients), fedjax lets batches run on from one "
    f"epoch into the next ({steps['peer_steps']} steps).",
    "",
    "![seconds per round against number of clients](fedavg.png)",
    "",
  ]
  return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
  for who, colour, label in (("fedjax", "#8a8a8a", "fedjax"), ("ours", "#1f6fb4", "jaxmethods")):
    rows = [row for row in report["curve"] if row["runs"][who]]
    if not rows:
      continue
    clients = [row["clients"] for row in rows]
    seconds = [row[f"{who}_cpu_median_s"] for row in rows]
    axes.loglog(clients, seconds, "o-", color=colour, label=label)
    for row, n, s in zip(rows, clients, seconds, strict=True):
      below = who == "ours"
      text = f"{s:.3g} s" + (f"\n{row['ratio']:.2f} x" if below and "ratio" in row else "")
      offset = (0, -8) if below else (0, 7)
      axes.annotate(
        text, (n, s), offset, textcoords="offset points", ha="center",
        va="top" if below else "bottom", fontsize=8, color=colour,
      )  # fmt: skip
  axes.set_xlabel("clients per round, about 14 examples each")
  axes.set_ylabel("CPU seconds per round, one core")
  axes.set_title("Federated averaging of a dense net (64-128-64-10)", fontsize=10, loc="left")
  axes.set_xticks([row["clients"] for row in report["curve"]])
  axes.set_xticklabels([f"{row['clients']:,}" for row in report["curve"]])
  axes.minorticks_off()
  axes.margins(x=0.08, y=0.18)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(True, axis="y", alpha=0.3)
  axes.legend(frameon=False, loc="upper left")
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main(argv=None) -> None:
  args = parse(argv)
  if args.worker:
    common = use_common(args.bench)
    if args.worker == "ours":
      return ours(common)
    import fedavg_fedjax

    return fedavg_fedjax.main()
  if not (args.bench / "common.py").is_file():
    raise SystemExit(f"--bench: no common.py in {args.bench}")
  long = [compare(args, model, 100, args.rounds, args.repeats) for model in ("mlp", "cnn")]
  curve = []
  for clients in args.curve:
    repeats = max(args.repeats - 1, 1)
    curve.append(long[0] if clients == 100 else compare(args, "mlp", clients, args.rounds, repeats))
  cohort = measure(args, "ours", "mlp", 1000, args.rounds, sampled=50)
  runs = [run for row in long for rows in row["runs"].values() for run in rows]
  versions = {run["peer"]: run["version"] for run in runs}
  report = {
    "date": datetime.date.today().isoformat(),
    "command": shlex.join(["python", "benchmarks/fedavg.py", *(argv or sys.argv[1:])]),
    "machine": f"{_cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    "versions": ", ".join(f"{name}: {version}" for name, version in versions.items()),
    "main": long,
    "curve": curve,
    "cohort": cohort,
  }
  write(args, report)
  print(markdown(report))


def _cpu() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


if __name__ == "__main__":
  main()
