"""Times human interaction beside the published denoiser in PyTorch, and its metrics beside NumPy.

  python -m benchmarks.human_interaction --peer_python PYTHON_WITH_TORCH [--only step,sample,metrics]

step     a training step of two persons (InterHuman features, width 128, 4 layers, 24 frames, batch
         32, dropout 0.1, InterGen's loss, AdamW), milliseconds; before it the PyTorch network has to
         give the recorded output of the published one, and its loss ours.
sample   clips a second: DDIM of 10 steps with classifier-free guidance, in one program of 256 clips.
metrics  all metrics of 1,000 clips beside their NumPy, SciPy and scikit-learn definitions, one clip
         after the other as published; float64; their largest difference.
All run on one pinned core, step and sample in fresh processes, which take turns. The allocator is set
as our entry point sets it: for ours, and in the rows "torch, our allocator". CPU time says more than
the wall on a machine that is shared. Writes results/human_interaction_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PEER = HERE / "human_interaction_peer.py"
GOLDEN = HERE.parent / "tests" / "golden" / "human_interaction.npz"
NET = {"features": 262, "width": 128, "layers": 4, "heads": 4, "hidden": 256, "classes": 8}
STEP = {"batch": 32, "frames": 24, "num_steps": 1000, "dropout": 0.1}
SAMPLE = {"batch": 256, "frames": 24, "num_steps": 1000, "steps": 10, "scale": 2.0}
CLIPS, FRAMES, POINTS = 1000, 48, 24


# --- ours: training and sampling ------------------------------------------------------------------


def task_of(dropout: float):
  """The task with random weights, and its parameters."""
  import jax
  import jax.numpy as jnp

  from jaxmethods.methods.human_interaction import tasks
  from jaxmethods.methods.human_interaction.representation import Scaling
  from jaxmethods.models.interaction import Condition, InteractionDenoiser

  net = InteractionDenoiser(
    "hhi", NET["width"], NET["layers"], NET["heads"], NET["hidden"], dropout
  )
  scaling = Scaling(jnp.zeros(NET["features"]), jnp.ones(NET["features"]))
  task = tasks.make(net, "hhi", scaling, num_steps=STEP["num_steps"], published=True)
  params = jax.jit(task.init)(
    jax.random.key(0),
    jnp.zeros((1, 2, 2, NET["features"])),
    Condition(label=jnp.zeros((1, NET["classes"]))),
  )
  return task, params


def labels(batch: int):
  import jax
  import jax.numpy as jnp

  from jaxmethods.models.interaction import Condition

  return Condition(label=jax.nn.one_hot(jnp.arange(batch) % NET["classes"], NET["classes"]))


def timed(function: Callable[[int], object], warm: int, repeats: int) -> dict[str, list[float]]:
  """Wall and CPU seconds of every call."""
  import jax

  times: dict[str, list[float]] = {"seconds": [], "processor": []}
  for i in range(warm + repeats):
    begin, used = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(i))
    if i >= warm:
      times["seconds"].append(time.perf_counter() - begin)
      times["processor"].append(time.process_time() - used)
  return times


def ours_step(warm: int, repeats: int) -> dict[str, list[float]]:
  """Seconds of training steps."""
  import jax
  import jax.numpy as jnp
  import optax

  task, params = task_of(STEP["dropout"])
  optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-4, weight_decay=2e-5))
  batch, frames = STEP["batch"], STEP["frames"]
  x0 = 0.3 * jax.random.normal(jax.random.key(1), (batch, frames, 2, NET["features"]))
  mask, condition = jnp.ones((batch, frames), bool), labels(batch)

  @jax.jit
  def step(state, key):
    params, inner = state
    gradient = jax.grad(lambda p: task.loss(p, key, x0, mask, condition)["total"])(params)
    change, inner = optimiser.update(gradient, inner, params)
    return optax.apply_updates(params, change), inner

  state = [(params, optimiser.init(params))]

  def one(i: int) -> object:
    state[0] = step(state[0], jax.random.key(i))
    return state[0]

  return timed(one, warm, repeats)


def ours_sample(warm: int, repeats: int) -> dict[str, list[float]]:
  """Seconds of one program that samples all clips."""
  import jax

  task, params = task_of(0.0)
  draw = jax.jit(
    lambda key: task.sample(
      params, key, labels(SAMPLE["batch"]), SAMPLE["frames"], steps=SAMPLE["steps"],
      scale=SAMPLE["scale"],
    )
  ).lower(jax.random.key(0)).compile()  # fmt: skip
  return timed(lambda i: draw(jax.random.key(i)), warm, repeats)


# --- the peer -------------------------------------------------------------------------------------


def agreement(python: str, folder: Path) -> dict[str, float]:
  """Differences of the PyTorch side from the recorded network, and from our loss."""
  import jax.numpy as jnp

  from jaxmethods.methods.human_interaction import losses
  from jaxmethods.methods.human_interaction.representation import Scaling

  stored = np.load(GOLDEN)
  of = lambda name: stored[name]
  features, width, layers, heads, hidden, classes = map(int, of("net/config"))
  x = of("net/x")
  arrays = {name[4:]: of(name) for name in stored.files if name.startswith("net/params/")}
  rng = np.random.default_rng(0)
  pred, target = (rng.normal(size=(4, 9, 2, 262)).astype("f4") for _ in range(2))
  mask, gate = np.arange(9) < np.array([[9], [7], [5], [9]]), np.array([1, 0, 1, 1], "f4")
  arrays |= {
    "x": x.reshape(*x.shape[:2], 2, features), "t": of("net/t"), "cond": of("net/cond"),
    "mask": of("net/mask")[..., 0] != 0, "pred": pred, "target": target, "loss_mask": mask,
    "gate": gate,
  }  # fmt: skip
  np.savez(folder / "arrays.npz", **arrays)
  sizes = {"features": features, "width": width, "layers": layers, "heads": heads, "hidden": hidden}
  found = peer(
    python, folder, {"work": "forward", "arrays": str(folder / "arrays.npz"), "classes": classes}
    | sizes,
  )  # fmt: skip
  out = np.array(found["out"]).reshape(of("net/out").shape)
  real = arrays["mask"]
  scaling = Scaling(jnp.zeros(262), jnp.ones(262))
  total = losses.interaction_loss(pred, target, jnp.asarray(mask), jnp.asarray(gate), scaling)[
    "total"
  ]
  return {
    "network": float(np.abs(out - of("net/out"))[real].max()),
    "loss": abs(found["loss"] / float(total) - 1),
  }


def peer(python: str, folder: Path, settings: dict, allocator: bool = False) -> dict:
  """Runs the PyTorch side in a fresh process on the pinned core, with its own allocator or ours."""
  file = folder / "settings.json"
  file.write_text(json.dumps(settings))
  return run([python, str(PEER), str(file)], allocator)


def run(command: list[str], allocator: bool) -> dict:
  from jaxmethods.runtime import launch

  core = min(os.sched_getaffinity(0))
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  if allocator:
    environment["GLIBC_TUNABLES"] = launch.tunables()
  done = subprocess.run(
    ["taskset", "-c", str(core), *command], capture_output=True, text=True, env=environment
  )
  if done.returncode:
    sys.exit(f"{command}: {done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def beside(work: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
  """Medians of both, whose processes take turns: by the wall, and by CPU time."""
  warm, repeats = (3, 10) if work == "step" else (0, 1)
  own = {"step": STEP, "sample": SAMPLE}[work]
  settings = {"work": work, "warm": warm, "repeats": repeats, **NET, **own}
  ours = [sys.executable, "-m", "benchmarks.human_interaction", "--worker", work]
  ways = {"ours": lambda: run([*ours, "--warm", str(warm), "--repeats", str(repeats)], True)}
  if args.peer_python:
    ways["torch"] = lambda: peer(args.peer_python, folder, settings)
    ways["torch, our allocator"] = lambda: peer(args.peer_python, folder, settings, True)
  runs: dict[str, list[dict]] = {who: [] for who in ways}
  for _ in range(args.rounds):
    for who, way in ways.items():
      runs[who].append(way())
  result = {}
  for clock, name in (("processor", "CPU"), ("seconds", "wall")):
    middle = {
      who: statistics.median(s for each in all_ for s in each[clock]) for who, all_ in runs.items()
    }
    result |= {f"{who}_ms, {name}": 1000 * s for who, s in middle.items()}
    if work == "sample":
      result |= {f"{who}_clips_per_s, {name}": SAMPLE["batch"] / s for who, s in middle.items()}
    result |= {f"ours/{who}, {name}": middle["ours"] / middle[who] for who in list(ways)[1:]}
  return result


# --- metrics by NumPy, as published ---------------------------------------------------------------


def np_fid(real, made):
  from scipy import linalg

  gap = np.square(real.mean(0) - made.mean(0)).sum()
  a, b = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
  return gap + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b).real)


def np_retrieval(text, motion, pool=32):
  hits, apart = np.zeros(3), []
  for start in range(0, len(text) // pool * pool, pool):
    t, m = text[start : start + pool], motion[start : start + pool]
    d = np.sqrt(np.square(t[:, None] - m).sum(-1))
    order = np.argsort(d, axis=1, kind="stable")
    for i in range(pool):
      hits += np.arange(1, 4) > np.flatnonzero(order[i] == i)[0]
      apart.append(d[i, i])
  return np.array([*hits / len(apart), np.mean(apart)])


def np_floor(joints):
  """OMOMO's floor, y up: DBSCAN of the heights of resting toes."""
  from sklearn.cluster import DBSCAN

  heights = []
  for toe in (10, 11):
    moved = np.linalg.norm(np.diff(joints[:, toe], axis=0), axis=-1)
    rests = np.append(moved, moved[-1]) < 0.005
    heights.append(joints[rests, toe, 1])
  heights = np.concatenate(heights)
  if not len(heights):
    return 0.0
  found = DBSCAN(eps=0.005, min_samples=3).fit(heights[:, None]).labels_
  return min(np.median(heights[found == label]) for label in set(found))


def np_sliding(joints, floor):
  feet, limits = joints[:, [7, 10, 8, 11]], (0.08, 0.04, 0.08, 0.04)
  found = []
  for foot, limit in enumerate(limits):
    height = feet[:-1, foot, 1] - floor
    moved = np.linalg.norm(np.diff(feet[:, foot][:, [0, 2]], axis=0), axis=-1)
    low = height < limit
    found.append(np.abs(moved[low] * (2 - 2 ** (height[low] / limit))).sum() / len(joints) * 1000)
  return np.mean(found)


def np_skating(joints, fps=20.0):
  from scipy.ndimage import uniform_filter1d

  toes = joints[:, [10, 11]]
  low = toes[..., 1] < 0.05
  speed = np.linalg.norm(np.diff(toes[..., [0, 2]], axis=0), axis=-1) * fps
  wide = uniform_filter1d(speed, 5, axis=0, mode="constant", origin=0)
  return (low[:-1] & low[1:] & (speed > 0.5) & (wide > 0.5)).any(1).mean()


def np_share(joints):
  v = (joints[2:] - joints[:-2]) / 2
  low = joints[1:-1, :, 1].argmin(1)
  speed = np.linalg.norm(v[np.arange(len(low)), low], axis=-1)
  return 100 * (speed > 0.01).sum() / len(joints)


def np_pfc(joints):
  change = np.diff(joints[:, 0], 2, axis=0)
  change[:, 1] = np.maximum(change[:, 1], 0)
  size = np.linalg.norm(change, axis=-1)
  v = np.linalg.norm(np.diff(joints[1:, [7, 10, 8, 11]][..., [0, 2]], axis=0), axis=-1)
  return (
    1e4 * (np.minimum(v[:, 0], v[:, 1]) * np.minimum(v[:, 2], v[:, 3]) * size / size.max()).mean()
  )


def np_contact(joints, truth, points):
  """Precision, recall, accuracy, F1."""
  touch = lambda x: (
    np.min([np.linalg.norm(x[:, hand, None] - points, axis=-1).min(1) for hand in (20, 21)], axis=0)
    < 0.1
  )
  a, b = touch(joints), touch(truth)
  hit = (a & b).sum()
  precision, recall = (hit / x.sum() if x.sum() else 0.0 for x in (a, b))
  both = precision + recall
  return np.array(
    [precision, recall, (a == b).mean(), 2 * precision * recall / both if both else 0]
  )


def np_penetration(signed):
  deep = signed < -0.04
  each = [-row[d].mean() for row, d in zip(signed, deep, strict=True) if d.any()]
  return np.array([np.mean(each) if each else 0.0, deep.any(1).mean()])


def np_mpjpe(joints, truth):
  return 1000 * np.linalg.norm(joints - joints[:, :1] - truth + truth[:, :1], axis=-1).mean()


def np_nearest(a, b):
  return np.array(
    [np.linalg.norm(x[:, None] - y, axis=-1).min() for x, y in zip(a, b, strict=True)]
  )


# --- metrics beside each other --------------------------------------------------------------------


def material() -> dict[str, np.ndarray]:
  """Walking bodies, their truth, an object, distances to a solid, embeddings; float64."""
  rng = np.random.default_rng(0)
  still = 0.5 * rng.normal(size=(CLIPS, 1, 22, 3)) + np.array([0, 1.0, 0])
  path = 0.01 * rng.normal(size=(CLIPS, FRAMES, 22, 3)).cumsum(1)
  joints = still + path
  # Feet rest for half of a clip, then slide.
  feet, half = [7, 10, 8, 11], FRAMES // 2
  joints[:, :, feet, 1] = 0.02 + 0.001 * rng.normal(size=(CLIPS, FRAMES, 4))
  joints[:, :half, feet] = joints[:, :1, feet] + 1e-4 * rng.normal(size=(CLIPS, half, 4, 3))
  points = joints[:, :, 20:21] + 0.06 * rng.normal(size=(CLIPS, FRAMES, POINTS, 3))
  return {
    "joints": joints, "truth": joints + 0.02 * rng.normal(size=joints.shape), "points": points,
    "signed": 0.05 * rng.normal(size=(CLIPS, FRAMES, POINTS)), "z": rng.normal(size=(CLIPS, 16)),
    "real": 1.2 * rng.normal(size=(CLIPS, 16)), "first": rng.permutation(CLIPS)[:300],
    "second": rng.permutation(CLIPS)[:300],
  }  # fmt: skip


def by_numpy(m: dict[str, np.ndarray]) -> dict[str, Callable[[], object]]:
  each = lambda function, *names: np.array(
    [function(*row) for row in zip(*(m[name] for name in names), strict=True)]
  )
  return {
    "fid": lambda: np_fid(m["real"], m["z"]),
    "retrieval": lambda: np_retrieval(m["real"], m["z"]),
    "diversity": lambda: np.linalg.norm(m["z"][m["first"]] - m["z"][m["second"]], axis=1).mean(),
    "mpjpe": lambda: each(np_mpjpe, "joints", "truth"),
    "floor": lambda: each(np_floor, "joints"),
    "foot_sliding": lambda: each(lambda x: np_sliding(x, 0.0), "joints"),
    "sliding_share": lambda: each(np_share, "joints"),
    "skating": lambda: each(np_skating, "joints"),
    "pfc": lambda: each(np_pfc, "joints"),
    "contact": lambda: each(np_contact, "joints", "truth", "points"),
    "penetration": lambda: each(np_penetration, "signed"),
    "nearest_joints": lambda: each(np_nearest, "joints", "truth"),
  }


def by_ours(m: dict) -> dict[str, Callable[[], object]]:
  import jax
  import jax.numpy as jnp

  from jaxmethods.methods.human_interaction import metrics, physics

  def contact(joints, truth, points):
    touch = lambda x: physics.touching(physics.hand_distances(x, points))
    return jnp.stack(physics.scores(touch(joints), touch(truth)))

  def retrieval(text, motion):
    found = metrics.retrieval(text, motion, 32)
    return jnp.append(found.precision, found.distance)

  each = lambda function, *names: (jax.jit(jax.vmap(function)), names)
  programs = {
    "fid": (jax.jit(metrics.fid), ("real", "z")),
    "retrieval": (jax.jit(retrieval), ("real", "z")),
    "diversity": (jax.jit(metrics.diversity), ("z", "first", "second")),
    "mpjpe": each(physics.mpjpe, "joints", "truth"),
    "floor": each(physics.floor_height, "joints"),
    "foot_sliding": each(physics.foot_sliding, "joints"),
    "sliding_share": each(physics.sliding_share, "joints"),
    "skating": each(physics.skating_ratio, "joints"),
    "pfc": each(physics.pfc, "joints"),
    "contact": each(contact, "joints", "truth", "points"),
    "penetration": each(lambda x: jnp.stack(physics.penetration(x)), "signed"),
    "nearest_joints": each(physics.joint_distance, "joints", "truth"),
  }  # fmt: skip
  arrays = {name: jnp.asarray(value) for name, value in m.items()}
  return {
    name: lambda program=program, names=names: jax.block_until_ready(
      program(*(arrays[name] for name in names))
    )
    for name, (program, names) in programs.items()
  }


def metrics_beside(rounds: int) -> dict:
  """CPU time of every metric by both, their ratio and largest relative difference."""
  import jax

  with jax.enable_x64(True):
    m = material()
    ours, theirs = by_ours(m), by_numpy(m)
    table = {}
    for name, way in ours.items():
      found, expected = np.asarray(way()), np.asarray(theirs[name]())
      size = max(float(np.abs(expected).max()), 1e-12)
      times: dict[str, list[float]] = {"ours": [], "numpy": []}
      for _ in range(rounds):
        for who, run_it in (("ours", way), ("numpy", theirs[name])):
          begin = time.process_time()
          run_it()
          times[who].append(time.process_time() - begin)
      mine, other = (min(times[who]) for who in ("ours", "numpy"))
      table[name] = {
        "ours_ms": 1000 * mine, "numpy_ms": 1000 * other, "numpy/ours": other / mine,
        "apart": float(np.abs(found - expected).max()) / size,
      }  # fmt: skip
  total = {who: sum(row[f"{who}_ms"] for row in table.values()) for who in ("ours", "numpy")}
  return {
    "table": table, "ours_ms": total["ours"], "numpy_ms": total["numpy"],
    "numpy/ours": total["numpy"] / total["ours"],
    "apart": max(row["apart"] for row in table.values()),
  }  # fmt: skip


def parse(argv=None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--peer_python", help="Python with torch; without it only ours is timed")
  add("--only", default="step,sample,metrics")
  add("--rounds", type=int, default=3, help="processes, or repetitions, for each figure")
  add("--out", type=Path, default=HERE / "results" / "human_interaction_speed.json")
  add("--worker", choices=("step", "sample"), help=argparse.SUPPRESS)
  add("--warm", type=int, help=argparse.SUPPRESS)
  add("--repeats", type=int, help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def main(argv=None) -> None:
  """Runs the command line."""
  args = parse(argv)
  if args.worker:
    from jaxmethods.runtime import launch

    launch.keep_compiled_programs()
    way = {"step": ours_step, "sample": ours_sample}[args.worker]
    print(json.dumps(way(args.warm, args.repeats)))
    return
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  result = json.loads(args.out.read_text()) if args.out.exists() else {}
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    if args.peer_python:
      result["agreement"] = agreement(args.peer_python, folder)
      print("agreement", result["agreement"], flush=True)
    for work in args.only.split(","):
      result[work] = (
        metrics_beside(args.rounds) if work == "metrics" else beside(work, args, folder)
      )
      print(work, json.dumps(result[work], indent=1), flush=True)
  result["settings"] = {"network": NET, "step": STEP, "sample": SAMPLE, "clips": CLIPS}
  result["machine"] = {
    "python": platform.python_version(),
    "machine": platform.machine(),
    "cores": 1,
  }
  args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
