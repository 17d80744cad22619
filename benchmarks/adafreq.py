"""Times AdaFreq's parts beside a plain step, a metric library and the published way in NumPy.

  python -m benchmarks.adafreq [--json FILE] [--only step,retrieval,memory,augmentation]

pytorch-metric-learning and torch are peers of this file only; without them their line is left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.experiments.adafreq import build as room, training, views
from jaxmethods.experiments.adafreq.config import Config, rows
from jaxmethods.stats import retrieval

SIZE, WIDTH, IDENTITIES, LARGE = 10_000, 128, 1_000, 100_000


def best(function: Callable[[], object], repeats: int) -> float:
  """The shortest of several wall times, in seconds."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return min(times)


def steps(repeats: int = 3) -> dict[str, float]:
  """A training step in ms, on a ViT with 441 patches as in the paper; by wall and by CPU time."""
  config = Config(
    image_size=128, patch=8, stride=6, width=128, layers=4, heads=4, identities=2, images=2,
    augment=False,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 256, (64, 128, 128, 3)), jnp.uint8)
  train = training.Train(images, None, jnp.arange(64).reshape(8, 8), jnp.full(8, 8, jnp.int32))
  programs = {}
  for name in ("plain", "adafreq"):
    row = rows(config)[name]
    network = room.network_of(row, 8, room.vit_of(row, (128, 128, 3)))
    rates = training.Rates("sgd", 1e-3, 1e-4, 10, 2.0, 1)
    parts = training.Parts(network, room.recipe_of(row), rates, 2, 2, np.asarray(images[:1]))
    state = training.init(parts, jax.random.key(0))
    # The batch is an argument: closed over, the views of one would be computed once and for all.
    step = jax.jit(functools.partial(training.step, parts))
    jax.block_until_ready(step(state, train))
    programs[name] = (step, state)
  wall: dict[str, list[float]] = {name: [] for name in programs}
  processor: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(repeats):
    for name, (step, state) in programs.items():
      begun = time.process_time()
      wall[name].append(best(lambda step=step, state=state: step(state, train), 1))
      processor[name].append(time.process_time() - begun)
  result = {f"{name}_ms": 1000 * min(values) for name, values in wall.items()}
  result |= {f"{name}_cpu_ms": 1000 * min(values) for name, values in processor.items()}
  return result | {
    "adafreq/plain": min(wall["adafreq"]) / min(wall["plain"]),
    "adafreq/plain, CPU time": min(processor["adafreq"]) / min(processor["plain"]),
  }


def features(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
  """Random features of length 1 that cluster by identity, ten of each, and labels."""
  rng = np.random.default_rng(0)
  identities = size * IDENTITIES // SIZE
  labels = np.arange(size) % identities
  centres = rng.normal(size=(identities, WIDTH)).astype(np.float32)
  x = centres[labels] + 2 * rng.normal(size=(size, WIDTH)).astype(np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def by_loop(x: np.ndarray, labels: np.ndarray, queries: int) -> float:
  """MAP of the first queries by a NumPy loop: each row sorted whole (published way)."""
  found = []
  for i in range(queries):
    order = np.argsort(-(x @ x[i]), kind="stable")
    right = (labels[order] == labels[i])[order != i]
    place = np.flatnonzero(right) + 1
    found.append((np.arange(1, len(place) + 1) / place).mean())
  return float(np.mean(found))


def metrics() -> dict[str, float]:
  """Retrieval metrics of 10,000 against 10,000, in seconds; the loop does a tenth and is scaled."""
  x, labels = features()
  arrays = jnp.asarray(x), jnp.asarray(labels)
  program = jax.jit(self_search).lower(*arrays).compile()
  value = float(program(*arrays).mean_ap)
  tenth = SIZE // 10
  result = {
    "ours_s": best(lambda: program(*arrays), 3),
    "numpy_s": 10 * best(lambda: by_loop(x, labels, tenth), 1),
    "ours_MB": program.memory_analysis().temp_size_in_bytes / 1e6,
    "mAP": value,
    "mAP_numpy_tenth": by_loop(x, labels, 50),
  }
  result["numpy/ours"] = result["numpy_s"] / result["ours_s"]
  try:
    import torch
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN
  except ImportError:
    return result
  names = ("mean_average_precision", "mean_average_precision_at_r", "precision_at_1")
  # None: the whole gallery, which mAP needs.
  peer = AccuracyCalculator(
    include=names, k=None, device=torch.device("cpu"),
    knn_func=CustomKNN(CosineSimilarity(), batch_size=1000),
  )  # fmt: skip
  tensors = torch.from_numpy(x), torch.from_numpy(labels)
  start = time.perf_counter()
  accuracy = peer.get_accuracy(*tensors)
  result["pytorch_metric_learning_s"] = time.perf_counter() - start
  result["mAP_pytorch_metric_learning"] = float(accuracy["mean_average_precision"])
  result["pytorch_metric_learning/ours"] = result["pytorch_metric_learning_s"] / result["ours_s"]
  return result


def memory() -> dict[str, float]:
  """Searches 100,000 in 100,000; MB of the compiled program, and the peak of a process that runs it."""
  form = jax.ShapeDtypeStruct((LARGE, WIDTH), jnp.float32)
  labels = jax.ShapeDtypeStruct((LARGE,), jnp.int32)
  found = jax.jit(self_search).lower(form, labels).compile().memory_analysis()
  result = {"temporaries_MB": found.temp_size_in_bytes / 1e6, "all_products_MB": 4 * LARGE**2 / 1e6}
  alone = [sys.executable, "-m", "benchmarks.adafreq", "--only", "streamed"]
  output = subprocess.run(alone, capture_output=True, text=True, check=True).stdout
  return result | json.loads(output.splitlines()[-1])


def self_search(x: jax.Array, labels: jax.Array) -> retrieval.Retrieval:
  """Metrics of photographs that search each other, ten of each individual."""
  found = retrieval.matches(labels, labels, SIZE // IDENTITIES, itself=jnp.arange(len(labels)))
  return retrieval.summary(retrieval.ranks(x, x, found))


def streamed() -> dict[str, float]:
  """Runs the search of 100,000 in 100,000 in this process: peak of resident memory before and after."""
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
  x, labels = (jnp.asarray(part) for part in features(LARGE))
  program = jax.jit(self_search).lower(x, labels).compile()
  before, begun, processor = peak(), time.perf_counter(), time.process_time()
  value = float(program(x, labels).mean_ap)
  return {
    "peak_before_MB": before, "peak_MB": peak(), "run_s": time.perf_counter() - begun,
    "run_cpu_s": time.process_time() - processor, "mAP": value,
  }  # fmt: skip


def published_view(image: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
  """The two spectra and back as the released code does it, one photograph at a time."""
  grey = image @ np.array([0.299, 0.587, 0.114])
  height, width = grey.shape
  rows, columns = np.ogrid[:height, :width]
  distance = (rows - (height - 1) // 2) ** 2 + (columns - (width - 1) // 2) ** 2
  weight = 1 - np.exp(-distance / (2 * deviation**2))
  whole = np.fft.fftshift(np.fft.fft2(grey))
  level = np.abs(np.fft.ifft2(np.fft.ifftshift(whole * weight)))
  level = (level - level.min() + 1e-5) / (level.max() - level.min() + 1e-5)
  other = np.fft.fftshift(np.fft.fft2((255 * level).astype(np.uint8)))
  side = np.sqrt(1 - 0.5 * rng.beta(1, 1))
  half = int(height * side) // 2, int(width * side) // 2
  centre = rng.integers(height), rng.integers(width)
  low, high = (
    np.clip([c + s * h for c, h in zip(centre, half, strict=True)], 0, height) for s in (-1, 1)
  )
  other[low[0] : high[0], low[1] : high[1]] = whole[low[0] : high[0], low[1] : high[1]]
  level = np.abs(np.fft.ifft2(np.fft.ifftshift(other)))
  level = (255 * (level - level.min()) / (level.max() - level.min())).astype(np.uint8)
  return np.repeat(level[..., None] / 255, 3, axis=-1)


def published_augmentation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Rotation, brightness, contrast, crop by Pillow; then normalised, then the second view."""
  from PIL import Image, ImageEnhance

  picture = Image.fromarray(image)
  if rng.random() < 0.5:
    picture = picture.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
  for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast):
    if rng.random() < 0.5:
      picture = kind(picture).enhance(rng.uniform(0.8, 1.2))
  padded = np.pad(np.asarray(picture), ((10, 10), (10, 10), (0, 0)))
  row, column = rng.integers(0, 21, 2)
  crop = padded[row : row + image.shape[0], column : column + image.shape[1]] / 127.5 - 1
  return published_view(crop, rng, 70.0)


def augmentation(count: int = 32, repeats: int = 5) -> dict[str, float]:
  """Images a second at 256 pixels, one batch of both views, interleaved; by the wall and by CPU time."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 256, 256, 3), np.uint8)
  key, batch = jax.random.key(0), jnp.asarray(images)
  ways: dict[str, Callable[[], object]] = {}
  for mix in ("paper", "code"):
    recipe = room.recipe_of(Config(mix=mix))
    draw = jax.jit(lambda key, x, recipe=recipe: views.views(recipe, key, x))
    ways[f"ours_{mix}"] = lambda draw=draw: draw(key, batch)
  ways["numpy"] = lambda: [published_augmentation(image, rng) for image in images]
  walls: dict[str, list[float]] = {name: [] for name in ways}
  processors: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(1 + repeats):  # the first compiles
    for name, way in ways.items():
      begun = time.process_time()
      walls[name].append(best(way, 1))
      processors[name].append(time.process_time() - begun)
  wall = {name: min(times[1:]) for name, times in walls.items()}
  processor = {name: min(times[1:]) for name, times in processors.items()}
  result = {f"{name}_per_s": count / seconds for name, seconds in wall.items()}
  result |= {f"{name}_cpu_ms": 1000 * seconds / count for name, seconds in processor.items()}
  return result | {
    "ours/numpy": wall["numpy"] / wall["ours_paper"],
    "ours/numpy, CPU time": processor["numpy"] / processor["ours_paper"],
    "ours/numpy, code": wall["numpy"] / wall["ours_code"],
  }


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--json", type=Path)
  parser.add_argument("--only", default="step,retrieval,memory,augmentation")
  args = parser.parse_args()
  parts = {"step": steps, "retrieval": metrics, "memory": memory, "augmentation": augmentation}
  if args.only == "streamed":
    print(json.dumps(streamed()))
    return
  # Parts that are not asked for stay as they are.
  result = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
  for name in args.only.split(","):
    result[name] = parts[name]()
    print(name, {key: round(value, 3) for key, value in result[name].items()}, flush=True)
    if args.json:
      args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
