"""A round of federated prompt learning beside a loop of PyTorch clients, on one pinned core.

  python benchmarks/fpl.py --peer_python $(python -m benchmarks.peers fpl)

The small CLIP of the testbed with random weights, the same in both; --clients clients with one batch of
32 digits each, five local epochs (PromptFL's number) of SGD with momentum, the mean of the prompts.
Ours is one jitted round. PyTorch runs twice: as the published loop does it (every step embeds its
images with the frozen tower, and texts at the full context), and with two of our savings (images
embedded once, texts trimmed). The prompts after the first round must agree. Every figure is
CPU time of a fresh process; the workers take turns. Writes results/fpl_speed.json.
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = ("text", "vision", "both")
PROMPTS, BATCH, EPOCHS, RATE, MOMENTUM, DECAY = 16, 32, 5, 0.01, 0.9, 5e-4
WORKERS = ("ours", "torch", "torch_saving")


def parse(argv=None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--peer_python", help="Python with torch; without it only ours is timed")
  add("--clients", type=int, default=100)
  add("--rounds", type=int, default=3, help="timed rounds in a process, after the first")
  add("--repeats", type=int, default=3, help="processes for each figure")
  add("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
  add("--client_map", choices=("vmap", "scan"), default="scan")
  add("--out", type=Path, default=HERE / "results" / "fpl_speed.json")
  add("--worker", choices=WORKERS, help=argparse.SUPPRESS)
  add("--shared", type=Path, help=argparse.SUPPRESS)
  return parser.parse_args(argv)


# --- ours -----------------------------------------------------------------------------------------


def write_problem(folder: Path, clients: int) -> None:
  """Writes weights by the names of the published layout, pictures, labels, prompts and token ids."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxmethods.experiments.fpl.texts import prompt_texts
  from jaxmethods.models.clip import CLIP_TABLE
  from jaxmethods.models.weights import export_params
  from jaxmethods.testbeds.vision_language import pretraining, tasks, words
  from jaxmethods.testbeds.vision_language.settings import SmallClip, TaskSize

  settings = SmallClip()
  tokens = words.word_tokens(settings.context)
  model = pretraining.model_of(settings, tokens)
  example = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 5), int)
  params = jax.jit(model.init)(jax.random.key(0), *example)["params"]
  task = tasks.load_task("digits", TaskSize(train=1200))
  random = np.random.default_rng(0)
  rows = random.integers(0, len(task.train[1]), (clients, BATCH))
  texts = prompt_texts(task.classes, PROMPTS, "end", tokens)
  plain = words.class_texts(task.classes, task.templates[:1], tokens)[:, 0]
  normal = lambda *shape: (0.02 * random.normal(size=shape)).astype(np.float32)
  np.savez(
    folder / "problem.npz", x=task.train[0][rows], y=task.train[1][rows].astype(np.int64),
    text=normal(PROMPTS, settings.text_width), vision=normal(1, PROMPTS, settings.width),
    ids=np.asarray(texts.ids), ends=np.asarray(texts.end), plain=plain, plain_ends=plain.argmax(1),
    heads=settings.heads, context=settings.context,
    **{f"w/{name}": value for name, value in export_params(params, CLIP_TABLE).items()},
  )  # fmt: skip


def ours(args: argparse.Namespace, kind: str) -> dict:
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from jaxmethods.federated import algorithms, engine
  from jaxmethods.federated.batching import Batches
  from jaxmethods.methods import fpl
  from jaxmethods.models.clip import CLIP_TABLE
  from jaxmethods.models.weights import import_params
  from jaxmethods.runtime import compiler
  from jaxmethods.testbeds.vision_language import pretraining, words
  from jaxmethods.testbeds.vision_language.settings import SmallClip

  problem = dict(np.load(args.shared / "problem.npz"))
  settings = SmallClip()
  model = pretraining.model_of(settings, words.word_tokens(settings.context))
  example = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 5), int)
  form = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
  tensors = {name[2:]: value for name, value in problem.items() if name.startswith("w/")}
  params = jax.tree.map(jnp.asarray, import_params(tensors, CLIP_TABLE, form))
  ids, ends = jnp.asarray(problem["ids"]), jnp.asarray(problem["ends"], jnp.int32)
  lengths = ends - PROMPTS - 2
  each = fpl.ClassTexts(ids, fpl.arrange(PROMPTS, lengths, ids.shape[1]), ends)
  texts = fpl.share_prefix(each, PROMPTS)
  plain_ids = jnp.asarray(problem["plain"])
  order = jnp.broadcast_to(jnp.arange(plain_ids.shape[1], dtype=jnp.int32), plain_ids.shape)
  plain = fpl.ClassTexts(plain_ids, order, jnp.asarray(problem["plain_ends"], jnp.int32))
  clients = len(problem["x"])
  pixels = pretraining.scaled(jnp.asarray(problem["x"]))
  scale = jnp.exp(params["logit_scale"])
  learn_text, learn_image = kind != "vision", kind != "text"
  names = (["text"] if learn_text else []) + (["vision"] if learn_image else [])
  prompts = {name: jnp.asarray(problem[name]) for name in names}
  optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM))
  embed = jax.jit(lambda params, x: fpl.image_features(model, params, {}, x))
  fixed_text = jax.jit(lambda params: fpl.text_features(model, params, {}, plain))(params)

  def one_round(server, x, y, params):
    def loss(prompts, state, batch, key):
      del key
      image = batch["x"]
      if learn_image:
        image = fpl.image_features(model, params, prompts, image)
      text = fixed_text
      if learn_text:
        text = fpl.shared_text_features(model, params, prompts, texts)
      return fpl.prompt_loss(image, text, scale, batch["y"]), (state, {})

    algorithm = algorithms.fedavg(loss, optimizer, local_epochs=EPOCHS)
    data = Batches({"x": x[:, None], "y": y[:, None]}, jnp.ones((clients, 1), bool))
    client = algorithms.init_client(server.params)
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), client)
    weights = jnp.full(clients, float(BATCH))
    server, _, metrics = engine.federated_round(
      algorithm, server, (states,), (data,), (weights,), jax.random.key(0),
      client_map=args.client_map,
    )  # fmt: skip
    return server, metrics["loss"].mean()

  x = pixels
  if not learn_image:
    x = jnp.stack([embed(params, part) for part in pixels])
  y, program = jnp.asarray(problem["y"]), compiler.jit(one_round)
  server = algorithms.ServerState(prompts, ())
  first = time.process_time()
  server, _ = jax.block_until_ready(program(server, x, y, params))
  first = time.process_time() - first
  after = {name: np.asarray(value) for name, value in server.params.items()}
  seconds = []
  for _ in range(args.rounds):
    begin = time.process_time()
    server, _ = jax.block_until_ready(program(server, x, y, params))
    seconds.append(time.process_time() - begin)
  np.savez(args.shared / f"ours-{kind}.npz", **after)
  return {"seconds": seconds, "first": first}


# --- the peer -------------------------------------------------------------------------------------


def peer(args: argparse.Namespace, kind: str, saving: bool) -> dict:
  import numpy as np
  import torch
  import torch.nn.functional as F

  torch.set_num_threads(1)
  problem = dict(np.load(args.shared / "problem.npz"))
  w = {name[2:]: torch.tensor(value) for name, value in problem.items() if name.startswith("w/")}
  heads, context = int(problem["heads"]), int(problem["context"])

  def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

  def dense(x, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

  def encode(x, tower, causal):
    layers = len({key.split(".")[3] for key in w if key.startswith(f"{tower}.encoder.layers.")})
    for i in range(layers):
      at = f"{tower}.encoder.layers.{i}"
      h = norm(x, f"{at}.layer_norm1")
      q, k, v = (
        dense(h, f"{at}.self_attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
        for n in "qkv"
      )
      mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
      x = x + dense(mixed, f"{at}.self_attn.out_proj")
      h = dense(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
      x = x + dense(h * torch.sigmoid(1.702 * h), f"{at}.mlp.fc2")
    return x

  def texts(ids, ends, prompt=None):
    x = w["text_model.embeddings.token_embedding.weight"][ids]
    if prompt is not None:
      wide = prompt.expand(len(x), *prompt.shape)
      x = torch.cat([x[:, :1], wide, x[:, 1 + len(prompt) :]], 1)
    x = x + w["text_model.embeddings.position_embedding.weight"][: x.shape[1]]
    x = norm(encode(x, "text_model", True), "text_model.final_layer_norm")
    return F.normalize(x[torch.arange(len(x)), ends] @ w["text_projection.weight"].T, dim=-1)

  def images(x, prompt=None):
    patch = F.conv2d(
      x, w["vision_model.embeddings.patch_embedding.weight"],
      stride=w["vision_model.embeddings.patch_embedding.weight"].shape[-1],
    ).flatten(2).transpose(1, 2)  # fmt: skip
    first = w["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, patch], 1) + w["vision_model.embeddings.position_embedding.weight"]
    if prompt is not None:
      x = torch.cat([x, prompt.expand(len(x), *prompt.shape)], 1)
    x = encode(norm(x, "vision_model.pre_layrnorm"), "vision_model", False)[:, 0]
    x = norm(x, "vision_model.post_layernorm") @ w["visual_projection.weight"].T
    return F.normalize(x, dim=-1)

  x = torch.tensor(problem["x"]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
  y, scale = torch.tensor(problem["y"]), w["logit_scale"].exp()
  ids, ends = torch.tensor(problem["ids"]), torch.tensor(problem["ends"])
  plain, plain_ends = torch.tensor(problem["plain"]), torch.tensor(problem["plain_ends"])
  if not saving:
    ids = F.pad(ids, (0, context - ids.shape[1]))
    plain = F.pad(plain, (0, context - plain.shape[1]))
  learn_text, learn_image = kind != "vision", kind != "text"
  with torch.no_grad():
    kept_images = [images(each) for each in x] if saving and not learn_image else None
    kept_texts = texts(plain, plain_ends) if saving else None

  def client(start, k):
    prompts = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.SGD(prompts.values(), RATE, MOMENTUM, weight_decay=DECAY)
    for _ in range(EPOCHS):
      if learn_image:
        f = images(x[k], prompts["vision"][0])
      elif kept_images is not None:
        f = kept_images[k]
      else:
        with torch.no_grad():
          f = images(x[k])
      if learn_text:
        g = texts(ids, ends, prompts["text"])
      elif kept_texts is not None:
        g = kept_texts
      else:
        with torch.no_grad():
          g = texts(plain, plain_ends)
      loss = F.cross_entropy(scale * f @ g.T, y[k])
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
    return {name: value.detach() for name, value in prompts.items()}

  names = (["text"] if learn_text else []) + (["vision"] if learn_image else [])
  server = {name: torch.tensor(problem[name]) for name in names}
  seconds, first = [], None
  for k in range(args.rounds + 1):
    begin = time.process_time()
    uploads = [client(server, c) for c in range(len(x))]
    server = {name: torch.stack([u[name] for u in uploads]).mean(0) for name in server}
    seconds.append(time.process_time() - begin)
    if k == 0:
      first, mine = seconds.pop(), np.load(args.shared / f"ours-{kind}.npz")
      apart = max(float(np.abs(mine[name] - value.numpy()).max()) for name, value in server.items())
  return {"seconds": seconds, "first": first, "apart": apart, "torch": torch.__version__}


# --- processes ------------------------------------------------------------------------------------


def main(argv=None) -> None:
  args = parse(argv)
  if args.worker:
    run = (
      ours if args.worker == "ours" else lambda args, kind: peer(args, kind, args.worker != "torch")
    )
    print(json.dumps(run(args, args.kinds[0])))
    return
  core = min(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory() as folder:
    write_problem(Path(folder), args.clients)
    results = {}
    for kind in args.kinds:
      runs = {worker: [] for worker in (WORKERS if args.peer_python else WORKERS[:1])}
      for _ in range(args.repeats):
        for worker, kept in runs.items():
          kept.append(process(args, kind, worker, folder, core))
      results[kind] = summary(runs)
      print(kind, json.dumps(results[kind]), flush=True)
  settings = {
    "clients": args.clients, "batch": BATCH, "epochs": EPOCHS, "prompts": PROMPTS, "classes": 10,
    "client_map": args.client_map, "rounds": args.rounds, "repeats": args.repeats,
  }  # fmt: skip
  machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": 1}
  contents = {"settings": settings, "machine": machine, "results": results}
  args.out.write_text(json.dumps(contents, indent=2) + "\n")


def process(args: argparse.Namespace, kind: str, worker: str, folder: str, core: int) -> dict:
  """One figure in a process of its own, on one core."""
  python = sys.executable if worker == "ours" else args.peer_python
  command = [
    "taskset", "-c", str(core), python, __file__, "--worker", worker, "--kinds", kind,
    "--shared", folder, "--rounds", str(args.rounds), "--client_map", args.client_map,
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"{worker} {kind}: {done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def summary(runs: dict[str, list[dict]]) -> dict:
  """The median round of every worker, and the ratios to ours."""
  out: dict = {}
  for worker, each in runs.items():
    out[worker] = round(statistics.median(s for run in each for s in run["seconds"]), 4)
    out[f"{worker}_first"] = round(statistics.median(run["first"] for run in each), 3)
  for worker in list(runs)[1:]:
    out[f"{worker}_over_ours"] = round(out[worker] / out["ours"], 2)
    out["apart"] = max(out.get("apart", 0.0), *(run["apart"] for run in runs[worker]))
  return out


if __name__ == "__main__":
  main()
