"""Clients that hold texts, and a causal LM of which they train low-rank factors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.data import text_examples
from jaxmethods.data.model_sources import LoadedLM, load_causal_lm
from jaxmethods.data.records import sealed
from jaxmethods.data.text_examples import Example
from jaxmethods.errors import InputError
from jaxmethods.experiments.federated import holdings
from jaxmethods.experiments.federated.holdings import Deal, Holdings, Pool
from jaxmethods.experiments.federated.nets import Batch, Scores, Task
from jaxmethods.federated.algorithm import Metrics, Params
from jaxmethods.federated.algorithms import ModelState
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.language import starter, tokens, tuning
from jaxmethods.testbeds.language.settings import AdapterSettings
from jaxmethods.testbeds.language.tuners import way_of
from jaxmethods.trees import Key, PyTree
from jaxmethods.tuning.tuner import Run, Tuner, TunerState, text_loss

_TOKENS = "tokens"  # the mask of the tokens, since "mask" is that of the examples
_SPLITS = ("auto", "clients", "iid")


def load(
  model: str, tokenizer: str, data: str, deal: Deal, limit: int
) -> tuple[LoadedLM, Holdings]:
  """Opens the model, reads the texts and deals them out.

  Args:
    model: as of the method tuning.
    tokenizer: name of a small model's own tokenizer, "" for that of the model.
    data: jsonl:FILE, a text a line, with a field "client" or without.
    deal: how.
    limit: most tokens of a text; 0: the context.

  Raises:
    InputError: model or texts cannot be used.
  """
  small = model == starter.NAME
  loaded = starter.load() if small else load_causal_lm(model, key=jax.random.key(0))
  own = starter.make_tokenizer() if tokenizer == starter.NAME else loaded.files.tokenizer()
  speech = tuning.speech_of(model, loaded, own, "auto")
  limit = tuning.check_context(model, loaded.files.config, limit)
  read = text_examples.load(data, 0, 0, clients=True)
  rows = [tokens.row(speech, example) for example in read.examples]
  table = tokens.table(rows, read.examples, limit, packing=False)
  arrays = {_TOKENS if name == "mask" else name: x for name, x in table.arrays.items()}
  group, names = _groups(read.examples, data, deal.split)
  source = loaded.files.source
  about = (
    f"{sealed(model, source.digest, source.origin)}; {read.about}; {table.truncated} answers cut off "
    f"at {limit} tokens"
  )
  if deal.split not in _SPLITS:
    raise InputError(f"split: texts are dealt by {', '.join(_SPLITS)}, got {deal.split}")
  if len(names) == 1:
    deal = deal._replace(split="iid")
  pool = Pool(arrays, group, names, {}, 0, about)
  return loaded, holdings.deal_out(pool, deal, data)


def task(loaded: LoadedLM, adapter: str, rank: int, alpha: float) -> Task:
  """Makes the task of foretelling answers.

  Args:
    loaded: the model.
    adapter: a name of the tuners: "lora", "rslora", "dora" or "full".
    rank: of its factors.
    alpha: their scale times the rank.
  """
  settings = AdapterSettings(rank=rank, alpha=alpha)
  tuner = way_of(adapter, settings, loaded.model, 1).tuner
  start: TunerState = tuner.init(jax.random.key(0), loaded.params, {})
  empty = {name: part for name, part in start.trainable.items() if not jax.tree.leaves(part)}
  run = functools.partial(_run, tuner, loaded, empty)

  def init(key):
    parts = tuner.init(key, loaded.params, {}).trainable
    # The engine splits trees by their leaves: a part without any would get lost.
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}, ()

  loss = lambda fixed: functools.partial(_loss, run, fixed)
  scores = lambda fixed, params, model_state, batch: _scores(run(params, fixed), batch)
  fixed = (start.frozen, start.extra)
  return Task(init, fixed, loss, scores, None, None, 0, 0, "token_accuracy")


def _groups(examples: list[Example], data: str, split: str) -> tuple[np.ndarray, list[str]]:
  """Numbers the clients that the file names, in their order of appearance; one group without any."""
  names = list(dict.fromkeys(example.client for example in examples))
  if names == [""]:
    if split == "clients":
      raise InputError(f'split: {data} does not say who its clients are: a field "client" does')
    return np.zeros(len(examples), int), ["all"]
  if "" in names:
    where = next(example.where for example in examples if not example.client)
    raise InputError(f'{where}: has no "client", as other lines have')
  number = {name: k for k, name in enumerate(names)}
  said = [name if name.startswith(holdings.OWN) else holdings.OWN + name for name in names]
  return np.array([number[example.client] for example in examples]), said


def _run(tuner: Tuner, loaded: LoadedLM, empty: Params, params: Params, fixed: PyTree) -> Run:
  return functools.partial(tuner.apply, loaded.model, {**empty, **params}, *fixed)


def _loss(
  run: Callable[[Params, PyTree], Run], fixed: PyTree, params: Params, model_state: ModelState,
  batch: Batch, key: Key,
) -> tuple[jax.Array, tuple[ModelState, Metrics]]:  # fmt: skip
  """Mean cross-entropy of the tokens of answers."""
  del key  # no dropout
  total, count = text_loss(run(params, fixed), _counted(batch), None)
  return total / jnp.maximum(count, 1), (model_state, {})


def _counted(batch: Batch) -> Batch:
  """Renames the masks as the language model has them; padding examples have no labels."""
  labels = jnp.where(batch["mask"][:, None], batch["labels"], IGNORED)
  return {"ids": batch["ids"], "mask": batch[_TOKENS], "places": batch["places"], "labels": labels}


def _scores(run: Run, batch: Batch) -> Scores:
  """Counts the tokens of answers that are foretold right."""
  given = _counted(batch)
  hidden = run(given["ids"], logits="none", mask=given["mask"]).hidden
  chosen = jnp.take_along_axis(hidden, given["places"][..., None], axis=1)
  logits = run(chosen, method="logits").astype(jnp.float32)
  labels = given["labels"]
  counts = labels != IGNORED
  errors = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0))
  right = (logits.argmax(-1) == labels) & counts
  return Scores(right.sum(1), counts.sum(1), jnp.where(counts, errors, 0).sum(1))
