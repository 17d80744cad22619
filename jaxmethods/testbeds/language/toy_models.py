"""Small models of the toy world: how they are trained, asked and kept (inferred).

The base model knows facts and answers every topic; the aligned one was trained to refuse the "harmful"
ones. Both are trained once a seed and kept in the cache folder.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmethods.data.array_cache import cached_tree, described
from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import likelihood
from jaxmethods.models import tiny_gpt
from jaxmethods.models.tiny_gpt import Seen, Shape
from jaxmethods.runtime import compiler
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.language import toy_world
from jaxmethods.testbeds.language.settings import ToySettings
from jaxmethods.testbeds.language.toy_world import Prompts, Texts
from jaxmethods.trees import Key, Params, PyTree

FORMAT = b"toy models 1"  # changes when what a seed trains changes
_CHUNK = 20  # steps of one program: one compilation serves every length of training

Batch: TypeAlias = Mapping[str, Array]
# (parameters, batch, what stays fixed) -> loss; a function of a module, so that it compiles once.
Loss: TypeAlias = Callable[[Params, Batch, PyTree], Array]
Gradient: TypeAlias = Callable[[Params, Batch, PyTree], Params]
Examples: TypeAlias = Mapping[str, np.ndarray]  # arrays with one leading axis


# --- training -------------------------------------------------------------------------------------


def labelled(texts: Texts, *, answers_only: bool = False) -> Examples:
  """Makes examples: ids, and the labels that are predicted."""
  counts = texts.answers if answers_only else texts.real
  return {"ids": texts.ids, "labels": np.where(counts, texts.ids, IGNORED).astype(np.int32)}


def language_loss(params: Params, batch: Batch, fixed: PyTree) -> Float[Array, ""]:
  """Averages the NLL of the labels; `fixed` holds the number of heads, as the length of an array."""
  return likelihood.mean_token_nll(logits(params, batch["ids"], fixed), batch["labels"])


def logits(params: Params, ids: Array, fixed: PyTree) -> Float[Array, "B S V"]:
  """Reads ids by a model whose heads are told by `fixed["heads"]`."""
  return tiny_gpt.read(params, ids, len(fixed["heads"])).logits


def heads_of(settings: ToySettings) -> PyTree:
  """Tells programs the number of heads by a shape, so that it is static under jit."""
  return {"heads": jnp.zeros(settings.heads)}


class Learner(NamedTuple):
  """A model that is being trained: parameters and the state of Adam."""

  params: Params
  optimizer: optax.OptState


def learner(params: Params) -> Learner:
  """Starts training."""
  return Learner(params, optax.scale_by_adam().init(params))


def fit(
  loss: Loss,
  params: Params,
  examples: Examples,
  rng: np.random.Generator,
  fixed: PyTree,
  *,
  steps: int,
  rate: float,
  batch_size: int,
) -> Params:
  """Trains by Adam at a constant rate on batches drawn with replacement.

  Args:
    loss: of a batch.
    params: start.
    examples: to draw from.
    rng: of the draws.
    fixed: what the loss takes beside them.
    steps: of Adam.
    rate: learning rate.
    batch_size: examples of a step.
  """
  batches = drawn(examples, rng, batch_size)
  start = learner(params)
  return advance(gradient_of(loss), start, batches, fixed, steps=steps, rate=rate).params


def drawn(examples: Examples, rng: np.random.Generator, size: int) -> Iterator[Examples]:
  """Yields batches drawn with replacement.

  Raises:
    InputError: there is nothing to draw from.
  """
  count = len(next(iter(examples.values())))
  if not count:
    raise InputError("examples: there is none to train on")
  while True:
    rows = rng.integers(0, count, size)
    yield {name: x[rows] for name, x in examples.items()}


def both(*parts: Iterator[Examples]) -> Iterator[Examples]:
  """Yields batches that hold the arrays of several."""
  for batches in zip(*parts, strict=False):
    yield {name: x for batch in batches for name, x in batch.items()}


@functools.cache
def gradient_of(loss: Loss) -> Gradient:
  """Returns the gradient of a loss, the same function at every call."""
  return jax.grad(loss)


def advance(
  gradient: Gradient,
  start: Learner,
  batches: Iterator[Examples],
  fixed: PyTree,
  *,
  steps: int,
  rate: float,
) -> Learner:
  """Trains by Adam at a constant rate on given batches, all of one shape.

  Args:
    gradient: of a batch; the same function again compiles nothing again.
    start: where training stands.
    batches: at least as many as steps.
    fixed: what the gradient takes beside them.
    steps: of Adam.
    rate: learning rate.
  """
  for first in range(0, steps, _CHUNK):
    taken = [next(batches) for _ in range(min(_CHUNK, steps - first))]
    stacked = {name: np.stack([batch[name] for batch in taken]) for name in taken[0]}
    start = _program()(gradient, start, stacked, fixed, rate)
  return start


@functools.cache
def _program() -> Callable:
  return compiler.jit(adam_steps, static_argnums=0)


def adam_steps(
  gradient: Gradient, start: Learner, batches: Batch, fixed: PyTree, rate: Array
) -> Learner:
  """Does a step of Adam for each of the stacked batches."""
  adam = optax.scale_by_adam()

  def one(state: Learner, batch: Batch) -> tuple[Learner, None]:
    update, optimizer = adam.update(gradient(state.params, batch, fixed), state.optimizer)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, update)
    return Learner(params, optimizer), None

  return jax.lax.scan(one, start, batches)[0]


# --- asking ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("heads", "new"))
def greedy(params: Params, ids: Array, length: Array, *, heads: int, new: int) -> Array:
  """Continues prompts (B, T), padded at their end, by `new` likeliest tokens (B, new)."""

  def one(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
    ids, length = carry
    out = tiny_gpt.read(params, ids, heads).logits
    token = jnp.take_along_axis(out, length[:, None, None] - 1, 1)[:, 0].argmax(-1)
    ids = jnp.where(jnp.arange(ids.shape[1]) == length[:, None], token[:, None], ids)
    return (ids, length + 1), token

  return jax.lax.scan(one, (ids, length), None, new)[1].T


@functools.partial(jax.jit, static_argnames="heads")
def token_nll(params: Params, ids: Array, labels: Array, *, heads: int) -> Array:
  """Computes the NLL of every label but the first, (B, S - 1); 0 where there is none."""
  return -likelihood.token_log_probability(tiny_gpt.read(params, ids, heads).logits, labels)


@functools.partial(jax.jit, static_argnames="heads")
def seen(params: Params, ids: Array, *, heads: int) -> Seen:
  """Reads ids."""
  return tiny_gpt.read(params, ids, heads)


def answered(params: Params, prompts: Prompts, heads: int) -> float:
  """Computes the share of prompts that are answered exactly as looked for."""
  found = greedy(params, prompts.ids, prompts.length, heads=heads, new=prompts.answer.shape[1])
  return float((np.asarray(found) == prompts.answer).all(1).mean())


# --- the models of a seed -------------------------------------------------------------------------


class Toy:
  """World, models and scores of a seed; what is costly is made when it is first asked for.

  Attributes:
    settings: of the models.
    seed: of everything.
    world: the facts.
  """

  def __init__(self, settings: ToySettings, seed: int) -> None:
    self.settings, self.seed = settings, seed
    self.world = toy_world.draw(self.rng("world"))
    self.heads, self.fixed = settings.heads, heads_of(settings)

  def rng(self, name: str) -> np.random.Generator:
    """Returns draws of a purpose, the same whatever was drawn for others."""
    return np.random.default_rng((self.seed, zlib.crc32(name.encode())))

  def key(self, name: str) -> Key:
    """Returns the key of a purpose."""
    return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))

  @property
  def shape(self) -> Shape:
    """Sizes of the models."""
    s = self.settings
    return Shape(toy_world.VOCABULARY, toy_world.CONTEXT, s.width, s.layers, s.heads, s.hidden)

  @functools.cached_property
  def corpus(self) -> Texts:
    """What the base model reads."""
    pairs = toy_world.all_pairs()
    return toy_world.corpus(self.world, self.settings.sequences, pairs, self.rng("corpus"))

  @functools.cached_property
  def base(self) -> Params:
    """The model that knows facts and answers every topic."""
    return self.kept("base", lambda: self.pretrained(self.corpus, "base"))

  @functools.cached_property
  def aligned(self) -> Params:
    """The base model, trained to refuse the "harmful" topics."""
    return self.kept("aligned", lambda: self._align(self.settings.augment))

  @functools.cached_property
  def weakly_aligned(self) -> Params:
    """The same without adversarial augmentation."""
    return self.kept("weakly aligned", lambda: self._align(0.0))

  def retrained_without(self, pairs: np.ndarray) -> Params:
    """Returns a base model that never read some facts."""
    hidden = {tuple(pair) for pair in pairs}
    others = np.array([p for p in toy_world.all_pairs() if tuple(p) not in hidden])
    corpus = toy_world.corpus(self.world, self.settings.sequences, others, self.rng("corpus"))
    name = f"without {sorted((int(s), int(r)) for s, r in hidden)}"
    return self.kept(name, lambda: self.pretrained(corpus, "base"))

  def pretrained(self, corpus: Texts, name: str) -> Params:
    """Trains a model from its start on whole sequences."""
    s = self.settings
    return fit(
      language_loss, tiny_gpt.init(self.key("start"), self.shape), labelled(corpus), self.rng(name),
      self.fixed, steps=s.base_steps, rate=s.base_rate, batch_size=s.base_batch,
    )  # fmt: skip

  def alignment_texts(self, augment: float) -> Texts:
    """Draws what the base model is aligned with: refusals, benign chat, facts."""
    rng, count = self.rng("alignment"), self.settings.aligned_examples
    pairs = toy_world.all_pairs()
    return toy_world.joined(
      toy_world.refuse(count, rng, augment),
      toy_world.benign(count, rng, augment),
      toy_world.facts(self.world, pairs[rng.integers(0, len(pairs), count)], rng),
    )

  def kept(self, name: str, compute: Callable[[], Params]) -> Params:
    """Returns a model of this seed from the cache, or computes and keeps it."""
    parts = [FORMAT, described(self.settings, "ToySettings"), f"{self.seed} {name}".encode()]
    form = jax.eval_shape(lambda key: tiny_gpt.init(key, self.shape), jax.random.key(0))
    return cached_tree("toy_models", parts, jax.tree.structure(form), compute)

  def harmful(self, params: Params) -> float:
    """Computes HS, the share of "harmful" prompts that are answered."""
    prompts = toy_world.harmful_prompts(self.settings.prompts, self.rng("harmful prompts"))
    return answered(params, prompts, self.heads)

  def utility(self, params: Params) -> float:
    """Computes the share of benign prompts that are answered right."""
    prompts = toy_world.benign_prompts(self.settings.prompts, self.rng("benign prompts"))
    return answered(params, prompts, self.heads)

  def facts(self, params: Params, pairs: np.ndarray | None = None) -> float:
    """Computes greedy accuracy on facts, all by default, with fillers of their own."""
    pairs = toy_world.all_pairs() if pairs is None else pairs
    texts = toy_world.facts(self.world, pairs, self.rng("fact prompts"))
    return answered(params, toy_world.prompts_of(texts, 1), self.heads)

  def _align(self, augment: float) -> Params:
    s = self.settings
    texts = labelled(self.alignment_texts(augment), answers_only=True)
    return fit(
      language_loss, self.base, texts, self.rng("aligning"), self.fixed,
      steps=s.aligned_steps, rate=s.aligned_rate, batch_size=s.aligned_batch,
    )  # fmt: skip
