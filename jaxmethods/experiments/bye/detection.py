"""Looking for a backdoor: the evidence that a tuned model gives, and the verdict of every defence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.adapters.training import token_cross_entropy
from jaxmethods.experiments.bye.config import Criteria, Index
from jaxmethods.experiments.bye.planting import Pair, mixed
from jaxmethods.methods import bye
from jaxmethods.methods.bye import Profile, Verdict
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.models.probe import Probe
from jaxmethods.runtime import compiler
from jaxmethods.stats import poisoning
from jaxmethods.testbeds.multimodal.questions import Split
from jaxmethods.tuning.tuner import Run, Tuner, TunerState

_CHUNK = 40  # examples that are examined at once


class Evidence(NamedTuple):
  """The behaviour of a tuned model on its N training examples.

  Attributes:
    entropies: (N, L), of the attention over image tokens, from the last token of the prompt.
    losses: (N,), of the answer that the example has.
    features: (N, D), hidden state of that token behind the last layer.
  """

  entropies: jax.Array
  losses: jax.Array
  features: jax.Array


class Judgement(NamedTuple):
  """The verdicts of the defences on the evidence.

  Attributes:
    profile, verdict: of BYE.
    entropies: (N, L), without missing values.
    missing: number of values that were.
    removed: by name of the defence, (N,) bool.
  """

  profile: Profile
  verdict: Verdict
  entropies: jax.Array
  missing: jax.Array
  removed: dict[str, jax.Array]


def examine(run: Run, pair: Pair, poisoned: jax.Array, tokens: int) -> Evidence:
  """Reads every training example in one pass without gradients.

  Args:
    run: the tuned model.
    pair: the training data.
    poisoned: which of it is triggered.
    tokens: of an image, T.
  """
  count = len(poisoned)
  chunk = min(_CHUNK, count)

  def part(rows: jax.Array) -> Evidence:
    examples = mixed(pair, rows, poisoned)
    labels = examples.labels[:, 0]
    # The answer stands behind the prompt's last token, which cannot see it.
    query = jnp.argmax(labels != IGNORED, -1)
    probe = attention_probe(query, tokens, bye.entropy)
    output = run(examples.ids, features=examples.features, probe=probe)
    totals, counts = jax.vmap(token_cross_entropy)(output.logits[:, 0], labels)
    hidden = output.hidden[jnp.arange(chunk), query]
    return Evidence(output.attention.T, totals / counts, hidden)

  # The last chunk is filled up with the last example.
  rows = jnp.minimum(jnp.arange(-(-count // chunk) * chunk), count - 1)
  evidence = jax.lax.map(part, rows.reshape(-1, chunk))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], evidence)


def attention_probe(
  query: jax.Array, tokens: int, reduce: Callable[[jax.Array], jax.Array]
) -> Probe:
  """Reduces, in every layer, the head-averaged attention (B, T) from `query` (B,) over the image."""
  return Probe(
    queries=query[:, None], attention=lambda rows: reduce(bye.head_mean(rows[:, :, 0], 0, tokens))
  )


def judge(evidence: Evidence, criteria: Criteria, tokens: int) -> Judgement:
  """Asks every defence that looks at a tuned model, on the same evidence.

  Answers are free text, so the rivals that were made for classes see all examples as one.
  """
  entropies, missing = bye.fill_missing(evidence.entropies)
  profile = bye.profile(
    entropies,
    tau=criteria.tau,
    index=criteria.separation,
    min_weight=criteria.min_weight,
    null=criteria.null,
  )
  clean = functools.partial(bye.clean, entropies, guard=criteria.guard)
  verdict, everywhere = clean(profile.kept), jnp.ones_like(profile.kept)
  share = 1.5 * criteria.assumed_rate
  removed = {
    "bye": verdict.removed,
    "kmeans": clean(profile.kept, split="kmeans").removed,
    "threshold": bye.below_threshold(entropies, profile.kept, tokens),
    "all_layers": clean(everywhere).removed,
    "fixed": bye.below_threshold(entropies, everywhere, tokens),
    "loss": poisoning.highest(-evidence.losses, share),
    "spectral": poisoning.highest(poisoning.spectral_scores(evidence.features), share),
    "clustering": poisoning.smaller_cluster(evidence.features),
  }
  return Judgement(profile, verdict, entropies, missing, removed)


def null_separations(count: int, draws: int, index: Index) -> dict[str, float]:
  """Separation that 95 % of the draws without poison stay below, by the shape of the entropies.

  Args:
    count: training examples.
    draws: of each shape, at least 1.
    index: of separation.
  """
  program = compiler.jit(
    functools.partial(bye.null_separation, count=count, draws=draws, index=index)
  )
  found = np.quantile(np.asarray(program(jax.random.key(0))), 0.95, axis=1)
  return {name: float(value) for name, value in zip(bye.NULLS, found, strict=True)}


def detection(removed: jax.Array, poisoned: jax.Array) -> dict[str, jax.Array]:
  """Share of the examples that are removed, and how well they are the poisoned ones, in percent."""
  found = poisoning.detection(removed, poisoned)._asdict()
  return {name: 100 * value for name, value in ({"removed": removed.mean()} | found).items()}


def attention_maps(tuner: Tuner, model: DeskMLLM, tuned: TunerState, split: Split) -> jax.Array:
  """Head-averaged attention (L, n, T) over the image, from the last token of the prompt."""
  query = jnp.argmax(split.labels[:, 0] != IGNORED, -1)
  probe = attention_probe(query, model.config.num_tokens, lambda attention: attention)
  return tuner.apply(model, *tuned, split.ids, features=split.features, probe=probe).attention
