"""BYE against vectors from its published functions and from its equations (float64)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.images import triggers
from jaxmethods.methods import bye
from jaxmethods.stats import mixtures
from jaxmethods.stats.poisoning import detection


@pytest.fixture
def golden(golden_file):
  with jax.enable_x64(True):
    yield {key: jnp.asarray(value) for key, value in golden_file("bye").items()}


def trigger_names(golden_file):
  return sorted({key.split("/")[1] for key in golden_file("bye") if key.startswith("trigger/")})


def test_entropies(golden):
  rows = golden["attention/weights_last_query"]
  start, count = int(golden["attention/image_start"]), int(golden["attention/num_image_tokens"])
  attention = bye.head_mean(rows, start, count)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
  close(attention, golden["attention/head_mean"])
  close(attention.sum(-1), golden["attention/image_mass"])
  close(bye.image_entropy(rows, start, count), golden["attention/entropy_code"])
  close(bye.image_entropy(rows, start, count, eps=0), golden["attention/entropy_exact"])
  close(bye.entropy(attention, renormalise=False), golden["attention/entropy_unnormalised"])


def test_converged_fits(golden):
  converged = functools.partial(mixtures.fit, iterations=1500, tolerance=1e-11)
  mixture = jax.lax.map(converged, golden["profile/entropy"].T)
  there = np.asarray(golden["profile/comparable"])
  assert there.any()
  for name, values in mixture._asdict().items():
    np.testing.assert_allclose(values[there], golden[f"profile/em_{name}"][there], atol=1e-3)
    np.testing.assert_allclose(values[there], golden[f"profile/sklearn_{name}"][there], atol=2e-2)
  for index in ("paper", "code"):
    separation = bye.separation_index(mixture, index)[there]
    for fit in ("em", "sklearn"):
      expected = golden[f"profile/{fit}_bsi_{index}"][there]
      np.testing.assert_allclose(separation, expected, rtol=2e-2)
  divergence = bye.divergence(mixture)[there]
  np.testing.assert_allclose(divergence, golden["profile/kl_code"][there], rtol=5e-2)


@pytest.mark.parametrize("rule", ["paper", "code", "all_layers"])
def test_cleaning(golden, rule):
  entropies = golden["profile/entropy"]
  if rule == "all_layers":
    layers = jnp.ones(entropies.shape[1], bool)
  else:
    layers = bye.profile(entropies, index=rule).kept
    np.testing.assert_array_equal(layers, golden[f"profile/sensitive_{rule}"])
  verdict = bye.clean(entropies, layers)
  np.testing.assert_allclose(verdict.score, golden[f"clean/{rule}_score"], atol=1e-9)
  np.testing.assert_allclose(verdict.low, golden[f"clean/{rule}_posterior_low_em"], atol=1e-3)
  for fit in ("em", "sklearn"):
    assert (verdict.removed != golden[f"clean/{rule}_flag_{fit}"]).mean() <= 0.01
  found = detection(golden[f"clean/{rule}_flag_sklearn"], golden["profile/is_poison"])
  expected = golden[f"clean/{rule}_precision_recall_f1"]
  np.testing.assert_allclose(jnp.stack(found), expected, atol=1e-6)


def test_ablations(golden):
  entropies = golden["profile/entropy"]
  verdict = bye.clean(entropies, golden["profile/sensitive_code"], split="kmeans")
  np.testing.assert_array_equal(verdict.removed, golden["baseline/kmeans_flag"])
  everything = jnp.ones(entropies.shape[1], bool)
  threshold = float(golden["baseline/fixed_threshold"])
  fixed = bye.below_threshold(entropies, everything, 1, threshold=threshold)
  np.testing.assert_array_equal(fixed, golden["baseline/fixed_flag"])


def test_patches(golden, golden_file):
  names = trigger_names(golden_file)
  assert names
  for name in names:
    arrays = {key.split("/")[2]: value for key, value in golden.items() if f"/{name}/" in key}
    image, side = arrays["image"], triggers.patch_side(arrays["image"])
    top, left = arrays["random_topleft"]
    assert side == arrays["side"]
    for made, expected in (
      (triggers.centred(image, side), "default"),
      (triggers.centred(image, side, cell=1), "texture"),
      (triggers.patch(image, top, left, side), "random"),
      (triggers.dual(image, side), "dual"),
    ):
      assert made.dtype == jnp.uint8
      np.testing.assert_array_equal(made, arrays[expected], err_msg=expected)
