"""RAHFL: robust asymmetric heterogeneous federated learning with corrupted clients.

Fang, Ye, Du, TPAMI 2025, arXiv 2503.09206; it extends AugHFL (ICCV 2023) and RHFL (CVPR 2022). Every
client has its own architecture and its own, partly corrupted, images; clients talk only through softmax
outputs on a shared unlabelled public set. Locally, AugMix with a Jensen-Shannon consistency loss and a
diversity-enhanced supervised contrastive loss (DCL); together, one-way learning from clients that are at
least as good (AsymHFL).

The formulas are those of the published code; of the paper the abstract, the framework figure and
tables 5 to 7 were read. The losses of its rivals that work on the same exchange stand at the end.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from jaxmethods.federated.exchange import Teachers
from jaxmethods.images import augment, views
from jaxmethods.stats import shapes
from jaxmethods.stats.losses import cross_entropy

DDMForm = Literal["code", "plain"]


def kl_divergence(teacher: Float[Array, "... B C"], student: Float[Array, "... B C"]) -> Array:
  """KL(softmax(teacher) || softmax(student)) of logits (..., B, C), averaged over the batch: (...)."""
  shapes.check(teacher=(teacher, "... B C"), student=(student, "... B C"))
  log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(-1)


def border(image: Array) -> int:
  """Width of the border that crops reach into: an eighth of the side, the published 4 of 32 pixels."""
  return image.shape[0] // 8


def private_views(
  key: Array,
  image: Shaped[Array, "side side 3"],
  *,
  strong: bool = True,
  weak: bool = True,
  flip: bool = True,
) -> Float[Array, "views side side 3"]:
  """The views of a private image, drawn anew every time it is used, whole values 0..255.

  Args:
    key: random key.
    image: (side, side, 3) uint8.
    strong: two AugMix draws of the crop, or none.
    weak: SimCLR's view, or none.
    flip: whether a mirror image means the same (code: of CIFAR).

  Returns:
    (views, side, side, 3) float32: the crop, then the strong views, then the weak one.
  """
  shapes.check(image=(image, "side side 3"))
  crop_key, strong_key, weak_key = jax.random.split(key, 3)
  pad = border(image)
  crop = views.crop_and_flip(crop_key, image, pad=pad, flip=flip)
  drawn = [crop[None]]
  if strong:
    drawn.append(jax.lax.map(lambda k: augment.augmix(k, crop), jax.random.split(strong_key)))
  if weak:
    drawn.append(views.weak_view(weak_key, image, pad=pad, flip=flip)[None])
  return jnp.concatenate(drawn)


# --- local learning -----------------------------------------------------------------------------


def jensen_shannon(logits: Float[Array, "views B C"]) -> Float[Array, ""]:
  """Consistency of the views of an image, in [0, log(views)]; gradients flow into all of them.

  Args:
    logits: (views, B, C); the original and two AugMix draws in the paper.
  """
  shapes.check(logits=(logits, "views B C"))
  p = jax.nn.softmax(logits)
  log_p = jax.nn.log_softmax(logits)
  log_mixture = jnp.log(jnp.clip(p.mean(0), 1e-7, 1.0))
  return (p * (log_p - log_mixture)).sum(-1).mean()


def supervised_contrast(
  features: Float[Array, "views B d"],
  labels: Int[Array, " B"],
  temperature: float = 0.2,
  base_temperature: float = 0.07,
) -> Float[Array, ""]:
  """Supervised contrastive loss with all views as anchors, times temperature / base_temperature.

  For anchor i: -1/|P(i)| sum over j in P(i) of [S_ij - log sum over l != i of exp S_il], with
  S = <z_i, z_j> / t and P(i) all other embeddings with the same label.

  Args:
    features: unit vectors (views, B, d).
    labels: (B,) int.
    temperature: t.
    base_temperature: t_base.

  Returns:
    Mean over the anchors; an anchor without a positive (a single view) counts 0.
  """
  shapes.check(features=(features, "views B d"), labels=(labels, "B"))
  z = features.reshape(-1, features.shape[-1])
  label = jnp.tile(labels, features.shape[0])
  itself = jnp.eye(len(label), dtype=bool)
  similarity = z @ z.T / temperature
  log_share = similarity - jax.nn.logsumexp(
    jnp.where(itself, -jnp.inf, similarity), axis=1, keepdims=True
  )
  positive = (label[:, None] == label) & ~itself
  count = positive.sum(1)
  mean = jnp.where(positive, log_share, 0).sum(1) / jnp.maximum(count, 1)
  return -(temperature / base_temperature) * mean.mean()


def distribution_matching(
  weak: Float[Array, "B d"],
  strong: Float[Array, "B d"],
  original: Float[Array, "B d"],
  temperature: float = 0.2,
  form: DDMForm = "code",
) -> Float[Array, ""]:
  """The strong view's similarities to the batch follow the weak view's, which are held fixed.

  q = softmax(exp(s) / t_d) over s = similarities to Z = [weak; original]; KL(q_weak || q_strong + 1e-9).

  Args:
    weak: unit vectors (B, d); their distribution is the target and receives no gradient.
    strong: (B, d).
    original: (B, d).
    temperature: t_d.
    form: "code" takes exp inside the softmax, "plain" softmax(s / t_d), the probable intent (inferred).

  Raises:
    ValueError: for another `form`.
  """
  shapes.check(weak=(weak, "B d"), strong=(strong, "B d"), original=(original, "B d"))
  if form not in ("code", "plain"):
    raise ValueError(f"form must be code or plain, got {form!r}")
  shaped = jnp.exp if form == "code" else lambda s: s
  batch = jnp.concatenate([weak, original])
  target = jax.lax.stop_gradient(jax.nn.log_softmax(shaped(weak @ batch.T) / temperature))
  q = jax.nn.softmax(shaped(strong @ batch.T) / temperature)
  return (jnp.exp(target) * (target - jnp.log(q + 1e-9))).sum(-1).mean()


def diversity_contrast(
  original: Float[Array, "B d"],
  weak: Float[Array, "B d"],
  strong: Float[Array, "B d"],
  labels: Int[Array, " B"],
  *,
  beta: float = 1.0,
  temperature: float = 0.2,
  base_temperature: float = 0.07,
  ddm_temperature: float = 0.2,
  form: DDMForm = "code",
) -> Float[Array, ""]:
  """DCL: supervised contrast of original and weak view + beta * distribution matching.

  Args:
    original: backbone features of the original crop, unit vectors (B, d); as are the next two.
    weak: of the SimCLR-style view.
    strong: of an AugMix view.
    labels: (B,) int.
    beta: weight of the matching term.
    temperature: t.
    base_temperature: t_base.
    ddm_temperature: t_d.
    form: as in `distribution_matching`.
  """
  shapes.check(original=(original, "B d"), weak=(weak, "B d"), labels=(labels, "B"))
  contrast = supervised_contrast(
    jnp.stack([original, weak]), labels, temperature, base_temperature
  )  # fmt: skip
  return contrast + beta * distribution_matching(weak, strong, original, ddm_temperature, form)


# --- learning from each other -------------------------------------------------------------------


def knowledge_transfer(accuracy: Float[Array, " K"]) -> Bool[Array, "K K"]:
  """M[k, i]: client k may learn from i, i != k and ACC_i >= ACC_k; (K,) -> (K, K) bool."""
  shapes.check(accuracy=(accuracy, "K"))
  better = accuracy[None, :] >= accuracy[:, None]
  return better & ~jnp.eye(len(accuracy), dtype=bool)


def collaboration(
  logits: Float[Array, "K B C"], weights: Float[Array, "K K"]
) -> Float[Array, " K"]:
  """L_col of every client: sum_i w_ki KL(stopgrad p_i || p_k) on a public batch.

  All clients' outputs are taken before anyone learns, so the order of the updates does not matter.

  Args:
    logits: (K, B, C).
    weights: (K, K), row k for client k; see `transfer_weights`.

  Returns:
    (K,); entry k depends on the logits of client k alone as far as gradients go.
  """
  shapes.check(logits=(logits, "K B C"), weights=(weights, "K K"))
  teachers = jax.lax.stop_gradient(logits)
  pairs = jax.vmap(lambda student: kl_divergence(teachers, student[None]))(logits)  # (K, K)
  return (weights * pairs).sum(1)


def transfer_weights(allowed: Bool[Array, "K K"]) -> Float[Array, "K K"]:
  """Each client learns evenly from those it may learn from: rows of (K, K) bool over their sums.

  An empty row, that of the strict best client, stays zero: it learns nothing. All true but the diagonal
  gives the symmetric HFL.
  """
  shapes.check(allowed=(allowed, "K K"))
  return allowed / jnp.maximum(allowed.sum(1, keepdims=True), 1)


def mixed_teachers(log_p: Float[Array, "K B C"], weights: Float[Array, "K K"]) -> Teachers:
  """The teacher sum_i w_ki p_i of every client; none where its weights are all zero.

  Its loss has the gradient of `collaboration` (rows of weights that sum to 1).

  Args:
    log_p: answers to a public batch, (K, B, C).
    weights: (K, K), row k for client k.
  """
  shapes.check(log_p=(log_p, "K B C"), weights=(weights, "K K"))
  return Teachers(jnp.einsum("ki,ibc->kbc", weights, jnp.exp(log_p)), weights.sum(1) > 0)


# --- rivals on the same exchange ----------------------------------------------------------------


def symmetric_cross_entropy(
  logits: Float[Array, "B C"], labels: Int[Array, " B"], alpha: float = 0.1, beta: float = 1.0
) -> Float[Array, ""]:
  """RHFL's local loss alpha CE + beta RCE, RCE = -mean sum_c clip(p_c) log clip(y_c)."""
  shapes.check(logits=(logits, "B C"), labels=(labels, "B"))
  p = jnp.clip(jax.nn.softmax(logits), 1e-7, 1.0)
  target = jnp.clip(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), 1e-4, 1.0)
  reverse = -(p * jnp.log(target)).sum(-1).mean()
  return alpha * cross_entropy(logits, labels) + beta * reverse


def confidence_weights(
  previous_loss: Float[Array, " K"], current_loss: Float[Array, " K"], eta: float = 0.5
) -> Float[Array, " K"]:
  """RHFL's weight of every client, by the fall of its mean local loss."""
  shapes.check(previous_loss=(previous_loss, "K"), current_loss=(current_loss, "K"))
  clients = previous_loss.shape[0]
  falling = (previous_loss - current_loss) / current_loss
  return jax.nn.softmax(1 / (clients - 1) + eta * falling / falling.sum())


def augmentation_weights(
  logits: Float[Array, "K 3 B C"], present: Bool[Array, " K"] | None = None
) -> Float[Array, " K"]:
  """AugHFL's weight of every client, by its stability under augmentation of the public batch.

  q_i = 1 / (KL(p_c || p_a1) + KL(p_c || p_a2)), w = q / (sum q + 1e-7).

  Args:
    logits: of the clean view and two augmented ones, (K, 3, B, C).
    present: clients that answered, (K,) bool; the others weigh nothing. None: all.

  Returns:
    (K,), without gradient.
  """
  shapes.check(logits=(logits, "K 3 B C"))
  clean, first, second = (jax.lax.stop_gradient(logits[:, view]) for view in range(3))
  moved = kl_divergence(clean, first) + kl_divergence(clean, second)
  q = 1 / jnp.maximum(moved, jnp.finfo(moved.dtype).eps)  # 0 where an answer does not move at all
  q = q if present is None else jnp.where(present, q, 0)
  return q / (q.sum() + 1e-7)


def merge_prototypes(
  sums: Float[Array, "K C w"], counts: Float[Array, "K C"]
) -> tuple[Float[Array, "C w"], Bool[Array, " C"]]:
  """Mean feature of every class over all clients' examples, and whether there is one."""
  shapes.check(sums=(sums, "K C w"), counts=(counts, "K C"))
  total = counts.sum(0)
  return sums.sum(0) / jnp.maximum(total, 1e-9)[:, None], total > 0
