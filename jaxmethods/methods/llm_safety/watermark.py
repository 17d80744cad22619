"""KGW watermark: a green part of the vocabulary, drawn anew after every token, is made more likely.

Kirchenbauer, Geiping, Wen, Katz, Miers, Goldstein, "A watermark for large language models",
arXiv 2301.10226 (code). The official permutations are torch's: texts marked there cannot be read here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.errors import InputError
from jaxmethods.stats import shapes
from jaxmethods.trees import Key


class Bigrams(NamedTuple):
  """Pairs of tokens that follow each other, (n,) each; `real` tells which count."""

  previous: Int[Array, " n"]
  current: Int[Array, " n"]
  real: Bool[Array, " n"]


class Detection(NamedTuple):
  """Result of the test.

  Attributes:
    scored: T, the tokens that count.
    green: how many of them are green.
    z: standard score of `green` without a watermark; the code's threshold is z > 4.
    p_value: chance of a z as large without one. Both are NaN at T = 0.
  """

  scored: Int[Array, ""]
  green: Int[Array, ""]
  z: Float[Array, ""]
  p_value: Float[Array, ""]


def green_row(
  key: Key, previous: Int[Array, ""], vocabulary: int, gamma: float
) -> Bool[Array, " V"]:
  """Draws the int(gamma V) green tokens that follow one token, from the key and that token alone."""
  if not 0 < gamma < 1:
    raise InputError(f"gamma must be in (0, 1), got {gamma}")
  order = jax.random.permutation(jax.random.fold_in(key, previous), vocabulary)
  return jnp.zeros(vocabulary, bool).at[order[: int(gamma * vocabulary)]].set(True)


def green_table(key: Key, vocabulary: int, gamma: float) -> Bool[Array, "V V"]:
  """Draws the green tokens after every token, `table[previous, current]`; for small vocabularies."""
  return jax.vmap(lambda token: green_row(key, token, vocabulary, gamma))(jnp.arange(vocabulary))


def is_green(key: Key, pairs: Bigrams, vocabulary: int, gamma: float) -> Bool[Array, " n"]:
  """Tells which pairs end in a green token, row by row: for vocabularies too large for a table."""
  one = lambda pair: green_row(key, pair[0], vocabulary, gamma)[pair[1]]
  return jax.lax.map(one, (pairs.previous, pairs.current))


def biased(
  logits: Float[Array, "... V"], green: Bool[Array, "... V"], delta: float
) -> Float[Array, "... V"]:
  """Adds delta to the logits of green tokens, e.g. `green = table[previous]`."""
  shapes.same(logits=logits, green=green)
  return jnp.where(green, logits + delta, logits)


def bigrams(tokens: Int[Array, "... S"], mask: Bool[Array, "... S"] | None = None) -> Bigrams:
  """Lists the pairs of one text, or of many pooled: the question may be about a model, not a text.

  Args:
    tokens: of texts of two tokens at least.
    mask: tokens that count; a pair counts if both of its tokens do. Default all.

  Raises:
    InputError: if no text has two tokens.
  """
  mask = jnp.ones(tokens.shape, bool) if mask is None else mask
  shapes.same(tokens=tokens, mask=mask)
  if tokens.ndim < 1 or tokens.shape[-1] < 2 or not tokens.size:
    raise InputError(f"tokens: a text needs two tokens at least, got shape {tokens.shape}")
  return Bigrams(
    tokens[..., :-1].ravel(), tokens[..., 1:].ravel(), (mask[..., :-1] & mask[..., 1:]).ravel()
  )


def first_occurrences(pairs: Bigrams) -> Bool[Array, " n"]:
  """Marks one of each distinct real pair."""
  shapes.same(**pairs._asdict())
  order = jnp.lexsort((pairs.current, pairs.previous, ~pairs.real))
  ranked = [x[order] for x in pairs]
  differs = jnp.zeros(len(order) - 1, bool)
  for x in ranked:
    differs |= x[1:] != x[:-1]
  new = jnp.concatenate([jnp.ones(1, bool), differs]) & ranked[2]
  return jnp.zeros(len(order), bool).at[order].set(new)


def detect(
  pairs: Bigrams, green: Bool[Array, " n"], gamma: float, *, distinct: bool = True
) -> Detection:
  """Computes z = (g - gamma T) / sqrt(T gamma (1 - gamma)), p = 1 - Phi(z).

  Args:
    pairs: of the text; its first token is not scored, nothing stands before it.
    green: which pairs end in a green token.
    gamma: green share of the vocabulary.
    distinct: counts every distinct pair once (default of the code): repeated pairs are not independent.
  """
  shapes.same(green=green, real=pairs.real)
  if not 0 < gamma < 1:
    raise InputError(f"gamma must be in (0, 1), got {gamma}")
  counts = first_occurrences(pairs) if distinct else pairs.real
  scored, found = counts.sum(), (counts & green).sum()
  z = (found - gamma * scored) / jnp.sqrt(scored * gamma * (1 - gamma))
  return Detection(scored, found, z, jax.scipy.stats.norm.sf(z))


def substituted(
  key: Key, tokens: Int[Array, ...], share: float, alphabet: Int[Array, " A"]
) -> Int[Array, ...]:
  """Attacks a text: replaces each token with chance `share` by one of `alphabet`, drawn uniformly."""
  shapes.check(alphabet=(alphabet, "A"))
  if not 0 <= share <= 1:
    raise InputError(f"share must be in [0, 1], got {share}")
  where, which = jax.random.split(key)
  new = jax.random.choice(which, alphabet, tokens.shape).astype(tokens.dtype)
  return jnp.where(jax.random.bernoulli(where, share, tokens.shape), new, tokens)
