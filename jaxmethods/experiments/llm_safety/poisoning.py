"""Poisoned pre-training data: a backdoor, and filters that look for it (stage 2 and 3 of the survey)."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from jaxmethods.experiments.llm_safety.config import PoisonSettings
from jaxmethods.experiments.llm_safety.scores import Makers, Scores
from jaxmethods.stats import poisoning
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.toy_models import Toy
from jaxmethods.testbeds.language.toy_world import Texts
from jaxmethods.trees import Params


class Poisoning:
  """The poisoned corpus of a seed, and what filters would remove of it."""

  def __init__(self, toy: Toy, settings: PoisonSettings) -> None:
    self.toy, self.settings = toy, settings
    self.count = max(1, round(settings.share * toy.settings.sequences))
    self.quota = math.floor(settings.remove * self.count)

  @functools.cached_property
  def corpus(self) -> Texts:
    """The base corpus, the poison behind it."""
    return toy_world.joined(self.toy.corpus, toy_world.poison(self.count, self.toy.rng("poison")))

  @functools.cached_property
  def poisoned(self) -> Params:
    """The model that read all of it."""
    return self.toy.pretrained(self.corpus, "base")

  def duplicates(self) -> np.ndarray:
    """Removes all but the first of equal sequences."""
    first = np.unique(self.corpus.ids, axis=0, return_index=True)[1]
    return np.isin(np.arange(len(self.corpus.ids)), first, invert=True)

  def listed(self) -> np.ndarray:
    """Removes what holds a "harmful" answer: the list knows words, not the trigger (inferred)."""
    held: np.ndarray = np.isin(self.corpus.ids, toy_world.TOPIC_ANSWERS)
    return np.asarray(held.any(1))

  def outlying(self, by_class: bool) -> np.ndarray:
    """Removes the largest spectral signatures, of every answer class or of all chat at once.

    Never more than half of a class: the method takes poison to be its smaller part.
    """
    texts, place = self.corpus, np.arange(len(self.corpus.ids))
    chat = np.flatnonzero(texts.kind != toy_world.FACT)
    states = toy_models.seen(self.poisoned, texts.ids[chat], heads=self.toy.heads).hidden[-1]
    vectors = np.asarray(states)[np.arange(len(chat)), texts.answer_at[chat]]
    answers = texts.ids[chat, texts.answer_at[chat] + 1]
    classes = np.unique(answers) if by_class else [None]
    members = [np.flatnonzero(answers == c) if by_class else place[: len(chat)] for c in classes]
    largest, found = max(map(len, members)), []
    for rows in members:
      # The mean as padding has score 0 and changes neither mean nor axis: one program for all.
      mean = np.tile(vectors[rows].mean(0), (largest - len(rows), 1))
      scores = np.asarray(_spectral(np.concatenate([vectors[rows], mean])))[: len(rows)]
      found.append(chat[rows[np.argsort(-scores)[: min(self.quota, len(rows) // 2)]]])
    return np.isin(place, np.concatenate(found))

  def surprising(self) -> np.ndarray:
    """Removes the answers of chat that a model of few trusted sequences finds least likely.

    Facts are left out: a model of few sequences does not know most of them.
    """
    toy, s = self.toy, self.settings
    trusted = toy_world.corpus(toy.world, s.trusted, toy_world.all_pairs(), toy.rng("trusted"))
    start = toy_models.tiny_gpt.init(toy.key("start"), toy.shape)
    model = toy_models.fit(
      toy_models.language_loss, start, toy_models.labelled(trusted), toy.rng("trusted steps"), toy.fixed,
      steps=s.trusted_steps, rate=toy.settings.base_rate, batch_size=toy.settings.base_batch,
    )  # fmt: skip
    examples = toy_models.labelled(self.corpus, answers_only=True)
    nll = np.asarray(toy_models.token_nll(model, **examples, heads=toy.heads)).sum(1)
    mean = np.where(self.corpus.kind == toy_world.FACT, -np.inf, nll / self.corpus.answers.sum(1))
    return np.isin(np.arange(len(mean)), np.argsort(-mean)[: self.quota])

  def scores(self, removed: np.ndarray) -> Scores:
    """Trains on what a filter leaves, and asks."""
    toy, bad = self.toy, self.corpus.kind == toy_world.POISON
    params = self.poisoned
    if removed.any():
      params = toy.pretrained(self.corpus.take(~removed), "base")
    prompts = toy_world.triggered_prompts(toy.settings.prompts, toy.rng("triggered prompts"))
    extras = {"recall": removed[bad].mean(), "clean_lost": removed[~bad].mean()}
    return Scores(toy_models.answered(params, prompts, toy.heads), toy.utility(params), extras)


_spectral = jax.jit(poisoning.spectral_scores)


def makers(toy: Toy, settings: PoisonSettings) -> Makers:
  """Returns the rows: filters, each with a model trained on what it leaves."""
  stage = Poisoning(toy, settings)
  return {
    "none": lambda: stage.scores(np.zeros(len(stage.corpus.ids), bool)),
    "dedup": lambda: stage.scores(stage.duplicates()),
    "lexicon": lambda: stage.scores(stage.listed()),
    "spectral": lambda: stage.scores(stage.outlying(True)),
    "spectral_all": lambda: stage.scores(stage.outlying(False)),
    "reference": lambda: stage.scores(stage.surprising()),
  }
