"""CoT-Kinetics, CoE and the baselines against vectors of an independent float64 computation.

CoE comes from the published class, the logit baselines were checked against it. `tiny_lm/` is a real
model, whose weights are read from `tiny_lm/` in `$JAXMETHODS_DATA`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data.files import data_dir
from jaxmethods.data.model_sources import load_causal_lm
from jaxmethods.methods import cot_kinetics as method
from jaxmethods.models import reading
from jaxmethods.models.probe import Probe, masked_mean
from jaxmethods.stats import confidence, ranking

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SEGMENTS = ("reasoning", "output")


@pytest.fixture(params=["float64", "float32"])
def golden(request, golden_file):
  """The file's arrays in one precision."""
  with jax.enable_x64(request.param == "float64"):
    yield {
      key: jnp.asarray(value.astype(request.param) if value.dtype.kind == "f" else value)
      for key, value in golden_file("cot_kinetics").items()
    }


def close(got, want, **tolerance):
  np.testing.assert_allclose(got, want, **(TOLERANCE | tolerance))


@pytest.mark.parametrize("segment", SEGMENTS)
def test_path(golden, segment):
  z = method.pool(golden["synthetic/hidden"], golden[f"synthetic/{segment}_mask"])
  close(z, golden[f"synthetic/{segment}/pooled"])
  path = method.path(z)
  for name in ("step_norm", "momentum", "turning", "accel_norm", "total"):
    close(getattr(path, name), golden[f"synthetic/{segment}/{name}"])
  assert path.ok.all()


@pytest.mark.parametrize("segment", SEGMENTS)
def test_energy(golden, segment):
  path = method.path(golden[f"synthetic/{segment}/pooled"])
  name = re.compile(rf"synthetic/{segment}/energy_(\w+)_gamma([\d.]+)$")
  found = [match for match in map(name.match, golden) if match]
  assert {match[1] for match in found} == set(method.FORMS)
  for match in found:
    close(method.energy(path, float(match[2]), match[1]), golden[match[0]])


def test_energy_of_every_token(golden):
  hidden, mask = golden["synthetic/hidden"], golden["synthetic/reasoning_mask"]
  paths = None
  for layer in range(hidden.shape[1]):
    paths = method.follow_tokens(paths, hidden[:, layer])
  for name in golden:
    if match := re.match(r"synthetic/reasoning/energy_(\w+)_gamma([\d.]+)_per_token$", name):
      form, gamma = match[1], float(match[2])
      close(method.energy_of(method.token_terms(paths, mask), gamma, form), golden[name])
      break
  else:
    pytest.fail("no per-token energy in the file")


@pytest.mark.parametrize("segment", SEGMENTS)
def test_chain_of_embedding(golden, segment):
  chain = method.chain_of_embedding(golden[f"synthetic/{segment}/pooled"])
  for got, name in zip(chain, ("mag", "ang", "R", "C"), strict=True):
    close(got, golden[f"coe/{segment}/{name}"])


def test_logits(golden):
  mask = golden["synthetic/output_mask"]
  arguments = golden["logits/logits"], golden["logits/sampled_token"]
  mean = lambda values: confidence.mean_over(values, mask)
  plain = confidence.token_statistics(*arguments)
  nll = -mean(plain.log_prob)
  expected = {
    "maxprob": mean(jnp.exp(plain.max_log_prob)),
    "neglog_maxprob": -mean(plain.max_log_prob),
    "entropy_nats": mean(plain.entropy),
    "entropy_bits": mean(plain.entropy) / jnp.log(2),
    "nll_sampled": nll,
    "perplexity_sampled": jnp.exp(nll),
  }
  for name in golden:
    if match := re.match(r"logits/((maxprob|energy)_T([\d.]+))$", name):
      scaled = confidence.token_statistics(*arguments, float(match[3]))
      value = jnp.exp(scaled.max_log_prob) if match[2] == "maxprob" else scaled.energy
      expected[match[1]] = mean(value)
  assert {f"logits/{name}" for name in expected} | {"logits/logits", "logits/sampled_token"} == {
    name for name in golden if name.startswith("logits/")
  }
  for name, value in expected.items():
    close(value, golden[f"logits/{name}"])


def test_samples(golden):
  entropy = confidence.length_normalised_entropy(
    golden["samples/token_logprob"], golden["samples/mask"]
  )
  close(entropy, golden["samples/ln_entropy"])
  majority, share = confidence.self_consistency(golden["samples/answer_id"])
  np.testing.assert_array_equal(majority, golden["samples/majority_answer"])
  close(share, golden["samples/self_consistency"])


def test_dropout(golden):
  statistics = confidence.dropout_statistics(golden["mc_dropout/probs"])
  for name, value in statistics._asdict().items():
    close(value, golden[f"mc_dropout/{name}"])


def test_ranking(golden):
  score, correct = golden["metrics/score"], golden["metrics/label_correct"] == 1
  tolerance = {"rtol": 0, "atol": 1e-9 if score.dtype == jnp.float64 else 1e-6}
  curve = ranking.roc_curve(score, correct)
  metrics = {
    "auroc": ranking.auroc(curve),
    "aupr": ranking.aupr(curve),
    "fpr_at_95_interp": ranking.fpr_at(curve),
    "fpr_at_95_official": ranking.fpr_at(curve),  # the same curve, fewer points on it
    "fpr_at_95_step": ranking.fpr_at(curve, method="step"),
  }
  for name, value in metrics.items():
    close(value, golden[f"metrics/{name}"], **tolerance)


# --- a real model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
  if not (data_dir() / "tiny_lm").is_dir():
    pytest.skip("no tiny_lm/ in $JAXMETHODS_DATA")
  return load_causal_lm("tiny:stories260k")


@pytest.mark.parametrize("scanned", [False, True])
def test_tiny_lm(golden_file, stories, scanned):
  golden = golden_file("cot_kinetics")
  loaded = load_causal_lm("tiny:stories260k", scan_layers=True) if scanned else stories
  variables = {"params": loaded.params}
  cases = sorted({name.split("/")[1] for name in golden if name.startswith("tiny_lm/")})
  assert cases
  for case in cases:
    want = {name.split("/")[2]: golden[name] for name in golden if f"tiny_lm/{case}/" in name}
    ids = jnp.asarray(want["tokens"])[None]
    size = ids.shape[1] - int(want["prompt_len"])
    text = reading.Text(ids, jnp.ones(ids.shape, bool), jnp.ones((1, 1, size), bool))
    read = jax.jit(
      lambda variables, text, model=loaded.model: reading.read(
        model, variables, text, confidence.token_statistics
      )
    )(variables, text)
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    z = read.states[:, 0]
    close(z[0], want["pooled"], **tolerance)
    path = method.path(z)
    for form in ("turning", "quadratic"):
      close(method.energy(path, 0.8, form)[0], want[f"energy_{form}_gamma0.8"], **tolerance)
    chain = method.chain_of_embedding(z)
    close(chain.real[0], want["coe_R"], **tolerance)
    close(chain.complex[0], want["coe_C"], **tolerance)
    mean = lambda values, size=size: confidence.mean_over(values, jnp.ones((1, size), bool))[0]
    close(mean(jnp.exp(read.tokens.max_log_prob)), want["maxprob"], **tolerance)
    close(mean(read.tokens.entropy), want["entropy_nats"], **tolerance)


def test_tiny_lm_looks_back_as_recorded(golden_file, stories):
  """Logits after the last token, and the entropy of its attention."""
  golden = golden_file("cot_kinetics")
  for case in {name.split("/")[1] for name in golden if name.startswith("tiny_lm/")}:
    ids = jnp.asarray(golden[f"tiny_lm/{case}/tokens"])[None]
    mean = lambda rows: rows.mean(1)[:, 0]
    probe = Probe(
      masked_mean(jnp.ones(ids.shape)), jnp.full((1, 1), ids.shape[1] - 1), attention=mean
    )
    out = stories.model.apply({"params": stories.params}, ids, probe=probe, logits="last")
    close(out.logits[0, 0], golden[f"tiny_lm/{case}/last_logits"], rtol=1e-3, atol=1e-3)
    p = out.attention[:, 0]
    entropy = -(p * jnp.log(p + 1e-8)).sum(-1)
    want = golden[f"tiny_lm/{case}/attention_entropy_last_query"]
    close(entropy, want, rtol=1e-3, atol=1e-3)
