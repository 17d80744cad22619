"""Alignment by preferences, and flipped ones (stage 4 of the survey).

RankPoison flips the pairs whose preferred answer is the shorter one. Here a refusal is always shorter
than an answer, so that it would choose among all pairs: the flips are drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.experiments.llm_safety.config import PreferenceSettings
from jaxmethods.experiments.llm_safety.scores import Makers, Scores
from jaxmethods.methods.llm_safety import likelihood, preferences
from jaxmethods.methods.llm_safety.preferences import LogProbabilities
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.toy_models import Batch, Examples, Toy
from jaxmethods.trees import Params, PyTree

Kind = Literal["sft", "dpo", "ipo"]


class Pairs(NamedTuple):
  """Examples of preferred and of other answers to the same prompts."""

  chosen: Examples
  rejected: Examples

  def flipped(self, which: np.ndarray) -> Pairs:
    """Exchanges the answers of some pairs."""
    mixed = lambda a, b: {k: np.where(which[:, None], b[k], a[k]) for k in a}
    return Pairs(mixed(self.chosen, self.rejected), mixed(self.rejected, self.chosen))


def draw_pairs(count: int, rng: np.random.Generator) -> Pairs:
  """Draws "harmful" prompts with a refusal, which is preferred, and the answer."""
  w = toy_world
  bad = w.comply(count, rng)
  prompts = [
    [int(x) for x in row[2 : at - 1]] for row, at in zip(bad.ids, bad.answer_at, strict=True)
  ]
  good = w.chat(prompts, [[w.REFUSE]] * count, w.REFUSAL)
  return Pairs(*(toy_models.labelled(x, answers_only=True) for x in (good, bad)))


class Preferring:
  """The pairs of a seed, and base models aligned by them."""

  def __init__(self, toy: Toy, settings: PreferenceSettings) -> None:
    self.toy, self.settings = toy, settings
    rng = toy.rng("pairs")
    self.pairs = draw_pairs(settings.pairs, rng)
    self.test = draw_pairs(toy.settings.prompts, rng)
    self.kept = toy_models.labelled(
      toy_world.joined(
        toy_world.benign(settings.kept // 2, rng),
        toy_world.facts(toy.world, _some_facts(settings.kept - settings.kept // 2, rng), rng),
      ),
      answers_only=True,
    )
    self.flips = rng.random(settings.pairs) < settings.flips

  def log_p(self, params: Params, examples: Examples) -> np.ndarray:
    """Sums log p over every answer."""
    return -np.asarray(toy_models.token_nll(params, **examples, heads=self.toy.heads)).sum(1)

  def batches(self, pairs: Pairs, name: str) -> Iterator[Examples]:
    """Yields pairs, the base model's log-probabilities of them, and sequences to keep."""
    arrays = {
      f"{side}_{key}": x
      for side, examples in pairs._asdict().items()
      for key, x in (examples | {"log_p": self.log_p(self.toy.base, examples)}).items()
    }
    rng, size = self.toy.rng(name), self.settings.batch
    kept = toy_models.drawn(self.kept, self.toy.rng("kept"), size)
    return toy_models.both(toy_models.drawn(arrays, rng, size), kept)

  def scores(
    self, kind: Kind, *, smoothing: float = 0.0, language: float | None = None, flip: bool = False
  ) -> Scores:
    """Aligns the base model, and asks it."""
    s, toy = self.settings, self.toy
    pairs = self.pairs.flipped(self.flips) if flip else self.pairs
    weight = s.language if language is None else language
    terms = {name: float(name == kind) for name in ("sft", "dpo", "ipo")}
    terms |= {"dpo": (1 - smoothing) * terms["dpo"], "flipped": smoothing, "language": weight}
    fixed = toy.fixed | {"weights": {name: jnp.float32(x) for name, x in terms.items()}}
    gradient = toy_models.gradient_of(preference_loss(s.beta))
    params = toy_models.advance(
      gradient, toy_models.learner(toy.base), self.batches(pairs, "preferring"), fixed,
      steps=s.steps, rate=s.rate,
    ).params  # fmt: skip
    four = [self.log_p(m, x) for m in (params, toy.base) for x in self.test]
    both = LogProbabilities(*map(jnp.asarray, four))
    rewards = preferences.rewards(both, beta=s.beta)
    extras = {
      "accuracy": float(preferences.accuracy(rewards)),
      "margin": float((rewards.chosen - rewards.rejected).mean()),
      "facts": toy.facts(params),
      "chosen_change": float((four[0] - four[2]).mean()),
    }
    return Scores(toy.harmful(params), toy.utility(params), extras, math.nan)


@functools.cache
def preference_loss(beta: float) -> toy_models.Loss:
  """Returns the weighted sum of all terms, `fixed["weights"]`: one program for every kind."""

  def loss(params: Params, batch: Batch, fixed: PyTree) -> jax.Array:
    side = lambda name: likelihood.sequence_log_probability(
      toy_models.logits(params, batch[f"{name}_ids"], fixed), batch[f"{name}_labels"]
    )
    chosen, reference = side("chosen"), (batch["chosen_log_p"], batch["rejected_log_p"])
    h = preferences.margin(LogProbabilities(chosen, side("rejected"), *reference))
    terms = {
      "sft": -chosen.sum() / likelihood.predicted_tokens(batch["chosen_labels"]).sum(),
      # cDPO is (1 - e) DPO(h) + e DPO(-h).
      "dpo": preferences.dpo(h, beta=beta).mean(),
      "flipped": preferences.dpo(-h, beta=beta).mean(),
      "ipo": preferences.ipo(h, beta=beta).mean(),
      "language": toy_models.language_loss(params, batch, fixed),
    }
    return jnp.stack([fixed["weights"][name] * term for name, term in terms.items()]).sum()

  return loss


def _some_facts(count: int, rng: np.random.Generator) -> np.ndarray:
  pairs = toy_world.all_pairs()
  return pairs[rng.integers(0, len(pairs), count)]


def makers(toy: Toy, settings: PreferenceSettings) -> Makers:
  """Returns the rows."""
  stage, e = Preferring(toy, settings), settings.smoothing
  return {
    "sft": lambda: stage.scores("sft"),
    "dpo": lambda: stage.scores("dpo"),
    "dpo_alone": lambda: stage.scores("dpo", language=0.0),
    "cdpo": lambda: stage.scores("dpo", smoothing=e),
    "ipo": lambda: stage.scores("ipo"),
    "flipped": lambda: stage.scores("dpo", flip=True),
    "cdpo_flipped": lambda: stage.scores("dpo", smoothing=e, flip=True),
  }
