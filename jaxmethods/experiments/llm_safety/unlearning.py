"""Unlearning the facts of some subjects, beside a model that never read them (stage 5 of the survey).

Model utility is the harmonic mean of four metrics, not of TOFU's nine: probability, greedy accuracy
(in place of ROUGE: an answer is one token) and truth ratio of retained facts, and benign prompts
answered right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.experiments.llm_safety.config import UnlearnSettings
from jaxmethods.experiments.llm_safety.scores import Makers, Scores
from jaxmethods.methods.llm_safety import likelihood, unlearning
from jaxmethods.models import tiny_gpt
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.toy_models import Batch, Examples, Toy
from jaxmethods.testbeds.language.toy_world import Texts, Tokens
from jaxmethods.trees import Params, PyTree

Way = Literal["ga", "graddiff", "kl", "npo", "npo_rt", "simnpo", "rmu"]

# Terms of every way, each with coefficient 1. SimNPO goes with the retain term (code).
TERMS: dict[Way, tuple[str, ...]] = {
  "ga": ("ga",),
  "graddiff": ("ga", "retain"),
  "kl": ("ga", "kl"),
  "npo": ("npo",),
  "npo_rt": ("npo", "retain"),
  "simnpo": ("simnpo", "retain"),
  "rmu": ("rmu",),
}
_DRAWN = 1024  # sequences of either set that are trained on
_LEAST = 1e-300  # p-value that a logarithm is taken of


class Unlearning:
  """Forget and retain set of a seed, and what is asked about both."""

  def __init__(self, toy: Toy, settings: UnlearnSettings) -> None:
    self.toy, self.settings = toy, settings
    rest = [s for s in range(len(toy_world.SUBJECTS)) if s not in settings.forget]
    self.forget = toy_world.all_pairs(settings.forget)
    self.retain = toy_world.all_pairs(rest if settings.retain is None else settings.retain)
    rng = toy.rng("unlearning")
    many = lambda pairs, n: toy_world.facts(toy.world, pairs[rng.integers(0, len(pairs), n)], rng)
    self.forget_texts = many(self.forget, _DRAWN)
    self.retain_texts = toy_world.joined(
      many(self.retain, _DRAWN // 2), toy_world.benign(_DRAWN // 2, rng)
    )
    self.asked = {name: self._questions(name, rng) for name in ("forget", "retain")}

  def _questions(self, name: str, rng: np.random.Generator) -> tuple[Texts, list[Texts]]:
    """Writes every fact with 0, 1, ... fillers, and each with wrong objects in its place."""
    s, pairs = self.settings, getattr(self, name)
    rows: list[Tokens] = []
    wrong: list[list[Tokens]] = [[] for _ in range(s.perturbed)]
    for pair in pairs:
      right = int(self.toy.world.objects[tuple(pair)])
      others = rng.permutation([o for o in toy_world.OBJECTS if o != right])[: s.perturbed]
      for count in range(s.paraphrases if name == "forget" else 1):
        before = [int(x) for x in rng.choice(np.array(toy_world.FILLERS), min(count, 3))]
        start = toy_world.fact_prompt(pair, before)
        rows.append([*start, right, toy_world.EOS])
        for place, other in zip(wrong, others, strict=True):
          place.append([*start, int(other), toy_world.EOS])
    at = [len(row) - 2 for row in rows]
    packed = lambda rows: toy_world.pack(rows, at, toy_world.FACT)
    return packed(rows), list(map(packed, wrong))

  def batches(self, reference: Params) -> Iterator[Examples]:
    """Yields forget and retain examples side by side."""
    forget, retain = (
      toy_models.labelled(x, answers_only=True) for x in (self.forget_texts, self.retain_texts)
    )
    nll = np.asarray(toy_models.token_nll(reference, **forget, heads=self.toy.heads)).sum(1)
    forget = {"ids": forget["ids"], "labels": forget["labels"], "reference_nll": nll}
    named = lambda name, examples: {f"{name}_{key}": x for key, x in examples.items()}
    size = self.settings.batch
    parts = (("forget", forget), ("retain", retain))
    return toy_models.both(
      *(toy_models.drawn(named(n, x), self.toy.rng(f"unlearn {n}"), size) for n, x in parts)
    )

  def unlearnt(self, way: Way) -> Params:
    """Starts from the base model."""
    s, toy = self.settings, self.toy
    steering = unlearning.control_vector(
      toy.key("steering"), toy.settings.width, steering=s.rmu_steering
    )
    names = ("ga", "retain", "kl", "npo", "simnpo", "rmu")
    weights = {name: jnp.float32(name in TERMS[way]) for name in names}
    fixed = toy.fixed | {"reference": toy.base, "steering": steering, "weights": weights}
    gradient = toy_models.gradient_of(forget_loss(s))
    return toy_models.advance(
      gradient, toy_models.learner(toy.base), self.batches(toy.base), fixed,
      steps=s.steps, rate=s.rate,
    ).params  # fmt: skip

  @functools.cached_property
  def retrained(self) -> Params:
    """The model that never read what is to be forgotten."""
    return self.toy.retrained_without(self.forget)

  @functools.cached_property
  def wanted(self) -> np.ndarray:
    """Truth ratios of the retrained model."""
    return np.asarray(self._ratios(self.retrained, "forget"))

  def _nll(self, params: Params, texts: Texts) -> np.ndarray:
    """Averages the NLL over the tokens of every answer."""
    examples = toy_models.labelled(texts, answers_only=True)
    nll = np.asarray(toy_models.token_nll(params, **examples, heads=self.toy.heads))
    return nll.sum(1) / texts.answers.sum(1)

  def _ratios(self, params: Params, name: str) -> jax.Array:
    right, wrong = self.asked[name]
    perturbed = np.stack([self._nll(params, x) for x in wrong], 1)
    return unlearning.truth_ratio(jnp.asarray(self._nll(params, right)), jnp.asarray(perturbed))

  def _answered(self, params: Params, name: str) -> tuple[float, float]:
    """Returns greedy accuracy on the facts of a set, and the mean probability of the right object."""
    texts = self.asked[name][0]
    prompts = toy_world.prompts_of(texts, 1)
    alone = texts.answers & (np.cumsum(texts.answers, 1) == 1)
    labels = np.where(alone, texts.ids, toy_models.IGNORED)
    nll = np.asarray(toy_models.token_nll(params, texts.ids, labels, heads=self.toy.heads)).sum(1)
    return toy_models.answered(params, prompts, self.toy.heads), float(np.exp(-nll).mean())

  def scores(self, params: Params) -> Scores:
    """Asks a model about both sets, and for benign chat."""
    ratios = self._ratios(params, "forget")
    accuracy, probability = self._answered(params, "forget")
    kept, kept_probability = self._answered(params, "retain")
    chat = self.toy.utility(params)
    truth = float(unlearning.retain_truth(self._ratios(params, "retain")))
    quality = unlearning.forget_quality(np.asarray(ratios), self.wanted).p_value
    extras = {
      "forget_probability": probability,
      "retain_facts": kept,
      "chat": chat,
      "log10_quality": math.log10(max(quality, _LEAST)),
      "forget_truth": float(unlearning.forget_truth(ratios)),
    }
    utility = unlearning.model_utility(jnp.array([kept_probability, kept, truth, chat]))
    return Scores(accuracy, float(utility), extras)


@functools.cache
def forget_loss(s: UnlearnSettings) -> toy_models.Loss:
  """Returns the weighted sum of all terms, `fixed["weights"]`: one program for every way."""

  def loss(params: Params, batch: Batch, fixed: PyTree) -> jax.Array:
    read = lambda name, model: toy_models.logits(model, batch[f"{name}_ids"], fixed)
    labels = batch["forget_labels"]
    logits, kept = read("forget", params), read("retain", params)
    nll = -likelihood.sequence_log_probability(logits, labels)
    terms = {
      "ga": unlearning.gradient_ascent(likelihood.mean_token_nll(logits, labels)),
      "retain": likelihood.mean_token_nll(kept, batch["retain_labels"]),
      "kl": unlearning.kl_to_reference(read("retain", fixed["reference"]), kept),
      "npo": unlearning.npo(nll, batch["forget_reference_nll"], beta=s.beta),
      "simnpo": unlearning.simnpo(
        nll, likelihood.predicted_tokens(labels), beta=s.sim_beta, delta=s.sim_delta
      ),
      "rmu": _rmu(params, batch, fixed, s),
    }
    return jnp.stack([fixed["weights"][name] * term for name, term in terms.items()]).sum()

  return loss


def _rmu(params: Params, batch: Batch, fixed: PyTree, s: UnlearnSettings) -> jax.Array:
  """Steers what a layer says of forget text, and holds what it says of the rest."""
  hidden = lambda model, name: tiny_gpt.read(
    model, batch[f"{name}_ids"], len(fixed["heads"])
  ).hidden[s.rmu_layer]
  real = lambda name: batch[f"{name}_ids"] != toy_world.PAD
  distance = unlearning.representation_distance
  forget = distance(hidden(params, "forget"), fixed["steering"], real("forget"))
  frozen = hidden(fixed["reference"], "retain")
  retain = distance(hidden(params, "retain"), frozen, real("retain"))
  return unlearning.rmu(forget, retain, alpha=s.rmu_alpha)


def makers(toy: Toy, settings: UnlearnSettings) -> Makers:
  """Returns the rows.

  Raises:
    InputError: a layer that the model does not have.
  """
  if not settings.rmu_layer < toy.settings.layers:
    raise InputError(
      f"unlearn.rmu_layer: there are layers 0..{toy.settings.layers - 1}, got {settings.rmu_layer}"
    )
  stage = Unlearning(toy, settings)
  return {
    "start": lambda: stage.scores(toy.base),
    "retrained": lambda: stage.scores(stage.retrained),
    **{way: functools.partial(lambda w: stage.scores(stage.unlearnt(w)), way) for way in TERMS},
  }
