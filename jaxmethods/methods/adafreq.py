"""AdaFreq: two views of every image, the second of them only its high frequencies (arXiv 2410.06977).

Coat patterns and outlines live in the high frequencies, and so does grass: the second view keeps only
the patches to which the class token of the first attends. Test features come from the first view alone.
Where the paper and its code differ, both are here; the default is the paper's.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmethods.models.probe import Probe
from jaxmethods.models.transformer import Encoded
from jaxmethods.models.vit import ViT
from jaxmethods.stats import shapes
from jaxmethods.stats.losses import cross_entropy
from jaxmethods.trees import Key, Params

# none: the high-pass image as it is
Mix = Literal["none", "paper", "code"]
Select = Literal["none", "paper", "code"]
_GREY = (0.299, 0.587, 0.114)
_GUARD = 1e-5  # keeps a constant image finite (code)
_LEVELS = 255
_EPSILON = 1e-5  # of the batch norm


# --- the high-frequency view ------------------------------------------------------------------------


def grey(image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
  """Weighs the channels of an image to luminance (code)."""
  shapes.check(image=(image, "h w 3"))
  return image @ jnp.asarray(_GREY, image.dtype)


def high_pass(height: int, width: int, deviation: float) -> Float[Array, "h w"]:
  """Computes the weights w = 1 - exp(-distance^2 / 2 D^2) of a centred spectrum.

  Args:
    height: H.
    width: W.
    deviation: D in pixels of the spectrum. Towards 0 everything passes but the centre.

  Returns:
    Weights in [0, 1]; 0 at (floor((H-1)/2), floor((W-1)/2)), which for even sizes is one short of the
    constant component (code).

  Raises:
    ValueError: `deviation` is not positive.
  """
  if not deviation > 0:
    raise ValueError(f"deviation: must be positive, got {deviation}")
  rows, columns = np.arange(height) - (height - 1) // 2, np.arange(width) - (width - 1) // 2
  distance = np.square(rows)[:, None] + np.square(columns)
  return jnp.asarray(1 - np.exp(-distance / (2 * deviation**2)), jnp.float32)


def spectrum(level: Float[Array, "h w"]) -> Array:
  """Computes the half of the two-dimensional DFT that a real image needs, complex (h, w // 2 + 1)."""
  shapes.check(level=(level, "h w"))
  return jnp.fft.rfft2(level)


def magnitude(*parts: tuple[Array, Float[Array, "h w"]]) -> Float[Array, "h w"]:
  """Computes |F^-1(sum of w F)| of weighted spectra of real images.

  A weight that is the same at a frequency and its negative leaves a real image, one of opposite signs an
  imaginary one: two inverse transforms of half spectra stand for a complex one.

  Args:
    parts: spectra, see `spectrum`, and their weights, centred.
  """
  height, width = parts[0][1].shape
  columns = width // 2 + 1
  even, odd = jnp.zeros(()), jnp.zeros(())
  for half, centred in parts:
    weight = jnp.fft.ifftshift(centred)
    positive = weight[:, :columns]
    negative = weight[-np.arange(height) % height][:, -np.arange(columns) % width]
    even = even + half * (0.5 * (positive + negative))
    odd = odd + half * (0.5 * (positive - negative))
  real, imaginary = (jnp.fft.irfft2(x, s=(height, width)) for x in (even, -1j * odd))
  return jnp.sqrt(jnp.square(real) + jnp.square(imaginary))


def stretched(level: Float[Array, "h w"]) -> Float[Array, "h w"]:
  """Scales to [0, 1] by (m - min + 1e-5) / (max - min + 1e-5); a constant image gives 1."""
  low, high = level.min(), level.max()
  return (level - low + _GUARD) / (high - low + _GUARD)


class Box(NamedTuple):
  """Rows top..bottom and columns left..right of a spectrum, the ends excluded; () int32 each."""

  top: Array
  left: Array
  bottom: Array
  right: Array


def mixing_box(height: int, width: int, side: Array | float, centre: Int[Array, " 2"]) -> Box:
  """Places a box of the aspect of the image, cut at its borders.

  Args:
    height: H.
    width: W.
    side: share of the height and of the width, in [0, 1].
    centre: row and column.
  """
  shapes.check(centre=(centre, "2"))
  half = (jnp.asarray([height, width]) * side).astype(jnp.int32) // 2
  ends = jnp.asarray([height, width])
  low, high = jnp.clip(centre - half, 0, ends), jnp.clip(centre + half, 0, ends)
  return Box(low[0], low[1], high[0], high[1])


def inside(box: Box, height: int, width: int) -> Bool[Array, "h w"]:
  """Marks the places of a box."""
  row, column = jnp.arange(height)[:, None], jnp.arange(width)
  return (row >= box.top) & (row < box.bottom) & (column >= box.left) & (column < box.right)


def mixed(
  level: Float[Array, "h w"], deviation: float, box: Box, mix: Mix = "paper"
) -> Float[Array, "h w"]:
  """Filters an image and puts a box of the spectrum before the filter back.

  Args:
    level: luminance of the image, in [-1, 1].
    deviation: D of the filter.
    box: where the whole spectrum stays.
    mix: "paper": |F^-1((1 - M) F_h + M F)|. "code": the filtered image is rounded to 8 bits first, so
      that the spectrum in the box is some 100 times weaker than the one around it. "none": the box is
      not read.

  Returns:
    In [0, 1].
  """
  height, width = level.shape
  whole, weight = spectrum(level), high_pass(height, width, deviation)
  if mix == "none":
    return stretched(magnitude((whole, weight)))
  kept = inside(box, height, width)
  if mix == "paper":
    return stretched(magnitude((whole, jnp.where(kept, 1, weight))))
  filtered = spectrum(eight_bits(stretched(magnitude((whole, weight)))))
  put = magnitude((whole, kept.astype(level.dtype)), (filtered, (~kept).astype(level.dtype)))
  low, high = put.min(), put.max()
  return eight_bits((put - low) / jnp.maximum(high - low, _GUARD)) / _LEVELS


def eight_bits(share: Array) -> Array:
  """Cuts a share in [0, 1] to whole levels 0..255 (code)."""
  return jnp.trunc(_LEVELS * share)


def high_frequency_view(
  key: Key,
  image: Float[Array, "h w 3"],
  *,
  deviation: float,
  area: float = 0.5,
  mix: Mix = "paper",
) -> Float[Array, "h w 3"]:
  """Draws the second view of one image.

  Args:
    key: of the box.
    image: in [-1, 1].
    deviation: D of the filter; 70 at 256 x 256 (code).
    area: largest share of the spectrum that is put back, in [0, 1]; its share a is uniform below it. The
      code's box has 1 - a instead.
    mix: see `mixed`.

  Returns:
    In [0, 1], three equal channels. No gradient passes.
  """
  shapes.check(image=(image, "h w 3"))
  height, width = image.shape[:2]
  area_key, row_key, column_key = jax.random.split(key, 3)
  share = area * jax.random.uniform(area_key)
  centre = jnp.stack([
    jax.random.randint(row_key, (), 0, height),
    jax.random.randint(column_key, (), 0, width),
  ])  # fmt: skip
  box = mixing_box(height, width, jnp.sqrt(1 - share if mix == "code" else share), centre)
  view = mixed(grey(image), deviation, box, mix)
  return jax.lax.stop_gradient(jnp.broadcast_to(view[..., None], image.shape))


# --- the two branches -------------------------------------------------------------------------------


class View(NamedTuple):
  """Tokens of a branch after the last norm.

  Attributes:
    tokens: (B, T, C); of the first branch the class token, then the patches.
    scores: attention of the class token to the patches in the last layer, mean over heads, (B, n);
      None where nobody asked.
  """

  tokens: Array
  scores: Array | None = None


def original_view(
  model: ViT, params: Params, pixels: Float[Array, "b h w c"], key: Key | None = None
) -> View:
  """Encodes images whole; `key` switches the dropping of branches on."""
  tokens = nn.apply(ViT.embed, model)({"params": params}, pixels)
  batch, length = tokens.shape[:2]
  look = Probe(
    queries=jnp.zeros((batch, 1), jnp.int32),
    attention=lambda rows: rows[:, :, 0, 1:length].mean(1),
  )
  encoded = _encoded(model, params, tokens, key, look)
  return View(_normed(model, params, encoded.hidden), encoded.attention[-1])


def selected(
  scores: Float[Array, "b n"], share: float, select: Select = "paper"
) -> Int[Array, "b t"]:
  """Chooses the tokens of the second branch (object-aware dynamic selection).

  Args:
    scores: attention of the class token to each patch.
    share: mu, kept are floor(mu n) patches.
    select: "paper": the class token, then the kept patches in order. "code": the kept patches and then
      the class token, and the last patch is never chosen. "none": all tokens.

  Returns:
    Positions among the n + 1 tokens, (B, k + 1). Ties go to the lowest place.

  Raises:
    ValueError: no patch would be kept.
  """
  shapes.check(scores=(scores, "b n"))
  batch, patches = scores.shape
  if select == "none":
    return jnp.broadcast_to(jnp.arange(patches + 1), (batch, patches + 1))
  count = math.floor(share * patches)
  if not 1 <= count <= patches - (select == "code"):
    raise ValueError(f"share: {share} keeps {count} of {patches} patches")
  ranked = jax.lax.stop_gradient(scores[:, :-1] if select == "code" else scores)
  kept = jnp.sort(jax.lax.top_k(ranked, count)[1], axis=1) + 1
  own = jnp.zeros((batch, 1), kept.dtype)
  return jnp.concatenate([kept, own] if select == "code" else [own, kept], axis=1)


def high_view(
  model: ViT,
  params: Params,
  pixels: Float[Array, "b h w c"],
  kept: Int[Array, "b t"],
  ranked_position: Float[Array, "1 t c"] | None = None,
  key: Key | None = None,
) -> View:
  """Encodes only some tokens of high-frequency images.

  Args:
    model: of the first branch.
    params: its parameters; the branches share them.
    pixels: see `high_frequency_view`.
    kept: see `selected`.
    ranked_position: a table by rank that stands for the position of each token (code).
    key: switches the dropping of branches on.
  """
  tokens = nn.apply(ViT.embed, model)({"params": params}, pixels)
  if ranked_position is not None:
    tokens = tokens - params["position"]
  tokens = taken(tokens, kept)
  if ranked_position is not None:
    tokens = tokens + ranked_position
  return View(_normed(model, params, _encoded(model, params, tokens, key, None).hidden))


def taken(tokens: Float[Array, "b n c"], kept: Int[Array, "b t"]) -> Float[Array, "b t c"]:
  """Takes some tokens of each image."""
  chex.assert_equal_shape_prefix([tokens, kept], 1)
  return jnp.take_along_axis(tokens, kept[:, :, None], axis=1)


def _encoded(
  model: ViT, params: Params, tokens: Array, key: Key | None, probe: Probe | None
) -> Encoded:
  rngs = {} if key is None else {"dropout": key}
  encode = nn.apply(ViT.encode, model)
  return encode({"params": params}, tokens, probe=probe, train=key is not None, rngs=rngs)


def _normed(model: ViT, params: Params, hidden: Array) -> Array:
  return nn.apply(lambda vit, x: vit.norm(x), model)({"params": params}, hidden)


def jigsaw(
  tokens: Float[Array, "b n c"], groups: int = 4, shift: int = 5
) -> Float[Array, "g b m c"]:
  """Shifts the patches cyclically and deals them out to groups (TransReID); a rest is left out.

  Args:
    tokens: the patches without the class token.
    groups: how many, even: two rows of half of the patches are read column by column.
    shift: in patches.
  """
  batch, patches, width = tokens.shape
  used = patches // (2 * groups) * 2 * groups
  moved = jnp.roll(tokens, -shift, axis=1)[:, :used]
  dealt = moved.reshape(batch, 2, used // 2, width).swapaxes(1, 2)
  return jnp.moveaxis(dealt.reshape(batch, groups, used // groups, width), 1, 0)


# --- heads and losses -------------------------------------------------------------------------------


class Moments(NamedTuple):
  """Running mean and variance of a batch norm, (C,) each."""

  mean: Array
  variance: Array


def bnneck(
  x: Float[Array, "b c"], scale: Float[Array, " c"], running: Moments, *, train: bool
) -> tuple[Array, Moments]:
  """Normalises class tokens by their batch, scaled and not shifted.

  Args:
    x: class tokens.
    scale: learnt.
    running: moments that stand for the batch where `train` is off.
    train: whether to use the batch, and move a tenth of the way to its (unbiased) moments.

  Returns:
    (B, C), and the running moments.
  """
  shapes.check(x=(x, "b c"), scale=(scale, "c"), mean=(running.mean, "c"))
  used = Moments(x.mean(0), x.var(0)) if train else running
  out = (x - used.mean) * jax.lax.rsqrt(used.variance + _EPSILON) * scale
  if not train:
    return out, running
  unbiased = used.variance * len(x) / max(len(x) - 1, 1)
  moved = Moments(0.9 * running.mean + 0.1 * used.mean, 0.9 * running.variance + 0.1 * unbiased)
  return out, jax.lax.stop_gradient(moved)


class Hardest(NamedTuple):
  """Distance of each anchor to its farthest positive and to its nearest negative, (B,) each."""

  positive: Array
  negative: Array


def hardest(features: Float[Array, "b c"], labels: Int[Array, " b"]) -> Hardest:
  """Finds the hardest pairs of a batch by Euclidean distance; an anchor is its own positive too."""
  shapes.check(features=(features, "b c"), labels=(labels, "b"))
  square = jnp.square(features).sum(1)
  product = jnp.matmul(features, features.T, precision="highest")
  # Clipped before the root: the gradient at distance 0 is 0, not infinite.
  distance = jnp.sqrt(jnp.maximum(square[:, None] + square - 2 * product, 1e-12))
  same = labels[:, None] == labels
  return Hardest(
    jnp.where(same, distance, -jnp.inf).max(1), jnp.where(same, jnp.inf, distance).min(1)
  )


def triplet(pairs: Hardest, margin: float | None = None) -> Array:
  """Computes mean log(1 + exp(d_ap - d_an)), or with a margin mean max(0, d_ap - d_an + margin).

  An anchor without a negative (a batch of one identity) counts 0.
  """
  apart = pairs.positive - pairs.negative
  each = jax.nn.softplus(apart) if margin is None else jax.nn.relu(apart + margin)
  return each.mean()


def equilibrium(
  original: Float[Array, "b t c"],
  high: Float[Array, "b t c"],
  reduce: Literal["sum", "mean"] = "sum",
) -> Array:
  """Computes L_F, the smooth L1 distance of the branches' tokens; neither side is detached.

  Args:
    original: tokens of the first branch at the kept places.
    high: tokens of the second.
    reduce: over the batch; the code sums, so the weight grows with the batch.
  """
  shapes.same(original=original, high=high)
  apart = jnp.abs(original - high)
  each = jnp.where(apart < 1, 0.5 * jnp.square(apart), apart - 0.5).mean((1, 2))
  return each.sum() if reduce == "sum" else each.mean()


class Terms(NamedTuple):
  """Weights of the terms of the loss, or their values."""

  identity: Array | float
  triplet: Array | float
  high_identity: Array | float = 0.0
  high_triplet: Array | float = 0.0
  equilibrium: Array | float = 0.0


PAPER = Terms(1.0, 1.0, 1.0, 1.0, 0.1)
CODE = Terms(0.9, 0.7, 0.1, 0.2, 0.1)


def total(values: Terms, weights: Terms = PAPER) -> Array:
  """Sums the weighted terms."""
  return jnp.stack([jnp.asarray(w * v) for w, v in zip(weights, values, strict=True)]).sum()


def branch_terms(
  logits: Float[Array, "b k"], features: Float[Array, "b c"], labels: Int[Array, " b"]
) -> tuple[Array, Array]:
  """Computes identity and triplet loss of one branch: logits behind the neck, features before it."""
  shapes.check(logits=(logits, "b k"), features=(features, "b c"), labels=(labels, "b"))
  return cross_entropy(logits, labels), triplet(hardest(features, labels))


# --- batches and rates ------------------------------------------------------------------------------


def balanced_batch(
  key: Key,
  members: Int[Array, "k m"],
  counts: Int[Array, " k"],
  *,
  identities: int,
  images: int,
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
  """Draws the same number of images of several identities.

  Args:
    key: random key.
    members: images of each identity, the first `counts` of a row.
    counts: how many there are, at least 1.
    identities: P, drawn without replacement.
    images: K of each, without replacement where there are as many.

  Returns:
    Images and labels, (P K,) each, identity by identity.

  Raises:
    ValueError: fewer than `identities` rows.
  """
  shapes.check(members=(members, "k m"), counts=(counts, "k"))
  if identities > len(members):
    raise ValueError(f"identities: {identities} a batch, but there are {len(members)}")
  who_key, order_key, again_key = jax.random.split(key, 3)
  labels = jax.random.permutation(who_key, len(members))[:identities]
  have = counts[labels][:, None]
  width = max(members.shape[1], images)
  lots = jnp.where(
    jnp.arange(width) < have, jax.random.uniform(order_key, (identities, width)), jnp.inf
  )
  distinct = jnp.argsort(lots, axis=1)[:, :images]
  repeated = jax.random.randint(again_key, (identities, images), 0, have)
  place = jnp.where(have >= images, distinct, repeated)
  chosen = jnp.take_along_axis(members[labels], place, axis=1)
  return chosen.reshape(-1), jnp.repeat(labels, images)


def learning_rate(
  epoch: Array | float, base: float, epochs: int, *, warmup: int = 5, group: float = 1.0
) -> Array:
  """Computes the rate of an epoch: cosine over all epochs, the first ones linear (code).

  Args:
    epoch: counted from 1.
    base: rate of the weights.
    epochs: all of them.
    warmup: epochs from 0.01 base to the group's rate; the cosine is not shifted by them.
    group: factor of a group of parameters; 2 for biases.
  """
  epoch = jnp.asarray(epoch, jnp.float32)
  rate, floor = base * group, 0.002 * base
  start = 0.01 * base
  linear = start + (rate - start) * epoch / max(warmup, 1)
  cosine = floor + 0.5 * (rate - floor) * (1 + jnp.cos(jnp.pi * epoch / epochs))
  return jnp.where(epoch < warmup, linear, cosine)
