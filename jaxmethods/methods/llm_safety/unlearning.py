"""Unlearning losses (GA, GradDiff, KL, NPO, SimNPO, RMU) and how well a fact was forgotten (TOFU).

Maini, Feng, Schwarzschild, Lipton, Kolter, "TOFU: a task of fictitious unlearning", arXiv 2401.06121
(code); NPO: Zhang, Lin, Bai, Mei, arXiv 2404.05868 (code); SimNPO: Fan, Liu, Lin, Jia, Zhang, Mei, Liu,
arXiv 2410.07163 (known); RMU: Li, Pan, Gopal et al., arXiv 2403.03218 (known).

The losses are terms to add: a method is its forget term plus, by choice, the negative log-likelihood of
retained text or `kl_to_reference` on it, all with coefficient 1 by default in the codes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from scipy import stats

from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety.likelihood import harmonic_mean
from jaxmethods.stats import shapes
from jaxmethods.trees import Key


class ForgetQuality(NamedTuple):
  """Two-sample Kolmogorov-Smirnov test of truth ratios, unlearned against retrained.

  Attributes:
    statistic: largest distance of the two distribution functions.
    p_value: the forget quality; small = told apart from a model that never saw the facts.
  """

  statistic: float
  p_value: float


# --- losses -------------------------------------------------------------------------------------


def gradient_ascent(forget_nll: Float[Array, ""]) -> Float[Array, ""]:
  """Computes -NLL(forget), the mean over tokens."""
  shapes.check(forget_nll=(forget_nll, ""))
  return -forget_nll


def gradient_difference(
  forget_nll: Float[Array, ""], retain_nll: Float[Array, ""]
) -> Float[Array, ""]:
  """Computes -NLL(forget) + NLL(retain), means over tokens."""
  shapes.check(forget_nll=(forget_nll, ""), retain_nll=(retain_nll, ""))
  return retain_nll - forget_nll


def kl_to_reference(
  reference_logits: Float[Array, "... V"],
  logits: Float[Array, "... V"],
  mask: Bool[Array, ...] | None = None,
) -> Float[Array, ""]:
  """Computes KL(reference || current) of next-token distributions, a mean over positions.

  Args:
    reference_logits: of the frozen model; gets no gradient.
    logits: of the current model.
    mask: positions that count; default all, padding too, as the code has it.
  """
  shapes.same(reference_logits=reference_logits, logits=logits)
  reference = jax.nn.log_softmax(jax.lax.stop_gradient(reference_logits))
  kl = (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum(-1)
  if mask is None:
    return kl.mean()
  shapes.same(kl=kl, mask=mask)
  return jnp.where(mask, kl, 0).sum() / jnp.maximum(mask.sum(), 1)


def npo(
  nll: Float[Array, " B"], reference_nll: Float[Array, " B"], *, beta: float = 0.1
) -> Float[Array, ""]:
  """Computes (2 / beta) mean -log sigmoid(beta (l - l_ref)), NPO.

  Args:
    nll: l, the summed NLL of the answers to forget.
    reference_nll: of the model at the start; gets no gradient.
    beta: > 0; towards 0 the gradient becomes that of gradient ascent on the summed NLL.
  """
  shapes.check(nll=(nll, "B"), reference_nll=(reference_nll, "B"))
  _check_forget(nll, beta)
  growth = nll - jax.lax.stop_gradient(reference_nll)
  return -2 / beta * jax.nn.log_sigmoid(beta * growth).mean()


def simnpo(
  nll: Float[Array, " B"], length: Int[Array, " B"], *, beta: float = 4.5, delta: float = 0.0
) -> Float[Array, ""]:
  """Computes -(2 / beta) mean log sigmoid(beta (l / length - delta)), SimNPO: no reference model.

  Args:
    nll: l, the summed NLL of the answers to forget.
    length: tokens of the answers; 0 counts as 1.
    beta: > 0.
    delta: the margin, in nats a token.
  """
  shapes.check(nll=(nll, "B"), length=(length, "B"))
  _check_forget(nll, beta)
  mean_nll = nll / jnp.maximum(length, 1)
  return -2 / beta * jax.nn.log_sigmoid(beta * (mean_nll - delta)).mean()


def control_vector(key: Key, width: int, *, steering: float = 20.0) -> Float[Array, " width"]:
  """Draws c u of RMU: u has uniform nonnegative entries and length 1, c is `steering` (known)."""
  u = jax.random.uniform(key, (width,))
  return steering * u / jnp.linalg.norm(u)


def representation_distance(
  hidden: Float[Array, "B S D"],
  target: Float[Array, "B S D"] | Float[Array, " D"],
  mask: Bool[Array, "B S"],
) -> Float[Array, ""]:
  """Averages squared differences over real tokens and widths, the term of RMU (known).

  RMU sums this distance of forget text to the control vector, and alpha times that of retained text to
  the hidden states of the frozen model.

  Args:
    hidden: states after one block of the current model.
    target: control vector or the frozen model's states; gets no gradient.
    mask: real tokens.
  """
  shapes.check(hidden=(hidden, "B S D"), target=(target, "... D"), mask=(mask, "B S"))
  squared = jnp.square(hidden - jax.lax.stop_gradient(target)).mean(-1)
  return jnp.where(mask, squared, 0).sum() / jnp.maximum(mask.sum(), 1)


def rmu(
  forget: Float[Array, ""], retain: Float[Array, ""], *, alpha: float = 100.0
) -> Float[Array, ""]:
  """Computes forget + alpha retain, two `representation_distance`s (known)."""
  shapes.check(forget=(forget, ""), retain=(retain, ""))
  return forget + alpha * retain


# --- metrics ------------------------------------------------------------------------------------


def truth_ratio(
  paraphrase_nll: Float[Array, " N"], perturbed_nll: Float[Array, "N P"]
) -> Float[Array, " N"]:
  """Computes exp(mean of perturbed NLLs - paraphrase NLL) (code of NPO).

  It is P(true) over the geometric mean of P(wrong), large where the fact is known. The ratio of
  open-unlearning is its inverse; the paper of TOFU takes an arithmetic mean of the wrong ones.

  Args:
    paraphrase_nll: mean NLL per token of the true answer in other words.
    perturbed_nll: of wrong answers.
  """
  shapes.check(paraphrase_nll=(paraphrase_nll, "N"), perturbed_nll=(perturbed_nll, "N P"))
  return jnp.exp(perturbed_nll.mean(1) - paraphrase_nll)


def forget_truth(ratio: Float[Array, " N"]) -> Float[Array, ""]:
  """Computes mean min(R, 1 / R) of the forget set: 1 if true and wrong are alike (code)."""
  return jnp.minimum(ratio, 1 / ratio).mean()


def retain_truth(ratio: Float[Array, " N"]) -> Float[Array, ""]:
  """Computes mean max(0, 1 - 1 / R) of text to keep: 1 if the truth is sure (code)."""
  return jnp.maximum(0, 1 - 1 / ratio).mean()


def option_probability(
  correct: Float[Array, " N"], wrong: Float[Array, "N P"]
) -> Float[Array, " N"]:
  """Computes P(correct) / (P(correct) + sum of P(wrong)), for questions with given options (code)."""
  shapes.check(correct=(correct, "N"), wrong=(wrong, "N P"))
  return correct / (correct + wrong.sum(1))


def forget_quality(unlearned: ArrayLike, retrained: ArrayLike) -> ForgetQuality:
  """Tests whether truth ratios of two models come from one distribution; on the host (code).

  Args:
    unlearned: truth ratios of the forget set under the model that unlearned it, (N,).
    retrained: under a model trained without it, (M,). Inverse ratios in both give the same result.
  """
  shapes.check(unlearned=(unlearned, "N"), retrained=(retrained, "M"))
  for name, ratio in (("unlearned", unlearned), ("retrained", retrained)):
    if not np.size(ratio):
      raise InputError(f"{name}: the forget set is empty")
  test = stats.ks_2samp(np.asarray(unlearned), np.asarray(retrained))
  return ForgetQuality(float(test.statistic), float(test.pvalue))


def model_utility(metrics: ArrayLike) -> Float[Array, ""]:
  """Computes the harmonic mean of metrics in [0, 1], in TOFU nine; one 0 makes it 0 (code).

  The nine are probability, ROUGE and truth ratio of retained text, real authors and world facts.
  """
  return harmonic_mean(metrics)


def _check_forget(nll: Array, beta: float) -> None:
  if not nll.size:
    raise InputError("nll: the forget set is empty")
  if not beta > 0:
    raise InputError(f"beta must be positive, got {beta}")
