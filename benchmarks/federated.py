"""`--method federated` beside fedjax, Flower's simulation and Apple's pfl, and memory over populations.

  python -m benchmarks.federated speed --peers fedjax=VENV/bin/python flower=... pfl=...
  python -m benchmarks.federated curve --peers fedjax=VENV/bin/python
  python -m benchmarks.federated population
  python -m benchmarks.federated page

The workload is that of `--bench` (see benchmarks/fedavg.py): scikit-learn's digits over 100 clients with
Dirichlet(0.5) label skew, all in every round, 2 local epochs in batches of 8, SGD 0.1; `mlp` is
64-128-64-10, `cnn` two 3x3 convolutions and a dense layer. Ours is the step of the method as its loop
calls it, with shuffling, drift and byte counts. Every figure is a fresh process, ours and the peers' in
turn; CPU seconds of the median round, of the whole process tree for Flower, whose work is done by
Ray's workers. Each part adds to results/federated_speed.json; `page` writes the page and the picture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # a peer's environment may have another package "benchmarks"
import fedavg  # noqa: E402

RESULTS = HERE / "results"
FILE = RESULTS / "federated_speed.json"
PARTS = ("speed", "curve", "population", "page")
CURVE = (10, 100, 1000, 10000)
POPULATIONS = (1_000, 10_000, 100_000)
AIMS = {("mlp", "fedjax"): 4, ("cnn", "fedjax"): 2, ("mlp", "flower"): 20, ("mlp", "pfl"): 20}
LABELS = {"ours": "jaxmethods", "fedjax": "fedjax", "flower": "Flower simulation", "pfl": "pfl"}
COLOURS = {"ours": "#1f6f8b", "fedjax": "#d1495b", "flower": "#edae49", "pfl": "#66a182"}


def parse(argv=None) -> argparse.Namespace:
  default = os.environ.get("BENCH_DIR", str(HERE.parents[1] / "shared" / "bench"))
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("part", choices=PARTS)
  parser.add_argument("--bench", type=Path, default=Path(default), help="folder of common.py")
  parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PYTHON")
  parser.add_argument("--models", nargs="*", default=["mlp", "cnn"])
  parser.add_argument("--repeats", type=int, default=3, help="processes per figure")
  parser.add_argument("--rounds", type=int, default=8, help="rounds per process")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  return parser.parse_args(argv)


# --- workers --------------------------------------------------------------------------------------


def ours(common) -> None:
  """Times the step of the method on the workload."""
  import jax
  import jax.numpy as jnp

  from jaxmethods.experiments.federated import build as room, nets
  from jaxmethods.experiments.federated.config import Config
  from jaxmethods.experiments.federated.holdings import Holdings
  from jaxmethods.runtime import compiler

  dense = common.MODEL == "mlp"
  config = Config(
    clients=common.CLIENTS, model="mlp" if dense else "convnet", steps=common.ROUNDS,
    widths=(128, 64) if dense else (16, 32), local_epochs=common.EPOCHS, batch_size=common.BATCH,
    learning_rate=common.LR,
  )  # fmt: skip
  clients, (x, y) = common.clients()
  train = [{"x": a, "y": b} for a, b in clients]
  held = Holdings(
    [f"client {k}" for k in range(len(train))], train, [{"x": x, "y": y}] + [
      {name: array[:0] for name, array in own.items()} for own in train[1:]
    ], {}, 10, "the workload of --bench",
  )  # fmt: skip
  sizes = nets.Sizes(**room.settings(config, nets.Sizes._fields))
  task = nets.array_task("", nets.make(config.model, sizes, x.shape[1:], 10), x[0], 10)
  experiment = room.build(config, material=room.of_clients(config, held, task))
  names = {
    True: ("dense_0/w1/b1", "dense_1/w2/b2", "head/w3/b3"),
    False: ("conv_0/c1/d1", "conv_1/c2/d2", "head/w/b"),
  }[dense]
  start, params = common.init_params(), {}
  for layer, kernel, bias in (name.split("/") for name in names):
    params[layer] = {"kernel": jnp.asarray(start[kernel]), "bias": jnp.asarray(start[bias])}
  state = experiment.init(jax.random.key(0))
  state = state._replace(server=state.server._replace(params=params))
  step, batches = compiler.jit(experiment.step, donate_argnums=0), experiment.batches(0)
  clock = common.Clock("jaxmethods", version=f"jax {jax.__version__}")
  for _ in range(common.ROUNDS):
    with clock:
      state, metrics = step(state, next(batches))
      jax.block_until_ready((state, metrics))
  found = experiment.evaluate(state, experiment.test)
  clock.report(test_accuracy=round(float(found["test_accuracy"]), 4))


def tree_seconds(pid: int) -> float:
  """CPU seconds of a process and of all that descend from it and live."""
  import psutil

  root = psutil.Process(pid)
  total = 0.0
  for process in [root, *root.children(recursive=True)]:
    try:
      total += sum(process.cpu_times()[:2])
    except psutil.Error:
      continue
  return total


def flower(common) -> None:
  """Times Flower by the script of --bench, with the CPU time of all its processes."""

  class Clock(common.Clock):
    """Takes the CPU time of the tree whenever a wall time is put down."""

    def __init__(self, *args, **more):
      super().__init__(*args, **more)
      seconds = [tree_seconds(os.getpid())]

      class Times(list):
        def append(self, value):
          now = tree_seconds(os.getpid())
          super().append(now - seconds[0])
          seconds[0] = now

      self.cpu = Times()

  common.Clock = Clock
  # By Ray's default the workers are nicer than anything else on a shared machine: they would starve.
  os.environ.setdefault("RAY_worker_niceness", "0")
  import fedavg_flwr as script

  script.run_simulation(
    server_app=script.server, client_app=script.client, num_supernodes=common.CLIENTS,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
  )  # fmt: skip


def pfl(common) -> None:
  """Times pfl's FederatedAveraging with its PyTorch model, all clients in one process."""
  import numpy as np
  import torch
  from fedavg_torch import Net
  from pfl.aggregate.simulate import SimulatedBackend
  from pfl.aggregate.weighting import WeightByDatapoints
  from pfl.algorithm.base import NNAlgorithmParams
  from pfl.algorithm.federated_averaging import FederatedAveraging
  from pfl.callback.base import TrainingProcessCallback
  from pfl.data.dataset import Dataset
  from pfl.data.federated_dataset import FederatedDataset
  from pfl.hyperparam import NNTrainHyperParams
  from pfl.metrics import Metrics
  from pfl.model.pytorch import PyTorchModel

  torch.set_num_threads(common.THREADS)
  clients, (x, y) = common.clients()
  tensors = [
    (torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(b).long())
    for a, b in clients
  ]

  class Scored(Net):
    """The net of the workload with the loss that pfl asks for."""

    def loss(self, inputs, targets, eval=False):
      self.train(not eval)
      return torch.nn.functional.cross_entropy(self(inputs), targets)

    def metrics(self, inputs, targets, eval=False):
      return {}

  net = Scored()
  order = {"next": 0}

  def sampler():
    order["next"] = (order["next"] + 1) % common.CLIENTS
    return order["next"]

  def dataset(k):  # pfl keeps the order of a client's examples, which are sorted by class
    rows = torch.randperm(len(tensors[k][0]))
    return Dataset(raw_data=[tensor[rows] for tensor in tensors[k]])

  data = FederatedDataset(dataset, sampler)
  model = PyTorchModel(
    net, local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
  )  # fmt: skip
  clock = common.Clock("pfl", version=__import__("importlib.metadata").metadata.version("pfl"))
  last = [time.perf_counter(), time.process_time()]

  class Timer(TrainingProcessCallback):
    """Puts the seconds of every round down."""

    def on_train_begin(self, *, model):
      last[:] = time.perf_counter(), time.process_time()
      return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
      now = time.perf_counter(), time.process_time()
      clock.t.append(now[0] - last[0])
      clock.cpu.append(now[1] - last[1])
      last[:] = now
      return False, Metrics()

  FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
      central_num_iterations=common.ROUNDS, evaluation_frequency=10**9,
      train_cohort_size=common.CLIENTS, val_cohort_size=0,
    ),
    backend=SimulatedBackend(
      training_data=data, val_data=None, postprocessors=[WeightByDatapoints()]
    ),
    model=model,
    model_train_params=NNTrainHyperParams(
      local_num_epochs=common.EPOCHS, local_learning_rate=common.LR, local_batch_size=common.BATCH
    ),
    callbacks=[Timer()],
  )  # fmt: skip
  with torch.no_grad():
    logits = net(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
  clock.report(test_accuracy=round(float(np.mean(logits.argmax(1) == y)), 4))


def population(size: int, rounds: int) -> None:
  """Prints peak memory and seconds of rounds of 100 clients out of a population."""
  import jax

  from jaxmethods.experiments.federated.build import build
  from jaxmethods.experiments.federated.config import Config
  from jaxmethods.runtime import compiler

  experiment = build(Config(population=size, cohort=100, steps=rounds))
  state, batches = experiment.init(jax.random.key(1)), experiment.batches(0)
  step, seconds = compiler.jit(experiment.step, donate_argnums=0), []
  for _ in range(rounds):
    begin = time.process_time()
    state, _ = step(state, next(batches))
    jax.block_until_ready(state)
    seconds.append(time.process_time() - begin)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(json.dumps({"rss_mib": peak, "cpu_median_s": statistics.median(seconds[1:])}))


# --- parts ----------------------------------------------------------------------------------------


def start(args, worker: str, python: str, **settings: object) -> dict:
  """Runs a worker in a process of its own; returns its JSON line."""
  env = {
    **os.environ, "BENCH_THREADS": "1", "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": f"{HERE.parent}{os.pathsep}{args.bench.resolve()}",
    **{f"BENCH_{name.upper()}": str(value) for name, value in settings.items()},
  }  # fmt: skip
  command = [python, str(HERE / "federated.py"), args.part, "--worker", worker]
  command += ["--bench", str(args.bench.resolve()), "--rounds", str(args.rounds)]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
  if done.returncode or not lines:
    raise SystemExit(f"{worker} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
  row = json.loads(lines[-1])
  print(worker, settings, row, flush=True)
  return row


def pythons(args) -> dict[str, str]:
  return {"ours": sys.executable, **dict(peer.split("=", 1) for peer in args.peers)}


def compared(args, model: str, clients: int, rounds: int, repeats: int, before: dict) -> dict:
  """Takes turns between ours and the peers; figures of peers that are not timed now are kept."""
  runs: dict[str, list[dict]] = {who: [] for who in pythons(args)}
  for _ in range(repeats):
    for who, python in pythons(args).items():
      runs[who].append(start(args, who, python, model=model, clients=clients, rounds=rounds))
  return before | {
    who: {
      "cpu_median_s": statistics.median(run["cpu_median_s"] for run in rows),
      "cpu_all_s": [run["cpu_median_s"] for run in rows],
      "first_s": statistics.median(run["first_s"] for run in rows),
      "accuracy": [run["test_accuracy"] for run in rows],
      "version": rows[0]["version"], "rounds": rounds, "load": [run["load1"] for run in rows],
    }
    for who, rows in runs.items()
  }  # fmt: skip


def measure(args, report: dict) -> None:
  """Adds one part to the report."""
  kept = report.setdefault(args.part, {})
  if args.part == "speed":
    for model in args.models:
      kept[model] = compared(args, model, 100, args.rounds, args.repeats, kept.get(model, {}))
  elif args.part == "curve":
    for clients in CURVE:
      rounds = args.rounds if clients <= 1000 else 3
      before = kept.get(str(clients), {})
      kept[str(clients)] = compared(args, "mlp", clients, rounds, 1, before)
  else:
    for size in POPULATIONS:
      kept[str(size)] = start(args, f"population-{size}", sys.executable)
  report["machine"] = f"{fedavg._cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}"
  report["date"] = datetime.date.today().isoformat()


def page(report: dict) -> str:
  """Builds the page of the report."""
  lines = [
    "# `--method federated`: seconds per round beside its peers, memory over populations", "",
    f"{report['date']}, `python -m benchmarks.federated speed|curve|population` (see the script); "
    f"{report['machine']}. CPU seconds of the median round, fresh processes in turn, one thread each. "
    "The machine was shared; the load is in the JSON.", "",
    "| workload, 100 clients | program | CPU s a round | times ours | aim | accuracy | first round, s |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]  # fmt: skip
  for model, rows in report["speed"].items():
    base = rows["ours"]["cpu_median_s"]
    for who, row in rows.items():
      times = "-" if who == "ours" else f"{row['cpu_median_s'] / base:.1f}"
      aim = AIMS.get((model, who), "-")
      name = f"{LABELS[who]} ({row['version']})"
      lines.append(
        f"| {model} | {name} | {row['cpu_median_s']:.4f} | {times} | {aim} | "
        f"{statistics.median(row['accuracy']):.3f} | {row['first_s']:.1f} |"
      )
  every = [row for rows in report["speed"].values() for row in rows.values()]
  said = (
    f"Processes per figure: {min(len(row['cpu_all_s']) for row in every)}. Load while they ran: up to "
    f"{max(load for row in every for load in row['load']):.0f} on two cores. Ray's workers were kept at "
    "niceness 0: by default they are nicer than all else, and starved."
  )
  lines += [
    "", f"Accuracies after a few rounds must agree within noise: the same work was done. {said}", "",
    "![seconds per round against the number of clients](federated_speed.png)", "",
    "## Populations", "",
    "100 clients of a round, drawn by their numbers; digits, dense net. Peak memory of the whole "
    "process.", "",
    "| population | peak memory, MiB | CPU s a round |", "| --- | --- | --- |",
  ]  # fmt: skip
  for size, row in report["population"].items():
    lines.append(f"| {int(size):,} | {row['rss_mib']:.0f} | {row['cpu_median_s']:.3f} |")
  return "\n".join(lines) + "\n"


def draw(report: dict, path: Path) -> None:
  """Draws seconds per round against the number of clients."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
  curve = report["curve"]
  points = {who: {} for who in LABELS}
  for clients, rows in [*curve.items(), ("100", report["speed"]["mlp"])]:
    for who, row in rows.items():
      points[who][int(clients)] = row["cpu_median_s"]
  for who, found in points.items():
    if found:
      x = sorted(found)
      axis.loglog(x, [found[n] for n in x], "o-", color=COLOURS[who], label=LABELS[who])
  axis.set(xlabel="clients per round, about 14 examples each", ylabel="CPU seconds per round")
  axis.set_title("Federated averaging of a dense net (64-128-64-10)", fontsize=10, loc="left")
  axis.set_xticks(CURVE, [f"{n:,}" for n in CURVE])
  axis.minorticks_off()
  axis.spines[["top", "right"]].set_visible(False)
  axis.grid(True, axis="y", alpha=0.3)
  axis.legend(frameon=False)
  figure.savefig(path, dpi=150)


def work(args) -> None:
  """Does the work of one process."""
  if args.worker.startswith("population-"):
    return population(int(args.worker.partition("-")[2]), args.rounds)
  common = fedavg.use_common(args.bench)
  if args.worker == "fedjax":
    import fedavg_fedjax

    return fedavg_fedjax.main()
  return {"ours": ours, "flower": flower, "pfl": pfl}[args.worker](common)


def main(argv=None) -> None:
  args = parse(argv)
  if args.worker:
    return work(args)
  report = json.loads(FILE.read_text()) if FILE.exists() else {}
  if args.part != "page":
    measure(args, report)
    FILE.write_text(json.dumps(report, indent=1) + "\n")
    return None
  draw(report, FILE.with_suffix(".png"))
  FILE.with_suffix(".md").write_text(page(report))
  return None


if __name__ == "__main__":
  main()
