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

from jaxmethods.federated.exchange import Teachers
from jaxmethods.images import augment, views
from jaxmethods.stats.losses import cross_entropy, mean_of_real

DDMForm = Literal["code", "plain"]


def kl_divergence(teacher: Array, student: Array) -> Array:
  """KL(softmax(teacher) || softmax(student)) of logits (..., B, C), averaged over the batch: (...)."""
  log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(-1)


def border(image: Array) -> int:
  """Width of the border that crops reach into: an eighth of the side, the published 4 of 32 pixels."""
  return image.shape[0] // 8


def private_views(key: Array, image: Array, *, strong: bool = True, weak: bool = True) -> Array:
  """The views of a private image, drawn anew every time it is used, whole values 0..255.

  Args:
    key: random key.
    image: (side, side, 3) uint8.
    strong: whether there are two AugMix draws of the crop.
    weak: whether there is SimCLR's view.

  Returns:
    (views, side, side, 3) float32: the crop, then the strong views, then the weak one.
  """
  crop_key, strong_key, weak_key = jax.random.split(key, 3)
  pad = border(image)
  crop = views.crop_and_flip(crop_key, image, pad=pad)
  drawn = [crop[None]]
  if strong:
    drawn.append(jax.lax.map(lambda k: augment.augmix(k, crop), jax.random.split(strong_key)))
  if weak:
    drawn.append(views.weak_view(weak_key, image, pad=pad)[None])
  return jnp.concatenate(drawn)


# --- local learning -----------------------------------------------------------------------------


def jensen_shannon(logits: Array) -> Array:
  """Consistency of the views of an image, in [0, log(views)]; gradients flow into all of them.

  Args:
    logits: (views, B, C); the original and two AugMix draws in the paper.
  """
  p = jax.nn.softmax(logits)
  log_p = jax.nn.log_softmax(logits)
  log_mixture = jnp.log(jnp.clip(p.mean(0), 1e-7, 1.0))
  return (p * (log_p - log_mixture)).sum(-1).mean()


def supervised_contrast(
  features: Array, labels: Array, temperature: float = 0.2, base_temperature: float = 0.07
) -> Array:
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
  weak: Array, strong: Array, original: Array, temperature: float = 0.2, form: DDMForm = "code"
) -> Array:
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
  if form not in ("code", "plain"):
    raise ValueError(f"form must be code or plain, got {form!r}")
  shaped = jnp.exp if form == "code" else lambda s: s
  batch = jnp.concatenate([weak, original])
  target = jax.lax.stop_gradient(jax.nn.log_softmax(shaped(weak @ batch.T) / temperature))
  q = jax.nn.softmax(shaped(strong @ batch.T) / temperature)
  return (jnp.exp(target) * (target - jnp.log(q + 1e-9))).sum(-1).mean()


def diversity_contrast(
  original: Array,
  weak: Array,
  strong: Array,
  labels: Array,
  *,
  beta: float = 1.0,
  temperature: float = 0.2,
  base_temperature: float = 0.07,
  ddm_temperature: float = 0.2,
  form: DDMForm = "code",
) -> Array:
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
  contrast = supervised_contrast(
    jnp.stack([original, weak]), labels, temperature, base_temperature
  )  # fmt: skip
  return contrast + beta * distribution_matching(weak, strong, original, ddm_temperature, form)


# --- learning from each other -------------------------------------------------------------------


def knowledge_transfer(accuracy: Array) -> Array:
  """M[k, i]: client k may learn from i, i != k and ACC_i >= ACC_k; (K,) -> (K, K) bool."""
  better = accuracy[None, :] >= accuracy[:, None]
  return better & ~jnp.eye(len(accuracy), dtype=bool)


def collaboration(logits: Array, weights: Array) -> Array:
  """L_col of every client: sum_i w_ki KL(stopgrad p_i || p_k) on a public batch.

  All clients' outputs are taken before anyone learns, so the order of the updates does not matter.

  Args:
    logits: (K, B, C).
    weights: (K, K), row k for client k; see `transfer_weights`.

  Returns:
    (K,); entry k depends on the logits of client k alone as far as gradients go.
  """
  teachers = jax.lax.stop_gradient(logits)
  pairs = jax.vmap(lambda student: kl_divergence(teachers, student[None]))(logits)  # (K, K)
  return (weights * pairs).sum(1)


def transfer_weights(allowed: Array) -> Array:
  """Each client learns evenly from those it may learn from: rows of (K, K) bool over their sums.

  An empty row, that of the strict best client, stays zero: it learns nothing. All true but the diagonal
  gives the symmetric HFL.
  """
  return allowed / jnp.maximum(allowed.sum(1, keepdims=True), 1)


def mixed_teachers(log_p: Array, weights: Array) -> Teachers:
  """The teacher sum_i w_ki p_i of every client; who may learn from nobody has none.

  Its loss has the gradient of `collaboration` (rows of weights that sum to 1).

  Args:
    log_p: answers to a public batch, (K, B, C).
    weights: (K, K), row k for client k.
  """
  return Teachers(jnp.einsum("ki,ibc->kbc", weights, jnp.exp(log_p)), weights.sum(1) > 0)


# --- rivals on the same exchange ----------------------------------------------------------------


def consensus_distillation(logits: Array, mean_of: Literal["softmax", "logits"]) -> Array:
  """KL of every client to the clients' mean output, which is held fixed; (K, B, C) -> (K,).

  "softmax" is FedMD's consensus (here with KL for comparability; its paper uses L1 on logits), "logits"
  the teacher of FedDF.
  """
  teachers = jax.lax.stop_gradient(logits)
  soft = mean_of == "softmax"
  teacher = jnp.log(jax.nn.softmax(teachers).mean(0)) if soft else teachers.mean(0)
  return jax.vmap(lambda student: kl_divergence(teacher, student))(logits)


def symmetric_cross_entropy(
  logits: Array, labels: Array, alpha: float = 0.1, beta: float = 1.0
) -> Array:
  """RHFL's local loss alpha CE + beta RCE, RCE = -mean sum_c clip(p_c) log clip(y_c)."""
  p = jnp.clip(jax.nn.softmax(logits), 1e-7, 1.0)
  target = jnp.clip(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), 1e-4, 1.0)
  reverse = -(p * jnp.log(target)).sum(-1).mean()
  return alpha * cross_entropy(logits, labels) + beta * reverse


def confidence_weights(previous_loss: Array, current_loss: Array, eta: float = 0.5) -> Array:
  """RHFL's weight of every client by how fast its mean local loss falls; (K,), (K,) -> (K,)."""
  clients = previous_loss.shape[0]
  falling = (previous_loss - current_loss) / current_loss
  return jax.nn.softmax(1 / (clients - 1) + eta * falling / falling.sum())


def augmentation_weights(logits: Array, present: Array | None = None) -> Array:
  """AugHFL's weight of every client by how stable it is under augmentation of the public batch.

  q_i = 1 / (KL(p_c || p_a1) + KL(p_c || p_a2)), w = q / (sum q + 1e-7).

  Args:
    logits: of the clean view and two augmented ones, (K, 3, B, C).
    present: (K,) bool, who answered; the others weigh nothing. None: all.

  Returns:
    (K,), without gradient.
  """
  clean, first, second = (jax.lax.stop_gradient(logits[:, view]) for view in range(3))
  moved = kl_divergence(clean, first) + kl_divergence(clean, second)
  q = 1 / jnp.maximum(moved, jnp.finfo(moved.dtype).eps)  # 0 where an answer does not move at all
  q = q if present is None else jnp.where(present, q, 0)
  return q / (q.sum() + 1e-7)


def prototype_distance(features: Array, prototypes: Array, known: Array, labels: Array) -> Array:
  """FedProto's pull: mean ||h - prototype[y]||^2 over the examples whose class has a prototype.

  Args:
    features: projected to the clients' common width, (B, w).
    prototypes: (C, w).
    known: (C,) bool.
    labels: (B,) int.
  """
  far = jnp.square(features - prototypes[labels]).sum(-1)
  return mean_of_real(far, known[labels])


def merge_prototypes(sums: Array, counts: Array) -> tuple[Array, Array]:
  """Mean feature of every class over all clients' examples: (K, C, w), (K, C) -> (C, w), (C,) bool."""
  total = counts.sum(0)
  return sums.sum(0) / jnp.maximum(total, 1e-9)[:, None], total > 0
