"""Memorised records: canaries, membership inference, DP-SGD (stage 2 of the survey)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.experiments.llm_safety.config import MemoriseSettings
from jaxmethods.experiments.llm_safety.scores import Makers, Scores
from jaxmethods.methods.llm_safety import likelihood, memorisation, privacy
from jaxmethods.models import tiny_gpt
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.privacy import Guarantee, poisson_rows
from jaxmethods.testbeds.language.toy_models import Examples, Toy
from jaxmethods.testbeds.language.toy_world import Texts
from jaxmethods.trees import Params, PyTree

_LENGTH = 4  # digits of a canary
_CANARY_AT = 3  # BOS s SEP d d d d EOS: the first digit


class Memorising:
  """Records of a seed: members, others alike, canaries."""

  def __init__(self, toy: Toy, settings: MemoriseSettings) -> None:
    self.toy, self.settings = toy, settings
    rng = toy.rng("records")
    self.members, self.others = (records(settings.members, rng) for _ in range(2))
    self.secrets = secrets_of(settings, rng)
    copies = [c for c, n in enumerate(settings.repeats) for _ in range(n)]
    self.data = toy_world.joined(self.members, canaries(self.secrets, np.array(copies)))

  def trained(self, texts: Texts) -> Params:
    """Trains the base model on records, without protection."""
    s = self.settings
    return toy_models.fit(
      toy_models.language_loss, self.toy.base, toy_models.labelled(texts), self.toy.rng("memorise"),
      self.toy.fixed, steps=s.steps, rate=s.rate, batch_size=s.batch,
    )  # fmt: skip

  def deduplicated(self) -> Params:
    """Trains on every record once."""
    first = np.unique(self.data.ids, axis=0, return_index=True)[1]
    return self.trained(self.data.take(np.sort(first)))

  def guarantee(self, sigma: float) -> Guarantee:
    """States what a noise promises."""
    s, size = self.settings, len(self.data.ids)
    rate = s.batch / size
    spent = privacy.epsilon(rate, sigma, s.steps, s.delta)
    needed = privacy.poisson_capacity(size, rate)
    rows = -(-needed // s.microbatch) * s.microbatch
    return Guarantee(
      spent, s.delta, sigma, s.clip, rate, s.batch, s.steps, rows, s.microbatch, "rdp"
    )

  def private(self, promise: Guarantee) -> Params:
    """Trains by DP-SGD on all parameters."""
    fixed = self.toy.fixed | {
      "clip": jnp.float32(promise.clip_norm),
      "sigma": jnp.float32(promise.noise_multiplier),
      "expected": jnp.float32(promise.expected_batch_size),
      "microbatch": jnp.zeros(promise.microbatch),
    }
    start = toy_models.learner(self.toy.base)
    batches = self._poisson(promise)
    s = self.settings
    return toy_models.advance(
      private_gradient, start, batches, fixed, steps=s.steps, rate=s.rate
    ).params

  def _poisson(self, promise: Guarantee) -> Iterator[Examples]:
    examples = toy_models.labelled(self.data)
    drawn = poisson_rows(promise, len(self.data.ids), self.toy.seed, 0)
    noise = self.toy.rng("noise").integers(0, 2**31, promise.steps)
    for seed, (rows, real) in zip(noise, drawn, strict=False):
      yield {name: x[rows] for name, x in examples.items()} | {"real": real, "seed": seed}

  def scores(self, params: Params, epsilon: float) -> Scores:
    """Attacks a model: membership, canaries, and the bound on epsilon that both give."""
    s = self.settings
    found, nll = zip(*(self._records(params, x) for x in (self.members, self.others)), strict=True)
    result = memorisation.membership(-nll[0], -nll[1], fpr=s.fpr)
    rank = self._ranks(params)
    exposure = memorisation.exposure(rank, 10**_LENGTH)
    extras = {
      "exposure": float(exposure.mean()),
      "extracted": float((rank == 1).mean()),
      "tpr_at_5": float(result.tpr),
      "min_k_auc": float(memorisation.membership(found[0], found[1], fpr=s.fpr).auc),
      "audit_epsilon": audit(-np.asarray(nll[0]), -np.asarray(nll[1]), s.delta),
      "member_nll": float(nll[0].mean()),
    }
    return Scores(float(result.auc), self.toy.utility(params), extras, epsilon)

  def _records(self, params: Params, texts: Texts) -> tuple[jax.Array, jax.Array]:
    """Returns Min-K% scores and mean NLLs."""
    examples = toy_models.labelled(texts)
    nll = toy_models.token_nll(params, **examples, heads=self.toy.heads)
    mask = jnp.asarray(texts.real[:, 1:])
    return memorisation.min_k_score(-nll, mask, fraction=self.settings.min_k), nll.sum(
      1
    ) / mask.sum(1)

  def _ranks(self, params: Params) -> jax.Array:
    """Ranks every canary among all strings of digits, by the NLL of the digits alone."""
    ranks = []
    for i, secret in enumerate(self.secrets):
      nll = _all_digits(params, jnp.int32(toy_world.SUBJECTS[i]), heads=self.toy.heads)
      number = int("".join(str(d - toy_world.DIGITS[0]) for d in secret))
      ranks.append(memorisation.exposure_rank(nll, jnp.int32(number)))
    return jnp.stack(ranks)


def records(count: int, rng: np.random.Generator) -> Texts:
  """Draws BOS f f s o o o o EOS with random objects."""
  some = lambda tokens, n: [int(x) for x in rng.choice(np.array(tokens), n)]
  w = toy_world
  rows = [
    [w.BOS, *some(w.FILLERS, 2), *some(w.SUBJECTS, 1), *some(w.OBJECTS, 4), w.EOS]
    for _ in range(count)
  ]
  return w.pack(rows, [4] * count, w.FACT)


def secrets_of(settings: MemoriseSettings, rng: np.random.Generator) -> np.ndarray:
  """Draws the digits of the canaries, or takes those that are given, (canaries, 4) token ids.

  Raises:
    InputError: a canary holds what is no digit of the vocabulary, or is of another length.
  """
  for i, canary in enumerate(settings.canaries):
    if outside := [token for token in canary if token not in toy_world.DIGITS]:
      raise InputError(
        f"memorise.canaries: canary {i} holds token {outside[0]}, digits are tokens 10..19"
      )
    if len(canary) != _LENGTH:
      raise InputError(
        f"memorise.canaries: canary {i} must have {_LENGTH} digits, got {len(canary)}"
      )
  if settings.canaries:
    return np.array(settings.canaries)
  return rng.choice(np.array(toy_world.DIGITS), (len(settings.repeats), _LENGTH))


def canaries(secrets: np.ndarray, which: np.ndarray) -> Texts:
  """Writes BOS s SEP d d d d EOS; every canary has a subject of its own."""
  w = toy_world
  rows = [[w.BOS, w.SUBJECTS[c], w.SEPARATOR, *map(int, secrets[c]), w.EOS] for c in which]
  return w.pack(rows, [_CANARY_AT] * len(rows), w.FACT)


def private_gradient(params: Params, batch: toy_models.Batch, fixed: PyTree) -> Params:
  """Computes the gradient of a step of DP-SGD over all parameters."""
  return privacy.private_gradient(
    lambda params, example: _of_one(params, example, len(fixed["heads"])),
    params,
    {"ids": batch["ids"], "labels": batch["labels"]},
    batch["real"],
    jax.random.key(batch["seed"]),
    clip_norm=fixed["clip"],
    noise_multiplier=fixed["sigma"],
    expected_batch_size=fixed["expected"],
    microbatch=len(fixed["microbatch"]),
  ).gradient


def _of_one(params: Params, example: PyTree, heads: int) -> jax.Array:
  out = tiny_gpt.read(params, example["ids"][None], heads).logits
  return likelihood.mean_token_nll(out, example["labels"][None])


@functools.partial(jax.jit, static_argnames="heads")
def _all_digits(params: Params, subject: jax.Array, *, heads: int) -> jax.Array:
  """Computes the NLL of all 10^4 strings of digits: the 10^3 that they begin with are read once."""
  first = toy_world.DIGITS[0]
  number = jnp.arange(10 ** (_LENGTH - 1))
  digits = [number // 10**i % 10 for i in range(_LENGTH - 2, -1, -1)]
  start = [jnp.full_like(number, toy_world.BOS), jnp.full_like(number, subject)]
  start.append(jnp.full_like(number, toy_world.SEPARATOR))
  ids = jnp.stack([*start, *(first + d for d in digits)], 1)
  out = tiny_gpt.read(params, ids, heads).logits[:, _CANARY_AT - 1 :]
  log_p = jax.nn.log_softmax(out)[..., first : first + 10]
  told = sum(jnp.take_along_axis(log_p[:, i], digit[:, None], 1) for i, digit in enumerate(digits))
  return -(told + log_p[:, -1]).ravel()


def audit(member: np.ndarray, other: np.ndarray, delta: float) -> float:
  """Bounds epsilon from below: a threshold chosen on one half of the records, tested on the other.

  All records are of one run, so that its coins are shared (inferred): the bound is a check, no proof.
  """
  half = min(len(member), len(other)) // 2
  if not half:
    return math.nan

  def bound(threshold: float, part: slice) -> float:
    hits, alarms = (x[part] >= threshold for x in (member, other))
    return privacy.empirical_epsilon(
      int(hits.sum()), hits.size, int(alarms.sum()), alarms.size, delta
    )

  chosen = max(np.unique(member[:half]), key=lambda t: bound(t, slice(half)))
  return bound(chosen, slice(half, None))


def makers(toy: Toy, settings: MemoriseSettings) -> Makers:
  """Returns the rows.

  Raises:
    InputError: canaries outside the vocabulary, or an epsilon that cannot be reached.
  """
  stage = Memorising(toy, settings)
  if settings.batch > len(stage.data.ids):
    raise InputError(f"memorise.batch: {settings.batch} is more than {len(stage.data.ids)} records")
  sigmas = list(settings.noises)
  if settings.epsilon:
    rate = settings.batch / len(stage.data.ids)
    try:
      sigmas[2] = privacy.noise_for(settings.epsilon, rate, settings.steps, settings.delta)
    except InputError as error:
      raise InputError(f"memorise.epsilon: {error}") from None

  def private(sigma: float) -> Scores:
    promise = stage.guarantee(sigma)
    return stage.scores(stage.private(promise), promise.epsilon)

  return {
    "untouched": lambda: stage.scores(toy.base, 0.0),
    "plain": lambda: stage.scores(stage.trained(stage.data), math.inf),
    "dedup": lambda: stage.scores(stage.deduplicated(), math.inf),
    "dp_low": lambda: private(sigmas[0]),
    "dp_mid": lambda: private(sigmas[1]),
    "dp_high": lambda: private(sigmas[2]),
  }
