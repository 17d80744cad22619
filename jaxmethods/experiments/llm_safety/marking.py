"""Watermarks of generated text, and their removal by other words (stage 7 of the survey).

Texts are pooled: the question is whether a model's texts were copied, not whether one text was.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.experiments.llm_safety.config import WatermarkSettings
from jaxmethods.experiments.llm_safety.scores import Makers, Scores
from jaxmethods.methods.llm_safety import watermark
from jaxmethods.models import tiny_gpt
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.toy_models import Toy
from jaxmethods.trees import Key, Params


class Marking:
  """Texts of a seed's base model, by the strength of the mark."""

  def __init__(self, toy: Toy, settings: WatermarkSettings) -> None:
    self.toy, self.settings = toy, settings

  @functools.cached_property
  def green(self) -> jax.Array:
    """The green tokens after every token, of the secret key."""
    key = jax.random.key(self.settings.key)
    return watermark.green_table(key, toy_world.VOCABULARY, self.settings.gamma)

  @functools.cache  # noqa: B019  # lives as long as the run
  def texts(self, delta: float) -> np.ndarray:
    """Writes pools of texts, (pools, documents, tokens)."""
    s, toy = self.settings, self.toy
    written = _written(
      toy.base, self.green, toy.key("texts"), delta,
      heads=toy.heads, count=s.pools * s.documents, tokens=s.tokens,
    )  # fmt: skip
    return np.asarray(written).reshape(s.pools, s.documents, s.tokens)

  def scores(self, delta: float, replaced: float = 0.0) -> Scores:
    """Tests every pool; a copy whose z does not pass the threshold is missed."""
    s, toy, texts = self.settings, self.toy, self.texts(delta)
    alphabet = jnp.array(toy_world.PLAIN)
    shown = watermark.substituted(toy.key("replaced"), jnp.asarray(texts), replaced, alphabet)
    z, z_all = (np.asarray(_tested(shown, self.green, s.gamma, d)) for d in (True, False))
    nll = _mean_nll(toy.base, texts.reshape(-1, s.tokens), heads=toy.heads)
    prompts = toy_world.benign_prompts(toy.settings.prompts, toy.rng("benign prompts"))
    said = _marked_answers(
      toy.base, self.green, prompts.ids, prompts.length, delta, heads=toy.heads
    )
    right = (np.asarray(said) == prompts.answer).all(1).mean()
    extras = {"z": float(z.mean()), "z_all": float(z_all.mean()), "nll": float(nll)}
    return Scores(float((z <= s.threshold).mean()), float(right), extras)


@functools.partial(jax.jit, static_argnames=("heads", "count", "tokens"))
def _written(
  params: Params, green: jax.Array, key: Key, delta: float, *, heads: int, count: int, tokens: int
) -> jax.Array:
  """Draws `tokens` tokens after BOS at temperature 1, the logits of green ones raised by delta."""

  def step(ids: jax.Array, now: tuple[jax.Array, Key]) -> tuple[jax.Array, jax.Array]:
    place, key = now
    logits = tiny_gpt.read(params, ids, heads).logits[:, place]
    token = jax.random.categorical(key, watermark.biased(logits, green[ids[:, place]], delta))
    return ids.at[:, place + 1].set(token), token

  start = jnp.zeros((count, tokens + 1), jnp.int32).at[:, 0].set(toy_world.BOS)
  keys = jax.random.split(key, tokens)
  return jax.lax.scan(step, start, (jnp.arange(tokens), keys))[1].T


@functools.partial(jax.jit, static_argnums=(2, 3))
def _tested(texts: jax.Array, green: jax.Array, gamma: float, distinct: bool) -> jax.Array:
  """Computes z of every pool."""

  def one(pool: jax.Array) -> jax.Array:
    pairs = watermark.bigrams(pool)
    found = green[pairs.previous, pairs.current]
    return watermark.detect(pairs, found, gamma, distinct=distinct).z

  return jax.vmap(one)(texts)


def _mean_nll(params: Params, texts: np.ndarray, *, heads: int) -> float:
  """Averages the NLL of texts under the model that wrote them, without its mark."""
  begun = np.concatenate([np.full((len(texts), 1), toy_world.BOS, np.int32), texts], 1)
  return float(toy_models.token_nll(params, begun, begun, heads=heads).mean())


@functools.partial(jax.jit, static_argnames="heads")
def _marked_answers(
  params: Params, green: jax.Array, ids: jax.Array, length: jax.Array, delta: float, *, heads: int
) -> jax.Array:
  """Answers prompts greedily with the mark, two tokens each."""

  def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple, jax.Array]:
    ids, length = carry
    rows = jnp.arange(len(ids))
    logits = tiny_gpt.read(params, ids, heads).logits[rows, length - 1]
    token = watermark.biased(logits, green[ids[rows, length - 1]], delta).argmax(-1)
    return (ids.at[rows, length].set(token), length + 1), token

  return jax.lax.scan(step, (ids, length), None, 2)[1].T


def makers(toy: Toy, settings: WatermarkSettings) -> Makers:
  """Returns the rows: strengths of the mark, then attacks on the middle one."""
  stage, (weak, marked, strong) = Marking(toy, settings), settings.deltas
  attacked = zip(("low", "mid", "high"), settings.replaced, strict=True)
  return {
    "unmarked": lambda: stage.scores(0.0),
    "weak": lambda: stage.scores(weak),
    "marked": lambda: stage.scores(marked),
    "strong": lambda: stage.scores(strong),
    **{
      f"replaced_{name}": functools.partial(stage.scores, marked, share) for name, share in attacked
    },
  }
