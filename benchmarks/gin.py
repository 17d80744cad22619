"""Adam step of a 3-layer GIN beside PyTorch Geometric, one pinned core.

Workload of `gin_pyg.py` in the shared bench folder: width 64, 128 seeded random graphs of 10 to 30
nodes. Both sides run alternately in fresh processes; the peer needs its own environment
(`pip install torch==2.13.0 torch_geometric scikit-learn`).

  python -m benchmarks.gin --bench ../shared/bench --peer_python /path/to/venv-pyg/bin/python
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import peers

STEPS = 40
RESULTS = Path(__file__).parent / "results"


def measure(bench: Path) -> dict:
  """Our side, timed exactly as the peer script times its own."""
  sys.path.insert(0, str(bench))
  import common

  common.limit_threads()
  import flax.linen as nn
  import gin_pyg
  import jax
  import jraph
  import numpy as np
  import optax

  from jaxmethods.data.records import GraphData, Source
  from jaxmethods.graphs.batching import batch_graphs
  from jaxmethods.models.graph_layers import GIN, pool

  class Net(nn.Module):
    @nn.compact
    def __call__(self, batch):
      h = batch.nodes["features"]
      for _ in range(3):
        conv = GIN(64, symmetric=True)
        h = nn.relu(conv(h, batch.senders, batch.receivers, edge_mask=batch.edges["mask"]))
      pooled = pool(h, batch.nodes["graph"], len(batch.n_node), batch.nodes["mask"], is_sorted=True)
      return nn.Dense(4)(pooled)

  drawn = gin_pyg.graphs()
  n_node = np.array([len(x) for x, _, _ in drawn], np.int32)
  first = np.cumsum(n_node) - n_node
  senders, receivers = np.concatenate(
    [e + f for (_, e, _), f in zip(drawn, first, strict=True)], axis=1
  )
  graphs = jraph.GraphsTuple(
    nodes=np.concatenate([x for x, _, _ in drawn]),
    edges=None,
    senders=senders,
    receivers=receivers,
    n_node=n_node,
    n_edge=np.array([e.shape[1] for _, e, _ in drawn], np.int32),
    globals=None,
  )
  labels = np.array([y for _, _, y in drawn], np.int32)
  data = GraphData(graphs, labels, 4, Source("gin_pyg", str(bench), "none stated", "none", False))

  net, optimiser = Net(), optax.adam(1e-3)
  (fixed,) = batch_graphs(data, range(len(drawn)), len(drawn))
  params = net.init(jax.random.key(0), fixed)
  state = params, optimiser.init(params)

  def loss_of(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      net.apply(params, batch), batch.globals["label"]
    )
    return losses.mean(where=batch.globals["mask"])

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    params, moments = state
    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    updates, moments = optimiser.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), loss

  resident = jax.device_put(fixed)
  result = {}
  for name, batch in (
    ("step", lambda: resident),
    ("collate_and_step", lambda: batch_graphs(data, range(len(drawn)), len(drawn))[0]),
  ):
    wall, cpu = [], []
    for _ in range(STEPS):
      begin, used = time.perf_counter(), time.process_time()
      state, loss = step(state, batch())
      loss.item()
      wall.append(time.perf_counter() - begin)
      cpu.append(time.process_time() - used)
    result[name] = {
      "first_ms": round(1e3 * wall[0], 2),
      "median_ms": round(1e3 * statistics.median(wall[3:]), 2),
      "min_ms": round(1e3 * min(wall[3:]), 2),
      "cpu_median_ms": round(1e3 * statistics.median(cpu[3:]), 2),
    }
  return {
    "name": "jaxmethods",
    "jax": jax.__version__,
    "threads": common.THREADS,
    "nodes": int(n_node.sum()),
    "edges": len(senders),
    "allocator_set": "MALLOC_MMAP_MAX_" in os.environ or "GLIBC_TUNABLES" in os.environ,
    "load1": round(os.getloadavg()[0], 2),
    **result,
  }


def run(command: list[str], **kwargs) -> dict:
  """One fresh process on one core; the JSON of its last line."""
  environment = {**os.environ, "BENCH_THREADS": "1"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, **kwargs)
  if done.returncode:
    sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def best(runs: list[dict], work: str, field: str) -> float:
  """The quietest of the repeats."""
  return min(r[work][field] for r in runs)


def main() -> None:
  """Runs both sides and writes the results."""
  parser = argparse.ArgumentParser(description="GIN step beside PyTorch Geometric")
  parser.add_argument(
    "--bench", type=Path, default=Path(os.environ.get("BENCH_DIR", "../shared/bench"))
  )
  parser.add_argument("--peer_python", help="python with torch_geometric; none: time ours only")
  parser.add_argument("--repeats", type=int, help="processes a side (default: 1; --full: 3)")
  parser.add_argument("--full", action="store_true", help="write the results of this folder")
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  bench = args.bench.resolve()
  if not (bench / "gin_pyg.py").is_file():
    parser.error(f"--bench: no gin_pyg.py in {bench}")
  if args.child:
    print(json.dumps(measure(bench)))
    return

  child = [sys.executable, "-m", "benchmarks.gin", "--child", "--bench", str(bench)]
  ours, peer = [], []
  args.repeats = args.repeats or (3 if args.full else 1)
  results = RESULTS if args.full else Path("runs/benchmarks")
  for i in range(args.repeats):
    peers.said(f"{i + 1}/{args.repeats} jaxmethods")
    ours.append(run(child))
    if args.peer_python:
      peers.said(f"{i + 1}/{args.repeats} torch_geometric")
      peer.append(run([args.peer_python, "gin_pyg.py"], cwd=bench))
  sides = {"jaxmethods": ours} | ({"torch_geometric": peer} if peer else {})
  rows = [
    "| work | side | median ms | best ms | CPU ms (median) |",
    "| --- | --- | --- | --- | --- |",
  ]
  ratios = {}
  for work in ("step", "collate_and_step"):
    for side, runs in sides.items():
      numbers = [best(runs, work, f) for f in ("median_ms", "min_ms", "cpu_median_ms")]
      rows.append(f"| {work} | {side} | {' | '.join(f'{n:.2f}' for n in numbers)} |")
    if peer:
      ratios[work] = {
        f: round(best(ours, work, f) / best(peer, work, f), 3)
        for f in ("median_ms", "cpu_median_ms")
      }
      rows.append(
        f"| {work} | **ratio** | {ratios[work]['median_ms']} | | {ratios[work]['cpu_median_ms']} |"
      )
  loads = [r["load1"] for runs in sides.values() for r in runs]
  text = "\n".join(
    [
      "# GIN step, one pinned core",
      f"128 graphs, {ours[0]['nodes']} nodes, {ours[0]['edges']} directed edges, width 64, Adam. "
      f"Each side: {STEPS} steps in {args.repeats} fresh processes, taken in turn; figures of the "
      f"quietest one. Machine load {min(loads)} to {max(loads)}; allocator setting "
      f"{'on' if ours[0]['allocator_set'] else 'off'}.",
      "",
      *rows,
      "",
    ]
  )
  print(text)
  results.mkdir(parents=True, exist_ok=True)
  (results / "gin.md").write_text(text)
  record = {"ratios": ratios, "jaxmethods": ours, "torch_geometric": peer}
  (results / "gin.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
