"""Which answers to trust: the facts about each one, its scores, and how well scores rank answers.

Texts and hidden states are reduced to `Evidence` where they arise; scores and metrics are made of that
alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmethods.experiments.cot_kinetics.config import Energy, Passes, Trial
from jaxmethods.methods import cot_kinetics as method
from jaxmethods.models import reading
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.stats import confidence, ranking
from jaxmethods.trees import Params

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
    steps: number of equations that the reasoning writes out.
  """

  real: jax.Array
  correct: jax.Array
  answered: jax.Array
  reasoning: jax.Array
  answer_at: jax.Array
  agreement: jax.Array
  sample_entropy: jax.Array
  verbalised: jax.Array
  steps: jax.Array


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


def per_token(logits: jax.Array, tokens: jax.Array) -> tuple[confidence.TokenStatistics, jax.Array]:
  """Statistics of written tokens, and the largest probability at every scale."""
  plain, scaled = confidence.statistics_at_scales(logits, tokens, _POWERS)
  return plain, jnp.exp(scaled)


def gather(
  model: CausalLM,
  variables: Params,
  text: reading.Text,
  facts: Facts,
  key: jax.Array,
  passes: Passes,
) -> Evidence:
  """Reads a batch of answers.

  Args:
    model: that wrote them, or another.
    variables: its collections.
    text: prompts and answers, with the segments of `SEGMENTS`.
    facts: of the answers.
    key: of MC dropout.
    passes: over the text.
  """
  read = reading.read(
    model, variables, text, per_token, fold=method.follow_tokens,
    official_first_token=passes.official_first_token,
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
  if passes.dropout_passes:
    start = text.ids.shape[1] - output.shape[1]
    keys = jax.random.split(key, passes.dropout_passes)
    probs = reading.dropout_probs(
      model, variables, text, start - 1 + facts.answer_at, keys, rate=passes.dropout_rate
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


def kinetics(evidence: Evidence, energy: Energy) -> jax.Array:
  """E of every answer, (N,)."""
  segment = SEGMENTS.index(energy.segment)
  pick = lambda tree: jax.tree.map(lambda x: x[:, segment], tree)
  if energy.pool == "per_token":
    return method.energy_of(pick(evidence.token_terms), energy.gamma, energy.form)
  return method.energy(pick(evidence.paths[energy.states]), energy.gamma, energy.form)


def scores(evidence: Evidence, trial: Trial) -> dict[str, jax.Array]:
  """Scores of answers to one set of problems, higher for more confident.

  Args:
    evidence: of the answers, those to the calibration problems first.
    trial: which scores.

  Returns:
    name -> (N,).
  """
  facts, tokens = evidence.facts, evidence.tokens
  fit = (jnp.arange(len(facts.correct)) < trial.calibration) & facts.real
  energy = lambda **changes: kinetics(evidence, trial.energy._replace(**changes))
  by_form = {form: energy(form=form) for form in method.FORMS}
  pooled = "with_final_norm" if trial.energy.pool == "mean" else trial.energy.states
  every = {
    "cot_kinetics": energy(),
    **{f"kinetics_{form}": value for form, value in by_form.items()},
    "kinetics_momentum": energy(gamma=0.0),
    "kinetics_per_token": energy(pool="per_token", states="residual"),
    "kinetics_output": energy(segment="output"),
    "kinetics_answer": energy(segment="answer"),
    "kinetics_final_norm": energy(states=pooled),
    "kinetics_calibrated": best_form(jnp.stack(list(by_form.values())), facts.correct, fit),
    "max_prob": tokens["max_prob"],
    "perplexity": tokens["max_log_prob"],
    "entropy": -tokens["entropy"],
    "temperature_scaled": best_scale(evidence.scaled, facts.correct, fit),
    "energy": tokens["energy"],
    "coe_r": evidence.coe[:, 0],
    "coe_c": evidence.coe[:, 1],
    "length": -facts.reasoning.astype(jnp.float32),
    "steps": -facts.steps.astype(jnp.float32),
    "random": jax.random.uniform(jax.random.key(0), facts.correct.shape),
    "self_consistency": facts.agreement,
    "sample_entropy": -facts.sample_entropy,
    "dropout_max_prob": evidence.dropout.max_mean_prob,
    "dropout_entropy": -evidence.dropout.predictive_entropy,
    "dropout_information": -evidence.dropout.mutual_information,
    "verbalised": facts.verbalised,
  }
  return {name: every[name] for name in trial.names}


def best_form(energies: jax.Array, correct: jax.Array, fit: jax.Array) -> jax.Array:
  """Chooses form and sign by the AUROC on some answers.

  Args:
    energies: (F, N) of F forms.
    correct: (N,) bool.
    fit: (N,) bool, the answers that decide.

  Returns:
    (N,), the energies of the best form, or minus them.
  """
  weight = fit.astype(jnp.float32)
  energies = jnp.concatenate([energies, -energies])
  found = jax.vmap(lambda e: ranking.ranking(e, correct, weight).auroc)(energies)
  return energies[jnp.argmax(jnp.nan_to_num(found))]


def best_scale(scaled: jax.Array, correct: jax.Array, fit: jax.Array) -> jax.Array:
  """The probabilities (N, scales) at the scale of least cross-entropy on the answers `fit`: (N,)."""
  p = jnp.clip(scaled, 1e-6, 1 - 1e-6)
  loss = -jnp.where(correct[:, None], jnp.log(p), jnp.log1p(-p))
  return scaled[:, jnp.argmin(jnp.where(fit[:, None], loss, 0).sum(0))]


def judge(
  evidence: Evidence, trial: Trial, chosen: jax.Array | None = None
) -> dict[str, jax.Array]:
  """How well every score ranks the answers to the test problems; means over temperatures.

  Args:
    evidence: (G, N, ...) of G temperatures, answers to the calibration problems first.
    trial: which scores.
    chosen: index of the score that the first metrics are about; None: `trial.score`. As an array it
      lets the rows of a comparison share one compiled program.

  Returns:
    Metrics. A ranking is NaN where all answers are right, or all wrong.
  """
  names, energy = trial.names, trial.energy
  if chosen is None:
    chosen = jnp.int32(names.index(trial.score))
  matrix, facts = test_scores(evidence, trial)
  weight = facts.real.astype(jnp.float32)
  right = jax.vmap(lambda s: _mean_ranking(s, facts.correct, weight))(matrix)
  wrong = jax.vmap(lambda s: _mean_ranking(-s, ~facts.correct, weight))(matrix)
  same = jax.vmap(lambda s: _same_length(s, facts, weight))(matrix)
  share = lambda values: (values * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  ok = evidence.paths[energy.states].ok[:, trial.calibration :, SEGMENTS.index(energy.segment)]
  return {
    "auroc": right.auroc[chosen],
    "aupr": right.aupr[chosen],
    "fpr95": right.fpr95[chosen],
    "aupr_incorrect": wrong.aupr[chosen],
    "fpr95_incorrect": wrong.fpr95[chosen],
    "accuracy": share(facts.correct).mean(),
    "answered": share(facts.answered).mean(),
    "standing_paths": share(~ok).mean(),
    "auroc_same_length": same[chosen],
    **{f"auroc/{name}": right.auroc[i] for i, name in enumerate(names)},
    **{f"auroc_same_length/{name}": same[i] for i, name in enumerate(names)},
  }


def _mean_ranking(score: jax.Array, positive: jax.Array, weight: jax.Array) -> ranking.Ranking:
  """Ranking of answers (G, n) by one score, averaged over the G temperatures."""
  return jax.tree.map(jnp.mean, jax.vmap(ranking.ranking)(score, positive, weight))


def _same_length(score: jax.Array, facts: Facts, weight: jax.Array) -> jax.Array:
  """AUROC of one score among answers of equally many reasoning tokens, mean over G temperatures."""
  each = jax.vmap(ranking.stratified_auroc)(score, facts.correct, facts.reasoning, weight)
  return each.mean()


def test_scores(evidence: Evidence, trial: Trial) -> tuple[jax.Array, Facts]:
  """Scores (S, G, n), in the order of `names`, and facts (G, n) of answers to the test problems."""
  every = jax.vmap(lambda part: scores(part, trial))(evidence)
  ordered = jnp.stack([every[name] for name in trial.names])  # vmap has sorted the names
  cut = slice(trial.calibration, None)
  return ordered[:, :, cut], jax.tree.map(lambda x: x[:, cut], evidence.facts)
