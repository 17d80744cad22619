"""RAHFL's AugMix, local step and round on one thread, beside what the published code was measured at.

The published figures (RAHFL spec; one thread of a busy machine of this kind): one AugMix draw 0.5 ms an
image, on the host; a local step of a batch of 64, six forward passes an image: ResNet10 23 s, ResNet12
17 s, MobileNetV2 21 s, ShuffleNet 7 s. Ours has four views of an image in one pass.

  python -m benchmarks.rahfl augmix
  python -m benchmarks.rahfl step resnet10 shufflenet
  python -m benchmarks.rahfl clients 4 40 400
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PUBLISHED_STEP = {"resnet10": 23, "resnet12": 17, "mobilenet": 21, "shufflenet": 7}
BATCH, SIDE = 64, 32


def cpu_seconds(work: Callable, repeats: int) -> tuple[float, float]:
  """CPU seconds of the first call, and the median of the others."""
  import jax

  def once() -> float:
    start = time.process_time()
    jax.block_until_ready(work())
    return time.process_time() - start

  return once(), statistics.median(once() for _ in range(repeats))


def augmix() -> list[str]:
  """One AugMix draw of every image of a set."""
  import jax

  from jaxmethods.images import augment
  from jaxmethods.runtime import compiler

  lines = ["| image | ours, CPU ms | images/s | published code, ms |", "| --- | --- | --- | --- |"]
  for side in (32, 16):
    images = jax.random.randint(jax.random.key(0), (512, side, side, 3), 0, 256).astype("uint8")
    keys = jax.random.split(jax.random.key(1), len(images))
    draw = compiler.jit(lambda k, x: jax.lax.map(lambda pair: augment.augmix(*pair), (k, x)))
    _, seconds = cpu_seconds(lambda d=draw, k=keys, x=images: d(k, x), 5)
    published = "0.5" if side == 32 else "-"
    each = seconds / len(images)
    lines.append(f"| {side} x {side} | {1e3 * each:.3f} | {1 / each:.0f} | {published} |")
  return lines


def step(architectures: list[str]) -> list[str]:
  """A local step with CE, JSD and DCL on a batch of published size and full networks."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from jaxmethods.experiments.rahfl import peers
  from jaxmethods.experiments.rahfl.config import Config
  from jaxmethods.models.convnets import classifier
  from jaxmethods.runtime import compiler

  config, optimizer = Config(), optax.adam(1e-3)
  views = jax.random.normal(jax.random.key(0), (BATCH, 4, SIDE, SIDE, 3))
  batch = {"views": views, "y": jnp.arange(BATCH) % 10}
  lines = [
    "| network | ours, CPU s | compilation | published code, s |",
    "| --- | --- | --- | --- |",
  ]
  for name in architectures:
    # A ResNet outside of a loop is better off with lax.conv (`models.conv`).
    net = classifier(name, 10, patches=False if name.startswith("resnet") else None)
    random = np.random.default_rng(0)
    drawn = peers.draw_variables(peers.variable_shapes(net, SIDE, 0), random, random)
    client = peers.Peer(*drawn, optimizer.init(drawn[0]))
    loss = peers.make_loss(peers.network_of(net), config, ())

    def one(client, batch, loss=loss):
      gradient, (state, _) = jax.grad(loss, has_aux=True)(
        client.params, client.model_state, batch, jax.random.key(0)
      )
      updates, opt_state = optimizer.update(gradient, client.opt_state)
      return optax.apply_updates(client.params, updates), state, opt_state

    program = compiler.jit(one)
    first, seconds = cpu_seconds(lambda p=program, c=client: p(c, batch), 2)
    published = PUBLISHED_STEP[name]
    lines.append(f"| {name} | {seconds:.1f} | {first - seconds:.0f} | {published} |")
  return lines


def clients(counts: list[int]) -> list[str]:
  """Rounds of RAHFL with one small architecture and more and more clients, and their picture."""
  import jax
  import matplotlib.pyplot as plt

  from jaxmethods.experiments.rahfl.build import build
  from jaxmethods.experiments.rahfl.config import Config
  from jaxmethods.runtime import compiler

  each, measured = 8, []
  for count in counts:
    config = Config(
      image_size=8, private_examples=each + 1, validation_share=0.12, overlap=True, batch_size=each,
      public_examples=each, corruption=0.0, kinds=["contrast"], architectures=["resnet10"],
      clients_per_architecture=count, narrow=8, stages=1, pretrain=0,
    )  # fmt: skip
    experiment = build(config)
    state, batch = experiment.init(jax.random.key(0)), next(experiment.batches(0))
    round_ = compiler.jit(experiment.step)
    measured.append(cpu_seconds(lambda r=round_, s=state, b=batch: r(s, b), 3))
  figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
  axes.loglog(counts, [seconds for _, seconds in measured], "o-", color="#1f6f8b")
  axes.set(xlabel="clients", ylabel="CPU seconds a round", xticks=counts, xticklabels=counts)
  axes.minorticks_off()
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(RESULTS / "rahfl_clients.png", dpi=120)
  lines = [
    f"One block of ResNet, 8 channels, 8 x 8 images; {each} private images and {each} public ones, "
    "four views, DCL and AsymHFL.\n",
    "| clients | a round, CPU s | compilation |",
    "| --- | --- | --- |",
  ]
  for count, (first, seconds) in zip(counts, measured, strict=True):
    lines.append(f"| {count} | {seconds:.3f} | {first - seconds:.0f} |")
  return [*lines, "\n![CPU seconds a round](rahfl_clients.png)"]


def main() -> None:
  """Measures in a process pinned to one core, prints and records."""
  what, arguments = sys.argv[1], [word for word in sys.argv[2:] if word != "--child"]
  if "--child" not in sys.argv:
    command = ["taskset", "-c", "0", sys.executable, "-m", "benchmarks.rahfl", *sys.argv[1:]]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    subprocess.run([*command, "--child"], env={**os.environ, **flags}, check=True)
    return
  import jax

  made = {
    "augmix": augmix,
    "step": lambda: step(arguments),
    "clients": lambda: clients([int(count) for count in arguments]),
  }[what]()
  called = " ".join(["python -m benchmarks.rahfl", what, *arguments])
  head = (
    f"# RAHFL: {what}\n{time.strftime('%Y-%m-%d')}, `{called}`; jax {jax.__version__}, Python "
    f"{platform.python_version()}, one thread, CPU time, load {os.getloadavg()[0]:.1f} on "
    f"{os.cpu_count()} cores.\n"
  )
  text = "\n".join([head, *made]) + "\n"
  print(text)
  (RESULTS / f"rahfl_{what}.md").write_text(text)


if __name__ == "__main__":
  from jaxmethods.runtime import launch

  launch.set_allocator()
  main()
