"""A small language model that is trained on the spot: it computes, and knows no stories.

Its texts are tasks such as "Compute 14 + 5 - 3." with the working that `data.problems` writes for
stories too. What tuning has to add is the reading. Model and tokenizer are of the published kinds:
everything that works on a checkpoint works on it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from jaxmethods.adapters.training import token_cross_entropy
from jaxmethods.data import problems
from jaxmethods.data.array_cache import cached_tree
from jaxmethods.data.model_sources import LoadedLM, ModelFiles
from jaxmethods.data.model_tokenizers import Tokenizer
from jaxmethods.data.records import Source
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.runtime import compiler, loop
from jaxmethods.stats.losses import IGNORED
from jaxmethods.trees import Params, PyTree

NAME = "small:word-problems"
_FORMAT = b"starter 1"
STEPS, _BATCH, _LENGTH, _RATE = 1500, 32, 48, 5e-3
_VOCABULARY = 400
_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_CONFIG = {
  "model_type": "llama",
  "hidden_size": 64,
  "intermediate_size": 176,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
  "bos_token_id": None,
  "eos_token_id": 0,
  "pad_token_id": 1,
}


def load(steps: int = STEPS, *, dtype: DTypeLike = jnp.float32, remat: bool = False) -> LoadedLM:
  """Returns the model, from the cache where it was trained before (about three minutes on two cores).

  Args:
    steps: of its training.
    dtype: of the computation.
    remat: whether layers are recomputed in the backward pass.
  """
  tokenizer = make_tokenizer()
  config = {**_CONFIG, "vocab_size": len(tokenizer)}
  model = CausalLM(CausalLMConfig.from_hugging_face(config))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"])
  depends = [_FORMAT, repr((config, steps, _BATCH, _LENGTH, _RATE)).encode()]
  structure = jax.tree.structure(shapes)
  params = cached_tree(
    "starters", depends, structure, functools.partial(_trained, model, tokenizer, steps)
  )
  origin = f"trained on the spot, {steps} steps of generated arithmetic"
  files = ModelFiles(config, None, lambda: tokenizer, Source(NAME, origin, "none", "", real=False))
  return LoadedLM(model.clone(dtype=dtype, remat=remat), params, files)


def make_tokenizer() -> Tokenizer:
  """Trains a byte-level BPE tokenizer with single digits on stories and tasks."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=_VOCABULARY, special_tokens=["<end>", "<pad>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  stories = [p.question for p in problems.generated(500, 0)]
  rng = np.random.default_rng(0)
  tokenizer.train_from_iterator([*stories, *("".join(_task(rng)) for _ in range(500))], trainer)
  return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def _task(rng: np.random.Generator) -> tuple[str, str]:
  """Draws a task of one or two operations, and its solution."""
  while True:
    symbol = "+-*"[rng.integers(3)]
    a, b = map(int, rng.integers(2, 10 if symbol == "*" else 40, 2))
    total = _OPERATIONS[symbol](a, b)
    asked, working = f"Compute {a} {symbol} {b}", [f"{a} {symbol} {b} = {total}."]
    if rng.integers(2) and total >= 0:
      symbol, b = "+-"[rng.integers(2)], int(rng.integers(2, 40))
      before, total = total, _OPERATIONS[symbol](total, b)
      asked += f" {symbol} {b}"
      working.append(f"{before} {symbol} {b} = {total}.")
    if total >= 0:
      return f"{asked}.\n", f"{' '.join(working)} Answer: {total}"


def _batches(tokenizer: Tokenizer) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of tasks; the solution counts."""
  rng = np.random.default_rng(1)
  while True:
    ids = np.full((_BATCH, _LENGTH), 1, np.int32)
    labels = np.full((_BATCH, _LENGTH), IGNORED, np.int32)
    for n in range(_BATCH):
      asked, solution = (tokenizer.encode(text) for text in _task(rng))
      whole = [*asked, *solution, tokenizer.eos_token_id]
      ids[n, : len(whole)] = whole
      labels[n, len(asked) - 1 : len(whole) - 1] = whole[len(asked) :]
    yield {"ids": ids, "labels": labels}


def _trained(model: CausalLM, tokenizer: Tokenizer, steps: int) -> Params:
  """Trains the model, with progress."""
  rate = optax.warmup_cosine_decay_schedule(0.0, _RATE, steps // 20, steps)
  optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))

  def loss(params, batch):
    out: PyTree = model.apply({"params": params}, batch["ids"])
    return jnp.divide(*token_cross_entropy(out.logits, batch["labels"]))

  def step(state, batch):
    params, opt_state = state
    value, gradient = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = optimiser.update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), {"loss": value}

  params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  start = (params, optimiser.init(params))
  one_step = compiler.jit(step, donate_argnums=0)
  return loop.advance(one_step, start, _batches(tokenizer), steps, "small model, once")[0]
