"""What `benchmarks.llm_safety_speed` is timed beside, run by the Python of each peer: none imports ours.

  PEER/bin/python benchmarks/llm_safety_peers.py opacus '{"shape": ..., "batch": ...}'

The last line that it prints is JSON.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version


def timed(work: Callable[[], object], calls: int) -> dict:
  """Wall and CPU seconds of one of `calls` calls, after two that warm up."""
  work()
  work()
  wall, cpu = [], []
  for _ in range(calls):
    begin, used = time.perf_counter(), time.process_time()
    work()
    wall.append(time.perf_counter() - begin)
    cpu.append(time.process_time() - used)
  return {
    "median_s": statistics.median(wall),
    "min_s": min(wall),
    "cpu_median_s": statistics.median(cpu),
    "cpu_min_s": min(cpu),
    "load1": round(os.getloadavg()[0], 2),
  }


# --- accountants ----------------------------------------------------------------------------------


def opacus_epsilons(given: dict) -> dict:
  """Epsilon of every (rate, noise, steps, delta) by opacus."""
  from opacus.accountants import RDPAccountant

  found = []
  for rate, sigma, steps, delta in given["grid"]:
    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    found.append(accountant.get_epsilon(delta, alphas=given["orders"]))
  return {"version": f"opacus {version('opacus')}", "epsilon": found}


def google_epsilons(given: dict) -> dict:
  """The same by dp-accounting."""
  import dp_accounting
  from dp_accounting.rdp import RdpAccountant

  found = []
  for rate, sigma, steps, delta in given["grid"]:
    event = dp_accounting.GaussianDpEvent(sigma)
    if rate < 1:
      event = dp_accounting.PoissonSampledDpEvent(rate, event)
    accountant = RdpAccountant(orders=given["orders"])
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    found.append(accountant.get_epsilon(delta))
  return {"version": f"dp-accounting {version('dp-accounting')}", "epsilon": found}


# --- DP-SGD ---------------------------------------------------------------------------------------


def torch_lm(shape: dict):
  """The small LM of the suite, of layers that opacus has rules for."""
  import torch
  from torch import nn
  from torch.nn import functional

  width, heads, hidden = shape["D"], shape["H"], shape["FF"]

  class Block(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
      self.wqkv = nn.Linear(width, 3 * width, bias=False)
      self.wo = nn.Linear(width, width, bias=False)
      self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, h):
      split = lambda x: x.view(*x.shape[:2], heads, -1).transpose(1, 2)
      q, k, v = map(split, self.wqkv(self.ln1(h)).chunk(3, -1))
      mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
      h = h + self.wo(mixed.transpose(1, 2).reshape(h.shape))
      return h + self.w2(functional.gelu(self.w1(self.ln2(h)), approximate="tanh"))

  class LM(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.wte, self.wpe = nn.Embedding(shape["V"], width), nn.Embedding(shape["T"], width)
      self.blocks = nn.ModuleList(Block() for _ in range(shape["L"]))
      self.lnf, self.head = nn.LayerNorm(width), nn.Linear(width, shape["V"], bias=False)

    def forward(self, ids):
      place = torch.arange(ids.shape[1]).repeat(len(ids), 1)
      h = self.wte(ids) + self.wpe(place)
      for block in self.blocks:
        h = block(h)
      return self.head(self.lnf(h))

  return LM()


def opacus_step(given: dict) -> dict:
  """A step of DP-SGD by opacus: per-example gradients by its hooks, or its ghost clipping."""
  import torch
  from opacus import PrivacyEngine
  from torch.nn import functional
  from torch.utils.data import DataLoader, TensorDataset

  torch.set_num_threads(given["threads"])
  torch.manual_seed(0)
  shape, batch, ghost = given["shape"], given["batch"], given["mode"] == "ghost"
  model = torch_lm(shape)
  ids = torch.randint(0, shape["V"], (batch, shape["T"]))
  loader = DataLoader(TensorDataset(ids), batch_size=batch)
  criterion = torch.nn.CrossEntropyLoss(reduction="mean")
  made = PrivacyEngine().make_private(
    module=model, optimizer=torch.optim.Adam(model.parameters(), 1e-3), data_loader=loader,
    criterion=criterion, noise_multiplier=given["sigma"], max_grad_norm=given["clip"],
    poisson_sampling=False, grad_sample_mode=given["mode"],
  )  # fmt: skip
  model, optimiser = made[:2]
  criterion = made[2] if ghost else criterion

  def step() -> float:
    optimiser.zero_grad(set_to_none=True)
    logits, labels = model(ids)[:, :-1], ids[:, 1:]
    flat, shape = (logits.flatten(0, 1), labels.flatten()), logits.shape
    loss = criterion(*flat, shape=shape) if ghost else functional.cross_entropy(*flat)
    loss.backward()
    optimiser.step()
    return loss.item()

  return {"version": f"opacus {version('opacus')}, torch {torch.__version__}"} | timed(
    step, given["calls"]
  )


def jax_privacy_step(given: dict) -> dict:
  """The same by jax-privacy: the small LM, its clipping and its noise."""
  import jax
  import jax.numpy as jnp
  import optax
  import small_lm
  from jax_privacy import clipped_grad, noise_addition

  shape, batch = given["shape"], given["batch"]
  params, ids = small_lm.drawn(shape), jnp.asarray(small_lm.texts(shape, batch))
  loss = lambda params, row: small_lm.mean_nll(params, row, shape["H"])
  clipped = clipped_grad(
    loss, l2_clip_norm=given["clip"], normalize_by=batch, keep_batch_dim=False,
    return_values=True, microbatch_size=given.get("microbatch"),
  )  # fmt: skip
  noise = noise_addition.gaussian_privatizer(
    stddev=given["sigma"] * given["clip"] / batch, prng_key=jax.random.key(0)
  )
  optimiser = optax.chain(noise, optax.adam(1e-3))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, state, ids):
    gradient, aux = clipped(params, ids)
    change, state = optimiser.update(gradient, state)
    return optax.apply_updates(params, change), state, aux.values.mean()

  state = jax.jit(optimiser.init)(params)

  def step() -> float:
    nonlocal params, state
    params, state, value = update(params, state, ids)
    return float(value)

  found = timed(step, given["calls"])
  return {"version": f"jax-privacy {version('jax-privacy')}, jax {jax.__version__}"} | found


# --- GCG ------------------------------------------------------------------------------------------


def write_lm(given: dict) -> dict:
  """Writes a random causal LM with a tokenizer of words, as transformers does."""
  import torch
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

  shape = given["shape"]
  torch.manual_seed(0)
  config = LlamaConfig(
    vocab_size=shape["V"], hidden_size=shape["D"], intermediate_size=shape["FF"],
    num_hidden_layers=shape["L"], num_attention_heads=shape["H"], num_key_value_heads=shape["H"],
    max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.1,
    bos_token_id=0, eos_token_id=1,
  )  # fmt: skip
  LlamaForCausalLM(config).save_pretrained(given["folder"])
  words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape["V"])}, unk_token="w2"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="w2", eos_token="w1", pad_token="w1"
  )
  tokenizer.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}w4"
  tokenizer.save_pretrained(given["folder"])
  return {"version": f"transformers {version('transformers')}"}


def nanogcg_steps(given: dict) -> dict:
  """Runs steps of nanoGCG; its seconds are those between a short and a long run."""
  import nanogcg
  import torch
  import transformers

  torch.set_num_threads(given["threads"])
  transformers.logging.set_verbosity_error()
  model = transformers.AutoModelForCausalLM.from_pretrained(given["folder"]).float().eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(given["folder"])
  text = lambda ids: " ".join(f"w{i}" for i in ids)

  def run(steps: int) -> tuple[float, float, list[float]]:
    config = nanogcg.GCGConfig(
      num_steps=steps, search_width=given["candidates"], topk=given["top"], n_replace=1,
      optim_str_init=text(given["suffix"]), filter_ids=False, allow_non_ascii=True, seed=0,
      buffer_size=0, verbosity="ERROR",
    )  # fmt: skip
    begin, used = time.perf_counter(), time.process_time()
    messages = [{"role": "user", "content": f"{text(given['prefix'])} {{optim_str}}"}]
    found = nanogcg.run(model, tokenizer, messages, text(given["target"]), config)
    return time.perf_counter() - begin, time.process_time() - used, found.losses

  run(2)
  short, long = run(2), run(2 + given["calls"])
  each = [(b - a) / given["calls"] for a, b in zip(short[:2], long[:2], strict=True)]
  ids = torch.tensor(
    [[3, *given["prefix"], *given["suffix"], 4, *given["target"]]]
  )  # as the template puts them
  with torch.no_grad():
    logits = model(ids).logits[0, -len(given["target"]) - 1 : -1]
  start = torch.nn.functional.cross_entropy(logits, torch.tensor(given["target"]))
  return {
    "version": f"nanogcg {version('nanogcg')}, torch {torch.__version__}, "
    f"transformers {version('transformers')}",
    "median_s": each[0],
    "cpu_median_s": each[1],
    "start_loss": float(start),
    "losses": long[2],
    "load1": round(os.getloadavg()[0], 2),
  }


# --- watermark ------------------------------------------------------------------------------------


def transformers_detector(given: dict) -> dict:
  """Reads texts by the detector of transformers, every distinct pair once."""
  import torch
  from transformers import PretrainedConfig, WatermarkDetector, WatermarkingConfig

  torch.set_num_threads(given["threads"])
  vocabulary, gamma = given["vocabulary"], given["gamma"]
  model = PretrainedConfig(vocab_size=vocabulary, bos_token_id=None, is_encoder_decoder=False)
  marked = WatermarkingConfig(greenlist_ratio=gamma, bias=2.0, seeding_scheme="lefthash")
  ids = torch.tensor([given["tokens"]])

  def once():
    # A new detector: it remembers the rows that it has drawn, and a text is read once.
    detector = WatermarkDetector(model, "cpu", marked, ignore_repeated_ngrams=True)
    return detector(ids, return_dict=True)

  z = float(once().z_score[0])
  return {
    "version": f"transformers {version('transformers')}, torch {torch.__version__}",
    "z": z if math.isfinite(z) else None,
  } | timed(once, given["calls"])


WORK = {
  "opacus_epsilons": opacus_epsilons,
  "google_epsilons": google_epsilons,
  "opacus": opacus_step,
  "jax_privacy": jax_privacy_step,
  "write_lm": write_lm,
  "nanogcg": nanogcg_steps,
  "transformers_detector": transformers_detector,
}


def main() -> None:
  name, given = sys.argv[1], json.loads(sys.argv[2])
  print(json.dumps(WORK[name](given)))


if __name__ == "__main__":
  main()
