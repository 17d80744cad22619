"""The safety suite against vectors of the official codes and of independent float64 programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods.llm_safety import (
  attacks,
  defences,
  editing,
  likelihood,
  memorisation,
  preferences,
  privacy,
  unlearning,
  watermark,
)
from jaxmethods.models import tiny_gpt
from jaxmethods.stats import poisoning

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
TOLERANCE = {"float64": 1e-8, "float32": 2e-4}


class Golden:
  """Arrays by name, floats in one type; comparison with its tolerance."""

  def __init__(self, file, dtype="float64"):
    self.file, self.dtype = file, dtype

  def __getitem__(self, name):
    value = self.file[name]
    return jnp.asarray(value, self.dtype if value.dtype.kind == "f" else None)

  def tree(self, group):
    return {k.removeprefix(group): self[k] for k in self.file.files if k.startswith(group)}

  @property
  def exact(self):
    """Whether choices are compared too: in float32 neighbours of another file may change places."""
    return self.dtype == "float64"

  def close(self, actual, name):
    """Compares with an array of the file, or a given one."""
    # Relative to the size of the whole array: sums that cancel have no relative accuracy of their own.
    expected = self.file[name] if isinstance(name, str) else name
    tolerance = TOLERANCE[self.dtype]
    size = np.abs(expected).max()
    np.testing.assert_allclose(
      actual, expected, rtol=tolerance, atol=tolerance * size, err_msg=str(name)
    )

  @property
  def params(self):
    return self.tree("tiny_lm/params/")

  @property
  def heads(self):
    return int(self.file["tiny_lm/config"][4])


@pytest.fixture
def golden(golden_file):
  with jax.enable_x64(True):
    yield partial(Golden, golden_file("llm_safety"))


@DTYPES
def test_tiny_lm(golden, dtype):
  g = golden(dtype)
  g.close(
    jax.jit(tiny_gpt.read, static_argnums=2)(g.params, g["tiny_lm/ids"], g.heads).logits,
    "tiny_lm/logits",
  )


@DTYPES
def test_dpsgd(golden, dtype):
  g = golden(dtype)
  ids, params = g["dpsgd/ids"], g.params
  labels = likelihood.labels_of(ids, g["dpsgd/mask"] > 0)
  loss = lambda params, example: likelihood.mean_token_nll(
    tiny_gpt.read(params, example[0][None], g.heads).logits, example[1][None]
  )
  losses, gradients = jax.jit(partial(privacy.per_example_gradients, loss))(params, (ids, labels))
  g.close(losses, "dpsgd/per_example_loss")
  g.close(privacy.global_norms(gradients), "dpsgd/per_example_grad_norm")
  real = jnp.ones(len(ids), bool)
  total = privacy.clipped_sum(gradients, g["dpsgd/clip_norm"], real)
  names = g.tree("dpsgd/clipped_sum/")
  for name in names:
    g.close(total[name], f"dpsgd/clipped_sum/{name}")
  amounts = {k: g[f"dpsgd/{k}"] for k in ("clip_norm", "noise_multiplier", "expected_batch_size")}
  noisy = privacy.noisy_mean(
    {k: total[k] for k in names}, g.tree("dpsgd/standard_normal/"), **amounts
  )
  for name in names:
    g.close(noisy[name], f"dpsgd/noisy_mean/{name}")
  whole = jax.jit(partial(privacy.private_gradient, loss, microbatch=1))(
    params, (ids, labels), real, jax.random.key(0),
    **amounts | {"noise_multiplier": 0.0},
  )  # fmt: skip
  np.testing.assert_allclose(whole.loss, g.file["dpsgd/per_example_loss"].mean(), rtol=1e-4)
  for name in names:
    scaled = whole.gradient[name] * amounts["expected_batch_size"]
    g.close(scaled, f"dpsgd/clipped_sum/{name}")


def test_accountant(golden):
  g = golden()
  orders = [int(a) for a in g.file["rdp/orders"]]
  for i, (rate, sigma, steps, delta) in enumerate(g.file["rdp/q_sigma_steps_delta"]):
    expected = g.file["rdp/per_step"][i]
    # log(1 + little) has lost digits in the file: 1e-12 is what float64 leaves of them.
    np.testing.assert_allclose(
      privacy.rdp_per_step(rate, sigma, orders), expected, rtol=1e-8, atol=1e-12
    )
    for conversion in ("classic", "improved"):
      spent = privacy.epsilon(rate, sigma, int(steps), delta, orders=orders, conversion=conversion)
      np.testing.assert_allclose(spent, g.file[f"rdp/epsilon_{conversion}"][i], rtol=1e-8)


@DTYPES
def test_exposure(golden, dtype):
  g = golden(dtype)
  nll = g["exposure/candidate_nll"]
  rank = memorisation.exposure_rank(nll, g["exposure/secret_index"])
  if g.exact:
    np.testing.assert_array_equal(rank, g["exposure/rank"])
  g.close(memorisation.exposure(g["exposure/rank"], len(nll)), "exposure/expected")


@DTYPES
def test_membership(golden, dtype):
  g = golden(dtype)
  found = memorisation.membership(g["mia/member_score"], g["mia/nonmember_score"], fpr=0.05)
  g.close(found.auc, "mia/auc")
  g.close(found.tpr, "mia/tpr_at_fpr05")
  score = memorisation.min_k_score(
    g["mink/token_logprob"], g["mink/mask"], fraction=float(g.file["mink/fraction"])
  )
  g.close(score, "mink/score")


@DTYPES
def test_sequence_log_probabilities(golden, dtype):
  g = golden(dtype)
  logits, labels = g["tiny_lm/logits"], g["dpo/labels"]
  total = likelihood.sequence_log_probability(logits, labels)
  g.close(total, "dpo/seq_logp_sum")
  g.close(-total, "npo/batch_nll_from_labels")
  mean = likelihood.sequence_log_probability(logits, labels, average=True)
  g.close(mean, "dpo/seq_logp_mean")


@DTYPES
@pytest.mark.parametrize(
  ("name", "beta", "loss", "free"),
  [
    ("dpo", 0.1, preferences.dpo, False),
    ("dpo_beta05", 0.5, preferences.dpo, False),
    ("cdpo", 0.1, partial(preferences.dpo, smoothing=0.2), False),
    ("ipo", 0.1, preferences.ipo, False),
    ("reference_free", 0.1, preferences.dpo, True),
  ],
)
def test_preferences(golden, dtype, name, beta, loss, free):
  g = golden(dtype)
  pairs = preferences.LogProbabilities(
    *(g[f"dpo/{field}"] for field in preferences.LogProbabilities._fields)
  )
  of = lambda chosen: loss(
    preferences.margin(pairs._replace(policy_chosen=chosen), reference_free=free), beta=beta
  )
  g.close(of(pairs.policy_chosen), f"dpo/{name}/loss")
  gradient = jax.grad(lambda chosen: of(chosen).mean())(pairs.policy_chosen)
  g.close(gradient, f"dpo/{name}/grad_policy_chosen_of_mean_loss")
  rewards = preferences.rewards(pairs, beta=beta)
  g.close(rewards.chosen, f"dpo/{name}/chosen_reward")
  g.close(rewards.rejected, f"dpo/{name}/rejected_reward")


@DTYPES
@pytest.mark.parametrize("beta", ["0.1", "0.5", "1.0"])
def test_npo(golden, dtype, beta):
  g = golden(dtype)
  of = lambda nll: unlearning.npo(nll, g["npo/reference_nll"], beta=float(beta))
  loss, gradient = jax.value_and_grad(of)(g["npo/current_nll"])
  g.close(loss, f"npo/beta{beta}/loss")
  g.close(gradient, f"npo/beta{beta}/grad_current_nll")


@DTYPES
def test_unlearning_losses(golden, dtype):
  g = golden(dtype)
  logits, labels, split = g["tiny_lm/logits"], g["dpo/labels"], int(g.file["unlearn/split_index"])
  forget = likelihood.mean_token_nll(logits[:split], labels[:split])
  retain = likelihood.mean_token_nll(logits[split:], labels[split:])
  g.close(forget, "unlearn/forget_token_mean_nll")
  g.close(retain, "unlearn/retain_token_mean_nll")
  g.close(unlearning.gradient_difference(forget, retain), "unlearn/grad_diff_loss")
  kl = unlearning.kl_to_reference(logits, g["unlearn/current_logits"])
  g.close(kl, "unlearn/kl_oracle_to_current_mean_over_positions")


@DTYPES
def test_forget_quality(golden, dtype):
  g = golden(dtype)
  ratios = {}
  for name in ("unlearned", "retrained"):
    nll = (g[f"forget_quality/{name}_{kind}_nll"] for kind in ("paraphrase", "perturbed"))
    ratios[name] = unlearning.truth_ratio(*nll)
    g.close(ratios[name], f"forget_quality/{name}_ratio")
  if g.exact:
    quality = unlearning.forget_quality(**ratios)
    g.close(quality.statistic, "forget_quality/ks_statistic")
    g.close(quality.p_value, "forget_quality/p_value")
  g.close(unlearning.model_utility(g["utility/nine_metrics"]), "utility/harmonic_mean")


@DTYPES
def test_watermark(golden, dtype):
  g = golden(dtype)
  table, gamma = g["kgw/green_table"], float(g.file["kgw/gamma"])
  pairs = watermark.bigrams(g["kgw/tokens"])
  green = table[pairs.previous, pairs.current]
  for name, distinct in (("all_tokens", False), ("unique_bigrams", True)):
    found = watermark.detect(pairs, green, gamma, distinct=distinct)
    assert found.scored == g[f"kgw/{name}/tokens_scored"]
    assert found.green == g[f"kgw/{name}/green"]
    g.close(found.z, f"kgw/{name}/z")
    g.close(found.p_value, f"kgw/{name}/p_value")
  rows = table[g["kgw/bias/previous_token"]]
  logits = watermark.biased(g["kgw/bias/logits"], rows, float(g.file["kgw/delta"]))
  g.close(logits, "kgw/bias/expected")


@DTYPES
def test_safelora(golden, dtype):
  g = golden(dtype)
  # The file has the layout of torch, (out, in).
  base, aligned = g["safelora/w_base"].T, g["safelora/w_aligned"].T
  matrix = defences.alignment_matrix(base, aligned)
  g.close(matrix.T, "safelora/projection")
  g.close(matrix.T @ g["safelora/lora_b"], "safelora/projected_b")
  update = (g["safelora/lora_b"] @ g["safelora/lora_a"]).T
  safe = defences.safe_update(update, matrix, 1.0)
  g.close(safe.cosine, "safelora/cosine")
  expected = g.file["safelora/projected_b"] @ g.file["safelora/lora_a"]
  g.close(safe.update.T, expected)
  exact = defences.alignment_subspace(base, aligned, energy=0.9)
  assert exact.rank == g["safelora/exact_rank_energy90"]
  g.close(exact.projection.T, "safelora/exact_projection_energy90")


@DTYPES
def test_lisa(golden, dtype):
  g = golden(dtype)
  of = lambda w: defences.lisa_penalty(w, g["lisa/anchor"], float(g.file["lisa/rho"]))
  penalty, gradient = jax.value_and_grad(of)(g["lisa/weights"])
  g.close(penalty, "lisa/penalty")
  g.close(gradient, "lisa/grad")


@DTYPES
def test_rome(golden, dtype):
  g = golden(dtype)
  moment = editing.second_moment(g["rome/keys"])
  g.close(moment, "rome/second_moment")
  key, bare = g["rome/key_mean_over_contexts"], g["rome/key_bare_prompt"]
  left = editing.direction(moment, key)
  left /= jnp.linalg.norm(left)
  g.close(left, "rome/left_vector_unit")
  weight, bias, value = (g[f"rome/{name}"] for name in ("weight", "bias", "target_value"))
  g.close(editing.right_vector(weight, bias, left, bare, value), "rome/official/right_vector")
  official = editing.edit(weight, bias, moment, key, value, bare_key=bare)
  g.close(official, "rome/official/new_weight")
  g.close(editing.edit(weight, bias, moment, key, value), "rome/symmetric/new_weight")


def gcg_loss(g, embedded_suffix):
  params, target = g.params, g["gcg/target"]
  wte = params["wte"]
  parts = (wte[g["gcg/prefix"]], embedded_suffix, wte[g["gcg/after"]], wte[target])
  return attacks.target_loss(
    tiny_gpt.read_embedded(params, jnp.concatenate(parts), g.heads).logits, target
  )


@DTYPES
def test_gcg(golden, dtype):
  g = golden(dtype)
  suffix, wte = g["gcg/suffix"], g.params["wte"]
  of = lambda ids: gcg_loss(g, wte[ids])
  relaxed = lambda onehot: gcg_loss(g, onehot @ wte)
  gradient = jax.jit(lambda ids: attacks.onehot_gradient(relaxed, ids, len(wte)))(suffix)
  g.close(gradient, "gcg/onehot_grad")
  top = g.file["gcg/topk_ids"].shape[1]
  choices = attacks.promising(gradient, g["gcg/forbidden"], top)
  if g.exact:
    np.testing.assert_array_equal(choices, g["gcg/topk_ids"])
  choices = g["gcg/topk_ids"]
  candidates = attacks.substituted(suffix, choices, g["gcg/position"], g["gcg/choice"])
  np.testing.assert_array_equal(candidates, g["gcg/candidates"])
  batched = jax.jit(jax.vmap(of))
  g.close(batched(suffix[None])[0], "gcg/loss")
  losses = batched(candidates)
  g.close(losses, "gcg/candidate_loss")
  if g.exact:
    found = attacks.moved(attacks.start(suffix, batched), candidates, losses)
    np.testing.assert_array_equal(found.suffix, g["gcg/next_suffix"])


@pytest.mark.parametrize("kind", ["swap", "patch", "insert"])
def test_smoothllm(golden, kind):
  g = golden()
  tokens, indices = g["smoothllm/tokens"], g[f"smoothllm/{kind}/indices"]
  replacements = g[f"smoothllm/{kind}/replacements"]
  count = defences.perturbed_count(len(tokens), float(g.file["smoothllm/percent"]))
  assert count == len(replacements)
  where = indices[0] if kind == "patch" else indices
  actual = getattr(defences, kind)(tokens, where, replacements)
  np.testing.assert_array_equal(actual, g[f"smoothllm/{kind}/expected"])
  votes = defences.jailbroken(g["smoothllm/jailbroken_flags"])
  np.testing.assert_array_equal(votes, g["smoothllm/vote"])


@DTYPES
def test_filters(golden, dtype):
  g = golden(dtype)
  nll, mask = g["ppl/token_nll"], g["ppl/mask"]
  g.close(defences.log_perplexity(nll, mask), "ppl/log_perplexity")
  windowed = defences.windowed_log_perplexity(nll, mask, int(g.file["ppl/window"]))
  g.close(windowed, "ppl/max_window_log_perplexity")
  representations = g["spectral/representations"]
  g.close(poisoning.spectral_scores(representations), "spectral/score")
  if g.exact:
    removed = defences.spectral_outliers(representations, int(g.file["spectral/num_remove"]))
    np.testing.assert_array_equal(removed, g["spectral/removed"])
