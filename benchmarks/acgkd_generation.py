"""Generation of pseudo-graphs on one pinned thread: milliseconds an iteration, memory against xi.

The teacher is a GCN-5-64 of random weights (their values do not change the cost) and the graphs have
MUTAG's sizes; `--graphs`, `--nodes`, `--features` and `--classes` set others, such as COLLAB's. GFKD's
official code took 3.1 to 4.2 s an iteration for 131 graphs on one CPU thread (ACGKD spec). Memory is
XLA's own account of the compiled program: temporaries, and the state that stays.

  taskset -c 1 python -m benchmarks.acgkd_generation [--iterations 20] [--memory_only]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

RESULTS = Path(__file__).parent / "results"
PUBLISHED_SECONDS = (3.1, 4.2)
CASES = (
  ("acgkd", "dense", 0.5),
  ("acgkd", "dense", 1.0),
  ("acgkd", "edges", 0.1),
  ("acgkd", "edges", 0.3),
  ("acgkd", "edges", 0.5),
  ("acgkd", "edges", 1.0),
  ("gfkd", "dense", 1.0),
)


def measure(args: argparse.Namespace, algorithm: str, form: str, xi: float) -> dict:
  """Measures one case: ms an iteration (absent with --memory_only), MB, parameters."""
  import jax
  import jax.numpy as jnp

  from jaxmethods.experiments.acgkd import generator
  from jaxmethods.experiments.acgkd.config import Config, rows
  from jaxmethods.models.graph_classifier import Classifier, GraphEncoder, init_head
  from jaxmethods.runtime import compiler

  config = Config(gen_iters=args.iterations, gen_chunk=args.iterations, form=form)
  row = dataclasses.replace(rows(config)[algorithm], xi=xi)
  low, high = args.nodes
  sizes = generator.Sizes(args.graphs, low, high, args.features, args.classes, True)
  encoder = GraphEncoder("gcn", 5, 64, symmetric=not row.directed)
  made = generator.Generator(row, sizes, encoder)
  start = functools.partial(generator.start, made)
  key = jax.random.key(0)

  def teacher_of(key):
    batch = two_nodes(key, args.features)
    variables = encoder.init(key, batch)
    head = init_head(key, encoder.width, args.classes)
    return Classifier(variables["params"], variables["batch_stats"], head)

  teacher = compiler.jit(teacher_of)(key)
  shapes = jax.eval_shape(start, key, teacher)
  chunk = compiler.jit(functools.partial(generator.generate, made), donate_argnums=1)
  began = time.perf_counter()
  program = chunk.lower(teacher, shapes, jax.ShapeDtypeStruct((), jnp.int32), key).compile()
  compiled = time.perf_counter() - began
  memory = program.memory_analysis()
  result = {
    "algorithm": algorithm,
    "form": form,
    "xi": xi,
    "structure_parameters": shapes.log_odds.size,
    "temporary_mb": memory.temp_size_in_bytes / 1e6,
    "state_mb": memory.argument_size_in_bytes / 1e6,
    "compile_seconds": compiled,
    "load": os.getloadavg()[0],
  }
  if not args.memory_only:
    pseudo = compiler.jit(start)(key, teacher)
    wall, cpu = [], []
    for repeat in range(args.repeats + 1):
      begin, used = time.perf_counter(), time.process_time()
      pseudo = jax.block_until_ready(program(teacher, pseudo, jnp.int32(repeat), key))
      wall.append(1e3 * (time.perf_counter() - begin) / args.iterations)
      cpu.append(1e3 * (time.process_time() - used) / args.iterations)
    result |= {"wall_ms": min(wall[1:]), "cpu_ms": min(cpu[1:])}
  return result


def two_nodes(key, features: int):
  """Builds the smallest batch, for the shapes of weights."""
  import jax.numpy as jnp

  from jaxmethods.methods import acgkd

  num_nodes = jnp.array([2])
  pairs = acgkd.draw_candidates(key, num_nodes, 2)
  return acgkd.assemble(
    pairs, jnp.zeros(pairs.source.shape), jnp.zeros((1, 2, features)), num_nodes
  )


def picture(results: list[dict], path: Path) -> None:
  """Draws memory and parameters against xi."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
  for form, marker in (("edges", "o"), ("dense", "s")):
    cases = [r for r in results if r["algorithm"] == "acgkd" and r["form"] == form]
    label = {"edges": "candidate edges", "dense": "dense adjacency"}[form]
    for axis, key in zip(axes, ("structure_parameters", "temporary_mb"), strict=True):
      axis.plot([r["xi"] for r in cases], [r[key] for r in cases], f"-{marker}", label=label)
  axes[0].set(title="structure parameters", ylabel="number")
  axes[1].set(title="temporaries of one iteration", ylabel="MB")
  for axis in axes:
    axis.set(xlabel="spatial complexity xi", xlim=(0, 1.05), ylim=(0, None))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].legend(frameon=False, fontsize=9)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main() -> None:
  """Measures, prints and records."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--graphs", type=int, default=131)
  parser.add_argument("--nodes", type=int, nargs=2, default=(10, 29), metavar=("LOW", "HIGH"))
  parser.add_argument("--features", type=int, default=7)
  parser.add_argument("--classes", type=int, default=2)
  parser.add_argument("--iterations", type=int, default=20, help="in one timed call")
  parser.add_argument("--repeats", type=int, default=4)
  parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="of CASES")
  parser.add_argument("--memory_only", action="store_true")
  parser.add_argument("--name", default="acgkd_generation", help="of the files under results/")
  args = parser.parse_args()

  import jax

  results = [measure(args, *case) for case in (CASES[i] for i in args.cases)]
  lines = [
    f"# Generation, {args.graphs} graphs of {args.nodes[0]} to {args.nodes[1]} nodes",
    f"{time.strftime('%Y-%m-%d')}, `python -m benchmarks.acgkd_generation --graphs {args.graphs} "
    f"--nodes {args.nodes[0]} {args.nodes[1]} --features {args.features} --classes {args.classes}"
    f"{' --memory_only' if args.memory_only else ''}`; jax {jax.__version__}, Python "
    f"{platform.python_version()}, one thread, teacher GCN-5-64. Best of {args.repeats} calls of "
    f"{args.iterations} iterations; machine load {min(r['load'] for r in results):.1f} to "
    f"{max(r['load'] for r in results):.1f}, so wall times are disturbed and CPU times less so.",
    "",
    "| row | form | xi | structure parameters | state MB | temporaries MB | wall ms | CPU ms |"
    + ("" if args.memory_only or args.graphs != 131 else " published / CPU |"),
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
    + ("" if args.memory_only or args.graphs != 131 else " --- |"),
  ]
  for r in results:
    line = (
      f"| {r['algorithm']} | {r['form']} | {r['xi']} | {r['structure_parameters']} "
      f"| {r['state_mb']:.1f} | {r['temporary_mb']:.1f} "
    )
    if args.memory_only:
      line += "| - | - |"
    else:
      line += f"| {r['wall_ms']:.1f} | {r['cpu_ms']:.1f} |"
      if args.graphs == 131:
        low, high = (1e3 * s / r["cpu_ms"] for s in PUBLISHED_SECONDS)
        line += f" {low:.0f} to {high:.0f} |"
    lines.append(line)
  text = "\n".join(lines) + "\n"
  print(text)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"{args.name}.md").write_text(text)
  (RESULTS / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")
  picture(results, RESULTS / f"{args.name}.png")


if __name__ == "__main__":
  main()
