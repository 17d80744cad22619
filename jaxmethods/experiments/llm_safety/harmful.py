"""Fine-tuning as a service: a user's data hold harmful examples (stage 4 of the survey)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmethods.experiments.llm_safety.config import HarmfulSettings
from jaxmethods.experiments.llm_safety.scores import Makers, Scores
from jaxmethods.methods.llm_safety import defences
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.toy_models import Batch, Toy
from jaxmethods.testbeds.language.toy_world import Texts
from jaxmethods.trees import Params, PyTree


class Service:
  """The data of a user of a seed, and models tuned on it."""

  def __init__(self, toy: Toy, settings: HarmfulSettings) -> None:
    self.toy, self.settings = toy, settings

  @functools.cached_property
  def data(self) -> Texts:
    """What the user sends: mostly benign."""
    rng, s = self.toy.rng("user"), self.settings
    return toy_world.joined(
      toy_world.benign(s.benign, rng), toy_world.comply(s.harmful, rng, s.topics)
    )

  @functools.cached_property
  def alignment(self) -> Texts:
    """What the service adds: of the data that the model was aligned with."""
    return self.toy.alignment_texts(self.toy.settings.augment)

  @functools.cached_property
  def tuned(self) -> Params:
    """The aligned model after plain fine-tuning."""
    return self.fitted(self.data)

  def fitted(self, texts: Texts) -> Params:
    """Tunes the aligned model on answers."""
    s, examples = self.settings, toy_models.labelled(texts, answers_only=True)
    return toy_models.fit(
      toy_models.language_loss, self.toy.aligned, examples, self.toy.rng("harmful steps"),
      self.toy.fixed, steps=s.steps, rate=s.rate, batch_size=s.batch,
    )  # fmt: skip

  def mixed(self) -> Params:
    """Tunes on the data and some of the alignment data."""
    share = self.settings.mix
    count = max(1, round(share / (1 - share) * len(self.data.ids)))
    rows = self.toy.rng("mixed").integers(0, len(self.alignment.ids), count)
    return self.fitted(toy_world.joined(self.data, self.alignment.take(rows)))

  def lisa(self) -> Params:
    """Tunes on alignment and user data in turn, each drawn to the last weights of the other."""
    s, toy = self.settings, self.toy
    parts = [toy_models.labelled(x, answers_only=True) for x in (self.alignment, self.data)]
    batches = [
      toy_models.drawn(x, toy.rng(name), s.batch)
      for x, name in zip(parts, ("lisa alignment", "lisa user"), strict=True)
    ]
    state = toy_models.learner(toy.aligned)
    done, phase = 0, 0
    gradient = toy_models.gradient_of(anchored_loss(s.rho))
    while done < s.steps:
      count = min((s.alignment_steps, s.user_steps)[phase], s.steps - done)
      # The last weights of the other phase are those that this one starts from.
      fixed = toy.fixed | {"anchor": state.params}
      state = toy_models.advance(gradient, state, batches[phase], fixed, steps=count, rate=s.rate)
      done, phase = done + count, 1 - phase
    return state.params

  def safe(self, choose: Callable[[jax.Array, jax.Array, jax.Array], jax.Array | None]) -> Scores:
    """Projects the update of every matrix; other parameters become the aligned ones again.

    Args:
      choose: (base, aligned, update) -> the update to take, None to take it as it is.
    """
    params, projected, matrices = dict(self.toy.aligned), 0, 0
    for name, aligned in self.toy.aligned.items():
      if aligned.ndim < 2:
        continue
      update = self.tuned[name] - aligned
      chosen = choose(self.toy.base[name], aligned, update)
      params[name] = aligned + (update if chosen is None else chosen)
      matrices, projected = matrices + 1, projected + (chosen is not None)
    return self.scores(params, projected / matrices)

  def scores(self, params: Params, projected: float = math.nan) -> Scores:
    """Asks a model."""
    toy = self.toy
    extras = {"facts": toy.facts(params), "projected": projected}
    return Scores(toy.harmful(params), toy.utility(params), extras)


@functools.cache
def anchored_loss(rho: float) -> toy_models.Loss:
  """Returns the loss of LISA."""

  def loss(params: Params, batch: Batch, fixed: PyTree) -> jax.Array:
    penalty = defences.lisa_penalty(params, fixed["anchor"], rho)
    return toy_models.language_loss(params, batch, fixed) + penalty

  return loss


def _code(threshold: float) -> Callable:
  """Projects by C where the cosine is at most tau (code)."""

  def choose(base: jax.Array, aligned: jax.Array, update: jax.Array) -> jax.Array | None:
    found = _safe_update(base, aligned, update)
    return found.update if float(found.cosine) <= threshold else None

  return choose


def _exact(energy: float) -> Callable:
  """Projects on the span of the alignment (inferred)."""

  def choose(base: jax.Array, aligned: jax.Array, update: jax.Array) -> jax.Array:
    return update @ defences.alignment_subspace(base, aligned, energy=energy).projection

  return choose


@jax.jit
def _safe_update(base: jax.Array, aligned: jax.Array, update: jax.Array) -> defences.Projected:
  return defences.safe_update(update, defences.alignment_matrix(base, aligned), jnp.inf)


def makers(toy: Toy, settings: HarmfulSettings) -> Makers:
  """Returns the rows."""
  stage = Service(toy, settings)
  return {
    "aligned": lambda: stage.scores(toy.aligned),
    "plain": lambda: stage.scores(stage.tuned),
    "mix": lambda: stage.scores(stage.mixed()),
    "safelora": lambda: stage.safe(_code(math.inf)),
    "safelora_tau": lambda: stage.safe(_code(settings.threshold)),
    "safelora_exact": lambda: stage.safe(_exact(settings.energy)),
    "lisa": lambda: stage.scores(stage.lisa()),
  }
