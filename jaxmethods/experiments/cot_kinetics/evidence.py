"""Which answers to trust: what is known of each one, every score of it, and how well scores rank them.

Shared by both readers of `experiments.cot_kinetics`. An answer's texts and hidden states are reduced to
`Evidence` where they arise; scores and metrics are made of that alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmethods.methods import cot_kinetics as method
from jaxmethods.models import reading
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.stats import confidence, ranking

if TYPE_CHECKING:
  from jaxmethods.experiments.cot_kinetics.config import Config

SEGMENTS = ("reasoning", "output", "answer")
_OUTPUT = SEGMENTS.index("output")
# Among these the one of temperature scaling is chosen on the calibration problems (ours).
_POWERS = (8, 6, 4, 3, 2, 1)
SCALES = tuple(confidence.HIGHEST / k for k in _POWERS)


class Facts(NamedTuple):
  """What is known of answers without looking into the model, (N,) each.

  Attributes:
    real: False for padding of the last batch.
    correct: whether the answer is right.
    answered: whether there is one: a text that was cut off has none, and is wrong.
    reasoning: number of reasoning tokens.
    answer_at: where the answer begins, counted from the first token written.
    agreement: share of the samples that agree with their majority; NaN without samples.
    sample_entropy: length-normalised entropy of the samples; NaN without.
    verbalised: what the model itself says; NaN where it was not asked.
  """

  real: jax.Array
  correct: jax.Array
  answered: jax.Array
  reasoning: jax.Array
  answer_at: jax.Array
  agreement: jax.Array
  sample_entropy: jax.Array
  verbalised: jax.Array


class Evidence(NamedTuple):
  """All that is kept of N answers; S segments.

  Attributes:
    facts: see `Facts`.
    paths: "residual" and "with_final_norm" -> (N, S, ...).
    token_terms: (N, S), of single tokens' paths, residual.
    coe: (N, 2), CoE-R and CoE-C of the output, states as published (with final norm).
    tokens: means over the output, (N,) each: max_prob, and the fields of `TokenStatistics`.
    scaled: (N, len(SCALES)), max_prob at every scale.
    dropout: (N,) each; NaN without.
  """

  facts: Facts
  paths: dict[str, method.Path]
  token_terms: method.Terms
  coe: jax.Array
  tokens: dict[str, jax.Array]
  scaled: jax.Array
  dropout: confidence.DropoutStatistics


def segments(reasoning: jax.Array, lengths: jax.Array, size: int) -> jax.Array:
  """Masks (B, S, size) of the tokens written: reasoning comes first, the answer is the rest."""
  place = jnp.arange(size)
  output = place < lengths[:, None]
  thought = place < reasoning[:, None]
  return jnp.stack([thought & output, output, output & ~thought], 1)


def gather(
  model: CausalLM, variables: Any, text: reading.Text, facts: Facts, key: jax.Array, config: Config
) -> Evidence:
  """Reads a batch of answers.

  Args:
    model: that wrote them, or another.
    variables: its collections.
    text: prompts and answers, with the segments of `SEGMENTS`.
    facts: of the answers.
    key: of MC dropout.
    config: which reading of CoT-Kinetics, how many dropout passes.
  """

  def per_token(logits, tokens):
    plain, scaled = confidence.statistics_at_scales(logits, tokens, _POWERS)
    return plain, jnp.exp(scaled)

  read = reading.read(
    model, variables, text, per_token, fold=method.follow_tokens,
    official_first_token=config.official_first_token,
  )  # fmt: skip
  plain, scaled = read.tokens
  output = text.segments[:, _OUTPUT]
  mean = lambda values: confidence.mean_over(values, output)
  tokens = {name: mean(values) for name, values in plain._asdict().items()}
  tokens["max_prob"] = mean(jnp.exp(plain.max_log_prob))
  normed = reading.with_final_norm(read)
  chain = method.chain_of_embedding(normed[:, _OUTPUT])
  paths = {"residual": method.path(read.states), "with_final_norm": method.path(normed)}
  nothing = jnp.full(len(text.ids), jnp.nan)
  dropout = confidence.DropoutStatistics(nothing, nothing, nothing)
  if config.dropout_passes:
    start = text.ids.shape[1] - output.shape[1]
    keys = jax.random.split(key, config.dropout_passes)
    probs = reading.dropout_probs(
      model, variables, text, start - 1 + facts.answer_at, keys, rate=config.dropout_rate
    )
    dropout = confidence.dropout_statistics(probs)
  return Evidence(
    facts,
    paths,
    method.token_terms(read.folded, text.segments),
    jnp.stack([chain.real, chain.complex], -1),
    tokens,
    jax.vmap(mean, in_axes=2, out_axes=1)(scaled),
    dropout,
  )


# --- scores ---------------------------------------------------------------------------------------


def kinetics(evidence: Evidence, config: Config, **changes: Any) -> jax.Array:
  """E of every answer, (N,), with the options of the config or changed ones."""
  option = lambda name: changes.get(name, getattr(config, name))
  segment = SEGMENTS.index(option("segment"))
  pick = lambda tree: jax.tree.map(lambda x: x[:, segment], tree)
  gamma, form = option("gamma"), option("form")
  if option("pool") == "per_token":
    return method.energy_of(pick(evidence.token_terms), gamma, form)
  return method.energy(pick(evidence.paths[option("states")]), gamma, form)


def scores(evidence: Evidence, names: tuple[str, ...], config: Config) -> dict[str, jax.Array]:
  """Scores of answers to one set of problems, higher for more confident.

  Args:
    evidence: of the answers, those to the calibration problems first.
    names: which scores.
    config: options.

  Returns:
    name -> (N,).
  """
  facts, tokens = evidence.facts, evidence.tokens
  fit = jnp.arange(len(facts.correct)) < config.calibration
  energy = lambda **changes: kinetics(evidence, config, **changes)
  by_form = {form: energy(form=form) for form in method.FORMS}

  def best_form() -> jax.Array:
    every = jnp.stack(list(by_form.values()))
    weight = (fit & facts.real).astype(jnp.float32)
    found = jax.vmap(lambda e: ranking.ranking(e, facts.correct, weight).auroc)(every)
    return every[jnp.argmax(jnp.nan_to_num(found))]

  def scaled() -> jax.Array:
    p = jnp.clip(evidence.scaled, 1e-6, 1 - 1e-6)
    right = facts.correct[:, None]
    loss = -jnp.where(right, jnp.log(p), jnp.log1p(-p))
    chosen = jnp.argmin(jnp.where((fit & facts.real)[:, None], loss, 0).sum(0))
    return evidence.scaled[:, chosen]

  pooled = "with_final_norm" if config.pool == "mean" else config.states
  every = {
    "cot_kinetics": energy(),
    **{f"kinetics_{form}": value for form, value in by_form.items()},
    "kinetics_momentum": energy(gamma=0.0),
    "kinetics_per_token": energy(pool="per_token", states="residual"),
    "kinetics_output": energy(segment="output"),
    "kinetics_answer": energy(segment="answer"),
    "kinetics_final_norm": energy(states=pooled),
    "kinetics_calibrated": best_form(),
    "max_prob": tokens["max_prob"],
    "perplexity": tokens["max_log_prob"],
    "entropy": -tokens["entropy"],
    "temperature_scaled": scaled(),
    "energy": tokens["energy"],
    "coe_r": evidence.coe[:, 0],
    "coe_c": evidence.coe[:, 1],
    "length": -facts.reasoning.astype(jnp.float32),
    "random": jax.random.uniform(jax.random.key(0), facts.correct.shape),
    "self_consistency": facts.agreement,
    "sample_entropy": -facts.sample_entropy,
    "dropout_max_prob": evidence.dropout.max_mean_prob,
    "dropout_entropy": -evidence.dropout.predictive_entropy,
    "dropout_information": -evidence.dropout.mutual_information,
    "verbalised": facts.verbalised,
  }
  return {name: every[name] for name in names}


def judge(
  evidence: Evidence, names: tuple[str, ...], config: Config, chosen: jax.Array | None = None
) -> dict[str, jax.Array]:
  """How well every score ranks the answers to the test problems; means over temperatures.

  Args:
    evidence: (G, N, ...) of G temperatures, answers to the calibration problems first.
    names: which scores.
    config: of the run.
    chosen: index of the score that the first metrics are about; None: `config.score`. As an array it
      lets the rows of a comparison share one compiled program.

  Returns:
    Metrics. A ranking is NaN where all answers are right, or all wrong.
  """
  if chosen is None:
    chosen = jnp.int32(names.index(config.score))
  matrix, facts = test_scores(evidence, names, config)
  weight = facts.real.astype(jnp.float32)

  def metrics(score: jax.Array, sign: int) -> ranking.Ranking:
    """(G, n) to means over G; sign -1: the incorrect answers are the positives."""
    positive = facts.correct if sign == 1 else ~facts.correct
    found = jax.vmap(ranking.ranking)(sign * score, positive, weight)
    return jax.tree.map(jnp.mean, found)

  right, wrong = (jax.vmap(lambda s, sign=sign: metrics(s, sign))(matrix) for sign in (1, -1))
  share = lambda values: (values * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  ok = evidence.paths[config.states].ok[:, config.calibration :, SEGMENTS.index(config.segment)]
  return {
    "auroc": right.auroc[chosen],
    "aupr": right.aupr[chosen],
    "fpr95": right.fpr95[chosen],
    "aupr_incorrect": wrong.aupr[chosen],
    "fpr95_incorrect": wrong.fpr95[chosen],
    "accuracy": share(facts.correct).mean(),
    "answered": share(facts.answered).mean(),
    "standing_paths": share(~ok).mean(),
    **{f"auroc/{name}": right.auroc[i] for i, name in enumerate(names)},
  }


def test_scores(
  evidence: Evidence, names: tuple[str, ...], config: Config
) -> tuple[jax.Array, Facts]:
  """Scores (S, G, n), in the order of `names`, and facts (G, n) of answers to the test problems."""
  every = jax.vmap(lambda part: scores(part, names, config))(evidence)
  ordered = jnp.stack([every[name] for name in names])  # vmap has sorted the names
  cut = slice(config.calibration, None)
  return ordered[:, :, cut], jax.tree.map(lambda x: x[:, cut], evidence.facts)
