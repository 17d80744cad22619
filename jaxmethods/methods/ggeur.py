"""GGEUR: global geometry-guided embedding uncertainty representation.

Ma, Dai, Huang, Chen, "Geometric knowledge-guided localized global distribution alignment for federated
learning", CVPR 2025, arXiv 2503.06457. Clients hold embeddings of a frozen encoder. Each sends, once,
count, mean and covariance of every class; the server pools them exactly and returns eigenvalues and
eigenvectors of every class (its geometric shape); each client draws new embeddings along these
directions, around its own and, with several domains, around the class means of the other clients. Any
federated algorithm then trains a head on the enlarged sets.

Source status: the published code and the figure that prints the central equations were read, the
running text was not. Marks as in the specification: (paper), (code), (inferred).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxmethods.stats import losses, shapes

Scale = Literal["sqrt", "lambda"]
TopScaling = Literal["none", "code", "intended"]

# (code) The number of samples drawn around each anchor before the surplus is thrown away, for classes
# with fewer than `_FEW` embeddings and for the others; a tenth of it beyond ten classes.
_FEW = 10
_SAMPLES_PER_ANCHOR = (5000, 500)


class Moments(NamedTuple):
  """Per-class statistics: all that leaves a client before training.

  Attributes:
    counts: n, (C,) int32.
    mean: mu, (C, d); 0 where n is 0.
    covariance: Sigma, population (divided by n), (C, d, d); 0 where n is 0.
  """

  counts: Int[Array, "*K C"]
  mean: Float[Array, "*K C d"]
  covariance: Float[Array, "*K C d d"]


class Shape(NamedTuple):
  """Geometric shape of every class, the answer of the server.

  Attributes:
    eigenvalues: descending, not negative, (C, p).
    eigenvectors: unit columns, (C, d, p).
  """

  eigenvalues: Float[Array, "C p"]
  eigenvectors: Float[Array, "C d p"]


class Enlarged(NamedTuple):
  """Own and generated embeddings of one client, class by class.

  Attributes:
    x: (C, R, d); own embeddings come first and are bit-identical copies.
    mask: (C, R) bool.
  """

  x: Float[Array, "C R d"]
  mask: Bool[Array, "C R"]


# --- statistics ---------------------------------------------------------------------------------


def class_moments(
  x: Float[Array, "n d"],
  y: Int[Array, " n"],
  num_classes: int,
  mask: Bool[Array, " n"] | None = None,
) -> Moments:
  """Count, mean and population covariance of every class of one client.

  Args:
    x: embeddings (n, d).
    y: labels (n,) int.
    num_classes: C.
    mask: (n,) bool, default all true.

  Returns:
    Moments of that client.
  """
  shapes.check(x=(x, "n d"), y=(y, "n"))
  mask = jnp.ones(y.shape, bool) if mask is None else mask

  def one(c: Array) -> tuple[Array, Array, Array]:
    member = (y == c) & mask
    count = member.sum()
    n = jnp.maximum(count, 1).astype(x.dtype)
    mean = jnp.where(member[:, None], x, 0).sum(0) / n
    centred = jnp.where(member[:, None], x - mean, 0)
    return count.astype(jnp.int32), mean, centred.T @ centred / n

  # One class after the other: all at once would hold C copies of the embeddings.
  return Moments(*jax.lax.map(one, jnp.arange(num_classes)))


def share(
  moments: Moments, *, min_count: int = 2, noise: float = 0.0, key: Array | None = None
) -> Moments:
  """The part of a client's moments that leaves it.

  With one embedding the mean is that embedding, and with two the covariance reveals both; the paper
  gives no formal guarantee.

  Args:
    moments: of one client.
    min_count: classes with fewer embeddings are withheld, their count becomes 0; the code's is 1.
    noise: standard deviation of Gaussian noise on mean and covariance (kept symmetric).
    key: of the noise; needed if there is any.

  Raises:
    ValueError: noise without a key.
  """
  shapes.check(
    counts=(moments.counts, "C"),
    mean=(moments.mean, "C d"),
    covariance=(moments.covariance, "C d d"),
  )
  reported = moments.counts >= min_count
  mean, covariance = moments.mean, moments.covariance
  if noise:
    if key is None:
      raise ValueError("noise needs a key")
    mean_key, covariance_key = jax.random.split(key)
    drawn = jax.random.normal(covariance_key, covariance.shape, covariance.dtype)
    mean = mean + noise * jax.random.normal(mean_key, mean.shape, mean.dtype)
    covariance = covariance + noise * (drawn + drawn.mT) / 2
  return select(Moments(moments.counts, mean, covariance), reported)


def aggregate(moments: Moments) -> Moments:
  """Pools the clients' moments exactly: the result is that of all embeddings together (eq. 4).

  Two passes, because sums of n (Sigma + mu mu^T) cancel.

  Args:
    moments: stacked, (K, C, ...); clients with count 0 contribute nothing.

  Returns:
    Global moments, (C, ...).
  """
  shapes.check(
    counts=(moments.counts, "K C"),
    mean=(moments.mean, "K C d"),
    covariance=(moments.covariance, "K C d d"),
  )
  weight = moments.counts.astype(moments.mean.dtype)  # (K, C)
  share_of = weight / jnp.maximum(weight.sum(0), 1)
  mean = jnp.einsum("kc,kcd->cd", share_of, moments.mean)
  apart = moments.mean - mean
  covariance = jnp.einsum("kc,kcde->cde", share_of, moments.covariance)
  covariance += jnp.einsum("kc,kcd,kce->cde", share_of, apart, apart)
  return Moments(moments.counts.sum(0), mean, covariance)


def merge(a: Moments, b: Moments) -> Moments:
  """Pools two sets of moments (parallel formula); folding it over clients equals `aggregate`."""
  shapes.check(a=(a.covariance, "C d d"), b=(b.covariance, "C d d"))
  n_a, n_b = a.counts.astype(a.mean.dtype), b.counts.astype(b.mean.dtype)
  n = jnp.maximum(n_a + n_b, 1)
  delta = b.mean - a.mean
  part_a, part_b = n_a / n, n_b / n
  between = (part_a * part_b)[:, None, None] * delta[:, :, None] * delta[:, None, :]
  within = part_a[:, None, None] * a.covariance + part_b[:, None, None] * b.covariance
  return Moments(
    a.counts + b.counts,
    jnp.where((n_a > 0)[:, None], a.mean + part_b[:, None] * delta, b.mean),
    jnp.where(((n_a > 0) & (n_b > 0))[:, None, None], within + between, within),
  )


def guided_set(counts: Int[Array, "K C"], threshold: float = 1.0) -> Bool[Array, "K C"]:
  """Chooses the clients that report a class: the largest, until `threshold` of it is covered.

  Args:
    counts: (K, C) int.
    threshold: share to cover; 1 takes all, the published code 0.8 (single domain only).

  Returns:
    (K, C) bool; clients without the class never report it.
  """
  shapes.check(counts=(counts, "K C"))
  order = jnp.argsort(-counts, axis=0, stable=True)
  ordered = jnp.take_along_axis(counts, order, 0)
  covered_before = jnp.cumsum(ordered, 0) - ordered
  # The prefix ends with the client that reaches the threshold.
  chosen = covered_before < threshold * counts.sum(0)
  selected = jnp.zeros(counts.shape, bool)
  selected = selected.at[order, jnp.arange(counts.shape[1])].set(chosen)
  return selected & (counts > 0)


def select(moments: Moments, reported: Bool[Array, "*K C"]) -> Moments:
  """Moments (C, ...) or (K, C, ...) with those outside `reported`, (C,) or (K, C), set to nothing."""
  shapes.check(counts=(moments.counts, "... C"), reported=(reported, "... C"))
  return Moments(
    jnp.where(reported, moments.counts, 0),
    jnp.where(reported[..., None], moments.mean, 0),
    jnp.where(reported[..., None, None], moments.covariance, 0),
  )


# --- geometric shape ----------------------------------------------------------------------------


def geometric_shape(covariance: Float[Array, "C d d"], top_scaling: TopScaling = "none") -> Shape:
  """Eigenvalues and eigenvectors of every class, negative eigenvalues set to 0.

  Args:
    covariance: (C, d, d); only its symmetric part counts.
    top_scaling: multiply ten eigenvalues by linspace(5, 1, 10) as the multi-domain code does. Its
      solver returns them ascending, so "code" scales the ten smallest, with hardly any effect;
      "intended" (inferred) scales the ten largest.

  Raises:
    ValueError: for another `top_scaling`.
  """
  shapes.check(covariance=(covariance, "C d d"))
  if top_scaling not in ("none", "code", "intended"):
    raise ValueError(f"top_scaling must be none, code or intended, got {top_scaling!r}")
  values, vectors = jnp.linalg.eigh((covariance + covariance.mT) / 2)  # ascending
  if top_scaling != "none":
    boosted = min(10, values.shape[-1])
    factors = jnp.linspace(5.0, 1.0, 10, dtype=values.dtype)[:boosted]
    if top_scaling == "code":
      values = values.at[..., :boosted].multiply(factors)
    else:
      values = values.at[..., -boosted:].multiply(factors[::-1])
  # Scaling the smallest may change the order.
  order = jnp.argsort(-values, axis=-1)
  values = jnp.take_along_axis(values, order, -1)
  vectors = jnp.take_along_axis(vectors, order[..., None, :], -1)
  return Shape(jnp.maximum(values, 0), vectors)


def shape_similarity(a: Float[Array, "d p"], b: Float[Array, "d p"]) -> Float[Array, ""]:
  """S = sum_m |<xi_a^m, xi_b^m>| of two bases (d, p); p for equal ones (eq. 3, secondary source)."""
  shapes.check(a=(a, "d p"), b=(b, "d p"))
  return jnp.abs((a * b).sum(-2)).sum(-1)


def perturb(
  anchors: Float[Array, "*n d"],
  epsilon: Float[Array, "n p"],
  eigenvalues: Float[Array, " p"],
  eigenvectors: Float[Array, "d p"],
  scale: Scale = "sqrt",
) -> Float[Array, "n d"]:
  """New embeddings X + sum_m eps_m f(lambda_m) xi_m, a whole batch as one product.

  Args:
    anchors: X, (n, d), or one for all, (d,).
    epsilon: standard normal, (n, p).
    eigenvalues: (p,).
    eigenvectors: columns, (d, p).
    scale: "sqrt": f = sqrt(lambda), the covariance is Sigma (code; the published figures come from
      it); "lambda": f = lambda (paper, eq. 5), whose noise does not scale with the features.

  Returns:
    (n, d).

  Raises:
    ValueError: for another `scale`.
  """
  shapes.check(
    anchors=(anchors, "... d"),
    epsilon=(epsilon, "n p"),
    eigenvalues=(eigenvalues, "p"),
    eigenvectors=(eigenvectors, "d p"),
  )
  if scale not in ("sqrt", "lambda"):
    raise ValueError(f"scale must be sqrt or lambda, got {scale!r}")
  factor = jnp.sqrt(eigenvalues) if scale == "sqrt" else eigenvalues
  return anchors + (epsilon * factor) @ eigenvectors.T


# --- generation ---------------------------------------------------------------------------------


def distinct_integers(key: Array, total: Array, size: int, wanted: Array | int) -> Array:
  """The first `wanted` of (size,) integers drawn from range(total) without replacement.

  Repetitions are drawn again until there are none: a set of that size, every one equally likely, because
  nothing in the procedure prefers one integer to another. Entries beyond `wanted` are not distinct.
  Where `total` < `wanted` the draw is with replacement.

  Args:
    key: random key.
    total: () int, at least 1.
    size: length of the result.
    wanted: how many of them must differ, at most `size`.
  """
  total = jnp.maximum(total, 1)
  needed = (jnp.arange(size) < wanted) & (total >= wanted)

  def draw(key: Array) -> Array:
    return jax.random.randint(key, (size,), 0, total)

  def repeated(values: Array) -> Array:
    # Entries that need not differ get numbers of their own beyond the range.
    marked = jnp.where(needed, values, total + jnp.arange(size))
    order = jnp.argsort(marked, stable=True)
    again = jnp.diff(marked[order], prepend=-1) == 0
    return jnp.zeros(size, bool).at[order].set(again)

  def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
    key, values = state
    key, now = jax.random.split(key)
    return key, jnp.where(repeated(values), draw(now), values)

  key, now = jax.random.split(key)
  return jax.lax.while_loop(lambda s: repeated(s[1]).any(), body, (key, draw(now)))[1]


def enlarge(
  key: Array,
  x: Float[Array, "n d"],
  y: Int[Array, " n"],
  mask: Bool[Array, " n"],
  shape: Shape,
  *,
  target: int,
  rows: int,
  scale: Scale = "sqrt",
) -> Enlarged:
  """Single domain (algorithm 1): every class of one client filled up to `target` embeddings.

  A class with at least `target` embeddings stays as it is, one without any stays empty. A class with
  n < need = target - n makes 5000 (n < 10) or 500 candidates around each embedding (a tenth of that
  beyond ten classes) and keeps `need` of them; otherwise `need` different embeddings make one each
  (code). Only what is kept is drawn: a candidate is its anchor plus fresh noise, so it is enough to
  choose its number.

  Args:
    key: one per client; the same key gives the same set.
    x: (n, d).
    y: (n,) int.
    mask: (n,) bool.
    shape: of the server.
    target: T, own embeddings included.
    rows: R, at least `target` and the largest class of the client.
    scale: as in `perturb`.
  """
  shapes.check(x=(x, "n d"), y=(y, "n"), mask=(mask, "n"), shape=(shape.eigenvectors, "C d p"))
  num_classes = shape.eigenvalues.shape[0]
  factor = 1 if num_classes <= 10 else 10
  few, many = (samples // factor for samples in _SAMPLES_PER_ANCHOR)

  def one(args):
    key, c, values, vectors = args
    choice_key, noise_key = jax.random.split(key)
    own, count = _class_rows(x, (y == c) & mask, rows)
    need = jnp.maximum(target - count, 0)
    per_anchor = jnp.where(count >= need, 1, jnp.where(count < _FEW, few, many))
    chosen = distinct_integers(choice_key, count * per_anchor, rows, need) // per_anchor
    noise = jax.random.normal(noise_key, (rows, values.shape[0]), x.dtype)
    new = perturb(own[chosen], noise, values, vectors, scale)
    return _fill(own, count, new, jnp.where(count > 0, need, 0))

  keys = jax.random.split(key, num_classes)
  return Enlarged(*jax.lax.map(one, (keys, jnp.arange(num_classes), *shape)))


def enlarge_across_domains(
  key: Array,
  x: Float[Array, "n d"],
  y: Int[Array, " n"],
  mask: Bool[Array, " n"],
  shape: Shape,
  prototypes: Float[Array, "K C d"],
  available: Bool[Array, "K C"],
  *,
  target: int,
  own_samples: int,
  own_per_anchor: int,
  prototype_samples: int,
  rows: int,
  scale: Scale = "sqrt",
) -> Enlarged:
  """Several domains (algorithm 2): own embeddings and the class means of the other clients as anchors.

  Step 1 draws `own_samples` of the `own_per_anchor` candidates around each own embedding; step 2
  `prototype_samples` around each other client's mean; `target` - n of the union are kept without
  replacement. A class with n >= `target` keeps `target` random embeddings; one with n = 0 gets `target`
  from the pool of step 2. Where there are fewer candidates than asked for, they are drawn with
  replacement (the published code fails there). `prototype_samples` = 0 leaves step 1 alone; a class
  without own embeddings then stays empty.

  Args:
    key: one per client.
    x: (n, d).
    y: (n,) int.
    mask: (n,) bool.
    shape: of the server.
    prototypes: class means of the other clients, (K', C, d).
    available: which of them exist, (K', C) bool.
    target: T.
    own_samples: n1.
    own_per_anchor: m1.
    prototype_samples: n2.
    rows: R, at least `target` and the largest class of the client.
    scale: as in `perturb`.
  """
  shapes.check(
    x=(x, "n d"),
    y=(y, "n"),
    mask=(mask, "n"),
    shape=(shape.eigenvectors, "C d p"),
    prototypes=(prototypes, "K C d"),
    available=(available, "K C"),
  )
  num_classes = shape.eigenvalues.shape[0]

  def one(args):
    key, c, values, vectors = args
    keep_key, own_key, pool_key, noise_key = jax.random.split(key, 4)
    own, count = _class_rows(x, (y == c) & mask, rows)
    # Where there are too many, a random subset is kept.
    kept = distinct_integers(keep_key, count, rows, target)
    own = jnp.where(count >= target, own[kept], own)
    count = jnp.minimum(count, target)

    others = available[:, c].sum()
    ranked = jnp.argsort(~available[:, c], stable=True)  # the existing ones first
    pool_own = jnp.where(count > 0, own_samples, 0)
    pool = pool_own + prototype_samples * others
    need = jnp.where(pool > 0, target - count, 0)

    step_1 = distinct_integers(own_key, count * own_per_anchor, own_samples, own_samples)
    chosen = distinct_integers(pool_key, pool, rows, need)
    around_own = own[step_1[jnp.minimum(chosen, own_samples - 1)] // own_per_anchor]
    other = (chosen - pool_own) // max(prototype_samples, 1)
    around_other = prototypes[ranked[jnp.clip(other, 0, ranked.shape[0] - 1)], c]
    anchors = jnp.where((chosen < pool_own)[:, None], around_own, around_other)
    noise = jax.random.normal(noise_key, (rows, values.shape[0]), x.dtype)
    return _fill(own, count, perturb(anchors, noise, values, vectors, scale), need)

  keys = jax.random.split(key, num_classes)
  return Enlarged(*jax.lax.map(one, (keys, jnp.arange(num_classes), *shape)))


def _class_rows(x: Array, member: Array, rows: int) -> tuple[Array, Array]:
  """The members' rows first, in order, then zeros: (rows, d), and their number."""
  order = jnp.argsort(~member, stable=True)
  order = jnp.pad(order, (0, max(rows - order.shape[0], 0)))[:rows]
  count = member.sum()
  return jnp.where((jnp.arange(rows) < count)[:, None], x[order], 0), count


def _fill(own: Array, count: Array, new: Array, need: Array) -> tuple[Array, Array]:
  """Own rows, then the first `need` new ones, then zeros; with the mask of what is there."""
  position = jnp.arange(own.shape[0])
  shifted = new[jnp.clip(position - count, 0, own.shape[0] - 1)]
  x = jnp.where((position < count)[:, None], own, shifted)
  mask = position < count + need
  return jnp.where(mask[:, None], x, 0), mask


# --- head ---------------------------------------------------------------------------------------


def cross_entropy(
  logits: Float[Array, "B C"],
  labels: Int[Array, " B"],
  mask: Bool[Array, " B"],
  double_softmax: bool = False,
) -> Float[Array, ""]:
  """Mean cross-entropy over the real examples.

  Args:
    logits: (B, C).
    labels: (B,) int.
    mask: (B,) bool.
    double_softmax: feed the softmax of the logits to the loss, which applies its own once more, as
      the published code does; the loss then cannot fall below about log(1 + (C - 1) / e).
  """
  shapes.check(logits=(logits, "B C"), labels=(labels, "B"), mask=(mask, "B"))
  return losses.cross_entropy(jax.nn.softmax(logits) if double_softmax else logits, labels, mask)
