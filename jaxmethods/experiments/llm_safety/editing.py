"""Edits of single facts: ROME beside fine-tuning (stage 5 of the survey); all edits in one program."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmethods.errors import InputError
from jaxmethods.experiments.llm_safety.config import EditSettings
from jaxmethods.experiments.llm_safety.scores import Makers, Scores
from jaxmethods.methods.llm_safety import editing
from jaxmethods.models import tiny_gpt
from jaxmethods.models.tiny_gpt import Nudge
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.toy_models import Toy
from jaxmethods.trees import Params

Way = Literal["rome", "rome_bare", "rome_plain", "finetune", "finetune_near"]

_CORPUS = 500  # sequences that the second moment of keys is of
_PARAPHRASES, _NEIGHBOURS, _BENIGN = 3, 10, 32


class Orders(NamedTuple):
  """Edits: prompts (E, J, T), lookup tokens (E, J, T), new objects (E,), essence prompts (E, T)."""

  ids: jax.Array
  where: jax.Array
  target: jax.Array
  essence: jax.Array


class Questions(NamedTuple):
  """Questions for every edit: ids (E, P, T), place of the answer (P,) or (E, P), right answers.

  `part` tells what a question is for, (P,): 0 the edit, 1 in other words, 2 neighbours, 3 the subject's
  other relations, 4 benign prompts, two of each, for both tokens of the answer.
  """

  ids: jax.Array
  place: jax.Array
  answer: jax.Array
  part: jax.Array


class Editing:
  """Facts to edit of a seed, and the questions that are asked afterwards."""

  def __init__(self, toy: Toy, settings: EditSettings) -> None:
    if not settings.layer < toy.settings.layers:
      raise InputError(
        f"edit.layer: there are layers 0..{toy.settings.layers - 1}, got {settings.layer}"
      )
    self.toy, self.settings = toy, settings
    rng, facts = toy.rng("edits"), toy_world.all_pairs()
    drawn = rng.permutation(len(facts))[: settings.edits]
    self.pairs = np.array(settings.facts) if settings.facts else facts[drawn]
    try:
      toy_world.check_pairs(self.pairs)
    except InputError as error:
      raise InputError(f"edit.facts: {error}") from None
    known = [int(toy.world.objects[tuple(pair)]) for pair in self.pairs]
    others = [[o for o in toy_world.OBJECTS if o != k] for k in known]
    self.new = np.array([rng.choice(o) for o in others])
    self.orders = self._orders(rng)
    self.questions = self._questions(rng)

  def _orders(self, rng: np.random.Generator) -> Orders:
    ids, where, essence = [], [], []
    for pair in self.pairs:
      befores = [[], *(toy_world.fillers(rng, 3) for _ in range(self.settings.contexts - 1))]
      starts = [toy_world.fact_prompt(pair, before) for before in befores]
      ids.append(toy_world.pack(starts, [len(s) for s in starts], toy_world.FACT).ids)
      where.append(np.arange(toy_world.CONTEXT) == np.array([[len(s) - 1] for s in starts]))
      short = [toy_world.BOS, toy_world.RELATIONS[pair[1]]]
      essence.append(toy_world.pack([short], [2], toy_world.FACT).ids[0])
    made = (np.array(ids), np.array(where), self.new.astype(np.int32), np.array(essence))
    return Orders(*map(jnp.asarray, made))

  def _questions(self, rng: np.random.Generator) -> Questions:
    world, every = self.toy.world, list[tuple[np.ndarray, ...]]()
    benign = toy_world.benign_prompts(_BENIGN, self.toy.rng("edit benign"))
    for (s, r), new in zip(self.pairs, self.new, strict=True):
      others = rng.permutation([x for x in range(len(toy_world.SUBJECTS)) if x != s])[:_NEIGHBOURS]
      asked: list[tuple] = [((s, r), [], new, 0)]
      asked += [((s, r), toy_world.fillers(rng, 3), new, 1) for _ in range(_PARAPHRASES)]
      asked += [((n, r), [], world.objects[n, r], 2) for n in others]
      rest = [x for x in range(len(toy_world.RELATIONS)) if x != r]
      asked += [((s, x), [], world.objects[s, x], 3) for x in rest]
      starts = [toy_world.fact_prompt(pair, before) for pair, before, _, _ in asked]
      ids = toy_world.pack(starts, [len(x) for x in starts], toy_world.FACT)
      said = benign.ids.copy()
      said[np.arange(_BENIGN), benign.length] = benign.answer[:, 0]
      every.append(
        (
          np.concatenate([ids.ids, benign.ids, said]),
          np.concatenate([ids.length - 1, benign.length - 1, benign.length]),
          np.concatenate([[x[2] for x in asked], benign.answer[:, 0], benign.answer[:, 1]]),
          np.concatenate([[x[3] for x in asked], np.full(2 * _BENIGN, 4)]),
        )
      )
    return Questions(*(jnp.asarray(np.stack(x)) for x in zip(*every, strict=True)))

  @functools.cached_property
  def moment(self) -> jax.Array:
    """The second moment of the keys of real tokens."""
    texts = self.toy.corpus.take(np.arange(min(_CORPUS, len(self.toy.corpus.ids))))
    keys = toy_models.seen(self.toy.base, texts.ids, heads=self.toy.heads).keys
    found = np.asarray(keys[self.settings.layer])[texts.real]
    return editing.second_moment(jnp.asarray(found), damping=self.settings.damping)

  def scores(self, way: Way) -> Scores:
    """Writes every fact into the base model, each alone, and asks."""
    toy = self.toy
    weights = _edited(
      toy.base, self.orders, self.moment, heads=toy.heads, way=way, settings=self.settings
    )
    right = np.asarray(_right(toy.base, weights, self.questions, toy.heads, self.settings.layer))
    part = np.asarray(self.questions.part[0])
    share = lambda k: float(right[:, part == k].mean())
    # Both tokens of a benign answer must be right.
    both = right[:, part == 4].reshape(len(right), 2, -1).all(1)
    success, paraphrase, neighbours = share(0), share(1), share(2)
    score = editing.score(*map(jnp.float32, (success, paraphrase, neighbours)))
    extras = {
      "paraphrase": paraphrase,
      "neighbourhood": neighbours,
      "other_relations": share(3),
      "score": float(score),
    }
    return Scores(success, float(both.mean()), extras)


@functools.partial(jax.jit, static_argnames=("heads", "way", "settings"))
def _edited(
  params: Params, orders: Orders, moment: jax.Array, *, heads: int, way: Way, settings: EditSettings
) -> jax.Array:
  """Returns the changed matrix of every edit, (E, F, D)."""
  one = _tuned if way.startswith("finetune") else _rome
  return jax.vmap(lambda order: one(params, order, moment, heads, way, settings))(
    jax.tree.map(jnp.asarray, orders)
  )


def _rome(
  params: Params, order: Orders, moment: jax.Array, heads: int, way: Way, settings: EditSettings
) -> jax.Array:
  layer = settings.layer
  weight, bias = params[f"{layer}.w2"], params[f"{layer}.b2"]
  before = tiny_gpt.read(params, order.ids, heads)
  at = lambda x: (x * order.where[..., None]).sum(1)  # of the lookup tokens
  keys, values = at(before.keys[layer]), at(before.values[layer])
  found = editing.find_value(
    functools.partial(_objective, params, order, values[0], heads, settings),
    values[0],
    learning_rate=settings.rate,
    steps=settings.steps,
    factor=settings.factor,
  )
  if way == "rome_plain":
    moment = jnp.eye(len(moment))
  bare = keys[0] if way == "rome_bare" else None
  return editing.edit(weight, bias, moment, keys.mean(0), found, bare_key=bare)


def _objective(
  params: Params,
  order: Orders,
  value: jax.Array,
  heads: int,
  settings: EditSettings,
  change: jax.Array,
) -> jax.Array:
  """Computes the loss of a change of the value."""
  now = tiny_gpt.read(params, order.ids, heads, Nudge(settings.layer, order.where, change)).logits
  log_p = (jax.nn.log_softmax(now) * order.where[..., None]).sum(1)[:, order.target]
  place = jnp.arange(len(order.essence)) == 1  # BOS r: the relation
  short = lambda nudge: jax.nn.log_softmax(
    tiny_gpt.read(params, order.essence[None], heads, nudge).logits[0, 1]
  )
  there = Nudge(settings.layer, place[None], change)
  return editing.value_objective(
    log_p, short(None), short(there), change, value, kl_weight=settings.kl, decay=settings.decay
  )


def _tuned(
  params: Params, order: Orders, moment: jax.Array, heads: int, way: Way, settings: EditSettings
) -> jax.Array:
  """Fine-tunes the same matrix on the same prompts; `finetune_near` bounds the change of a weight."""
  del moment
  name = f"{settings.layer}.w2"
  bound = settings.near if way == "finetune_near" else jnp.inf
  adam = optax.adam(settings.tune_rate)

  def loss(weight: jax.Array) -> jax.Array:
    out = tiny_gpt.read(dict(params) | {name: weight}, order.ids, heads).logits
    return -(jax.nn.log_softmax(out) * order.where[..., None]).sum(1)[:, order.target].mean()

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    weight, state = carry
    update, state = adam.update(jax.grad(loss)(weight), state)
    change = jnp.clip(weight + update - params[name], -bound, bound)
    return (params[name] + change, state), None

  start = params[name], adam.init(params[name])
  return jax.lax.scan(step, start, None, settings.tune_steps)[0][0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _right(
  params: Params, weights: jax.Array, questions: Questions, heads: int, layer: int
) -> jax.Array:
  """Tells which questions every edited model answers right, (E, P)."""

  def one(weight: jax.Array, asked: Questions) -> jax.Array:
    out = tiny_gpt.read(dict(params) | {f"{layer}.w2": weight}, asked.ids, heads).logits
    said = jnp.take_along_axis(out, asked.place[:, None, None], 1)[:, 0].argmax(-1)
    return said == asked.answer

  return jax.vmap(one)(weights, jax.tree.map(jnp.asarray, questions))


def makers(toy: Toy, settings: EditSettings) -> Makers:
  """Returns the rows.

  Raises:
    InputError: a fact that the world does not have, or a layer that the model does not have.
  """
  stage = Editing(toy, settings)
  ways: tuple[Way, ...] = ("finetune", "finetune_near", "rome_plain", "rome_bare", "rome")
  return {way: functools.partial(stage.scores, way) for way in ways}
